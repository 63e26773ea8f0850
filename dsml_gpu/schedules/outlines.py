"""Outlines of the catalog's algorithms: the same steps as in their files, counted instead of written out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np

from dsml_gpu.schedules import binomial_tree, bruck, direct, ring
from dsml_gpu.schedules.algorithm import Algorithm
from dsml_gpu.schedules.dissemination import dissemination_barrier
from dsml_gpu.schedules.double_binary_tree import double_binary_tree_all_reduce
from dsml_gpu.schedules.halving_doubling import halving_doubling_all_reduce
from dsml_gpu.schedules.hierarchical import hierarchical_all_reduce
from dsml_gpu.schedules.naive import naive_all_reduce
from dsml_gpu.schedules.outline import Everybody, Outline, Pattern, Round, Rounds
from dsml_gpu.schedules.recursive_doubling import (
    distances,
    fold,
    recursive_doubling_all_gather,
    recursive_doubling_all_reduce,
)
from dsml_gpu.schedules.scatter_all_gather import scatter_all_gather_broadcast
from dsml_gpu.schedules.topology import Ints


def has_outline(algorithm: Algorithm) -> bool:
    """Whether the algorithm has one."""
    return algorithm.build in _OUTLINES


def outline_of(algorithm: Algorithm, nranks: int, *, root: int = 0, hosts: tuple[int, ...] = ()) -> Outline:
    """The outline of an algorithm's schedule. Arguments as of `Algorithm.schedule`.

    Raises:
        KeyError: it has none.
    """
    build = _OUTLINES[algorithm.build]
    offered: dict[str, Any] = {"root": root, "hosts": hosts or (0,) * nranks}
    asked = inspect.signature(build).parameters
    outline: Outline = build(nranks, **{name: value for name, value in offered.items() if name in asked})
    return outline


# ---- rings -----------------------------------------------------------------------------------------------------------


def _ring_rounds(ring_ranks: Ints, chunks: int = 1, *, reduce: bool) -> Rounds:
    """One round for each rank but one: to the next in every ring; the last axis of `ring_ranks` is a ring."""
    pattern = Pattern(ring_ranks.ravel(), np.roll(ring_ranks, -1, axis=-1).ravel(), chunks, reduce)
    return (Round((pattern,), ring_ranks.shape[-1] - 1),) if ring_ranks.shape[-1] > 1 else ()


def _ring_all_reduce(nranks: int) -> Outline:
    ranks = np.arange(nranks)
    return Outline(nranks, nranks, (_ring_rounds(ranks, reduce=True) + _ring_rounds(ranks, reduce=False),))


def _bidirectional_ring_all_reduce(nranks: int) -> Outline:
    rings = np.stack([np.arange(nranks), np.arange(nranks)[::-1]])
    return Outline(nranks, 2 * nranks, (_ring_rounds(rings, reduce=True) + _ring_rounds(rings, reduce=False),))


def _ring_reduce_scatter(nranks: int) -> Outline:
    return Outline(nranks, nranks, (_ring_rounds(np.arange(nranks), reduce=True),))


def _ring_all_gather(nranks: int) -> Outline:
    return Outline(nranks, nranks, (_ring_rounds(np.arange(nranks), reduce=False),))


# ---- trees -----------------------------------------------------------------------------------------------------------


def _turned_round(rounds: Rounds, *, reduce: bool) -> Rounds:
    """The last first, and every transfer back to where it came from."""
    return tuple(
        Round(tuple(pattern.turned_round(reduce) for pattern in round_.patterns), round_.repeat)
        for round_ in reversed(rounds)
    )


def _binomial_edges(nranks: int) -> list[tuple[Ints, Ints, Ints]]:
    """Parents, children, and ranks below these, themselves included, step by step from rank 0 down."""
    edges = []
    for power in range((nranks - 1).bit_length() - 1, -1, -1):
        distance = 1 << power
        parents = np.arange(0, nranks - distance, 2 * distance)
        edges.append((parents, parents + distance, np.minimum(distance, nranks - parents - distance)))
    return edges


def _binomial_broadcast_rounds(order: Ints, chunks: int = 1) -> Rounds:
    """From the first rank of `order` to all the others."""
    return tuple(
        Round((Pattern(order[parents], order[children], chunks, False),))
        for parents, children, _ in _binomial_edges(len(order))
    )


def _binomial_scatter_rounds(order: Ints) -> Rounds:
    return tuple(
        Round((Pattern(order[parents], order[children], below, False),))
        for parents, children, below in _binomial_edges(len(order))
    )


def _from_root(nranks: int, root: int) -> Ints:
    return (np.arange(nranks) + root) % nranks


def _binomial_all_reduce(nranks: int) -> Outline:
    down = _binomial_broadcast_rounds(np.arange(nranks))
    return Outline(nranks, 1, (_turned_round(down, reduce=True) + down,))


def _binomial_reduce(nranks: int, root: int = 0) -> Outline:
    return Outline(nranks, 1, (_turned_round(_binomial_broadcast_rounds(_from_root(nranks, root)), reduce=True),))


def _binomial_broadcast(nranks: int, root: int = 0) -> Outline:
    return Outline(nranks, 1, (_binomial_broadcast_rounds(_from_root(nranks, root)),))


def _binomial_scatter(nranks: int, root: int = 0) -> Outline:
    return Outline(nranks, nranks, (_binomial_scatter_rounds(_from_root(nranks, root)),))


def _binomial_gather(nranks: int, root: int = 0) -> Outline:
    rounds = _turned_round(_binomial_scatter_rounds(_from_root(nranks, root)), reduce=False)
    return Outline(nranks, nranks, (rounds,))


def _scatter_all_gather_broadcast(nranks: int, root: int = 0) -> Outline:
    order = _from_root(nranks, root)
    places = np.arange(nranks)
    # The scatter has brought a rank its own part and those of the ranks below it, which come round to it last.
    has = np.minimum(places & -places, nranks - places)
    has[0] = nranks
    steps = nranks - has
    bounds = [0, *np.unique(steps[steps > 0]).tolist()]
    left = np.roll(order, 1)
    gather = tuple(
        Round((Pattern(left[steps > first], order[steps > first], 1, False),), last - first)
        for first, last in pairwise(bounds)
    )
    return Outline(nranks, nranks, (_binomial_scatter_rounds(order), gather))


def _double_binary_tree_all_reduce(nranks: int) -> Outline:
    ranks = np.arange(nranks)
    second = (ranks + 1) % nranks if nranks % 2 else ranks[::-1]
    down = tuple(
        Round((Pattern(np.concatenate([parents, second[parents]]), np.concatenate([children, second[children]]), 1, False),))
        for parents, children in _binary_edges(nranks)
    )
    return Outline(nranks, 2, (_turned_round(down, reduce=True) + down,))


def _binary_edges(nranks: int) -> list[tuple[Ints, Ints]]:
    """Parents and children by the children's depth; see `double_binary_tree.children_of`."""
    if nranks == 1:
        return []
    edges = [(np.array([0]), np.array([1 << (nranks - 1).bit_length() - 1]))]
    while True:
        parents = edges[-1][1]
        half = (parents & -parents) >> 1
        right = half.copy()
        while (beyond := (parents + right >= nranks) & (right > 0)).any():
            right[beyond] >>= 1
        has_left, has_right = half > 0, right > 0
        if not has_left.any():
            return edges
        children = np.concatenate([(parents - half)[has_left], (parents + right)[has_right]])
        edges.append((np.concatenate([parents[has_left], parents[has_right]]), children))


