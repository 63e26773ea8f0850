"""When a device server counts as dead, without servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any

import pytest

from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.heartbeats import DEFAULT_DETECTION, Detection, ProcessState, Pulse, Requests, Watch
from dsml_gpu.errors import DsmlError, InvalidValue, NoAnswer, PeerUnavailable, Unavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.lane import Lane

#: Nothing here takes so long.
LIMIT_S = 20.0
COMPUTES, WAITS, STOPPED, ENDED = (ProcessState(letter, 100) for letter in "RSTZ")


def in_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))

    return run


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Body:
    """A pulse under a clock of its own, and what the system says of the process."""

    def __init__(self, detection: Detection | None = None) -> None:
        self.clock = Clock()
        self.state: ProcessState | None = None
        self.pulse = Pulse(detection or Detection(), lambda: self.state, self.clock)

    def ticks(self, number: int, seconds: float = 0.25) -> bool:
        """What the last of so many ticks says, which come every `seconds`."""
        dead = False
        for _ in range(number):
            self.clock.now += seconds
            dead = self.pulse.tick()
        return dead


# ---- decisions --------------------------------------------------------------------------------------------------------


def test_a_server_is_dead_after_the_time_that_it_is_given() -> None:
    body = Body()
    assert not body.ticks(7)
    assert body.ticks(1)
    assert body.pulse.silent_s == 2.0


def test_time_counts_from_the_last_sign_of_life() -> None:
    body = Body()
    for _ in range(100):
        assert not body.ticks(7)
        body.clock.now += 0.1
        body.pulse.heard()
    assert body.pulse.longest_silence_s == pytest.approx(1.85)
    assert body.ticks(8)


def test_a_coordinator_that_was_stopped_blames_nobody() -> None:
    """However long it stood still, that is one tick, which counts as two at most."""
    body = Body()
    assert not body.ticks(3)
    assert not body.ticks(1, seconds=3600)
    assert not body.ticks(2)
    assert body.ticks(1)


def test_a_starved_coordinator_takes_longer_to_blame_somebody() -> None:
    body = Body()
    assert not body.ticks(3, seconds=1.0)
    assert body.ticks(1, seconds=1.0)
    assert body.pulse.silent_s == 4.0


@pytest.mark.parametrize("state", [WAITS, STOPPED, ENDED, None], ids=str)
def test_a_process_that_does_not_compute_gets_no_more_time(state: ProcessState | None) -> None:
    body = Body()
    body.state = state
    assert not body.ticks(7)
    assert body.ticks(1)


def test_a_process_that_computes_gets_more_time_but_not_for_ever() -> None:
    body = Body()
    body.state = COMPUTES
    assert not body.ticks(4 * 8 - 1)
    assert body.ticks(1)


def test_a_process_computes_when_it_had_processor_time_meanwhile() -> None:
    body = Body()
    body.state = WAITS
    assert not body.ticks(7)
    body.state = ProcessState("S", 101)
    assert not body.ticks(1)
    body.pulse.heard()
    assert not body.ticks(7)
    assert body.ticks(1)


def test_a_process_that_is_stopped_does_not_compute_whatever_it_had_before() -> None:
    assert not ProcessState("T", 200).computes_since(ProcessState("R", 100))
    assert ProcessState("S", 101).computes_since(ProcessState("S", 100))
    assert not ProcessState("S", 101).computes_since(None)


def test_what_the_system_says_of_a_process_is_read_whatever_its_name() -> None:
    text = "42 (a) R (b) 7) T 1 42 42 0 -1 4194560 1000 0 0 0 17 4 0 0 20 0 9 0 12345 1000 200 184467"
    assert ProcessState.of_stat(text) == ProcessState("T", 21)


def test_three_of_the_last_five_requests() -> None:
    requests = Requests(Detection())
    answered = [False, False, True, True, True, False, False, True, False]
    assert [requests.note(answered=one) for one in answered] == [False] * 8 + [True]
    assert str(requests) == "3 of the last 5 requests"
    requests.forget()
    assert not requests.note(answered=False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"interval_s": 0.0}, "every 0 s"),
        ({"interval_s": 1.1}, "dead after 2 s"),
        ({"failed_requests": 0}, "0 of the last 5"),
        ({"failed_requests": 6}, "6 of the last 5"),
    ],
)
def test_settings_that_do_not_do_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        Detection(**values)


# ---- a watch ----------------------------------------------------------------------------------------------------------

QUICK = Detection(interval_s=0.01, dead_after_s=0.1)


class FakeServer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.beat = pb.HeartbeatResponse()
        self.on_answer: Callable[[], None] = lambda: None
        self.owes = False
        self.refreshed = 0
        self.failure: DsmlError | None = None
        self.given_up: list[str] = []

    async def refresh(self) -> None:
        self.refreshed += 1
        if self.failure is not None:
            raise self.failure
        self.on_answer()

    def give_up(self, why: str, after_s: float) -> None:
        self.given_up.append(why)


class FakeSigns:
    """Gives what is put into `coming`: heartbeats, errors, or None for an orderly end."""

    def __init__(self) -> None:
        self.coming: asyncio.Queue[pb.HeartbeatResponse | DsmlError | None] = asyncio.Queue()
        self.opened = 0
        self.closed = 0
        self.refuses = False
        self.state: ProcessState | None = None

    async def listen(self, interval_s: float) -> AsyncGenerator[pb.HeartbeatResponse, None]:
        self.opened += 1
        try:
            while (coming := await self.coming.get()) is not None:
                if isinstance(coming, DsmlError):
                    raise coming
                yield coming
        finally:
            self.closed += 1

    async def nobody_listens(self) -> bool:
        return self.refuses

    def look(self) -> ProcessState | None:
        return self.state

    def beat(self) -> None:
        self.coming.put_nowait(pb.HeartbeatResponse(number=1))


@asynccontextmanager
async def watching(
    detection: Detection = DEFAULT_DETECTION,
) -> AsyncIterator[tuple[FakeServer, FakeSigns, Watch]]:
    server, signs = FakeServer(), FakeSigns()
    watch = Watch(server, signs, detection)
    watch.start()
    try:
        yield server, signs, watch
    finally:
        await watch.stop()
        assert signs.opened == signs.closed


@in_event_loop
async def test_the_first_heartbeat_of_a_stream_has_the_server_asked_who_it_is() -> None:
    async with watching() as (server, signs, _):
        for _ in range(3):
            signs.beat()
        await until(signs.coming.empty)
        await until(lambda: server.refreshed == 1)
        signs.coming.put_nowait(Unavailable("broken"))
        signs.beat()
        await until(lambda: server.refreshed == 2)
        assert signs.opened == 2
        assert server.given_up == []


@in_event_loop
async def test_a_server_that_does_not_say_who_it_is_is_asked_at_the_next_heartbeat() -> None:
    async with watching() as (server, signs, _):
        server.failure = Unavailable("not now")
        signs.beat()
        await until(lambda: server.refreshed == 1)
        server.failure = None
        await asyncio.sleep(0)
        signs.beat()
        await until(lambda: server.refreshed == 2)


@in_event_loop
async def test_a_broken_connection_where_nobody_listens_is_the_end_of_the_process() -> None:
    async with watching() as (server, signs, _):
        signs.beat()
        signs.refuses = True
        signs.coming.put_nowait(Unavailable("broken"))
        await until(lambda: bool(server.given_up))
        assert set(server.given_up) == {"is gone: its process has ended"}
        # And when somebody listens again, he is asked.
        before = server.refreshed
        signs.refuses = False
        signs.beat()
        await until(lambda: server.refreshed > before)


@in_event_loop
async def test_a_stream_that_ends_in_order_is_the_end_of_the_server() -> None:
    async with watching() as (server, signs, _):
        signs.beat()
        signs.coming.put_nowait(None)
        await until(lambda: server.given_up == ["is gone: its server was stopped"])


@in_event_loop
async def test_a_lane_that_ends_has_the_port_looked_at() -> None:
    async with watching() as (server, signs, watch):
        signs.beat()
        watch.look_now()
        await until(lambda: server.refreshed == 1)
        assert server.given_up == []
        signs.refuses = True
        watch.look_now()
        await until(lambda: server.given_up == ["is gone: its process has ended"])


@in_event_loop
async def test_silence_is_the_end_and_the_connection_is_made_anew() -> None:
    async with watching(QUICK) as (server, signs, _):
        signs.beat()
        await until(lambda: bool(server.given_up))
        assert server.given_up[0].startswith("has sent no heartbeat for 0.")
        await until(lambda: signs.opened == 2)


@in_event_loop
async def test_a_silent_process_that_has_ended_is_said_to_have() -> None:
    async with watching(QUICK) as (server, signs, _):
        signs.beat()
        signs.state = ENDED
        await until(lambda: bool(server.given_up))
        assert server.given_up[0] == "is gone: its process has ended"


@in_event_loop
async def test_a_lost_server_that_is_heard_again_is_asked_again() -> None:
    async with watching(QUICK) as (server, signs, _):
        signs.beat()
        await until(lambda: bool(server.given_up))
        before, server.owes = server.refreshed, True
        signs.beat()
        await until(lambda: server.refreshed > before)


@in_event_loop
async def test_a_server_that_knows_no_heartbeats_is_not_blamed_for_silence() -> None:
    async with watching(QUICK) as (server, signs, watch):
        signs.coming.put_nowait(DsmlError("UNIMPLEMENTED: no such method"))
        await until(signs.coming.empty)
        await asyncio.sleep(3 * QUICK.dead_after_s)
        assert server.given_up == []
        assert watch.pulse.silent_s > QUICK.dead_after_s


# ---- a device that is given up ----------------------------------------------------------------------------------------


class FakeConnection:
    """Answers what `answers` says, by method; a method that is not there is not answered."""

    def __init__(self) -> None:
        self.lane: Lane | None = None
        self.on_lane_end: Callable[[], None] = lambda: None
        self.tells_of_its_end = True
        self.calls: list[tuple[str, int]] = []
        self.failure: DsmlError | None = None
        self.hangs = False
        self.cancelled = 0

    async def open_lane(self, name: str) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError

    async def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        self.calls.append((method, getattr(request, "commId", 0)))
        await asyncio.sleep(0)
        if self.failure is not None:
            raise self.failure
        if self.hangs:
            try:
                await asyncio.sleep(LIMIT_S)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return None

    def write(self, chunks: Any) -> Any:
        raise AssertionError

    def read(self, request: Any, loss: Any) -> Any:
        raise AssertionError

    def stream(self, method: str, request: Any) -> Any:
        raise AssertionError


def device_7(process_uid: str = "one") -> tuple[DeviceHandle, FakeConnection]:
    connection = FakeConnection()
    handle = DeviceHandle(connection, "host:1", detection=Detection())
    handle.update(metadata(process_uid))
    return handle, connection


def metadata(process_uid: str) -> pb.DeviceMetadata:
    return pb.DeviceMetadata(deviceId=pb.DeviceId(value=7), processUid=process_uid)


@in_event_loop
async def test_all_who_wait_for_a_loss_hear_of_it() -> None:
    handle, _ = device_7()
    one, two, three = (handle.until_lost() for _ in range(3))
    two.cancel()
    handle.give_up("has sent no heartbeat for 2.0 s", 2.04)
    reason = "device 7 at host:1 has sent no heartbeat for 2.0 s"
    assert [await one, await three, await handle.until_lost()] == [reason] * 3
    assert (handle.lost, handle.lost_after_s, handle.reachable) == (reason, 2.04, False)
    handle.give_up("is gone", 9.0)
    assert handle.lost == reason
    assert not handle.tells_of_its_end


@in_event_loop
async def test_a_call_to_a_lost_device_is_not_made_and_one_that_runs_is_given_up() -> None:
    handle, connection = device_7()
    connection.hangs = True
    running = asyncio.ensure_future(handle.call("Malloc", pb.MallocRequest()))
    await until(lambda: bool(connection.calls))
    handle.give_up("is gone", 0.1)
    for call in (running, handle.call("Free", pb.FreeRequest())):
        with pytest.raises(PeerUnavailable, match="device 7 at host:1 is gone"):
            await call
    assert [method for method, _ in connection.calls] == ["Malloc"]
    assert connection.cancelled == 1


@in_event_loop
async def test_a_device_that_answers_too_few_requests_is_given_up() -> None:
    handle, connection = device_7()
    connection.failure = NoAnswer("no answer before the call's deadline")
    for _ in range(2):
        with pytest.raises(NoAnswer):
            await handle.call("Malloc", pb.MallocRequest())
        assert not handle.lost
    with pytest.raises(NoAnswer):
        await handle.call("Malloc", pb.MallocRequest())
    assert handle.lost == "device 7 at host:1 has not answered 3 of the last 3 requests in time"


@in_event_loop
async def test_a_device_comes_back_when_it_has_stopped_what_it_did_for_others() -> None:
    handle, connection = device_7()
    handle.drop(5)
    connection.failure = Unavailable("gone")
    with pytest.raises(PeerUnavailable):
        await handle.leave(3)
    handle.give_up("is gone", 0.1)
    handle.update(metadata("one"))
    assert not handle.reachable
    with pytest.raises(PeerUnavailable):
        await handle.come_back()
    assert handle.lost
    connection.failure = None
    connection.calls.clear()
    handle.update(metadata("one"))
    await handle.come_back()
    assert connection.calls == [("Quiesce", 3), ("LeaveComm", 3), ("Quiesce", 5), ("LeaveComm", 5)]
    assert (handle.lost, handle.reachable, handle.owes) == ("", True, False)
    await handle.come_back()
    assert len(connection.calls) == 4


@in_event_loop
async def test_a_device_that_was_dropped_alive_is_not_used_until_it_has_heard() -> None:
    handle, _ = device_7()
    handle.drop(5)
    assert not handle.reachable
    assert handle.owes
    await handle.come_back()
    assert handle.reachable


@in_event_loop
async def test_another_process_is_another_device() -> None:
    handle, _ = device_7()
    loss = handle.until_lost()
    handle.update(metadata("two"))
    assert await loss == "device 7 at host:1 is gone: its server was restarted"
    assert not handle.reachable
    await handle.come_back()
    assert handle.reachable
    assert handle.metadata.processUid == "two"
