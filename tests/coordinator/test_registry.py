"""What the coordinator makes of the answers of device servers, without servers."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Coroutine
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from dsml_gpu.coordinator.embedded import DeviceService, EmbeddedDevices, TransferSettings
from dsml_gpu.coordinator.registry import DeviceRegistry
from dsml_gpu.coordinator.server_handle import ServerHandle
from dsml_gpu.errors import DeviceNotFound, NoAnswer, PeerUnavailable, Unavailable
from dsml_gpu.memory.backend import NUMPY
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.lane import Lane


class FakeServer:
    """A device server that answers with the devices it has just now, and notes what it was asked.

    Attributes:
        ids: of its devices; None: it does not answer.
        lists_them: false for a server that knows only the original contract.
    """

    def __init__(self, *ids: int) -> None:
        self.ids: tuple[int, ...] | None = ids
        self.lists_them = True
        self.failure: Exception = Unavailable("nobody there")
        self.calls: list[str] = []
        self.left: list[tuple[int, int]] = []
        self.tells_of_its_end = False
        self.lane: Lane | None = None
        self.on_lane_end: Callable[[], None] = lambda: None

    async def open_lane(self, name: str) -> None:
        assert name == ""

    def close(self) -> None:
        raise AssertionError

    async def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        self.calls.append(method)
        await asyncio.sleep(0)
        if self.ids is None:
            raise self.failure
        if method == "Quiesce":
            return pb.QuiesceResponse()
        if method == "LeaveComm":
            self.left.append((request.deviceId, request.commId))
            return pb.LeaveCommResponse()
        assert method == "GetDeviceMetadata"
        devices = [
            pb.DeviceMetadata(deviceId=pb.DeviceId(value=device_id), address="elsewhere", host="a name of some length" * 5)
            for device_id in self.ids
        ]
        return pb.GetDeviceMetadataResponse(metadata=devices[0], devices=devices if self.lists_them else [])

    def write(self, chunks: Any) -> Any:
        raise AssertionError

    def read(self, request: Any, loss: Any) -> Any:
        raise AssertionError

    def stream(self, method: str, request: Any) -> Any:
        raise AssertionError


def in_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


def registry_of(*servers: FakeServer) -> DeviceRegistry:
    embedded = EmbeddedDevices(DeviceService("here:1", TransferSettings()), 0, 4 << 20, [NUMPY])
    registry = DeviceRegistry([], embedded, 1.0)
    registry.servers += [ServerHandle(server, f"host:{number}") for number, server in enumerate(servers, 1)]
    return registry


def state(registry: DeviceRegistry) -> list[tuple[int, str, bool]]:
    for handle in registry.handles:
        assert handle.metadata.address == handle.address
    return [(handle.device_id, handle.address, handle.reachable) for handle in registry.handles]


@in_event_loop
async def test_a_refresh_is_one_call_to_each_server() -> None:
    servers = FakeServer(1, 2, 3), FakeServer(4, 5)
    registry = registry_of(*servers)
    for _ in range(2):
        await registry.refresh()
    assert [server.calls for server in servers] == [["GetDeviceMetadata"] * 2] * 2
    assert [handle.device_id for handle in registry.handles] == [1, 2, 3, 4, 5]


@in_event_loop
async def test_devices_stand_in_the_order_of_their_server_and_stay_the_same_objects() -> None:
    server = FakeServer(5, 1)
    registry = registry_of(server)
    await registry.refresh()
    five, one = registry.handles
    server.ids = (1, 3, 5)
    await registry.refresh()
    assert state(registry) == [(1, "host:1", True), (3, "host:1", True), (5, "host:1", True)]
    assert registry.handles[0] is one
    assert registry.handles[2] is five


@in_event_loop
async def test_a_server_of_the_original_contract_has_one_device() -> None:
    server = FakeServer(8)
    server.lists_them = False
    registry = registry_of(server)
    await registry.refresh()
    assert state(registry) == [(8, "host:1", True)]


@in_event_loop
async def test_a_server_that_has_not_answered_is_one_unreachable_device() -> None:
    server = FakeServer(1, 2)
    server.ids = None
    registry = registry_of(server)
    await registry.refresh()
    assert state(registry) == [(0, "host:1", False)]
    with pytest.raises(DeviceNotFound):
        registry.device(0)
    server.ids = (1, 2)
    await registry.refresh()
    assert state(registry) == [(1, "host:1", True), (2, "host:1", True)]


@pytest.mark.parametrize("failure", [Unavailable("gone"), NoAnswer("frozen")], ids=str)
@in_event_loop
async def test_no_device_of_a_server_that_falls_silent_is_reachable(failure: Exception) -> None:
    server = FakeServer(1, 2)
    registry = registry_of(server)
    await registry.refresh()
    server.ids, server.failure = None, failure
    await registry.refresh()
    assert state(registry) == [(1, "host:1", False), (2, "host:1", False)]
    with pytest.raises(type(failure), match="the device server at host:1 does not answer"):
        await registry.servers[0].refresh()


@in_event_loop
async def test_a_device_that_is_gone_stays_as_long_as_a_communicator_has_it() -> None:
    server = FakeServer(1, 2)
    registry = registry_of(server)
    await registry.refresh()
    taken = await registry.take_named([1], 77)
    server.ids = (3,)
    await registry.refresh()
    assert state(registry) == [(3, "host:1", True), (1, "host:1", False)]
    with pytest.raises(PeerUnavailable, match="device 1 at host:1"):
        await registry.take_named([1], 78)
    server.ids = (1, 3)
    await registry.refresh()
    assert registry.device(1) is taken[0]
    assert registry.device(1).reachable
    server.ids = (3,)
    await registry.refresh()
    registry.release(taken, 77)
    await registry.refresh()
    assert state(registry) == [(3, "host:1", True)]


@in_event_loop
async def test_leaves_that_were_not_heard_are_told_to_each_device_when_it_answers() -> None:
    server = FakeServer(1, 2)
    registry = registry_of(server)
    await registry.refresh()
    one, two = registry.handles
    server.ids = None
    for handle, comm_id in ((one, 7), (two, 7), (two, 5)):
        with pytest.raises(PeerUnavailable):
            await handle.leave(comm_id)
    server.ids = (1, 2)
    for _ in range(2):
        await registry.refresh()
    assert server.left == [(1, 7), (2, 5), (2, 7)]


@in_event_loop
async def test_of_two_devices_with_one_id_the_one_that_a_communicator_has_is_meant() -> None:
    """Whichever stands first, and also when it does not answer."""
    early, late = FakeServer(1, 2), FakeServer(2, 3)
    early.ids = None
    registry = registry_of(early, late)
    await registry.refresh()
    taken = await registry.take_named([2], 77)
    early.ids = (1, 2)
    await registry.refresh()
    assert state(registry) == [(1, "host:1", True), (2, "host:1", False), (2, "host:2", True), (3, "host:2", True)]
    assert registry.device(2) is taken[0]
    late.ids = None
    await registry.refresh()
    assert registry.device(2) is taken[0]
    assert [handle.device_id for handle in registry.handles if handle.reachable] == [1]
    # Once nobody has the old one, the id is free for the new one.
    registry.release(taken, 77)
    await registry.refresh()
    assert registry.device(2).address == "host:1"
    assert registry.device(2).reachable


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells how much memory is in use")
@in_event_loop
async def test_asking_devices_again_and_again_takes_no_memory() -> None:
    """A message that is written again and again keeps what it has held before."""
    registry = registry_of(FakeServer(1, 2))

    async def ask(times: int) -> None:
        for _ in range(times):
            await registry.refresh()

    await ask(200)
    before = resident_bytes()
    await ask(10_000)
    assert resident_bytes() - before < 512 << 10


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
