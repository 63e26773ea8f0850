"""Direct algorithms: every rank sends to whom it concerns, all at once.

The fewest steps that are possible, and streams between all pairs of ranks. In each step the ranks go round from their right
neighbour on, so that not all of them send to the same one first. For ranks that read each other's memory it is the way of
choice: the data moves once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.steps import Steps


def direct_all_reduce(nranks: int) -> Schedule:
    """Each rank reduces a part of the data from all, then sends it to all: 2 steps, 2(N-1)/N of the data from each rank."""
    reduce_scatter = to_everybody(nranks, lambda src, dst: dst, reduce=True)
    all_gather = to_everybody(nranks, lambda src, dst: src)
    return Schedule("all_reduce", "direct", nranks, nranks, reduce_scatter + all_gather)


def direct_reduce(nranks: int, root: int = 0) -> Schedule:
    """All ranks send to the root: 1 step, in which N-1 times the data goes to one rank."""
    return Schedule(
        "reduce", "direct", nranks, 1, _one_step(Transfer(r, root, 0, True) for r in _others(nranks, root)), root
    )


def direct_broadcast(nranks: int, root: int = 0) -> Schedule:
    """The root sends to all: 1 step, in which N-1 times the data comes from one rank."""
    return Schedule("broadcast", "direct", nranks, 1, _one_step(Transfer(root, r, 0) for r in _others(nranks, root)), root)


def direct_reduce_scatter(nranks: int) -> Schedule:
    """1 step; each rank sends all blocks but its own."""
    return Schedule("reduce_scatter", "direct", nranks, 1, to_everybody(nranks, lambda src, dst: dst, reduce=True))


def direct_all_gather(nranks: int) -> Schedule:
    """1 step; each rank sends its block N-1 times."""
    return Schedule("all_gather", "direct", nranks, 1, to_everybody(nranks, lambda src, dst: src))


def direct_gather(nranks: int, root: int = 0) -> Schedule:
    """1 step; each rank sends its block to the root."""
    return Schedule("gather", "direct", nranks, 1, _one_step(Transfer(r, root, r) for r in _others(nranks, root)), root)


def direct_scatter(nranks: int, root: int = 0) -> Schedule:
    """1 step; the root sends each rank its block."""
    return Schedule("scatter", "direct", nranks, 1, _one_step(Transfer(root, r, r) for r in _others(nranks, root)), root)


def direct_all_to_all(nranks: int) -> Schedule:
    """1 step; each rank sends a block to each other one."""
    return Schedule("all_to_all", "direct", nranks, 1, to_everybody(nranks, lambda src, dst: src * nranks + dst))


def pairwise_all_to_all(nranks: int) -> Schedule:
    """N-1 steps; in step s each rank sends to the one that is s to its right, and receives from the one s to its left."""
    (everybody,) = to_everybody(nranks, lambda src, dst: src * nranks + dst) or ((),)
    steps = tuple(everybody[first : first + nranks] for first in range(0, len(everybody), nranks))
    return Schedule("all_to_all", "pairwise", nranks, 1, steps)


def direct_send_recv(nranks: int, pairs: tuple[tuple[int, int], ...] = ()) -> Schedule:
    """1 step; what goes from a rank to itself needs no transfer."""
    transfers = (Transfer(src, dst, block) for block, (src, dst) in enumerate(pairs) if src != dst)
    return Schedule("send_recv", "direct", nranks, 1, _one_step(transfers), pairs=pairs)


def to_everybody(nranks: int, chunk: Callable[[int, int], int], reduce: bool = False) -> Steps:
    """One step in which each rank sends to each other one, those at a distance of 1 first.

    Args:
        chunk: (src, dst) -> which chunk.
    """
    return _one_step(
        Transfer(src, (src + distance) % nranks, chunk(src, (src + distance) % nranks), reduce)
        for distance in range(1, nranks)
        for src in range(nranks)
    )


def _one_step(transfers: Iterable[Transfer]) -> Steps:
    step = tuple(transfers)
    return (step,) if step else ()


def _others(nranks: int, root: int) -> list[int]:
    return [rank for rank in range(nranks) if rank != root]
