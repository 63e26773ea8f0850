"""What every element of every buffer must be after an operation: in numpy, and of nothing else.

A rank that dies may have contributed, or not: what the others have must be the result over exactly the ranks that are
reported. Data is such that each set of ranks has another result, at each element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from dsml_gpu.chaos.operations import REDUCTIONS, SAME_EVERYWHERE, Operation

_UFUNCS: dict[str, np.ufunc] = {"sum": np.add, "max": np.maximum, "min": np.minimum}
#: Whole numbers: below this in the bits above those of the ranks, so that sums of 8 are exact in float32.
_LARGEST = 1 << 12


@dataclass(frozen=True, slots=True)
class Buffers:
    """What one rank has.

    Attributes:
        source: its input, and its output too where the operation is in place.
        result: its output; None: in place.
    """

    source: np.ndarray
    result: np.ndarray | None = None

    def named(self) -> dict[str, np.ndarray]:
        """Each under the name that people know it by."""
        return {"input": self.source} | ({} if self.result is None else {"output": self.result})


def draw(operation: Operation, seed: int, *, whole: bool = True) -> list[Buffers]:
    """Buffers of all ranks for an operation.

    Args:
        whole: of float types, whole numbers, whose sums are exact in any order; otherwise any numbers.
    """
    rng = np.random.default_rng(seed)
    dtype = np.dtype(operation.dtype)
    buffers = []
    for rank in range(operation.nranks):

        def numbers(count: int, offset: int, rank: int = rank) -> np.ndarray:
            if not whole and dtype.kind == "f":
                return rng.standard_normal(count).astype(dtype)
            # One bit of each rank's own: no two sets of ranks have the same sum.
            return ((rng.integers(0, _LARGEST, count) << 8) + (1 << rank % 8) + offset).astype(dtype)

        source = numbers(operation.input_elements, 0)
        # What was in an output before is none of the inputs' numbers.
        buffers.append(Buffers(source, None if operation.in_place else -numbers(operation.output_elements, 0)))
    return buffers


def expected(operation: Operation, before: Sequence[Buffers], members: Sequence[int]) -> dict[int, Buffers]:
    """What the ranks have after an operation on these members.

    Args:
        before: of all ranks.
        members: ranks that took part.

    Returns:
        By rank, of the members. Blocks of ranks that did not take part are what they were.
    """
    after = {}
    for rank in members:
        was = before[rank]
        target = (was.source if was.result is None else was.result).copy()
        _write(operation, target, before, members, rank)
        after[rank] = Buffers(target) if was.result is None else Buffers(was.source, target)
    return after


def _write(operation: Operation, target: np.ndarray, before: Sequence[Buffers], members: Sequence[int], rank: int) -> None:
    count, in_place = operation.elements, before[rank].result is None

    def block(array: np.ndarray, number: int) -> np.ndarray:
        return array[number * count : (number + 1) * count]

    if operation.collective == "broadcast":
        target[:] = before[operation.root].source
    elif operation.collective == "all_reduce":
        target[:] = _reduced(operation, [before[member].source for member in members])
    elif operation.collective == "reduce_scatter":
        own = block(target, rank) if in_place else target
        own[:] = _reduced(operation, [block(before[member].source, rank) for member in members])
    elif operation.collective == "all_gather":
        for member in members:
            source = before[member].source
            block(target, member)[:] = block(source, member) if in_place else source
    else:
        for member in members:
            block(target, member)[:] = block(before[member].source, rank)


def _reduced(operation: Operation, arrays: Sequence[np.ndarray]) -> np.ndarray:
    result: np.ndarray = reduce(_UFUNCS[operation.op], arrays)
    return result


def _tolerance(operation: Operation, before: Sequence[Buffers], members: Sequence[int]) -> float:
    """By how much sums of float types may differ, that are added in another order."""
    dtype = np.dtype(operation.dtype)
    if operation.collective not in REDUCTIONS or operation.op != "sum" or dtype.kind != "f":
        return 0.0
    largest = sum(float(np.abs(before[member].source).max()) for member in members)
    return len(members) * float(np.finfo(dtype).eps) * largest


def wrong(
    operation: Operation, before: Sequence[Buffers], actual: Mapping[int, Buffers], members: Sequence[int]
) -> list[str]:
    """What is wrong after an operation that has ended well; empty: nothing.

    Args:
        before: of all ranks.
        actual: by rank, of all that are left.
        members: ranks that took part, as the answer says.
    """
    found = []
    left = sorted(actual)
    for rank in sorted(set(left) - set(members)):
        found.append(f"rank {rank} is there, but the answer says that only ranks {sorted(members)} took part")
    tolerance = _tolerance(operation, before, members)
    after = expected(operation, before, members)
    for rank in [rank for rank in left if rank in after]:
        allowed = {"input": 0.0 if before[rank].result is not None else tolerance, "output": tolerance}
        for name, array in actual[rank].named().items():
            found += _compared(
                f"rank {rank}, {name}", array, after[rank].named()[name], before[rank].named()[name], allowed[name]
            )
    if operation.collective in SAME_EVERYWHERE and left:
        name = "input" if operation.in_place else "output"
        first = actual[left[0]].named()[name]
        for rank in left[1:]:
            if actual[rank].named()[name].tobytes() != first.tobytes():
                found.append(f"rank {rank}, {name}: other bits than at rank {left[0]}")
    return found


def changed(before: Mapping[int, Buffers], actual: Mapping[int, Buffers]) -> list[str]:
    """Which bytes are not as before, after an operation that has failed, or after none; empty: all are.

    Args:
        before, actual: by rank; ranks that are missing in `actual` are lost.
    """
    found = []
    for rank, buffers in sorted(actual.items()):
        was = before[rank].named()
        for name, array in buffers.named().items():
            found += _compared(f"rank {rank}, {name}, which must be as before", array, was[name], None, 0.0)
    return found


def _compared(what: str, actual: np.ndarray, expected: np.ndarray, before: np.ndarray | None, tolerance: float) -> list[str]:
    if tolerance:
        differs = ~(np.abs(actual - expected) <= tolerance)  # NaN differs
    else:
        bits: Any = f"u{actual.dtype.itemsize}"
        differs = actual.view(bits) != expected.view(bits)
    places = np.flatnonzero(differs)
    if not places.size:
        return []
    first = int(places[0])
    stale = before is not None and bool(actual[first] == before[first])
    found = f"expected {expected[first]}, got {actual[first]}{', as before' if stale else ''}"
    return [f"{what}: {places.size} of {actual.size} elements are wrong, the first at {first}: {found}"]
