"""What the coordinator tells the ranks, without devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from dsml_gpu.coordinator.call import CollectiveCall, call_of
from dsml_gpu.coordinator.plan import Plan, choose_transport, execute_requests, hosts_of, key_of, peers_of, plan_of
from dsml_gpu.reduction import DTYPES
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.harness import all_reduce_request


def device(device_id: int, process: str, backend: str = "numpy") -> pb.DeviceMetadata:
    return pb.DeviceMetadata(
        deviceId=pb.DeviceId(value=device_id), address=f"host:{device_id}", processUid=process, backend=backend
    )


@pytest.mark.parametrize(
    ("one", "other", "forced", "expected"),
    [
        (device(1, "a"), device(2, "a"), pb.AUTO, pb.P2P),
        (device(1, "a"), device(2, "b"), pb.AUTO, pb.GRPC),
        (device(1, "a"), device(2, "a", "cupy"), pb.AUTO, pb.GRPC),
        (device(1, ""), device(2, ""), pb.AUTO, pb.GRPC),  # device servers that tell no process share none
        (device(1, "a"), device(2, "a"), pb.GRPC, pb.GRPC),
        (device(1, "a"), device(2, "a"), pb.P2P, pb.P2P),
        (device(1, "a"), device(2, "b"), pb.P2P, pb.GRPC),  # unless all goes by passes over memory
    ],
)
def test_transport(one: pb.DeviceMetadata, other: pb.DeviceMetadata, forced: int, expected: int) -> None:
    assert choose_transport(one, other, forced) == expected
    assert choose_transport(other, one, forced) == expected


def test_transport_is_chosen_for_each_pair() -> None:
    devices = [device(1, "a"), device(2, "a"), device(3, "b")]
    assert [peer.transport for peer in peers_of(devices, 0)] == [pb.P2P, pb.P2P, pb.GRPC]
    assert [peer.transport for peer in peers_of(devices, 2)] == [pb.GRPC, pb.GRPC, pb.P2P]
    assert [(peer.deviceId, peer.address) for peer in peers_of(devices, 1)] == [(n, f"host:{n}") for n in (1, 2, 3)]


def test_hosts_are_numbered_as_they_come() -> None:
    def on(host: str, address: str = "") -> pb.DeviceMetadata:
        return pb.DeviceMetadata(host=host, address=address)

    assert hosts_of([on("b"), on("a"), on("b")]) == (0, 1, 0)
    # Device servers that do not name their host are told apart by their addresses.
    assert hosts_of([on("", "10.0.0.1:1"), on("", "10.0.0.1:2"), on("", "10.0.0.2:1")]) == (0, 0, 1)


def all_reduce(algorithm: str, addrs: Sequence[int]) -> tuple[CollectiveCall, Plan]:
    call = call_of(all_reduce_request(addrs, 80, DTYPES["FLOAT64"], algorithm=algorithm), len(addrs))
    return call, plan_of(key_of(call, algorithm, (0,) * len(addrs)))


def test_a_group_is_one_request_per_rank_with_one_stream_per_pair() -> None:
    nranks = 4
    addrs = range(0, 400, 100)
    group = [all_reduce(algorithm, addrs) for algorithm in ("ring", "naive", "ring", "ring")]
    requests = execute_requests(9, [11, 12, 13, 14], group, stall_timeout_ms=1500)
    assert [request.deviceId for request in requests] == [11, 12, 13, 14]
    streams = Counter()
    for rank, request in enumerate(requests):
        assert (request.commId, request.stallTimeoutMs) == (9, 1500)
        assert len(request.programs) == 2, "a program is shipped once however often it is used"
        assert [operation.program for operation in request.operations] == [0, 1, 0, 0]
        for operation in request.operations:
            assert [(block.count, block.sendAddr, block.recvAddr) for block in operation.blocks] == [
                (80, 100 * rank, 100 * rank)
            ]
        for link in request.links:
            streams.update(("send", rank, link.peer, link.sendStreamId) for _ in range(link.sendStreamId > 0))
            streams.update(("send", link.peer, rank, link.recvStreamId) for _ in range(link.recvStreamId > 0))
    # Each stream is named by both of its ends, and by nobody else.
    assert set(streams.values()) == {2}
    pairs = {(src, dst) for _, src, dst, _ in streams}
    ring = {(rank, (rank + 1) % nranks) for rank in range(nranks)}
    naive = {(rank, 0) for rank in range(1, nranks)} | {(0, rank) for rank in range(1, nranks)}
    assert pairs == ring | naive
    assert len({stream for *_, stream in streams}) == len(streams) == len(pairs)


def test_stream_ids_are_never_used_again() -> None:
    operation = all_reduce("ring", (0, 0))
    seen = [
        link.sendStreamId
        for _ in range(50)
        for request in execute_requests(1, [1, 2], [operation])
        for link in request.links
    ]
    assert len(set(seen)) == 100
    assert all(0 < stream < 1 << 53 for stream in seen)