# ---- exchanges -------------------------------------------------------------------------------------------------------


def _folded(nranks: int, chunks: int, exchanges: Callable[[Ints], Rounds]) -> Rounds:
    """The exchanges of a power of two of ranks, with those that are too many before and after (`fold`)."""
    core, handed = fold(nranks)
    rounds = exchanges(np.array(core))
    if not handed:
        return rounds
    extras, keepers = np.array(handed).T
    before = Round((Pattern(extras, keepers, chunks, True),))
    return (before, *rounds, Round((Pattern(keepers, extras, chunks, False),)))


def _exchange(core: Ints, distance: int, chunks: int, *, reduce: bool) -> Round:
    return Round((Pattern(core, core[np.arange(len(core)) ^ distance], chunks, reduce),))


def _recursive_doubling_all_reduce(nranks: int) -> Outline:
    def exchanges(core: Ints) -> Rounds:
        return tuple(_exchange(core, distance, 1, reduce=True) for distance in distances(len(core)))

    return Outline(nranks, 1, (_folded(nranks, 1, exchanges),))


def _recursive_doubling_all_gather(nranks: int) -> Outline:
    core, handed = (np.array(ranks, dtype=np.int64) for ranks in fold(nranks))
    extras, keepers = handed.reshape(-1, 2).T
    has = 1 + np.isin(core, keepers).astype(np.int64)
    rounds = []
    for distance in distances(len(core)):
        partners = np.arange(len(core)) ^ distance
        rounds.append(Round((Pattern(core, core[partners], has, False),)))
        has = has + has[partners]
    if len(extras):
        rounds.insert(0, Round((Pattern(extras, keepers, 1, False),)))
        rounds.append(Round((Pattern(keepers, extras, nranks - 1, False),)))
    return Outline(nranks, nranks, (tuple(rounds),))


