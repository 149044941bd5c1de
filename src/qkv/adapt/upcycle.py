"""From dense to sparse: a trained model's feed-forwards become experts that begin as copies of them."""

from functools import partial

import torch
from torch import Tensor, nn

from qkv.checkpoints.weights import empty, refuse_adapters
from qkv.context import Context
from qkv.errors import QkvError
from qkv.models import Module
from qkv.ops.blocks.packed import Packed
from qkv.parts import Experts, FeedForward, Gated, PlainExperts, Router, Sparse, TopK
from qkv.spec import edit, matches, walk

BEST_TWO = TopK(2)


def upcycle(
    model: Module, pattern: str = "**.ffn.f", *, count: int, router: Router = BEST_TWO, noise: float = 0.0
) -> Module:
    """A new model: each feed-forward whose path matches as `count` experts, all copies of it, behind a new router.

    It computes what the old one does (Komatsuzaki 2022), for gates that sum to a constant weigh equal outputs, and the
    last matrix is divided by that constant. Where the sum depends on the token, as in `TopK(normalise=False)`, the
    router begins at zero, and there it does not; then all tokens begin with the same k experts. `noise` is added to
    the weights of each expert, in standard deviations of the dense ones: experts differ from the first step on, and
    the new model is only near the old one. `QkvError` for a part that is no feed-forward, and for packed weights.
    """
    refuse_adapters(model)
    if any(isinstance(weight, Packed) for weight in model.parameters()):
        raise QkvError("the weights are packed, and experts learn from dense ones: dequantise(model) first")
    dense = {path: part for path, part in walk(model.spec) if matches(pattern, path)}
    for path, part in dense.items():
        if not isinstance(part, FeedForward) and not (isinstance(part, Gated) and not part.bias):
            raise QkvError(f"{path} is {part!r}: a feed-forward is expected, or a gated one without biases")
    spec = edit(model.spec, pattern, partial(sparse, count=count, router=router))
    made, within = empty(spec), tuple(f"{path}." for path in dense)
    state = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith(within)}
    for path in dense:
        experts = copies(model.get_submodule(path), router, count, noise)
        state |= {f"{path}.{name}": value for name, value in experts.items()}
    made.load_state_dict(state, assign=True)
    return made.train(model.training)


def sparse(part: FeedForward | Gated, count: int, router: Router) -> Sparse:
    """The experts that can be copies of this."""
    if isinstance(part, Gated):
        return Experts(part.hidden, count=count, router=router, act=part.act)
    return PlainExperts(part.hidden, count=count, router=router, act=part.act, bias=part.bias)


@torch.no_grad()
def copies(dense: nn.Module, router: Router, count: int, noise: float) -> dict[str, Tensor]:
    """The state of the experts."""
    state = dense.state_dict()
    like = state["down.weight"]
    module = router.build(len(like), count)
    made = {f"router.{name}": value for name, value in module.state_dict().items()}
    total = constant(module, len(like))
    for name, value in state.items():
        value = value / total if name.startswith("down.") else value
        several = value.expand(count, *value.shape).clone()
        if noise:
            several += noise * value.std() * torch.randn_like(several)
        made[name.replace(".weight", "").replace(".", "_")] = several
    return {name: value.to(like) for name, value in made.items()}


def constant(router: nn.Module, width: int) -> float:
    """What the gates of a token sum to; a router for which that varies is set to zero, which makes it constant."""
    for _ in range(2):
        x = torch.randn(1, 64, width)
        sums = router.eval()(x, Context(torch.arange(64)[None])).gates.sum(-1)
        if float(sums.max() - sums.min()) < 1e-5:
            return float(sums.mean())
        for parameter in router.parameters():
            nn.init.zeros_(parameter)
    raise QkvError("the gates of this router sum to another number for each token, even at zero: take another")
