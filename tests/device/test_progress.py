"""Heartbeats of a device server: when they come, what they tell, and how they end."""

from __future__ import annotations

import asyncio

from dsml_gpu.device.progress import Progress
from tests.support.in_this_process import in_event_loop

#: Nothing here takes so long.
LIMIT_S = 20.0


@in_event_loop
async def test_heartbeats_tell_what_was_done_and_what_runs() -> None:
    progress, running = Progress(), 3
    beats = progress.beats(0.001, lambda: running)
    first = await anext(beats)
    progress.add()
    progress.add(4)
    running = 1
    second = await anext(beats)
    assert [(beat.number, beat.progress, beat.executing) for beat in (first, second)] == [(1, 0, 3), (2, 5, 1)]
    await beats.aclose()


@in_event_loop
async def test_heartbeats_end_at_once_when_nothing_runs() -> None:
    progress = Progress()
    beats = progress.beats(3600.0, lambda: 0)
    await anext(beats)
    waiting = asyncio.ensure_future(anext(beats, None))
    await asyncio.sleep(0)
    progress.end()
    assert await asyncio.wait_for(waiting, LIMIT_S) is None


@in_event_loop
async def test_heartbeats_go_on_as_long_as_something_runs() -> None:
    progress, running = Progress(), 1
    progress.end()
    beats = progress.beats(3600.0, lambda: running)
    for number in range(1, 4):
        assert (await asyncio.wait_for(anext(beats), LIMIT_S)).number == number
    running = 0
    assert await asyncio.wait_for(anext(beats, None), LIMIT_S) is None
