"""Steps of schedules as building blocks: moved to other ranks and chunks, run side by side, turned round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from dsml_gpu.schedules.schedule import Transfer

#: The transfers of each step.
Steps = tuple[tuple[Transfer, ...], ...]


def relabelled(steps: Steps, ranks: Sequence[int], chunks: Sequence[Sequence[int]]) -> Steps:
    """The same steps among other ranks, on other chunks.

    Args:
        ranks: the rank that takes the place of each.
        chunks: the chunks that take the place of each.
    """
    return tuple(
        tuple(
            Transfer(ranks[transfer.src], ranks[transfer.dst], chunk, transfer.reduce)
            for transfer in step
            for chunk in chunks[transfer.chunk]
        )
        for step in steps
    )


def side_by_side(several: Iterable[Steps]) -> Steps:
    """All at the same time, step by step; those that are shorter end earlier."""
    return tuple(tuple(transfer for step in steps for transfer in step) for steps in zip_longest(*several, fillvalue=()))


def turned_round(steps: Steps, reduce: bool) -> Steps:
    """The last step first, and every transfer back to where it came from: a broadcast becomes a reduction.

    Args:
        reduce: whether the transfers reduce.
    """
    return tuple(
        tuple(Transfer(transfer.dst, transfer.src, transfer.chunk, reduce) for transfer in step) for step in reversed(steps)
    )


def seen_from(root: int, nranks: int) -> list[int]:
    """The ranks in their order from `root` on: the first is `root` itself."""
    return [(root + rank) % nranks for rank in range(nranks)]
