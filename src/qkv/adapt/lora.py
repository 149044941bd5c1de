"""LoRA: a product of two thin matrices beside a frozen one (Hu 2021)."""

import dataclasses as dc
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.errors import QkvError
from qkv.ops.dropout import dropout
from qkv.ops.precision import wide
from qkv.parts.linear import Linear
from qkv.spec import matches, nearest

LIST = re.compile(r"\{([^{}]*)\}")


class LoRA(nn.Module):
    """y = s B A dropout(x): … C → … O, with A: r C, B: O r, and s = α / r, or α / √r if `stabilised`.

    Hu 2021; the root, with which a larger rank learns no slower, is rsLoRA's (Kalajdzievski 2023).
    """

    def __init__(self, A: Tensor, B: Tensor, alpha: float, *, dropout: float = 0.0, stabilised: bool = False) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.alpha, self.dropout, self.stabilised = alpha, dropout, stabilised

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

    def forward(self, x: Tensor) -> Tensor:
        inputs = dropout(x, self.dropout) if self.training and self.dropout else x
        y = F.linear(F.linear(inputs.to(self.A.dtype), self.A), self.B) * self.scale
        return y.to(x.dtype) if x.dtype.itemsize < y.dtype.itemsize else y  # under autocast y is the narrower one

    def product(self) -> Tensor:
        """s B A: O C, what it adds to a weight."""
        return (self.B.detach() @ self.A.detach()) * self.scale

    def extra_repr(self) -> str:
        return f"{self.A.shape[1]} → {self.rank} → {len(self.B)}, scale {self.scale:g}"


def add_lora(
    model: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
    dropout: float = 0.0,
    stabilised: bool = False,
    freeze: bool = True,
) -> list[str]:
    """Put a fresh LoRA beside every Linear whose path matches, and freeze all the rest; → the paths.

    `targets` is one glob or several, each with lists if need be: "**.attn.f.{q,v}". A is uniform in ±1/√C and B zero,
    so that the model computes what it did before. `QkvError` for a glob that matches no Linear, or a taken name.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise QkvError(f"a LoRA has a rank of at least 1 and a dropout in [0, 1), not {rank} and {dropout}")
    layers, found = linears(model), dict[str, Linear]()
    for glob in written_out([targets] if isinstance(targets, str) else targets):
        hits = {path: layer for path, layer in layers.items() if matches(glob, path)}
        if not hits:
            forms = dict.fromkeys(re.sub(r"\b\d+\b", "*", path) for path in layers)
            raise QkvError(f"no Linear of the model matches {glob!r}{nearest(glob, forms)}")
        found |= hits
    for path, layer in found.items():
        if rank > max(layer.weight.shape):
            raise QkvError(f"rank {rank} is more than {path} has rows or columns, {tuple(layer.weight.shape)}")
    made = {path: fresh(layer, rank, alpha, dropout, stabilised) for path, layer in found.items()}
    attach(model, name, made)
    if freeze:
        train_only(model, name)
    return list(made)


def written_out(globs: Sequence[str]) -> Iterator[str]:
    """Globs with their lists {a,b} written out."""
    for glob in globs:
        pieces = LIST.split(glob)  # what stands outside of lists and inside, in turn
        for choice in itertools.product(*(piece.split(",") if n % 2 else [piece] for n, piece in enumerate(pieces))):
            yield "".join(choice)


def fresh(layer: Linear, rank: int, alpha: float, dropout: float, stabilised: bool) -> LoRA:
    """A LoRA that adds nothing yet; in fp32 beside a narrower weight, in which small steps would be lost."""
    outputs, inputs = layer.weight.shape
    dtype = wide(layer.weight)
    A = torch.empty(rank, inputs, dtype=dtype, device=layer.weight.device).uniform_(-(inputs**-0.5), inputs**-0.5)
    return LoRA(A, A.new_zeros(outputs, rank), alpha, dropout=dropout, stabilised=stabilised)


def attach(model: nn.Module, name: str, made: Mapping[str, LoRA]) -> None:
    """Put each LoRA beside the Linear of its path; all or none."""
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise QkvError(f"an adapter cannot be called {name!r}: give it a word without a dot, such as 'default'")
    layers = linears(model)
    taken = [path for path, layer in layers.items() if name in layer.adapters]
    if taken:
        raise QkvError(
            f"{taken[0]} has an adapter {name!r} already: choose another name, or remove_lora(model, {name!r})"
        )
    for path, lora in made.items():
        layers[path].adapters[name] = lora.to(layers[path].weight.device).train(model.training)


def remove_lora(model: nn.Module, name: str) -> None:
    """Take an adapter away; what was frozen stays so."""
    layers = linears(model)
    for path in loras(model, name):
        del layers[path].adapters[name]


def train_only(model: nn.Module, *names: str) -> None:
    """Of all parameters, let only those of these adapters learn."""
    chosen = [lora for name in names for lora in loras(model, name).values()]
    model.requires_grad_(False)
    for lora in chosen:
        lora.requires_grad_()


def linears(model: nn.Module) -> dict[str, Linear]:
    """Every Linear by its path; one that several layers share by its first."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Linear)}


