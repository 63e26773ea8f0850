"""When memory of messages is given back to the system."""

from __future__ import annotations

import asyncio

import pytest

from dsml_gpu.wire import trim

MIB = 1 << 20


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each time that memory is given back."""
    calls: list[int] = []
    monkeypatch.setattr(trim, "_malloc_trim", calls.append)
    monkeypatch.setattr(trim, "_DELAY_S", 0.01)
    return calls


async def until_trimmed(trims: list[int], times: int) -> None:
    deadline = asyncio.get_running_loop().time() + 5
    while len(trims) < times:
        assert asyncio.get_running_loop().time() < deadline, f"memory was given back {len(trims)} times, expected {times}"
        await asyncio.sleep(0.001)


def test_a_stream_that_never_pauses_gives_memory_back_before_it_ends(trims: list[int]) -> None:
    async def scenario() -> None:
        memory = trim.MessageMemory()
        deadline = asyncio.get_running_loop().time() + 5
        while not trims:
            assert asyncio.get_running_loop().time() < deadline, "every message put it off"
            memory.count(256 * MIB)
            await asyncio.sleep(0)

    asyncio.run(scenario())


def test_the_end_of_a_call_gives_back_what_came_after_a_trim_in_its_middle(trims: list[int]) -> None:
    async def scenario() -> None:
        memory = trim.MessageMemory()
        memory.count(256 * MIB)
        await until_trimmed(trims, 1)
        memory.count(MIB)
        memory.call_ended()
        await until_trimmed(trims, 2)

    asyncio.run(scenario())


def test_small_calls_give_nothing_back(trims: list[int]) -> None:
    async def scenario() -> None:
        memory = trim.MessageMemory()
        memory.count(63 * MIB)
        memory.call_ended()
        assert memory._timer is None

    asyncio.run(scenario())
