"""Recursive doubling: partners exchange all they have, at distances of 1, 2, 4 ...

Source: R. Thakur, R. Rabenseifner and W. Gropp, "Optimization of collective communication operations in MPICH",
International Journal of High Performance Computing Applications 19 (2005). Where N is no power of two, the ranks that are
too many hand what they have to a neighbour before, and get the result from it after (`fold`).
"""

from __future__ import annotations

from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.steps import Steps


def recursive_doubling_all_reduce(nranks: int) -> Schedule:
    """log2 N steps, or floor(log2 N) + 2; each rank sends all the data in each. The least latency for little data."""
    core, handed = fold(nranks)
    before = tuple(Transfer(extra, keeper, 0, reduce=True) for extra, keeper in handed)
    exchanges = tuple(
        tuple(Transfer(rank, core[place ^ distance], 0, reduce=True) for place, rank in enumerate(core))
        for distance in distances(len(core))
    )
    after = tuple(Transfer(keeper, extra, 0) for extra, keeper in handed)
    return Schedule("all_reduce", "recursive_doubling", nranks, 1, between(before, exchanges, after))


def recursive_doubling_all_gather(nranks: int) -> Schedule:
    """log2 N steps, or floor(log2 N) + 2; the data doubles with each, so that each rank sends N-1 blocks.

    Where N is no power of two, a rank sends more or less than that, by the blocks that were handed to the ranks of its half;
    and a keeper sends its extra rank N-1 blocks more.
    """
    core, handed = fold(nranks)
    before = tuple(Transfer(extra, keeper, extra) for extra, keeper in handed)
    extras = {keeper: extra for extra, keeper in handed}
    has = {rank: [rank, *([extras[rank]] if rank in extras else [])] for rank in core}
    exchanges = []
    for distance in distances(len(core)):
        partners = [(rank, core[place ^ distance]) for place, rank in enumerate(core)]
        exchanges.append(tuple(Transfer(rank, partner, block) for rank, partner in partners for block in has[rank]))
        has = {partner: [*has[partner], *has[rank]] for rank, partner in partners}
    after = tuple(Transfer(keeper, extra, block) for extra, keeper in handed for block in range(nranks) if block != extra)
    return Schedule("all_gather", "recursive_doubling", nranks, 1, between(before, tuple(exchanges), after))


def fold(nranks: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The ranks that take part in the exchanges, a power of two of them, and (extra, keeper) for those that do not.

    Of the first 2 * extras ranks the even ones hand what they have to the odd ones next to them.
    """
    nextras = nranks - (1 << nranks.bit_length() - 1)
    handed = [(2 * number, 2 * number + 1) for number in range(nextras)]
    return [keeper for _, keeper in handed] + [*range(2 * nextras, nranks)], handed


def distances(nplaces: int) -> list[int]:
    """1, 2, 4 ... below a power of two."""
    return [1 << power for power in range(nplaces.bit_length() - 1)]


def between(before: tuple[Transfer, ...], steps: Steps, after: tuple[Transfer, ...]) -> Steps:
    """The steps, after one step and before another, where these have transfers."""
    return ((before,) if before else ()) + steps + ((after,) if after else ())