def loras(model: nn.Module, name: str) -> dict[str, LoRA]:
    """The LoRAs of an adapter by the path of their Linear; `QkvError` if there is none of that name."""
    beside = {path: layer.adapters.items() for path, layer in linears(model).items()}
    found = {
        path: lora for path, some in beside.items() for key, lora in some if key == name and isinstance(lora, LoRA)
    }
    if not found:
        raise QkvError(
            f"no LoRA is called {name!r}{nearest(name, {key for some in beside.values() for key, _ in some})}"
        )
    return found


def lora_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's matrices: `stack.0.attn.f.q.A` and `.B`, and so on."""
    found = loras(model, name).items()
    return {f"{path}.{key}": tensor.detach() for path, lora in found for key, tensor in lora.named_parameters()}


# --- into the weights, and out of them ---


@dc.dataclass(frozen=True)
class Exchange:
    """One Linear's weight before and after a merge, and the adapters that went into it."""

    before: nn.Parameter
    after: nn.Parameter
    adapters: dict[str, LoRA]


@dc.dataclass(frozen=True)
class Merged:
    """What `merge` took out of a model, by the path of each Linear; all that `unmerge` needs."""

    layers: dict[str, Exchange]


def merge(model: nn.Module, *names: str) -> Merged:
    """W ← W + Σ s B A over the adapters of these names, or over all, which then no longer cost a product.

    The sum is taken in fp32 or wider, and rounded to the weight's own type. The old weights are kept by what comes
    back, and freed with it. A Linear that shared its weight no longer does. `QkvError` if a weight is packed.
    """
    layers = linears(model)
    names = names or tuple(dict.fromkeys(name for layer in layers.values() for name in layer.adapters))
    merged: dict[str, dict[str, LoRA]] = {}
    for name in names:
        for path, lora in loras(model, name).items():
            merged.setdefault(path, {})[name] = lora
    for path in merged:
        weight = layers[path].weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise QkvError(
                f"{path} keeps its weight packed ({type(weight).__name__}, {weight.dtype}), which cannot take in an "
                "adapter without another rounding: leave it beside, or load the model with dense weights"
            )
    exchanges = {path: exchanged(layers[path].weight, adapters) for path, adapters in merged.items()}
    for path, exchange in exchanges.items():
        layers[path].weight = exchange.after
        for name in exchange.adapters:
            del layers[path].adapters[name]
    return Merged(exchanges)


def exchanged(before: nn.Parameter, adapters: dict[str, LoRA]) -> Exchange:
    total = before.detach().to(wide(before))
    for lora in adapters.values():
        total = total + lora.product()
    return Exchange(before, nn.Parameter(total.to(before.dtype), before.requires_grad), adapters)


def unmerge(model: nn.Module, merged: Merged) -> None:
    """Put back the very weights that `merge` replaced, bit for bit, and the adapters beside them."""
    layers = linears(model)
    for path, exchange in merged.layers.items():
        if path not in layers or layers[path].weight is not exchange.after:
            raise QkvError(f"{path} has another weight than this merge gave it: undo later merges first, last to first")
        taken = sorted(set(exchange.adapters) & set(layers[path].adapters))
        if taken:
            raise QkvError(
                f"{path} has a new adapter {taken[0]!r}: remove_lora(model, {taken[0]!r}) before the old is back"
            )
    for path, exchange in merged.layers.items():
        layers[path].weight = exchange.before
        layers[path].adapters.update(exchange.adapters)
