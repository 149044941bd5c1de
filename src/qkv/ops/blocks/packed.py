"""Weights that stay in their blocks while a model computes with them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.errors import QkvError
from qkv.ops.blocks.dequantise import dequantise
from qkv.ops.blocks.layout import BLOCKS

SLICE = 1 << 20
"""How many weights stand dequantised at a time, but for a row at least."""

FEW = 64
"""Up to so many rows of activations a form of the weights that a product reads as it is beats dequantising them."""

Context: TypeAlias = tuple[str, torch.dtype]


class Packed(Tensor):
    """A matrix, or several stacked, as its `blocks`: uint8, … × the bytes of a row; a tensor of its weights in `dtype`.

    F.linear and torch.mm multiply with it and F.embedding looks rows up, a slice of rows dequantised at a time; so
    `Linear`, embeddings, heads and experts run on it as they are. Blocks lie along rows: rows can be split, stacked,
    permuted and chosen, and the whole moved to another device or dtype, without being unpacked. `contiguous` and
    `dequantise` give the plain tensor. Gradients pass through to x; asking for its own, as training does, and anything
    else, raises QkvError.
    """

    format: str
    blocks: Tensor
    served: Callable[[Tensor], Tensor] | None
    """x Wᵀ for a few rows x that need no gradient, from another form of the weights (`prepacked`)."""

    @staticmethod
    def __new__(cls, format: str, blocks: Tensor, dtype: torch.dtype = torch.float32) -> "Packed":
        block = BLOCKS[format]
        if blocks.dtype != torch.uint8 or blocks.shape[-1] % block.bytes:
            raise QkvError(f"rows of {blocks.shape[-1]} bytes are not whole blocks of {format}")
        shape = (*blocks.shape[:-1], blocks.shape[-1] // block.bytes * block.weights)
        made: Packed = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=blocks.device)
        made.format, made.blocks, made.served = format, blocks, None
        return made

    def dequantise(self) -> Tensor:
        """The plain tensor."""
        return dequantise(self.format, self.blocks, self.shape, self.dtype)

    def slices(self) -> Iterator[Tensor]:
        """The rows (of a matrix), dequantised, so many at a time."""
        for some in self.blocks.split(max(1, SLICE // self.shape[-1])):
            yield dequantise(self.format, some, (len(some), self.shape[-1]), self.dtype)

    def like(self, blocks: Tensor, dtype: torch.dtype | None = None) -> "Packed":
        return Packed(self.format, blocks, dtype or self.dtype)

    # --- what torch asks of a tensor that is made of others ---

    def __tensor_flatten__(self) -> tuple[list[str], Context]:
        return ["blocks"], (self.format, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner: Mapping[str, Tensor], context: Context, *shape: Any) -> Self:
        return cls(context[0], inner["blocks"], context[1])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in REARRANGING:
            return rearranged(func, args, kwargs)
        if func in HANDLERS:
            return HANDLERS[func](*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    __torch_dispatch__: Any = staticmethod(lambda func, *_: unable(func.name()))


# --- moving rows ---


def rearranged(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Do with the rows of blocks what is asked of the rows of weights; `QkvError` where it would break rows up.

    That is known by doing it with the shapes alone, too: a row has other numbers of weights and of bytes.
    """
    every = found(args)
    if len({one.format for one in every}) > 1 or len(every) < len(found(args, Tensor)):
        return func(*replaced(args, Packed.dequantise), **kwargs)
    first, width = every[0], every[0].shape[-1]
    shapes = func(*replaced(args, lambda one: torch.empty(one.shape, device="meta")), **kwargs)
    blocks = func(*replaced(args, lambda one: one.blocks), **kwargs)

    def packed(some: Any, shape: Any) -> Any:
        if isinstance(some, tuple | list):
            return type(some)(packed(a, b) for a, b in zip(some, shape, strict=True))
        if some.shape[:-1] != shape.shape[:-1] or shape.shape[-1] != width:
            raise QkvError(f"{func.__name__} would break up the blocks of packed weights: load them dequantised")
        return first.like(some)

    return packed(blocks, shapes)


def unable(name: str) -> None:
    raise QkvError(
        f"weights kept packed in blocks can be multiplied with and looked up, and {name} is neither: load the model "
        "dequantised for that"
    )


def found(args: Any, kind: type[Tensor] = Packed) -> list[Any]:
    """The tensors of a kind among arguments and in their lists."""
    if isinstance(args, tuple | list):
        return [one for each in args for one in found(each, kind)]
    return [args] if isinstance(args, kind) else []


