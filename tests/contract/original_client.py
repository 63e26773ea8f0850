"""A client of the original contract. It knows nothing of this project: only the stubs that protoc made of the old file.

    python original_client.py FOLDER_OF_STUBS COMMAND ARGUMENTS...

Commands: ``job COORDINATOR NRANKS``, ``sizes COORDINATOR NRANKS``, ``low-level COORDINATOR DEVICE0 DEVICE1`` (rank 0 and
rank 1), ``metadata DEVICE ID``. Each ends with a traceback where something is not as the contract says.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import grpc
import numpy as np

FOLDER, COMMAND, *ARGUMENTS = sys.argv[1:]
sys.path.insert(0, FOLDER)
pb: Any = importlib.import_module("gpu_sim_pb2")
services: Any = importlib.import_module("gpu_sim_pb2_grpc")

UFUNCS: dict[str, Any] = {"SUM": np.add, "PROD": np.multiply, "MIN": np.minimum, "MAX": np.maximum}
DEADLINE_S = 20.0


class Coordinator:
    """The calls that an old client makes."""

    def __init__(self, address: str) -> None:
        self.stub = services.GPUCoordinatorStub(grpc.insecure_channel(address))

    def comm_init(self, ndevices: int) -> Any:
        comm = self.stub.CommInit(pb.CommInitRequest(numDevices=ndevices), timeout=DEADLINE_S)
        assert comm.success
        assert comm.commId != 0
        assert len(comm.devices) == ndevices
        assert len({device.deviceId.value for device in comm.devices}) == ndevices
        for device in comm.devices:
            assert device.deviceId.value != 0
            assert device.minMemAddr.value == 0
            assert device.maxMemAddr.value - device.minMemAddr.value >= 4 << 20
        return comm

    def status(self, comm: Any) -> str:
        response = self.stub.GetCommStatus(pb.GetCommStatusRequest(commId=comm.commId), timeout=DEADLINE_S)
        return str(pb.Status.Name(response.status))

    def write(self, device_id: int, addr: int, data: bytes) -> None:
        to_device = pb.MemcpyHostToDeviceRequest(
            hostSrcData=data, dstDeviceId=pb.DeviceId(value=device_id), dstMemAddr=pb.MemAddr(value=addr)
        )
        response = self.stub.Memcpy(pb.MemcpyRequest(hostToDevice=to_device), timeout=DEADLINE_S)
        assert response.WhichOneof("either") == "hostToDevice"
        assert response.hostToDevice.success

    def read(self, device_id: int, addr: int, nbytes: int) -> bytes:
        to_host = pb.MemcpyDeviceToHostRequest(
            srcDeviceId=pb.DeviceId(value=device_id), srcMemAddr=pb.MemAddr(value=addr), numBytes=nbytes
        )
        response = self.stub.Memcpy(pb.MemcpyRequest(deviceToHost=to_host), timeout=DEADLINE_S)
        assert response.WhichOneof("either") == "deviceToHost"
        return bytes(response.deviceToHost.dstData)

    def write_all(self, comm: Any, values: list[Any], offset: int = 0) -> None:
        for device, value in zip(comm.devices, values, strict=True):
            self.write(device.deviceId.value, device.minMemAddr.value + offset, value.tobytes())

    def read_all(self, comm: Any, elements: int, offset: int = 0) -> list[Any]:
        return [
            np.frombuffer(self.read(device.deviceId.value, device.minMemAddr.value + offset, elements * 8), "<f8")
            for device in comm.devices
        ]

    def ring(self, comm: Any, count: int, op: str, offset: int = 0) -> None:
        addrs = {rank: pb.MemAddr(value=d.minMemAddr.value + offset) for rank, d in enumerate(comm.devices)}
        request = pb.AllReduceRingRequest(commId=comm.commId, count=count, op=op, memAddrs=addrs)
        assert self.stub.AllReduceRing(request, timeout=DEADLINE_S).success

    def naive(self, comm: Any, count: int, op: str, offset: int = 0) -> None:
        addrs = {rank: pb.MemAddr(value=d.minMemAddr.value + offset) for rank, d in enumerate(comm.devices)}
        request = pb.NaiveAllReduceRequest(comm_id=comm.commId, count=count, op=op, mem_addrs=addrs)
        assert self.stub.NaiveAllReduce(request, timeout=DEADLINE_S).success


def values_of(nranks: int, elements: int, seed: int) -> list[Any]:
    """Whole numbers, so that every order of reduction gives the same bits."""
    generator = np.random.default_rng(seed)
    return [generator.integers(-5, 6, elements).astype("<f8") for _ in range(nranks)]


def job(address: str, nranks_text: str) -> None:
    nranks = int(nranks_text)
    coordinator = Coordinator(address)
    comm = coordinator.comm_init(nranks)
    assert coordinator.status(comm) == "IN_PROGRESS"
    elements = 10_007
    values = values_of(nranks, elements, seed=1)
    coordinator.write_all(comm, values)
    assert coordinator.status(comm) == "IN_PROGRESS"

    assert coordinator.stub.GroupStart(pb.GroupStartRequest(commId=comm.commId), timeout=DEADLINE_S).success
    coordinator.ring(comm, elements * 8, "SUM")
    # Queued only: nothing has run.
    assert coordinator.status(comm) == "IN_PROGRESS"
    for got, value in zip(coordinator.read_all(comm, elements), values, strict=True):
        np.testing.assert_array_equal(got, value)
    assert coordinator.stub.GroupEnd(pb.GroupEndRequest(commId=comm.commId), timeout=DEADLINE_S).success
    assert coordinator.status(comm) == "SUCCESS"
    for got in coordinator.read_all(comm, elements):
        np.testing.assert_array_equal(got, sum(values))

    coordinator.naive(comm, elements * 8, "SUM")
    assert coordinator.status(comm) == "SUCCESS"
    for got in coordinator.read_all(comm, elements):
        np.testing.assert_array_equal(got, nranks * sum(values))

    # The two algorithms in one group, on different buffers.
    other = values_of(nranks, elements, seed=2)
    coordinator.write_all(comm, values)
    coordinator.write_all(comm, other, offset=1 << 20)
    coordinator.stub.GroupStart(pb.GroupStartRequest(commId=comm.commId), timeout=DEADLINE_S)
    coordinator.ring(comm, elements * 8, "MAX")
    coordinator.naive(comm, elements * 8, "MIN", offset=1 << 20)
    coordinator.stub.GroupEnd(pb.GroupEndRequest(commId=comm.commId), timeout=DEADLINE_S)
    for got in coordinator.read_all(comm, elements):
        np.testing.assert_array_equal(got, reduce(np.maximum, values))
    for got in coordinator.read_all(comm, elements, offset=1 << 20):
        np.testing.assert_array_equal(got, reduce(np.minimum, other))


def sizes(address: str, nranks_text: str) -> None:
    nranks = int(nranks_text)
    coordinator = Coordinator(address)
    comm = coordinator.comm_init(nranks)
    counts = sorted({0, 1, 2, nranks - 1, nranks, nranks + 1, 1000, 1021})
    guard = np.full(1, 12345.0)
    for (op, ufunc), elements, algorithm in itertools.product(UFUNCS.items(), counts, (coordinator.ring, coordinator.naive)):
        values = values_of(nranks, elements, seed=elements)
        coordinator.write_all(comm, [np.concatenate([guard, value, guard]) for value in values])
        algorithm(comm, elements * 8, op, offset=8)
        expected = np.concatenate([guard, reduce(ufunc, values), guard])
        for rank, got in enumerate(coordinator.read_all(comm, elements + 2)):
            np.testing.assert_array_equal(got, expected, f"{op} of {elements} elements, rank {rank}")


def low_level(address: str, *device_addresses: str) -> None:
    coordinator = Coordinator(address)
    devices = [services.GPUDeviceStub(grpc.insecure_channel(device)) for device in device_addresses]
    ids = []
    for device in devices:
        metadata = device.GetDeviceMetadata(pb.GetDeviceMetadataRequest(), timeout=DEADLINE_S).metadata
        assert metadata.minMemAddr.value == 0
        assert metadata.maxMemAddr.value >= 4 << 20
        ids.append(metadata.deviceId.value)

    def begin_send(rank: int, addr: int, nbytes: int) -> int:
        request = pb.BeginSendRequest(sendBuffAddr=pb.MemAddr(value=addr), numBytes=nbytes, dstRank=pb.Rank(value=1 - rank))
        response = devices[rank].BeginSend(request, timeout=DEADLINE_S)
        assert response.initiated
        assert response.streamId.value != 0
        return int(response.streamId.value)

    def begin_receive(rank: int, stream_id: int, addr: int, nbytes: int) -> None:
        request = pb.BeginReceiveRequest(
            streamId=pb.StreamId(value=stream_id),
            recvBuffAddr=pb.MemAddr(value=addr),
            numBytes=nbytes,
            srcRank=pb.Rank(value=1 - rank),
        )
        assert devices[rank].BeginReceive(request, timeout=DEADLINE_S).initiated

    def end_of(rank: int, stream_id: int) -> str:
        request = pb.GetStreamStatusRequest(streamId=pb.StreamId(value=stream_id))
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            status = devices[rank].GetStreamStatus(request, timeout=DEADLINE_S).status
            if status != pb.IN_PROGRESS:
                return str(pb.Status.Name(status))
            time.sleep(0.01)
        raise AssertionError(f"stream {stream_id} is IN_PROGRESS for ever at rank {rank}")

    def ends_of(stream_id: int) -> tuple[str, str]:
        return end_of(0, stream_id), end_of(1, stream_id)

    def check(what: str, scenario: Callable[[], None]) -> None:
        print(what, flush=True)
        scenario()

    generator = np.random.default_rng(3)

    def one_transfer_each_way() -> None:
        for src, nbytes in ((0, 1), (1, 8), (0, 3_000_001), (1, 0)):
            data = generator.bytes(nbytes)
            coordinator.write(ids[src], 100, data)
            coordinator.write(ids[1 - src], 0, bytes(nbytes + 200))
            stream_id = begin_send(src, 100, nbytes)
            begin_receive(1 - src, stream_id, 55, nbytes)
            assert ends_of(stream_id) == ("SUCCESS", "SUCCESS")
            # Nothing before or behind the buffer is touched.
            assert coordinator.read(ids[1 - src], 0, nbytes + 200) == bytes(55) + data + bytes(145)

    def many_at_a_time() -> None:
        size, number = 70_000, 20
        data = [generator.bytes(size) for _ in range(number)]
        coordinator.write(ids[0], 0, b"".join(data))
        streams = [begin_send(0, index * size, size) for index in range(number)]
        for index in reversed(range(number)):
            begin_receive(1, streams[index], index * size, size)
        for stream_id in streams:
            assert ends_of(stream_id) == ("SUCCESS", "SUCCESS")
        assert coordinator.read(ids[1], 0, number * size) == b"".join(data)

    def lengths_differ() -> None:
        for sent, expected in ((100, 60), (60, 100), (0, 5), (5, 0), (3_000_000, 2_000_000)):
            stream_id = begin_send(0, 0, sent)
            begin_receive(1, stream_id, 0, expected)
            assert ends_of(stream_id) == ("FAILED", "FAILED"), (sent, expected)

    def nobody_at_the_other_end() -> None:
        unsent, unreceived = 4711, begin_send(0, 0, 2_000_000)
        begin_receive(1, unsent, 0, 8)
        assert end_of(0, unreceived) == "FAILED"
        assert end_of(1, unsent) == "FAILED"

    def an_own_stream_send() -> None:
        """What a device server of the original contract does: its chunks name no stream."""
        data = generator.bytes(300_000)

        def chunks() -> Iterator[Any]:
            for start in range(0, len(data), 100_000):
                yield pb.DataChunk(data=data[start : start + 100_000])

        begin_receive(1, 8899, 64, len(data))
        assert devices[1].StreamSend(chunks(), timeout=DEADLINE_S).success
        assert end_of(1, 8899) == "SUCCESS"
        assert coordinator.read(ids[1], 64, len(data)) == data

    check("one transfer each way", one_transfer_each_way)
    check("many at a time", many_at_a_time)
    check("lengths differ", lengths_differ)
    check("nobody at the other end", nobody_at_the_other_end)
    check("an own StreamSend", an_own_stream_send)


def metadata(device: str, device_id: str) -> None:
    """A device server has one device, as far as an old client knows."""
    stub = services.GPUDeviceStub(grpc.insecure_channel(device))
    answer = stub.GetDeviceMetadata(pb.GetDeviceMetadataRequest(), timeout=DEADLINE_S).metadata
    assert answer.deviceId.value == int(device_id)
    assert answer.maxMemAddr.value - answer.minMemAddr.value >= 4 << 20


{"job": job, "sizes": sizes, "low-level": low_level, "metadata": metadata}[COMMAND](*ARGUMENTS)
