"""Double binary tree: two trees over all ranks, each for half of the data, so that nobody only receives.

Source: P. Sanders, J. Speck and J. L. Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan",
Parallel Computing 35 (2009); NCCL builds its trees so.
"""

from __future__ import annotations

from collections import defaultdict

from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.steps import Steps, relabelled, side_by_side, turned_round


def double_binary_tree_all_reduce(nranks: int) -> Schedule:
    """Half of the data goes up one tree and down again, the other half through the other one.

    2 ceil(log2 N) steps, which slices go through one behind the other. Who has two children in one tree is a leaf of the
    other: a rank sends a half at most to two children and a parent, and the other half to a parent, 2 times the data.
    """
    broadcast = tree_steps(nranks)
    up_and_down = turned_round(broadcast, reduce=True) + broadcast
    trees = [relabelled(up_and_down, ranks, [(half,)]) for half, ranks in enumerate((range(nranks), other_ranks(nranks)))]
    return Schedule("all_reduce", "double_binary_tree", nranks, 2, side_by_side(trees))


def tree_steps(nranks: int) -> Steps:
    """Chunk 0 from rank 0 down a binary tree: ranks that are odd are leaves, those of higher powers of two higher up."""
    by_depth: dict[int, list[Transfer]] = defaultdict(list)
    depths = {0: 0}
    pending = [(0, child) for child in children_of(0, nranks)]
    while pending:
        parent, child = pending.pop(0)
        depths[child] = depths[parent] + 1
        by_depth[depths[child]].append(Transfer(parent, child, 0))
        pending += [(child, grandchild) for grandchild in children_of(child, nranks)]
    return tuple(tuple(by_depth[depth]) for depth in sorted(by_depth))


def children_of(rank: int, nranks: int) -> list[int]:
    """A rank's children in the tree whose root is rank 0."""
    if rank == 0:
        return [1 << (nranks - 1).bit_length() - 1] if nranks > 1 else []
    half = (rank & -rank) >> 1
    if not half:
        return []
    right = half
    while rank + right >= nranks and right:
        right >>= 1
    return [rank - half, *([rank + right] if right else [])]


def other_ranks(nranks: int) -> list[int]:
    """The ranks that take the places in the second tree: odd places go to even ranks, and the other way round.

    Where N is odd there is one leaf less than in all: rank 0, the root of the first tree, has one child in both.
    """
    if nranks % 2:
        return [(place + 1) % nranks for place in range(nranks)]
    return [nranks - 1 - place for place in range(nranks)]