def replaced(args: Any, change: Callable[[Packed], Tensor]) -> Any:
    if isinstance(args, tuple | list):
        return type(args)(replaced(each, change) for each in args)
    return change(args) if isinstance(args, Packed) else args


REARRANGING = {
    Tensor.unflatten, Tensor.flatten, Tensor.transpose, Tensor.view, Tensor.reshape, Tensor.split, Tensor.chunk,
    Tensor.unbind, Tensor.narrow, Tensor.unsqueeze, Tensor.squeeze, Tensor.index_select, Tensor.__getitem__,
    Tensor.detach, Tensor.clone, Tensor.t, torch.cat, torch.stack, torch.split, torch.unbind,
}  # fmt: skip


# --- computing ---


class Product(torch.autograd.Function):
    """x Wᵀ + b with a packed W, x: … C."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = torch.cat([F.linear(x, rows) for rows in weight.slices()], -1)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradient
        refuse(ctx.needs_input_grad[1])
        dx = product(dy, ctx.weight) if ctx.needs_input_grad[0] else None
        return dx, None, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class Lookup(torch.autograd.Function):
    """The rows of a packed matrix that ids name."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Packed) -> Tensor:
        rows = weight.blocks[ids.flatten()]
        return dequantise(weight.format, rows, (*ids.shape, weight.shape[-1]), weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse(ctx.needs_input_grad[1])
        return None, None


def refuse(asked: bool) -> None:
    if asked:
        raise QkvError(
            "weights kept packed in blocks cannot be trained: load the model dequantised, or freeze them and train "
            "adapters beside them"
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Packed) or isinstance(x, Packed):
        raise QkvError("packed weights multiply activations; they are no activations themselves")
    if weight.served is not None and not x.requires_grad and 0 < x.numel() <= FEW * x.shape[-1]:
        y = weight.served(x)
        return y if bias is None else y + bias
    return Product.apply(x, weight, bias)


def product(x: Tensor, weight: Packed, *, out: Tensor | None = None) -> Tensor:
    """x W, x: … O and W: O C."""
    if not isinstance(weight, Packed) or isinstance(x, Packed):
        raise QkvError("packed weights multiply activations; they are no activations themselves")
    total = x.new_empty(*x.shape[:-1], weight.shape[1]) if out is None else out
    total.zero_()
    for some, rows in zip(x.split(max(1, SLICE // weight.shape[1]), -1), weight.slices(), strict=True):
        total += some @ rows.to(x.dtype)
    return total


def embedding(ids: Tensor, weight: Packed, padding_idx: int | None = None, max_norm: float | None = None, *_: Any,
              **__: Any) -> Tensor:  # fmt: skip
    if max_norm is not None:
        raise QkvError("packed embeddings cannot be renormalised (max_norm): load the model dequantised")
    return Lookup.apply(ids, weight)


def equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    x, y = (one.flatten(0, -2) for one in (a, b))
    parts = (one.slices() if isinstance(one, Packed) else one.split(max(1, SLICE // one.shape[-1])) for one in (x, y))
    return all(torch.equal(some, other) for some, other in zip(*parts, strict=True))


def moved(x: Packed, *args: Any, **kwargs: Any) -> Packed:
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    return x.like(x.blocks.to(device, non_blocking=non_blocking), dtype)


def zeros(x: Packed, *shape: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(*shape, **{"dtype": x.dtype, "device": x.device, **kwargs})


def said(x: Packed, **_: Any) -> str:
    return f"Packed({x.format}, {' × '.join(map(str, x.shape))}, {x.dtype})"


def deep_copied(x: Packed, memo: dict[int, Any]) -> Tensor:
    copy = x.like(x.blocks.clone())
    return nn.Parameter(copy, x.requires_grad) if isinstance(x, nn.Parameter) else copy


HANDLERS: dict[Any, Callable[..., Any]] = {
    Tensor.__repr__: said,
    Tensor.__deepcopy__: deep_copied,
    F.linear: linear,
    F.embedding: embedding,
    torch.mm: product,
    torch.equal: equal,
    Tensor.contiguous: Packed.dequantise,
    Tensor.to: moved,
    Tensor.cpu: lambda x: moved(x, "cpu"),
    Tensor.cuda: lambda x, device="cuda": moved(x, device),
    Tensor.float: lambda x: moved(x, torch.float32),
    Tensor.double: lambda x: moved(x, torch.float64),
    Tensor.half: lambda x: moved(x, torch.float16),
    Tensor.bfloat16: lambda x: moved(x, torch.bfloat16),
    Tensor.new_zeros: zeros,
}