def _halving_doubling_all_reduce(nranks: int) -> Outline:
    def exchanges(core: Ints) -> Rounds:
        down = [_exchange(core, distance, distance, reduce=True) for distance in reversed(distances(len(core)))]
        return (*down, *(_exchange(core, distance, distance, reduce=False) for distance in distances(len(core))))

    chunks = 1 << nranks.bit_length() - 1
    rounds = _folded(nranks, chunks, exchanges)
    if chunks == nranks:
        return Outline(nranks, chunks, (rounds,))
    # What is sent first in an exchange is not what came first from the rank that is too many.
    return Outline(nranks, chunks, (rounds[:1], rounds[1:-1], rounds[-1:]))


def _dissemination_barrier(nranks: int) -> Outline:
    ranks = np.arange(nranks)
    powers = range((nranks - 1).bit_length())
    rounds = tuple(Round((Pattern(ranks, (ranks + (1 << power)) % nranks, 1, True),)) for power in powers)
    return Outline(nranks, 1, (rounds,))


def _bruck_rounds(nranks: int) -> Rounds:
    """The all-gather."""
    ranks = np.arange(nranks)
    powers = range((nranks - 1).bit_length())
    return tuple(
        Round((Pattern(ranks, (ranks - distance) % nranks, min(distance, nranks - distance), False),))
        for distance in (1 << power for power in powers)
    )


def _bruck_all_reduce(nranks: int) -> Outline:
    gather = _bruck_rounds(nranks)
    return Outline(nranks, nranks, (_turned_round(gather, reduce=True) + gather,))


def _bruck_reduce_scatter(nranks: int) -> Outline:
    return Outline(nranks, nranks, (_turned_round(_bruck_rounds(nranks), reduce=True),))


def _bruck_all_gather(nranks: int) -> Outline:
    return Outline(nranks, nranks, (_bruck_rounds(nranks),))


def _bruck_reduce(nranks: int, root: int = 0) -> Outline:
    gather = _turned_round(_binomial_scatter_rounds(_from_root(nranks, root)), reduce=False)
    return Outline(nranks, nranks, (_turned_round(_bruck_rounds(nranks), reduce=True) + gather,))


def _bruck_all_to_all(nranks: int) -> Outline:
    ranks = np.arange(nranks)
    distances_ = [1 << power for power in range((nranks - 1).bit_length())]
    rounds = tuple(
        Round((Pattern(ranks, (ranks + distance) % nranks, int((ranks & distance > 0).sum()), False),))
        for distance in distances_
    )
    return Outline(nranks, nranks, (rounds,))


# ---- everybody to everybody ------------------------------------------------------------------------------------------


def _everybody(nranks: int, reduce: bool) -> Rounds:
    return (Round((Everybody(nranks, 1, reduce),)),) if nranks > 1 else ()


def _direct_all_reduce(nranks: int) -> Outline:
    return Outline(nranks, nranks, (_everybody(nranks, True) + _everybody(nranks, False),))


def _direct_reduce_scatter(nranks: int) -> Outline:
    return Outline(nranks, nranks, (_everybody(nranks, True),))


def _direct_to_all(nranks: int) -> Outline:
    """All-gather and all-to-all: in both, a block from each rank to each other one."""
    return Outline(nranks, nranks, (_everybody(nranks, False),))


def _from_all(nranks: int, root: int, reduce: bool) -> Rounds:
    others = np.delete(np.arange(nranks), root)
    return (Round((Pattern(others, np.full_like(others, root), 1, reduce),)),) if nranks > 1 else ()


