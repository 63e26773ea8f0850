"""A collective without the ranks that are lost: pure decisions.

The ranks that are left keep their buffers and the places of their blocks in them; what was to go to a lost rank, or to come
from one, is left out. So an all-gather leaves a gap where the block of a lost rank would be, and a reduction is one of what
the others have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dsml_gpu.coordinator.call import CollectiveCall, Place
from dsml_gpu.coordinator.remembered import remembered
from dsml_gpu.errors import RanksLost
from dsml_gpu.schedules import Layout, Roles


@remembered
def without_lost(call: CollectiveCall, kept: tuple[int, ...]) -> CollectiveCall:
    """The call on the ranks that are left, numbered anew.

    Args:
        kept: ranks of the call, ascending.

    Raises:
        RanksLost: it cannot be done without the others: the root is lost, or one end of a send/recv, or it comes with a
            schedule for so many ranks.
    """
    nranks = call.roles.nranks
    if len(kept) == nranks:
        return call
    lost = sorted(set(range(nranks)) - set(kept))
    named = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}"
    if call.own_schedule:
        raise RanksLost(f"{named} of {nranks} are lost, and the schedule is for {nranks} ranks")
    if call.collective.rooted and call.roles.root in lost:
        raise RanksLost(f"root {call.roles.root} is lost")
    for pair in call.roles.pairs:
        if set(pair) & set(lost):
            raise RanksLost(f"{named} of {nranks} are lost, with one end of the send/recv {pair[0]} -> {pair[1]}")
    new_rank = {rank: number for number, rank in enumerate(kept)}
    roles = Roles(
        len(kept),
        new_rank[call.roles.root] if call.collective.rooted else 0,
        tuple((new_rank[src], new_rank[dst]) for src, dst in call.roles.pairs),
    )
    blocks = _kept_blocks(call, kept)
    return replace(
        call,
        roles=roles,
        counts=tuple(call.counts[block] for block in blocks),
        places=tuple(_places(call, rank, blocks) for rank in kept),
        ranges=tuple(call.ranges[rank] for rank in kept),
        weights=tuple(call.weights[rank] for rank in kept) if call.weights else (),
        copies_input=frozenset(new_rank[rank] for rank in call.copies_input if rank in new_rank),
    )


def _kept_blocks(call: CollectiveCall, kept: Sequence[int]) -> list[int]:
    """The old numbers of the blocks that are left, in the order of the new ones."""
    nranks = call.roles.nranks
    if call.collective.layout is Layout.PER_RANK:
        return list(kept)
    if call.collective.layout is Layout.PER_PAIR:
        return [src * nranks + dst for src in kept for dst in kept]
    return list(range(len(call.counts)))


def _places(call: CollectiveCall, rank: int, blocks: Sequence[int]) -> dict[int, Place]:
    places = call.places[rank]
    return {number: places[block] for number, block in enumerate(blocks) if block in places}
