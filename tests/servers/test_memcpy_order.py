"""Stream order: work on a device happens in the order in which it was issued, and only there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.coordinator.server import CoordinatorConfig, CoordinatorServer
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.rpc import (
    CALL_TIMEOUT_S,
    MIB,
    Rpc,
    addresses,
    all_reduce_on,
    device_to_host,
    host_to_device,
    ring,
    rpc_to,
)
from tests.support.slow_copy import SlowCopy

BIG = 24 * MIB
ELEMENTS = BIG // 8


@pytest.fixture(scope="module", params=["embedded", "fleet"])
def rpc(request: pytest.FixtureRequest) -> Iterator[Rpc]:
    if request.param == "embedded":
        with ServerProcess("coordinator", "--memory", "64MiB", "--embedded", "3") as alone, rpc_to(alone.address) as rpc:
            yield rpc
    else:
        with Fleet(3, ["--memory", "64MiB"]) as fleet, rpc_to(fleet.address) as rpc:
            yield rpc


@pytest.fixture
def pair(rpc: Rpc) -> Iterator[pb.CommInitResponse]:
    with rpc.comm(2) as comm:
        yield comm


def ids(comm: pb.CommInitResponse) -> list[int]:
    return [device.deviceId.value for device in comm.devices]


class HeldGroup:
    """A non-blocking group of one big all-reduce of ones, which cannot begin before `let_go` because a copy is ahead.

    It is issued when the constructor returns. The copy writes ones, to the first device.
    """

    def __init__(self, rpc: Rpc, comm: pb.CommInitResponse) -> None:
        ones = np.ones(ELEMENTS).tobytes()
        for device_id in ids(comm):
            rpc.write(device_id, 0, ones)
        self._rest = ones[8:]
        self._copy = SlowCopy(rpc.coordinator, comm.devices[0], BIG)
        rpc.coordinator.GroupStart(pb.GroupStartRequest(commId=comm.commId), timeout=CALL_TIMEOUT_S)
        rpc.coordinator.AllReduceRing(ring(comm, BIG), timeout=CALL_TIMEOUT_S)
        request = pb.GroupEndRequest(commId=comm.commId, nonBlocking=True)
        rpc.coordinator.GroupEnd(request, timeout=CALL_TIMEOUT_S)
        assert rpc.status(comm.commId).status == pb.IN_PROGRESS

    def let_go(self) -> None:
        self._copy.finish(self._rest)


def test_a_copy_to_host_sees_the_result_of_a_group_issued_before(rpc: Rpc, pair: pb.CommInitResponse):
    last = pair.devices[1]
    group = HeldGroup(rpc, pair)
    read = rpc.coordinator.Memcpy.future(device_to_host(last.deviceId.value, BIG - 8, 8), timeout=CALL_TIMEOUT_S)
    request = pb.StreamDeviceToHostRequest(deviceId=last.deviceId, memAddr=pb.MemAddr(value=BIG - 8), numBytes=8)
    stream = rpc.coordinator.StreamDeviceToHost(request, timeout=CALL_TIMEOUT_S)
    group.let_go()
    assert np.frombuffer(read.result().deviceToHost.dstData, "<f8") == 2.0
    assert np.frombuffer(b"".join(chunk.data for chunk in stream), "<f8") == 2.0


def test_a_copy_to_the_device_does_not_change_the_input_of_a_group_issued_before(rpc: Rpc, pair: pb.CommInitResponse):
    one, two = ids(pair)
    group = HeldGroup(rpc, pair)
    data = np.full(ELEMENTS, 100.0).tobytes()
    written = rpc.coordinator.Memcpy.future(host_to_device(two, 0, data), timeout=CALL_TIMEOUT_S)
    group.let_go()
    assert written.result().hostToDevice.success
    assert np.all(np.frombuffer(rpc.read(one, 8, BIG - 8), "<f8") == 2.0)
    assert np.all(np.frombuffer(rpc.read(two, 0, BIG), "<f8") == 100.0)


def test_a_collective_sees_a_copy_issued_before(rpc: Rpc, pair: pb.CommInitResponse):
    one, two = ids(pair)
    rpc.write(two, 0, bytes(BIG))
    slow = SlowCopy(rpc.coordinator, pair.devices[0], BIG)
    result = rpc.coordinator.AllReduceRing.future(ring(pair, BIG - 8, offset=8), timeout=CALL_TIMEOUT_S)
    slow.finish(np.full(ELEMENTS - 1, 3.0).tobytes())
    assert result.result().success
    for device in (one, two):
        assert np.all(np.frombuffer(rpc.read(device, 8, BIG - 8), "<f8") == 3.0)


def test_the_place_in_the_order_is_taken_when_a_call_comes_in():
    """Calls that come in together, as of a client that does not wait for each answer. Over a connection gRPC itself may
    change their order now and then, so this one calls the service.
    """

    async def scenario() -> None:
        server = CoordinatorServer(CoordinatorConfig(port=0, memory_bytes=4 * MIB))
        await server.start()
        try:
            service = server._service
            comm = await service.CommInit(pb.CommInitRequest(numDevices=2), None)
            one, two = ids(comm)
            data = np.ones(100).tobytes()
            # Tasks begin in the order in which they are made.
            tasks = [
                asyncio.create_task(call)
                for call in (
                    service.Memcpy(host_to_device(one, 0, data), None),
                    service.Memcpy(host_to_device(two, 0, data), None),
                    service.AllReduceRing(ring(comm, 800), None),
                    service.Memcpy(device_to_host(two, 0, 800), None),
                )
            ]
            results: list[Any] = await asyncio.gather(*tasks)
            got = np.frombuffer(results[-1].deviceToHost.dstData, "<f8")
            np.testing.assert_array_equal(got, np.full(100, 2.0))
        finally:
            await server.stop()

    asyncio.run(scenario())


def test_other_devices_do_not_wait(rpc: Rpc, pair: pb.CommInitResponse):
    with rpc.comm(1) as other:
        slow = SlowCopy(rpc.coordinator, pair.devices[0], 800)
        # Nothing of this would end while the copy holds everybody up.
        rpc.write(ids(other)[0], 0, b"12345678")
        assert rpc.read(ids(other)[0], 0, 8) == b"12345678"
        all_reduce_on(rpc, other)
        rpc.write(ids(pair)[1], 0, b"87654321")
        assert rpc.read(ids(pair)[1], 0, 8) == b"87654321"
        slow.finish()


def test_a_copy_that_is_given_up_leaves_its_place(rpc: Rpc, pair: pb.CommInitResponse):
    slow = SlowCopy(rpc.coordinator, pair.devices[0], 800)
    waiting = rpc.coordinator.AllReduceRing.future(ring(pair, 800), timeout=CALL_TIMEOUT_S)
    slow.give_up()
    assert waiting.result().success
    all_reduce_on(rpc, pair)


def test_a_copy_to_host_that_nobody_reads_to_its_end_leaves_its_place(rpc: Rpc, pair: pb.CommInitResponse):
    request = pb.StreamDeviceToHostRequest(
        deviceId=pb.DeviceId(value=ids(pair)[0]), memAddr=pb.MemAddr(value=0), numBytes=64 * MIB
    )
    answer = rpc.coordinator.StreamDeviceToHost(request, timeout=CALL_TIMEOUT_S)
    assert len(next(answer).data) > 0
    answer.cancel()
    all_reduce_on(rpc, pair)


def test_an_operation_that_is_given_up_while_it_waits_leaves_its_place(rpc: Rpc, pair: pb.CommInitResponse):
    one, two = ids(pair)
    rpc.write(two, 0, bytes(800))
    slow = SlowCopy(rpc.coordinator, pair.devices[0], 800)
    given_up = rpc.coordinator.AllReduceRing.future(ring(pair, 792, offset=8), timeout=0.3)
    with pytest.raises(grpc.RpcError):
        given_up.result()
    # What comes after it must still come after the copy.
    result = rpc.coordinator.AllReduceRing.future(ring(pair, 792, offset=8), timeout=CALL_TIMEOUT_S)
    slow.finish(np.full(99, 7.0).tobytes())
    assert result.result().success
    for device in (one, two):
        np.testing.assert_array_equal(np.frombuffer(rpc.read(device, 8, 792), "<f8"), np.full(99, 7.0))


def test_communicators_that_share_devices_in_opposite_order_do_not_deadlock(rpc: Rpc):
    with rpc.comm(3) as forward, rpc.comm(3, deviceIds=list(reversed(ids(forward)))) as backward:
        elements, rounds = 20_000, 12
        for device_id in ids(forward):
            rpc.write(device_id, 0, np.ones(2 * elements).tobytes())

        def reduce(comm: pb.CommInitResponse, offset: int) -> None:
            request = pb.AllReduceRingRequest(
                commId=comm.commId, count=elements * 8, memAddrs=addresses([offset] * 3), op=pb.AVG
            )
            for _ in range(rounds):
                rpc.coordinator.AllReduceRing(request, timeout=CALL_TIMEOUT_S)

        with ThreadPoolExecutor(4) as threads:
            for done in [
                threads.submit(reduce, comm, offset) for comm in (forward, backward) for offset in (0, elements * 8)
            ]:
                done.result()
        for device_id in ids(forward):
            assert np.all(np.frombuffer(rpc.read(device_id, 0, 2 * elements * 8), "<f8") == 1.0)
