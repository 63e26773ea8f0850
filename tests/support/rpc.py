"""Plain stubs of a running server, and the questions that every test of one asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.gpu_sim_pb2_grpc import GPUCoordinatorStub, GPUDeviceStub

#: Deadline of calls that do little. The server itself must end every call long before: where this deadline ends one,
#: the test fails, because the answer then has no "dsml-refusal".
CALL_TIMEOUT_S = 15.0
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Rpc:
    """The generated stubs of one server, without any of the project's own client code."""

    address: str
    channel: Any
    coordinator: Any
    device: Any

    def is_serving(self, service: str = "", timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """What the standard health service says."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def comm_init(self, ndevices: int, **fields: Any) -> pb.CommInitResponse:
        request = pb.CommInitRequest(numDevices=ndevices, **fields)
        response: pb.CommInitResponse = self.coordinator.CommInit(request, timeout=CALL_TIMEOUT_S)
        return response

    def comm_destroy(self, comm_id: int) -> None:
        self.coordinator.CommDestroy(pb.CommDestroyRequest(commId=comm_id), timeout=CALL_TIMEOUT_S)

    @contextmanager
    def comm(self, ndevices: int, **fields: Any) -> Iterator[pb.CommInitResponse]:
        """A communicator for the length of a block."""
        comm = self.comm_init(ndevices, **fields)
        try:
            yield comm
        finally:
            self.comm_destroy(comm.commId)

    def status(self, comm_id: int) -> pb.GetCommStatusResponse:
        request = pb.GetCommStatusRequest(commId=comm_id)
        response: pb.GetCommStatusResponse = self.coordinator.GetCommStatus(request, timeout=CALL_TIMEOUT_S)
        return response

    def write(self, device_id: int, addr: int, data: bytes, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Host to device by the unary Memcpy."""
        self.coordinator.Memcpy(host_to_device(device_id, addr, data), timeout=timeout_s)

    def read(self, device_id: int, addr: int, nbytes: int, timeout_s: float = CALL_TIMEOUT_S) -> bytes:
        """Device to host by the unary Memcpy."""
        response = self.coordinator.Memcpy(device_to_host(device_id, addr, nbytes), timeout=timeout_s)
        return bytes(response.deviceToHost.dstData)


@contextmanager
def rpc_to(address: str, max_message_bytes: int = 2**31 - 1) -> Iterator[Rpc]:
    """Stubs over a connection of their own."""
    options = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.use_local_subchannel_pool", 1),  # one connection for each channel, none shared between tests
    ]
    with grpc.insecure_channel(address, options=options) as channel:
        yield Rpc(address, channel, GPUCoordinatorStub(channel), GPUDeviceStub(channel))


def host_to_device(device_id: int, addr: int, data: bytes) -> pb.MemcpyRequest:
    return pb.MemcpyRequest(
        hostToDevice=pb.MemcpyHostToDeviceRequest(
            hostSrcData=data, dstDeviceId=pb.DeviceId(value=device_id), dstMemAddr=pb.MemAddr(value=addr)
        )
    )


def device_to_host(device_id: int, addr: int, nbytes: int) -> pb.MemcpyRequest:
    return pb.MemcpyRequest(
        deviceToHost=pb.MemcpyDeviceToHostRequest(
            srcDeviceId=pb.DeviceId(value=device_id), srcMemAddr=pb.MemAddr(value=addr), numBytes=nbytes
        )
    )


def addresses(values: Sequence[int]) -> dict[int, pb.MemAddr]:
    """``memAddrs`` of a collective: the address of each rank's buffer."""
    return {rank: pb.MemAddr(value=value) for rank, value in enumerate(values)}


def ring(comm: pb.CommInitResponse, count: int, offset: int = 0, **fields: Any) -> pb.AllReduceRingRequest:
    """A ring all-reduce of buffers `offset` bytes from the beginning of each device's memory."""
    values = [device.minMemAddr.value + offset for device in comm.devices]
    return pb.AllReduceRingRequest(commId=comm.commId, count=count, memAddrs=addresses(values), **fields)


def naive(comm: pb.CommInitResponse, count: int, offset: int = 0, **fields: Any) -> pb.NaiveAllReduceRequest:
    """As `ring`, by the naive algorithm."""
    values = [device.minMemAddr.value + offset for device in comm.devices]
    return pb.NaiveAllReduceRequest(comm_id=comm.commId, count=count, mem_addrs=addresses(values), **fields)


def all_reduce_on(rpc: Rpc, comm: pb.CommInitResponse, elements: int = 37) -> None:
    """Asserts that a communicator sums values of its ranks, and that every rank has the sum."""
    nranks = len(comm.devices)
    values = [np.arange(elements, dtype="<f8") * (rank + 1) for rank in range(nranks)]
    for device, value in zip(comm.devices, values, strict=True):
        rpc.write(device.deviceId.value, device.minMemAddr.value, value.tobytes())
    rpc.coordinator.AllReduceRing(ring(comm, elements * 8), timeout=CALL_TIMEOUT_S)
    expected = np.arange(elements) * float(nranks * (nranks + 1) // 2)
    for device in comm.devices:
        got = np.frombuffer(rpc.read(device.deviceId.value, device.minMemAddr.value, elements * 8), "<f8")
        np.testing.assert_array_equal(got, expected)


def all_reduce_works(rpc: Rpc, ndevices: int) -> None:
    """Asserts that a new communicator can be had and works."""
    with rpc.comm(ndevices) as comm:
        all_reduce_on(rpc, comm)


def refusal_of(error: grpc.RpcError) -> str | None:
    """Name in ``enum Refusal`` that came with a failed call, None where none came."""
    trailing = error.trailing_metadata() or ()
    return next((str(value) for key, value in trailing if key == "dsml-refusal"), None)


def failure_of(call: Callable[[], Any]) -> grpc.RpcError:
    """The error that a call ends with; a stream in the answer is read to its end."""

    def to_the_end() -> None:
        response = call()
        if hasattr(response, "__next__"):
            list(response)

    with pytest.raises(grpc.RpcError) as caught:
        to_the_end()
    return caught.value


def assert_refused(call: Callable[[], Any], code: str, refusal: str, words: Sequence[object] = ()) -> None:
    """Asserts that a call is refused with a code, a name and a message in which all `words` stand."""
    error = failure_of(call)
    said = f"{error.code().name}: {error.details()!r} ({refusal_of(error)})"
    assert (error.code().name, refusal_of(error)) == (code, refusal), said
    for word in words:
        assert str(word) in error.details(), f"{word} is not in {said}"
