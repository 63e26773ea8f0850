"""Who has whose memory open, and the fence around ranks that were given up, without devices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest

from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.memory_access import MemoryAccess
from dsml_gpu.errors import DsmlError, InvalidValue, MemoryNotShared, NoAnswer, OutOfMemory
from dsml_gpu.wire import gpu_sim_pb2 as pb


class FakeDevice:
    """A device server with one device; its memory is somewhere else after each move."""

    lane = None
    tells_of_its_end = True

    def __init__(self, device_id: int, process: str) -> None:
        self.place = device_id << 32
        self.calls: list[str] = []
        self.failures: dict[str, DsmlError] = {}
        self.unreachable: list[int] = []
        #: ShareMemory waits for the first of them.
        self.gates: list[asyncio.Event] = []
        self.handle = DeviceHandle(self, f"host:{device_id}")  # type: ignore[arg-type]
        self.handle.update(
            pb.DeviceMetadata(deviceId=pb.DeviceId(value=device_id), processUid=process, host="here", backend="numpy")
        )

    async def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        assert timeout_s is not None
        name = "move" if method == "ShareMemory" and request.move else method
        self.calls.append(name)
        if name in self.failures:
            raise self.failures[name]
        if method == "ShareMemory":
            if self.gates:
                await self.gates.pop(0).wait()
            self.place += request.move
            return pb.SharedMemory(offset=self.place, numBytes=8)
        if method == "JoinComm":
            response = pb.JoinCommResponse()
            for rank, peer in enumerate(request.peers):
                if rank in self.unreachable or not (peer.transport == pb.P2P or peer.HasField("sharedMemory")):
                    response.unreachable.add(rank=rank, reason="out of reach")
            return response
        assert method == "Quiesce"
        return pb.QuiesceResponse()


def in_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 20))

    return run


def handles_of(*devices: FakeDevice) -> list[DeviceHandle]:
    return [device.handle for device in devices]


async def joined(*devices: FakeDevice, comm_id: int = 1, forced: int = pb.AUTO) -> MemoryAccess:
    access = MemoryAccess(forced)
    await access.join(comm_id, handles_of(*devices))
    for device in devices:
        device.calls.clear()
    return access


async def some_turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@in_event_loop
async def test_two_that_join_at_the_same_time_both_open_all() -> None:
    one, two = FakeDevice(1, "a"), FakeDevice(2, "b")
    slow, slower = asyncio.Event(), asyncio.Event()
    two.gates = [slow, slower]
    first = asyncio.ensure_future(joined(one, two))
    await some_turns()
    assert one.handle.shared is not None, "the first device has answered"
    one.gates = [slower]
    second = asyncio.ensure_future(joined(one, two, comm_id=2))
    await some_turns()
    slow.set()
    assert (await first).all_open
    slower.set()
    assert (await second).all_open


@in_event_loop
async def test_only_memory_that_has_moved_makes_others_join_again() -> None:
    one, two, three = FakeDevice(1, "a"), FakeDevice(2, "b"), FakeDevice(3, "b")
    access = await joined(one, two)
    # Another communicator with the same devices, one that uses gRPC, and one within a process.
    await joined(two, one, comm_id=2)
    await joined(two, one, comm_id=3, forced=pb.GRPC)
    inside = await joined(two, three, comm_id=4)
    assert inside.all_open
    assert not access.has_moved(handles_of(one, two))
    await two.handle.share_memory(move=True)
    assert access.has_moved(handles_of(one, two))
    assert not inside.has_moved(handles_of(two, three))
    await access.join(1, handles_of(one, two))
    assert not access.has_moved(handles_of(one, two))


@in_event_loop
async def test_ranks_that_stop_when_asked_cost_the_others_nothing() -> None:
    devices = [FakeDevice(number, str(number)) for number in (1, 2, 3)]
    access = await joined(*devices)
    await access.fence(1, handles_of(*devices), [0, 2])
    assert [device.calls for device in devices] == [["Quiesce"], [], ["Quiesce"]]
    assert not access.has_moved(handles_of(*devices))


@in_event_loop
async def test_ranks_that_do_not_answer_lose_the_memory_of_all_others(caplog: pytest.LogCaptureFixture) -> None:
    devices = [FakeDevice(number, str(number)) for number in (1, 2, 3, 4)]
    access = await joined(*devices)
    for lost in (0, 2):
        devices[lost].failures["Quiesce"] = NoAnswer("frozen")
    await access.fence(1, handles_of(*devices), [0, 1, 2])
    assert [device.calls for device in devices] == [["Quiesce"], ["Quiesce", "move"], ["Quiesce"], ["move"]]
    assert access.has_moved(handles_of(*devices))
    assert "device 1 at host:1, device 3 at host:3 may still write" in caplog.text


@in_event_loop
async def test_who_cannot_be_kept_from_being_written_to_is_given_up() -> None:
    devices = [FakeDevice(number, str(number)) for number in (1, 2, 3)]
    access = await joined(*devices)
    devices[0].failures["Quiesce"] = NoAnswer("frozen")
    devices[1].failures["move"] = OutOfMemory("full")
    await access.fence(1, handles_of(*devices), [0])
    assert devices[2].calls == ["move"]
    assert "its memory did not move: full" in devices[1].handle.lost
    assert not devices[2].handle.lost
    assert access.has_moved(handles_of(*devices))


@pytest.mark.parametrize("forced", [pb.AUTO, pb.P2P])
@pytest.mark.parametrize(
    ("failure", "unreachable", "why"),
    [
        (MemoryNotShared("told not to"), [], "device 2 at host:2 does not share its memory: told not to"),
        (None, [0], "device 2 at host:2 cannot open the memory of device 1 at host:1: out of reach"),
    ],
)
@in_event_loop
async def test_why_memory_is_not_open_is_said_once(
    caplog: pytest.LogCaptureFixture, forced: int, failure: DsmlError | None, unreachable: list[int], why: str
) -> None:
    one, two = FakeDevice(1, "a"), FakeDevice(2, "b")
    if failure is not None:
        two.failures["ShareMemory"] = failure
    two.unreachable = unreachable
    access = MemoryAccess(forced)
    if forced == pb.P2P:
        with pytest.raises(InvalidValue, match=f"p2p is not possible between these devices: {why}"):
            await access.join(7, handles_of(one, two))
        assert not caplog.records
    else:
        await access.join(7, handles_of(one, two))
        assert [record.getMessage() for record in caplog.records] == [f"communicator 7 uses gRPC: {why}"]
    assert not access.all_open
    assert not access.has_moved(handles_of(one, two))


@in_event_loop
async def test_one_that_does_not_answer_cannot_join() -> None:
    one, two = FakeDevice(1, "a"), FakeDevice(2, "b")
    two.failures["ShareMemory"] = NoAnswer("frozen")
    with pytest.raises(NoAnswer, match="device 2 at host:2"):
        await joined(one, two)
