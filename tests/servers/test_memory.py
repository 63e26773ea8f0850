"""What servers cost: many devices next to nothing, and big copies their device memory and no more once they are over.

Resident memory is read from outside, by process id. gRPC and the allocator give memory back shortly after a call has ended,
not before it ends, so what must go away is waited for, up to `RELEASE_S`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.processes import wait_until
from tests.support.rpc import GIB, MIB, Rpc, all_reduce_on, device_to_host, host_to_device, rpc_to

RELEASE_S = 10.0
#: What a server may keep after a copy of 1 GiB beside the device memory that the copy touched.
SLACK = 50 * MIB
COPY_TIMEOUT_S = 100.0
SLICE = 4 * MIB


def rss(server: ServerProcess) -> int:
    return int(psutil.Process(server.process.pid).memory_info().rss)


def own_rss(server: ServerProcess) -> int:
    """Without memory that other processes can have open, such as that of devices."""
    memory = psutil.Process(server.process.pid).memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def test_twenty_communicators_that_nobody_destroys():
    """What old clients leave behind; each has four devices of 1 GiB."""
    with ServerProcess("coordinator") as server, rpc_to(server.address) as rpc:
        all_reduce_on(rpc, rpc.comm_init(4))
        before = rss(server)
        for _ in range(20):
            comm = rpc.comm_init(4)
        all_reduce_on(rpc, comm)
        assert rss(server) - before < 100 * MIB


def test_the_memory_of_destroyed_communicators_is_given_back():
    with ServerProcess("coordinator", "--memory", "256MiB") as server, rpc_to(server.address) as rpc:
        before = rss(server)
        for _ in range(3):
            with rpc.comm(2) as comm:
                for device in comm.devices:
                    chunks = stream(device.deviceId.value, 128 * MIB)
                    rpc.coordinator.StreamHostToDevice(chunks, timeout=COPY_TIMEOUT_S)
                assert rss(server) - before > 256 * MIB
        wait_until(lambda: rss(server) - before < SLACK, "the release of 2 x 128 MiB", RELEASE_S)


@pytest.fixture(params=["embedded", "device process"])
def servers(request: pytest.FixtureRequest) -> Iterator[tuple[Rpc, list[ServerProcess]]]:
    """The coordinator, and all processes; the last one has the device."""
    if request.param == "embedded":
        with ServerProcess("coordinator", "--embedded", "1") as alone, rpc_to(alone.address) as rpc:
            yield rpc, [alone]
    else:
        with Fleet(1) as fleet, rpc_to(fleet.address) as rpc:
            yield rpc, [fleet.coordinator, *fleet.devices]


def pattern(start: int, nbytes: int) -> bytes:
    """Bytes from `start` on of a memory in which no two words of 8 bytes are equal: a piece in a wrong place is seen."""
    return np.arange(start // 8, (start + nbytes) // 8, dtype="<u8").tobytes()


def stream(device_id: int, nbytes: int) -> Iterator[pb.DataChunk]:
    yield pb.DataChunk(deviceId=pb.DeviceId(value=device_id), memAddr=pb.MemAddr(value=0), numBytes=nbytes)
    for start in range(0, nbytes, SLICE):
        yield pb.DataChunk(data=pattern(start, SLICE))


def assert_is_pattern(piece: bytes, start: int) -> None:
    words = np.frombuffer(piece, "<u8")
    assert words[0] == start // 8
    assert words[-1] == start // 8 + words.size - 1
    assert np.all(np.diff(words) == 1)


class Baseline:
    """Memory that servers have for themselves, compared with that at the beginning."""

    def __init__(self, servers: list[ServerProcess]) -> None:
        self._servers = servers
        self._before = self._own()

    def _own(self) -> int:
        # Not the resident sizes: device memory counts in each process that has it open.
        return sum(int(psutil.Process(server.process.pid).memory_full_info().uss) for server in self._servers)

    def assert_only_device_memory_is_kept(self, touched: int) -> None:
        """Asserts that all servers together have grown by no more than `touched` bytes, beside `SLACK`."""
        wait_until(
            lambda: self._own() - self._before <= touched + SLACK,
            f"growth by at most {touched / MIB:.0f} MiB and {SLACK / MIB:.0f}",
            RELEASE_S,
        )


@pytest.fixture
def device_id(servers: tuple[Rpc, list[ServerProcess]]) -> int:
    rpc, _ = servers
    (device,) = rpc.coordinator.ListDevices(pb.ListDevicesRequest(), timeout=10).devices
    return int(device.metadata.deviceId.value)


SIZES = [
    pytest.param(128 * MIB, id="128 MiB"),
    pytest.param(GIB, id="1 GiB", marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
]


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_copy_as_one_message(servers: tuple[Rpc, list[ServerProcess]], device_id: int, nbytes: int):
    rpc, processes = servers
    baseline = Baseline(processes)
    request = host_to_device(device_id, 0, pattern(0, nbytes))
    assert rpc.coordinator.Memcpy(request, timeout=COPY_TIMEOUT_S).hostToDevice.success
    del request
    response = rpc.coordinator.Memcpy(device_to_host(device_id, 0, nbytes), timeout=COPY_TIMEOUT_S)
    assert len(response.deviceToHost.dstData) == nbytes
    assert_is_pattern(response.deviceToHost.dstData, 0)
    del response
    baseline.assert_only_device_memory_is_kept(nbytes)


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_copy_as_a_stream(servers: tuple[Rpc, list[ServerProcess]], device_id: int, nbytes: int):
    rpc, processes = servers
    baseline = Baseline(processes)
    peak = 0

    def chunks() -> Iterator[pb.DataChunk]:
        nonlocal peak
        for chunk in stream(device_id, nbytes):
            yield chunk
            peak = max(peak, own_rss(processes[0]))

    before = own_rss(processes[0])
    assert rpc.coordinator.StreamHostToDevice(chunks(), timeout=COPY_TIMEOUT_S).numBytes == nbytes
    baseline.assert_only_device_memory_is_kept(nbytes)
    request = pb.StreamDeviceToHostRequest(
        deviceId=pb.DeviceId(value=device_id), memAddr=pb.MemAddr(value=0), numBytes=nbytes
    )
    received = 0
    for chunk in rpc.coordinator.StreamDeviceToHost(request, timeout=COPY_TIMEOUT_S):
        assert_is_pattern(chunk.data, received)
        received += len(chunk.data)
        peak = max(peak, own_rss(processes[0]))
    assert received == nbytes
    baseline.assert_only_device_memory_is_kept(nbytes)
    # A stream goes through the coordinator; it does not gather there. What gRPC has under way is usually 60 MiB, and at
    # times twice or three times as much, whatever the length of the stream.
    if len(processes) > 1:
        assert peak - before < max(100 * MIB, nbytes // 4)