def _direct_reduce(nranks: int, root: int = 0) -> Outline:
    return Outline(nranks, 1, (_from_all(nranks, root, True),))


def _direct_broadcast(nranks: int, root: int = 0) -> Outline:
    return Outline(nranks, 1, (_turned_round(_from_all(nranks, root, False), reduce=False),))


def _direct_gather(nranks: int, root: int = 0) -> Outline:
    return Outline(nranks, nranks, (_from_all(nranks, root, False),))


def _direct_scatter(nranks: int, root: int = 0) -> Outline:
    return Outline(nranks, nranks, (_turned_round(_from_all(nranks, root, False), reduce=False),))


def _naive_all_reduce(nranks: int) -> Outline:
    gather = _from_all(nranks, 0, True)
    return Outline(nranks, 1, (gather + _turned_round(gather, reduce=False),), store_and_forward=True)


# ---- hosts -----------------------------------------------------------------------------------------------------------


def _hierarchical_all_reduce(nranks: int, hosts: tuple[int, ...]) -> Outline:
    members: dict[int, list[int]] = {}
    for rank in range(nranks):
        members.setdefault(hosts[rank], []).append(rank)
    groups = list(members.values())
    nhosts = len(groups)
    if len({len(group) for group in groups}) == 1:
        inside = np.array(groups)
        across = inside.T
        return Outline(
            nranks,
            nranks,
            (
                _ring_rounds(inside, nhosts, reduce=True),
                _ring_rounds(across, reduce=True) + _ring_rounds(across, reduce=False),
                _ring_rounds(inside, nhosts, reduce=False),
            ),
        )
    trees = [_binomial_broadcast_rounds(np.array(group), nhosts) for group in groups]
    down = tuple(
        Round(tuple(pattern for round_ in rounds if round_ is not None for pattern in round_.patterns))
        for rounds in zip_longest(*trees)
    )
    leaders = np.array([group[0] for group in groups])
    across = _ring_rounds(leaders, reduce=True) + _ring_rounds(leaders, reduce=False)
    return Outline(nranks, nhosts, (_turned_round(down, reduce=True) + across + down,))


#: By the function that builds the schedule.
_OUTLINES: dict[Callable[..., Any], Callable[..., Outline]] = {
    ring.ring_all_reduce: _ring_all_reduce,
    ring.bidirectional_ring_all_reduce: _bidirectional_ring_all_reduce,
    ring.ring_reduce_scatter: _ring_reduce_scatter,
    ring.ring_all_gather: _ring_all_gather,
    naive_all_reduce: _naive_all_reduce,
    binomial_tree.binomial_all_reduce: _binomial_all_reduce,
    binomial_tree.binomial_reduce: _binomial_reduce,
    binomial_tree.binomial_broadcast: _binomial_broadcast,
    binomial_tree.binomial_scatter: _binomial_scatter,
    binomial_tree.binomial_gather: _binomial_gather,
    scatter_all_gather_broadcast: _scatter_all_gather_broadcast,
    double_binary_tree_all_reduce: _double_binary_tree_all_reduce,
    binomial_tree.binomial_barrier: _binomial_all_reduce,
    dissemination_barrier: _dissemination_barrier,
    recursive_doubling_all_gather: _recursive_doubling_all_gather,
    recursive_doubling_all_reduce: _recursive_doubling_all_reduce,
    halving_doubling_all_reduce: _halving_doubling_all_reduce,
    bruck.bruck_all_reduce: _bruck_all_reduce,
    bruck.bruck_reduce: _bruck_reduce,
    bruck.bruck_reduce_scatter: _bruck_reduce_scatter,
    bruck.bruck_all_gather: _bruck_all_gather,
    bruck.bruck_all_to_all: _bruck_all_to_all,
    direct.direct_all_reduce: _direct_all_reduce,
    direct.direct_reduce: _direct_reduce,
    direct.direct_broadcast: _direct_broadcast,
    direct.direct_reduce_scatter: _direct_reduce_scatter,
    direct.direct_all_gather: _direct_to_all,
    direct.direct_gather: _direct_gather,
    direct.direct_scatter: _direct_scatter,
    direct.direct_all_to_all: _direct_to_all,
    hierarchical_all_reduce: _hierarchical_all_reduce,
}
