"""Which part of which file goes where, when a checkpoint is restored on as many ranks as wrote it, or on others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsml_gpu.checkpoints.manifest import Manifest, SavedArray
from dsml_gpu.errors import InvalidValue
from dsml_gpu.reduction.dtypes import DTYPES

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Bytes of an array of a file.

    Attributes:
        rank: whose file it is.
        name: of the array.
    """

    rank: int
    name: str
    start: int
    nbytes: int


def shapes_on(manifest: Manifest, name: str, nranks: int) -> list[Shape]:
    """The shape that each of `nranks` ranks has of an array.

    Raises:
        InvalidValue: there is no such array, or it cannot be cut for so many ranks.
    """
    parts = manifest.parts(name)
    if nranks == manifest.nranks:
        return [part.shape for part in parts]
    if _are_same(parts):
        return [parts[0].shape] * nranks
    return _cut_shapes(parts, nranks)


def sources_of(manifest: Manifest, name: str, dtype: str, shapes: Sequence[Shape]) -> list[list[Source]]:
    """What is put together, one behind the other, for each rank's part of an array.

    Where the ranks are as many as when it was written, and the shapes the same, each gets its own part. Otherwise parts that
    were the same on all ranks go to each rank, and others are put together along the first axis and cut as
    ``numpy.array_split`` does.

    Args:
        dtype: name in ``enum DataType`` of what they go to.
        shapes: of each rank's part.

    Raises:
        InvalidValue: types or shapes are not those that the parts have.
    """
    parts = manifest.parts(name)
    if dtype != parts[0].dtype:
        raise InvalidValue(f"{name} has type {parts[0].dtype} in the checkpoint, and {dtype} where it shall go")
    nranks = len(shapes)
    if [part.shape for part in parts] == list(shapes):
        return [[Source(rank, name, 0, part.nbytes)] for rank, part in enumerate(parts)]
    if _are_same(parts) and all(shape == parts[0].shape for shape in shapes):
        # From all files in turn, so that no one of them is read by everybody.
        return [[Source(rank % len(parts), name, 0, parts[0].nbytes)] for rank in range(nranks)]
    expected = _cut_shapes(parts, nranks)
    for rank, (shape, right) in enumerate(zip(shapes, expected, strict=True)):
        if shape != right:
            raise InvalidValue(
                f"{name} of {len(parts)} ranks with shapes {_shown(parts)} has shape {right} on rank {rank} of {nranks}, "
                f"but goes to one of shape {shape}"
            )
    return _cut(name, parts, [_nbytes(shape, dtype) for shape in expected])


def _cut(name: str, parts: Sequence[SavedArray], sizes: Sequence[int]) -> list[list[Source]]:
    """Bytes that lie one behind the other in `parts`, cut into `sizes`."""
    cuts = []
    rank = taken = 0  # of the part that comes next
    for size in sizes:
        cut = []
        while size:
            count = min(size, parts[rank].nbytes - taken)
            if count:
                cut.append(Source(rank, name, taken, count))
                size -= count
                taken += count
            if taken == parts[rank].nbytes:
                rank, taken = rank + 1, 0
        cuts.append(cut)
    return cuts


def _cut_shapes(parts: Sequence[SavedArray], nranks: int) -> list[Shape]:
    rests = {part.shape[1:] for part in parts}
    name = parts[0].name
    if len(rests) > 1 or any(not part.shape for part in parts):
        raise InvalidValue(
            f"{name} of {len(parts)} ranks cannot be put together for {nranks} along its first axis: shapes {_shown(parts)}"
        )
    rows, more = divmod(sum(part.shape[0] for part in parts), nranks)
    (rest,) = rests
    return [(rows + (rank < more), *rest) for rank in range(nranks)]


def _are_same(parts: Sequence[SavedArray]) -> bool:
    return all(part.same_as(parts[0]) for part in parts)


def _nbytes(shape: Shape, dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _shown(parts: Sequence[SavedArray]) -> str:
    return ", ".join(str(part.shape) for part in parts[:8]) + (" ..." if len(parts) > 8 else "")
