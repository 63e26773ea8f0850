"""A coordinator in the test's own process, over device servers in theirs, to look into."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any

from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.heartbeats import DEFAULT_DETECTION, Detection
from dsml_gpu.coordinator.server import CoordinatorConfig, CoordinatorServer
from dsml_gpu.coordinator.settings import CoordinatorSettings


def in_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


@asynccontextmanager
async def coordinating(*addresses: str, detection: Detection = DEFAULT_DETECTION) -> AsyncIterator[CoordinatorServer]:
    """A coordinator over device servers for the length of a block."""
    settings = CoordinatorSettings(detection=detection)
    server = CoordinatorServer(CoordinatorConfig(port=0, devices=addresses, embedded=0, settings=settings))
    await server.start()
    try:
        yield server
    finally:
        await server.stop(2.0)


async def heard_of(coordinator: CoordinatorServer) -> None:
    """Returns when every server has sent a heartbeat."""
    await until(lambda: all(server.beat.number for server in coordinator.registry.servers), "a heartbeat of each")


async def until(holds: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """As `processes.wait_until`, beside what else runs in the event loop."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not holds():
        assert asyncio.get_running_loop().time() < deadline, f"{what} did not come true within {timeout_s:g} s"
        await asyncio.sleep(0.01)


async def loss_of(handle: DeviceHandle, timeout_s: float = 20.0) -> str:
    """The reason for which a device is given up."""
    return await asyncio.wait_for(handle.until_lost(), timeout_s)
