"""Stream order on devices, without devices."""

from __future__ import annotations

import asyncio

import pytest

from dsml_gpu.coordinator.connection import RemoteConnection
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.order import Turn
from dsml_gpu.errors import OperationTimeout


def handles(count: int) -> list[DeviceHandle]:
    return [DeviceHandle(RemoteConnection(None, 1.0), f"host:{number}") for number in range(count)]


class Log:
    """Work that logs its begin, waits to be let go, and logs its end."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    def start(self, name: str, devices: list[DeviceHandle]) -> asyncio.Task[None]:
        self.gates[name] = asyncio.Event()
        return asyncio.ensure_future(self._work(name, devices))

    async def _work(self, name: str, devices: list[DeviceHandle]) -> None:
        async with Turn(devices, 60):
            self.lines.append(f"+{name}")
            await self.gates[name].wait()
            self.lines.append(f"-{name}")


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_work_on_one_device_runs_in_the_order_of_its_issue() -> None:
    async def scenario() -> None:
        log, [device] = Log(), handles(1)
        tasks = [log.start(name, [device]) for name in "abc"]
        await settle()
        assert log.lines == ["+a"]
        for name in "cba":  # letting the later ones go first changes nothing
            log.gates[name].set()
        await asyncio.gather(*tasks)
        assert log.lines == ["+a", "-a", "+b", "-b", "+c", "-c"]

    asyncio.run(scenario())


def test_work_on_other_devices_does_not_wait() -> None:
    async def scenario() -> None:
        log, [one, two] = Log(), handles(2)
        first, second = log.start("a", [one]), log.start("b", [two])
        await settle()
        assert log.lines == ["+a", "+b"]
        log.gates["a"].set()
        log.gates["b"].set()
        await asyncio.gather(first, second)

    asyncio.run(scenario())


def test_opposite_orders_of_devices_do_not_deadlock() -> None:
    async def scenario() -> None:
        log, devices = Log(), handles(3)
        tasks = [log.start("a", devices), log.start("b", devices[::-1]), log.start("c", devices[1:])]
        for gate in log.gates.values():
            gate.set()
        await asyncio.wait_for(asyncio.gather(*tasks), 5)
        assert log.lines == ["+a", "-a", "+b", "-b", "+c", "-c"]

    asyncio.run(scenario())


def test_cancelled_work_does_not_let_later_work_overtake_earlier() -> None:
    async def scenario() -> None:
        log, [device] = Log(), handles(1)
        first, second, third = (log.start(name, [device]) for name in "abc")
        await settle()
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await settle()
        assert log.lines == ["+a"], "c waits for a, though b, between them, is gone"
        log.gates["c"].set()
        log.gates["a"].set()
        await asyncio.gather(first, third)
        assert log.lines == ["+a", "-a", "+c", "-c"]

    asyncio.run(scenario())


def test_failed_work_lets_the_next_begin() -> None:
    async def scenario() -> None:
        [device] = handles(1)
        with pytest.raises(RuntimeError):
            async with Turn([device], 60):
                raise RuntimeError
        async with Turn([device], 60):
            pass

    asyncio.run(scenario())


def test_the_place_is_taken_when_the_turn_is_made_not_when_its_task_runs() -> None:
    async def scenario() -> None:
        log, [device] = Log(), handles(1)
        turn = Turn([device], 60)
        later = log.start("b", [device])
        log.gates["b"].set()
        await settle()
        assert log.lines == []
        async with turn:
            log.lines.append("a")
        await later
        assert log.lines == ["a", "+b", "-b"]

    asyncio.run(scenario())


def test_nobody_waits_for_ever_for_earlier_work() -> None:
    async def scenario() -> None:
        log, [device] = Log(), handles(1)
        stuck = log.start("a", [device])
        await settle()
        with pytest.raises(OperationTimeout, match=r"did not end within 0.05 s"):
            async with Turn([device], 0.05):
                pytest.fail("it overtook")
        log.gates["a"].set()
        await stuck
        async with Turn([device], 5):
            pass

    asyncio.run(scenario())
