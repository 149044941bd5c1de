"""What a model does for its user: continue, chat, translate, fill, classify, tag, extract, embed, score."""

from qkv.use.chat import Chat
from qkv.use.embed import embed
from qkv.use.extract import Tag, extract, tag
from qkv.use.published import open_published
from qkv.use.score import Score, score
from qkv.use.task import Manner, Prediction, Task

__all__ = ["Chat", "Manner", "Prediction", "Score", "Tag", "Task", "embed", "extract", "open_published", "score", "tag"]
