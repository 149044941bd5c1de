"""What a model does for its user, text in and text out: continue, chat, translate, fill, classify, embed, score."""

from qkv.use.chat import Chat
from qkv.use.embed import embed
from qkv.use.published import open_published
from qkv.use.score import Score, score
from qkv.use.task import Manner, Prediction, Task

__all__ = ["Chat", "Manner", "Prediction", "Score", "Task", "embed", "open_published", "score"]
