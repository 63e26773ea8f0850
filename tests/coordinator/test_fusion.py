"""Which operations of a group travel as one."""

from __future__ import annotations

from typing import Any

import pytest

from dsml_gpu.coordinator import fusion
from dsml_gpu.coordinator.call import CollectiveCall, call_of
from dsml_gpu.wire import gpu_sim_pb2 as pb

NRANKS = 3
KIB = 1 << 10


def call(addr: int, count: int = 64, **fields: Any) -> CollectiveCall:
    """By default an all-reduce in place."""
    kind = fields.pop("kind", pb.CollectiveRequest.ALL_REDUCE)
    buffers = [pb.RankBuffers(sendAddr=addr, recvAddr=addr) for _ in range(NRANKS)]
    return call_of(pb.CollectiveRequest(kind=kind, counts=[count], buffers=buffers, **fields), NRANKS)


def sizes(*calls: CollectiveCall) -> list[int]:
    return [len(bucket) for bucket in fusion.buckets_of(calls)]


def test_neighbours_that_differ_only_in_place_and_size() -> None:
    assert sizes(*(call(1024 * number, 8 * number) for number in range(1, 20))) == [19]


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": pb.FLOAT32},
        {"op": pb.MAX},
        {"algorithm": "ring"},
        {"weights": [1.0, 2.0, 3.0]},
        {"kind": pb.CollectiveRequest.BROADCAST},
        {"kind": pb.CollectiveRequest.REDUCE},
    ],
    ids=lambda other: next(iter(other)),
)
def test_neighbours_that_differ_otherwise_are_not_fused(other: dict[str, Any]) -> None:
    assert sizes(call(0), call(1024, **other), call(2048, **other), call(4096)) == [1, 2, 1]


def test_roots_must_be_the_same() -> None:
    broadcast = {"kind": pb.CollectiveRequest.BROADCAST}
    assert sizes(call(0, **broadcast), call(1024, root=1, **broadcast), call(2048, root=1, **broadcast)) == [1, 2]


def test_one_that_reads_what_another_writes_is_not_fused_with_it() -> None:
    assert sizes(call(0), call(1024), call(32), call(2048)) == [2, 2]


def test_large_ones_go_alone() -> None:
    large = fusion.MAX_FUSED_BYTES + 8
    assert sizes(call(0), call(1 << 20, large), call(4 << 20), call(5 << 20)) == [1, 1, 2]


def test_a_bucket_has_a_limit() -> None:
    count = fusion.MAX_FUSED_BYTES
    full = fusion.MAX_BUCKET_BYTES // count
    assert sizes(*(call(number * count, count) for number in range(2 * full + 1))) == [full, full, 1]


def test_the_fused_call_has_the_bytes_of_its_parts() -> None:
    parts = [call(0, 8), call(64, 24), call(128, 0)]
    bucket = fusion.fused(parts)
    assert bucket.counts == (32,)
    assert bucket.parts == tuple(parts)
    assert bucket.count == 24, "of the largest buffer"
    assert fusion.fused(parts[:1]) is parts[0]
