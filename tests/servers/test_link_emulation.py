"""Servers with emulated links: what they say of themselves, and that data between devices is never faster than the links."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.processes import run_to_end, running
from tests.support.rpc import CALL_TIMEOUT_S, Rpc, ring, rpc_to

pytestmark = pytest.mark.alone

LATENCY_S = 0.02
BYTES_PER_S = 10e6
LINK = ("--link-latency", "20ms", "--link-bandwidth", "80Mbit/s")
COUNT = 2_000_000
#: For two ranks: each sends as many bytes as its buffer has, in two steps of which the second ends with the last latency.
RING_S = COUNT / BYTES_PER_S + LATENCY_S


def seconds_of_ring(rpc: Rpc, comm: pb.CommInitResponse) -> float:
    """How long a second all-reduce takes; the first one has made the connections."""
    for _ in range(2):
        started_s = time.monotonic()
        rpc.coordinator.AllReduceRing(ring(comm, COUNT), timeout=CALL_TIMEOUT_S)
        elapsed_s = time.monotonic() - started_s
    return elapsed_s


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(2, ["--memory", "16MiB", *LINK, "--host-name", "far-away"]) as fleet:
        yield fleet


@pytest.fixture
def rpc(fleet: Fleet) -> Iterator[Rpc]:
    with rpc_to(fleet.address) as rpc:
        yield rpc


def test_devices_tell_of_their_links_and_hosts(fleet: Fleet, rpc: Rpc):
    with rpc.comm(2) as comm:
        for device in comm.devices:
            assert (device.linkLatencyNs, device.linkBytesPerS) == (20_000_000, 10_000_000)
            assert device.host == "far-away"
            assert device.cores == (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    assert fleet.devices[0].ready_line.rstrip().endswith("; emulated link of 80 Mbit/s and 20 ms)")
    assert "emulated" not in fleet.coordinator.ready_line


def test_devices_without_the_options_have_no_emulated_link_and_the_name_of_the_machine(tmp_path: Path):
    with running(tmp_path, "device", "--memory", "4MiB") as server, rpc_to(server.address) as rpc:
        device = rpc.device.GetDeviceMetadata(pb.GetDeviceMetadataRequest(), timeout=CALL_TIMEOUT_S).metadata
        assert (device.linkLatencyNs, device.linkBytesPerS) == (0, 0)
        assert device.host == socket.gethostname()
        assert "emulated" not in server.ready_line


def test_a_collective_between_servers_is_as_slow_as_the_links(rpc: Rpc):
    with rpc.comm(2) as comm:
        assert RING_S <= seconds_of_ring(rpc, comm) < RING_S + 2


def test_a_single_transfer_is_as_slow_as_the_link(fleet: Fleet, rpc: Rpc):
    with rpc.comm(2) as comm, rpc_to(fleet.devices[0].address) as first, rpc_to(fleet.devices[1].address) as second:
        data = os.urandom(COUNT)
        rpc.write(comm.devices[0].deviceId.value, 0, data)
        started_s = time.monotonic()
        sending = first.device.BeginSend(
            pb.BeginSendRequest(sendBuffAddr=pb.MemAddr(), numBytes=COUNT, dstRank=pb.Rank(value=1), commId=comm.commId),
            timeout=CALL_TIMEOUT_S,
        )
        second.device.BeginReceive(
            pb.BeginReceiveRequest(
                streamId=sending.streamId, recvBuffAddr=pb.MemAddr(), numBytes=COUNT, srcRank=pb.Rank(), commId=comm.commId
            ),
            timeout=CALL_TIMEOUT_S,
        )
        request = pb.GetStreamStatusRequest(streamId=sending.streamId)
        while second.device.GetStreamStatus(request, timeout=CALL_TIMEOUT_S).status == pb.IN_PROGRESS:
            time.sleep(1e-3)
        elapsed_s = time.monotonic() - started_s
        assert second.device.GetStreamStatus(request, timeout=CALL_TIMEOUT_S).status == pb.SUCCESS
        assert COUNT / BYTES_PER_S + LATENCY_S <= elapsed_s < COUNT / BYTES_PER_S + LATENCY_S + 2
        assert rpc.read(comm.devices[1].deviceId.value, 0, COUNT) == data


def test_copies_to_and_from_the_host_are_not_slowed_down(rpc: Rpc):
    with rpc.comm(2) as comm:
        started_s = time.monotonic()
        rpc.write(comm.devices[0].deviceId.value, 0, bytes(COUNT))
        rpc.read(comm.devices[0].deviceId.value, 0, COUNT)
        assert time.monotonic() - started_s < COUNT / BYTES_PER_S, "over the link it would take twice as long as that"


@pytest.mark.parametrize("transport", ["grpc", "p2p"])
def test_embedded_devices_have_links_where_they_use_grpc(transport: str):
    with (
        ServerProcess("coordinator", "--embedded", "2", "--memory", "16MiB", "--transport", transport, *LINK) as server,
        rpc_to(server.address) as rpc,
        rpc.comm(2) as comm,
    ):
        assert "emulated link of 80 Mbit/s and 20 ms" in server.ready_line
        assert {device.linkLatencyNs for device in comm.devices} == {20_000_000}
        elapsed_s = seconds_of_ring(rpc, comm)
        assert (elapsed_s >= RING_S) == (transport == "grpc")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["coordinator", "--link-latency", "100"], ["--link-latency", "'100' is not a duration such as"]),
        (["device", "--link-bandwidth", "1GB"], ["--link-bandwidth", "'1GB' is not a bandwidth such as"]),
        (["coordinator", "--link-bandwidth", "1bit/s"], ["1 byte/s or more", "not 0.125 bytes/s"]),
        (["device", "--link-bandwidth", "64kbit/s"], ["1048576 bytes takes 131 s", "stall timeout of 30 s"]),
        (["coordinator", "--link-latency", "31s"], ["takes 31 s", "stall timeout of 30 s"]),
    ],
    ids=str,
)
def test_options_that_do_not_do_are_said_clearly(arguments: list[str], words: list[str]):
    ended = run_to_end(*arguments, "--port", "0")
    assert ended.returncode != 0
    assert ended.stdout == ""
    said = " ".join(ended.stderr.split())
    for word in words:
        assert word in said
