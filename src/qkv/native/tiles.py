"""Weights in the tiles that the kernels multiply (`kernels/tiles.h` draws them)."""

import mmap
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.errors import QkvError
from qkv.native.library import Store, lanes, library
from qkv.ops.blocks.layout import BLOCKS, FLOATS
from qkv.ops.blocks.packed import Packed

CHUNK = 1 << 25
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Shared memory, which Python maps by itself, gets no large pages."""


class Arena:
    """The tiles of a model's weights, in large pages and in the order of use: a token reads them from end to end."""

    def __init__(self, release: Callable[[], None] | None = None) -> None:
        self.release = release
        """Gives back the memory of the weights that have been copied."""
        self.left = torch.empty(0, dtype=torch.uint8)
        self.kept: dict[tuple[bool, tuple[int, ...]], tuple[Tensor, Sequence[Tensor]]] = {}

    def take(self, size: int) -> Tensor:
        """So many bytes, at a multiple of 64."""
        whole = -(-size // 64) * 64
        if whole > len(self.left):
            if self.release is not None:
                self.release()
            region = mmap.mmap(-1, max(whole, CHUNK), **PRIVATE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                region.madvise(mmap.MADV_HUGEPAGE)
            self.left = torch.frombuffer(region, dtype=torch.uint8)
        given, self.left = self.left[:size], self.left[whole:]
        return given

    def tiles(self, weights: Sequence[Tensor], *, gated: bool = False) -> Tensor:
        """Matrices of one store and width as tiles, one matrix after the other; gates in turn with what they multiply.

        Weights that were given before, as a tied head's are, have their tiles already.
        """
        key = gated, tuple(id(weight) for weight in weights)
        if key not in self.kept:
            self.kept[key] = self.fill(weights, gated), list(weights)  # which keep their ids while they live
        return self.kept[key][0]

    def fill(self, weights: Sequence[Tensor], gated: bool) -> Tensor:
        store, inputs = store_of(weights[0]), weights[0].shape[1]
        size = library().qkv_tile_bytes(store, inputs)
        counts = [-(-len(weight) // lanes()) for weight in weights]
        out = self.take(size * sum(counts)).view(sum(counts), size)
        at = 0
        for n, (weight, count) in enumerate(zip(weights, counts, strict=True)):
            target = out[at : at + 2 * count][n % 2 :: 2] if gated else out[at : at + count]
            (fill_dense if store.dense else fill_packed)(weight, target)
            at += 2 * count * (n % 2) if gated else count
        return out


def store_of(weight: Tensor) -> Store:
    """How the kernels keep a weight: in blocks as it is packed, in bfloats, or in floats."""
    if isinstance(weight, Packed) and weight.format not in FLOATS:
        return Store(library().qkv_store(BLOCKS[weight.format].id))
    kept = FLOATS[weight.format] if isinstance(weight, Packed) else weight.dtype
    return Store.BFLOAT if kept == torch.bfloat16 else Store.FLOAT


def fill_dense(weight: Tensor, tiles: Tensor) -> None:
    """Rows → tiles × inputs × lanes, or of bfloats tiles × inputs / 2 × lanes × 2, a megabyte or so at a time."""
    dtype, pair = (torch.bfloat16, 2) if store_of(weight) == Store.BFLOAT else (torch.float32, 1)
    step = max(1, (1 << 20) // (lanes() * weight.shape[1]))
    for at in range(0, len(tiles), step):
        rows, target = weight[lanes() * at : lanes() * (at + step)].detach(), tiles[at : at + step]
        rows = (rows.dequantise() if isinstance(rows, Packed) else rows).to(dtype)
        rows = F.pad(rows, (0, -rows.shape[1] % pair, 0, lanes() * len(target) - len(rows)))
        columns = rows.unflatten(1, (-1, pair)).unflatten(0, (-1, lanes())).transpose(1, 2)
        target.view(dtype).view(columns.shape).copy_(columns)


def fill_packed(weight: Tensor, tiles: Tensor) -> None:
    """Rows of blocks → tiles."""
    assert isinstance(weight, Packed)
    blocks, kind = weight.blocks.contiguous(), BLOCKS[weight.format].id
    place = tiles.data_ptr(), tiles.stride(0)
    if not library().qkv_pack(kind, blocks.data_ptr(), len(blocks), weight.shape[1], *place):
        raise QkvError(f"a scale of {weight.format} weights is too large for half precision: load them dequantised")
