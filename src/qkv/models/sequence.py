"""One stack over one sequence: a decoder with the mask Causal(), an encoder with Full()."""

from qkv.masks import Causal, Mask
from qkv.models.model import Model, Module, Wiring
from qkv.parts.embed import Tokens
from qkv.parts.head import Output
from qkv.parts.norm import Norm
from qkv.parts.stack import Stack
from qkv.spec import part, positive


@part("sequence")
class Sequence(Model):
    """head(norm(stack(embed(ids)))). GPT and BERT differ in the mask and in where the norms stand."""

    width: int
    embed: Tokens
    stack: Stack
    mask: Mask = Causal()
    norm: Norm | None = None
    head: Output | None = None

    def check(self) -> None:
        positive(self, "width")

    def build(self) -> "SequenceModel":
        return SequenceModel(self)


class SequenceModel(Module):
    spec: Sequence

    def __init__(self, spec: Sequence) -> None:
        super().__init__()
        self.spec = spec
        self.embed = spec.embed.build(spec.width)
        self.stack = spec.stack.build(spec.width)
        self.norm = spec.norm.build(spec.width) if spec.norm else None
        self.head = spec.head.build(spec.width, self.embed.table) if spec.head else None

    @property
    def wiring(self) -> Wiring:
        return self.wired(self.embed, self.stack, self.norm, self.spec.mask, "stack")
