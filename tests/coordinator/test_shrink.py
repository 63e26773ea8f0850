"""Collectives without the ranks that are lost."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dsml_gpu.coordinator.call import CollectiveCall, call_of
from dsml_gpu.coordinator.passes import passes_of
from dsml_gpu.coordinator.shrink import without_lost
from dsml_gpu.errors import RanksLost
from dsml_gpu.reduction import dtype_of
from dsml_gpu.schedules import COLLECTIVES
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.oracle import Memory, layout, reduced
from tests.coordinator.test_passes import MOVING, random_case, run


def expected(call: CollectiveCall, kept: tuple[int, ...], before: list[np.ndarray]) -> list[np.ndarray]:
    """By the specification: what takers that are left get is of the holders that are left, where they would have got it."""
    after = [memory.copy() for memory in before]
    dtype, roles = dtype_of(call.dtype), call.roles
    for block, count in enumerate(call.counts):
        holders = [rank for rank in call.collective.holders(roles, block) if rank in kept]
        sources = []
        for rank in holders:
            start = call.places[rank][block].send
            assert start is not None
            sources.append(before[rank][start : start + count].view(dtype))
        if not sources:
            continue
        weights = tuple(call.weights[rank] for rank in holders) if call.weights else ()
        result = reduced(sources, pb.ReduceOp.Name(call.op), weights) if call.collective.reduces else sources[0]
        for rank in call.collective.takers(roles, block):
            if rank in kept:
                start = call.places[rank][block].recv
                assert start is not None
                after[rank][start : start + count] = result.view(np.uint8)
    return after


@pytest.mark.parametrize("collective", MOVING)
def test_those_that_are_left_get_what_they_have_among_them(collective: str) -> None:
    generator = random.Random(collective)
    shrunk = 0
    for _ in range(100):
        case = random_case(collective, generator)
        memories = [Memory() for _ in range(case.nranks)]
        call = call_of(layout(case, memories), case.nranks)
        kept = tuple(rank for rank in range(case.nranks) if generator.random() < 0.7)
        named = {call.roles.root} if call.collective.rooted else {rank for pair in call.roles.pairs for rank in pair}
        if not kept or not named <= {*kept}:
            continue
        shrunk += len(kept) < case.nranks
        before = [np.frombuffer(bytes(memory.before), np.uint8) for memory in memories]
        actual = [before[rank].copy() for rank in kept]
        less = without_lost(call, kept)
        assert less.roles.nranks == len(kept)
        assert less.ranges == tuple(call.ranges[rank] for rank in kept)
        for one in passes_of(less):
            run(one, actual)
        for rank, now in zip(kept, actual, strict=True):
            np.testing.assert_array_equal(now, expected(call, kept, before)[rank], err_msg=f"{case}: {kept}, rank {rank}")
    assert shrunk >= (3 if collective == "send_recv" else 20)


def test_nothing_is_made_anew_where_all_are_left() -> None:
    buffers = [pb.RankBuffers(sendAddr=0, recvAddr=0)] * 3
    call = call_of(pb.CollectiveRequest(kind="ALL_REDUCE", counts=[8], buffers=buffers), 3)
    assert without_lost(call, (0, 1, 2)) is call
    assert without_lost(call, (0, 2)) is without_lost(call, (0, 2)), "what follows is remembered by the call"


@pytest.mark.parametrize("collective", sorted(name for name, one in COLLECTIVES.items() if one.rooted))
def test_what_needs_a_lost_root_fails(collective: str) -> None:
    buffers = [pb.RankBuffers(sendAddr=0, recvAddr=1024)] * 3
    call = call_of(pb.CollectiveRequest(kind=collective.upper(), counts=[8], buffers=buffers, root=1), 3)
    with pytest.raises(RanksLost, match="root 1 is lost"):
        without_lost(call, (0, 2))
    assert without_lost(call, (1, 2)).roles.root == 0


def test_a_send_to_or_from_a_lost_rank_fails() -> None:
    sends = [pb.SendRecv(src=0, dst=2, count=8, sendAddr=0, recvAddr=64)]
    call = call_of(pb.CollectiveRequest(kind="SEND_RECV", sendRecvs=sends), 4)
    with pytest.raises(RanksLost, match=r"rank 2 of 4 are lost, with one end of the send/recv 0 -> 2"):
        without_lost(call, (0, 1, 3))
    assert without_lost(call, (0, 2, 3)).roles.pairs == ((0, 1),)


def test_a_schedule_of_ones_own_is_for_its_number_of_ranks() -> None:
    buffers = [pb.RankBuffers(sendAddr=0, recvAddr=0)] * 3
    schedule = pb.Schedule(algorithm="mine", parts=1)
    request = pb.CollectiveRequest(kind="ALL_REDUCE", counts=[8], buffers=buffers, schedule=schedule)
    with pytest.raises(RanksLost, match="ranks 0, 1 of 3 are lost, and the schedule is for 3 ranks"):
        without_lost(call_of(request, 3), (2,))
