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
    monkeypatch.setattr(trim, "_IDLE_S", 0.01)
    monkeypatch.setattr(trim, "_AGAIN_S", 0.02)
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


def test_calls_that_follow_each_other_keep_what_the_one_before_has_freed(
    trims: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trim, "_IDLE_S", 5.0)

    async def scenario() -> None:
        memory = trim.MessageMemory()
        memory.count(100 * MIB)
        timer = memory._timer
        for _ in range(3):
            memory.call_ended()
            memory.count(50 * MIB)
        memory._look()  # as the timer does, before the pause has come
        await asyncio.sleep(0)
        assert not trims
        assert timer is not memory._timer, "the timer was not set again"

    asyncio.run(scenario())


def test_what_is_freed_late_is_given_back_a_little_later(trims: list[int]) -> None:
    async def scenario() -> None:
        memory = trim.MessageMemory()
        memory.count(64 * MIB)
        await until_trimmed(trims, 2)
        assert memory._timer is None, "an idle server goes on giving back"

    asyncio.run(scenario())


def test_small_calls_give_nothing_back(trims: list[int]) -> None:
    async def scenario() -> None:
        memory = trim.MessageMemory()
        memory.count(63 * MIB)
        memory.call_ended()
        assert memory._timer is None

    asyncio.run(scenario())


def test_memory_is_given_back_from_time_to_time_until_that_is_stopped(trims: list[int]) -> None:
    async def scenario() -> None:
        regular = trim.RegularTrim(0.001)
        regular.stop()
        regular.start()
        await until_trimmed(trims, 3)
        regular.stop()
        await asyncio.sleep(0.01)  # what is under way
        before = len(trims)
        await asyncio.sleep(0.02)
        assert len(trims) == before

    asyncio.run(scenario())
