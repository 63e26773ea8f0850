"""What a device needs to take the place of another one."""

from __future__ import annotations

import pytest

from dsml_gpu.coordinator.call import Range, call_of
from dsml_gpu.coordinator.replacement import Allocations, blocks_of, reads_of, uncovered
from dsml_gpu.wire import gpu_sim_pb2 as pb


@pytest.mark.parametrize(
    ("needed", "ranges", "missing"),
    [
        (Range(0, 8), [], 0),
        (Range(0, 8), [Range(0, 8)], None),
        (Range(4, 8), [Range(0, 8), Range(8, 8)], None),
        (Range(4, 8), [Range(8, 8), Range(0, 8)], None),
        (Range(4, 8), [Range(0, 8), Range(9, 8)], 8),
        (Range(4, 8), [Range(5, 80)], 4),
        (Range(4, 8), [Range(0, 6), Range(2, 9)], 11),
        (Range(7, 0), [], None),
    ],
)
def test_what_is_in_no_range(needed: Range, ranges: list[Range], missing: int | None) -> None:
    assert uncovered(needed, ranges) == missing


def all_reduce(send: int, recv: int) -> pb.CollectiveRequest:
    return pb.CollectiveRequest(
        kind="ALL_REDUCE",
        counts=[64],
        buffers=[pb.RankBuffers(sendAddr=send, recvAddr=recv + 64 * rank) for rank in range(2)],
    )


def test_what_calls_read_before_they_write_it() -> None:
    calls = [call_of(request, 2) for request in (all_reduce(0, 1024), all_reduce(1024, 0), all_reduce(512, 4096))]
    assert reads_of(calls, 0) == [Range(0, 64), Range(512, 64)]
    # On rank 1 the first one's result is elsewhere.
    assert reads_of(calls, 1) == [Range(0, 64), Range(1024, 64), Range(512, 64)]
    assert reads_of([call_of(pb.CollectiveRequest(kind="BARRIER"), 2)], 0) == []


def test_what_is_allocated_is_what_was_and_what_is_saved_beside_it() -> None:
    saved = [Range(0, 100), Range(256, 100), Range(1024, 8)]
    assert blocks_of({0: 256, 1024: 64}, saved) == [Range(0, 256), Range(256, 100), Range(1024, 64)]
    assert blocks_of({}, saved) == saved


def test_allocations_are_those_of_a_communicator_on_a_device() -> None:
    allocations = Allocations()
    for comm_id, device_id, addr in ((1, 1, 0), (1, 1, 256), (1, 2, 0), (2, 1, 512), (0, 1, 768)):
        allocations.add(comm_id, device_id, addr, 100)
    allocations.remove(1, 1, 256)
    allocations.remove(7, 7, 7)
    assert allocations.of(1, 1) == {0: 100}
    assert allocations.of(0, 1) == {}, "of no communicator"
    allocations.move(1, 2, 3)
    assert (allocations.of(1, 2), allocations.of(1, 3)) == ({}, {0: 100})
    allocations.forget(1)
    assert (allocations.of(1, 1), allocations.of(1, 3), allocations.of(2, 1)) == ({}, {}, {512: 100})
