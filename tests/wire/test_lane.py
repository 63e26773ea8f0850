"""RPCs over a Unix socket: what they answer and refuse, and what ends them."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import wraps
from typing import Any

import pytest

from dsml_gpu.errors import (
    BY_REFUSAL,
    DeviceNotFound,
    DsmlError,
    InternalError,
    MessageTooLarge,
    NoAnswer,
    OperationAborted,
    Unavailable,
)
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire import lane as lanes
from dsml_gpu.wire.lane import Lane, LaneServer, can_have_lanes, open_lane

#: Nothing here takes so long.
LIMIT_S = 10.0
#: Length of the payload, number of the call, kind of the frame; and the kinds.
HEADER = struct.Struct("<IQB")
REQUEST, ANSWER, REFUSAL, CANCEL = range(4)
pytestmark = pytest.mark.skipif(not can_have_lanes(), reason="lanes need Linux's abstract sockets")


class Servicer:
    """Answers Malloc with what was asked for; the other methods do what the test says."""

    def __init__(self) -> None:
        self.act: Callable[[Any], Awaitable[Any]] | None = None
        self.started = asyncio.Event()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def Malloc(self, request: pb.MallocRequest, context: Any) -> pb.MallocResponse:
        assert context is None
        return pb.MallocResponse(memAddr=pb.MemAddr(value=request.numBytes))

    async def Execute(self, request: pb.ExecuteRequest, context: Any) -> pb.ExecuteResponse:
        self.started.set()
        how = "done"
        try:
            assert self.act is not None
            return await self.act(request)
        except asyncio.CancelledError:
            how = "cancelled"
            raise
        finally:
            self.ended.set_result(how)


@asynccontextmanager
async def served() -> AsyncIterator[tuple[Servicer, LaneServer]]:
    servicer = Servicer()
    server = LaneServer(servicer)
    await server.start()
    try:
        yield servicer, server
    finally:
        await server.stop()


@asynccontextmanager
async def lane_to(server: LaneServer) -> AsyncIterator[Lane]:
    lane = await open_lane(server.name)
    assert lane is not None
    try:
        yield lane
    finally:
        lane.close()


def in_event_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        async def limited() -> None:
            await asyncio.wait_for(test(*arguments, **named), 3 * LIMIT_S)

        asyncio.run(limited())

    return run


async def soon(awaitable: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaitable, LIMIT_S)


async def for_ever(request: Any) -> Any:
    await asyncio.get_running_loop().create_future()


def raising(error: Exception) -> Callable[[Any], Awaitable[Any]]:
    async def act(request: Any) -> Any:
        raise error

    return act


async def malloc_works(lane: Lane, nbytes: int = 8) -> None:
    assert (await lane.call("Malloc", pb.MallocRequest(numBytes=nbytes), LIMIT_S)).memAddr.value == nbytes


# ---- calls -----------------------------------------------------------------------------------------------------------


@in_event_loop
async def test_many_calls_side_by_side_have_the_answers_to_what_they_asked() -> None:
    async with served() as (servicer, server), lane_to(server) as lane, lane_to(server) as other:
        gate = asyncio.Event()

        async def wait(request: pb.ExecuteRequest) -> pb.ExecuteResponse:
            await gate.wait()
            return pb.ExecuteResponse(bytesSent=request.commId)

        servicer.act = wait
        late = asyncio.ensure_future(lane.call("Execute", pb.ExecuteRequest(commId=5), None))
        await soon(servicer.started.wait())
        await asyncio.gather(*(malloc_works(one, number) for number in range(200) for one in (lane, other)))
        assert not late.done()
        gate.set()
        assert (await soon(late)).bytesSent == 5


@in_event_loop
async def test_a_message_of_megabytes_passes_whole() -> None:
    async with served() as (servicer, server), lane_to(server) as lane:
        passes = [pb.Pass(count=number, weights=[0.5] * 150) for number in range(5000)]

        async def count(request: pb.ExecuteRequest) -> pb.ExecuteResponse:
            assert list(request.passes) == passes
            return pb.ExecuteResponse(bytesSent=request.ByteSize())

        servicer.act = count
        request = pb.ExecuteRequest(passes=passes)
        assert request.ByteSize() > 4 << 20
        assert (await lane.call("Execute", request, LIMIT_S)).bytesSent == request.ByteSize()


@pytest.mark.parametrize("refusal", sorted(set(BY_REFUSAL) - {"REFUSAL_UNSPECIFIED"}))
@in_event_loop
async def test_a_refusal_is_raised_as_what_it_is(refusal: str) -> None:
    async with served() as (servicer, server), lane_to(server) as lane:
        text = "expected 1, got 2\0 ünd\nmore"
        servicer.act = raising(BY_REFUSAL[refusal](text))
        with pytest.raises(BY_REFUSAL[refusal]) as caught:
            await lane.call("Execute", pb.ExecuteRequest(), LIMIT_S)
        assert type(caught.value) is BY_REFUSAL[refusal]
        assert str(caught.value) == text
        await malloc_works(lane)


@pytest.mark.parametrize("error", [InternalError("broken GPU"), Unavailable("no more"), NoAnswer("late")], ids=repr)
@in_event_loop
async def test_an_error_without_a_name_on_the_wire_is_that_of_its_code(error: DsmlError) -> None:
    async with served() as (servicer, server), lane_to(server) as lane:
        servicer.act = raising(error)
        with pytest.raises(DsmlError, match=f"^{error}$") as caught:
            await lane.call("Execute", pb.ExecuteRequest(), LIMIT_S)
        assert caught.value.code == error.code
        assert isinstance(error, type(caught.value))


@in_event_loop
async def test_a_defect_of_the_server_is_logged_there_and_said(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as (servicer, server), lane_to(server) as lane:
        servicer.act = raising(KeyError("x"))
        with pytest.raises(InternalError, match="defect of the server: KeyError: 'x'"):
            await lane.call("Execute", pb.ExecuteRequest(), LIMIT_S)
        (record,) = caplog.records
        assert record.exc_info is not None
        await malloc_works(lane)


# ---- requests that are none ------------------------------------------------------------------------------------------


async def raw(server: LaneServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection without any code of ours."""
    return await asyncio.open_unix_connection("\0" + server.name)


def request_frame(number: int, name: bytes, message: bytes = b"") -> bytes:
    payload = bytes([len(name)]) + name + message
    return HEADER.pack(len(payload), number, REQUEST) + payload


async def frame_from(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    """Number, kind and payload of the next frame."""
    length, number, kind = HEADER.unpack(await soon(reader.readexactly(HEADER.size)))
    return number, kind, await soon(reader.readexactly(length))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"NoSuchMethod", b""),
        (b"__init__", b""),
        (b"StreamSend", b""),
        (b"StreamDeviceToHost", b""),
        (b"CommInit", b""),  # of the other service
        (b"\xff\xfe", b""),
        (b"", b""),
        (b"Malloc", b"\xff\xff\xff"),
    ],
    ids=repr,
)
@in_event_loop
async def test_what_is_no_request_is_refused_and_the_lane_goes_on(
    caplog: pytest.LogCaptureFixture, name: bytes, message: bytes
) -> None:
    async with served() as (_, server):
        reader, writer = await raw(server)
        writer.write(
            request_frame(7, name, message) + request_frame(8, b"Malloc", pb.MallocRequest(numBytes=3).SerializeToString())
        )
        frames = {number: (kind, payload) for number, kind, payload in (await frame_from(reader), await frame_from(reader))}
        kind, payload = frames[7]
        assert kind == REFUSAL
        assert payload.split(b"\0")[:2] == [b"MALFORMED_MESSAGE", b"INVALID_ARGUMENT"]
        assert frames[8] == (ANSWER, pb.MallocResponse(memAddr=pb.MemAddr(value=3)).SerializeToString())
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
        writer.close()


@in_event_loop
async def test_an_empty_request_frame_is_refused() -> None:
    async with served() as (_, server):
        reader, writer = await raw(server)
        writer.write(HEADER.pack(0, 1, REQUEST))
        assert (await frame_from(reader))[:2] == (1, REFUSAL)
        writer.close()


@in_event_loop
async def test_frames_may_come_byte_by_byte() -> None:
    async with served() as (_, server):
        reader, writer = await raw(server)
        for byte in request_frame(1, b"Malloc", pb.MallocRequest(numBytes=300).SerializeToString()) * 2:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        expected = pb.MallocResponse(memAddr=pb.MemAddr(value=300)).SerializeToString()
        assert [await frame_from(reader) for _ in range(2)] == [(1, ANSWER, expected)] * 2
        writer.close()


@in_event_loop
async def test_frames_that_no_client_sends_are_ignored() -> None:
    async with served() as (_, server):
        reader, writer = await raw(server)
        for kind in (ANSWER, REFUSAL, CANCEL, 4, 255):
            writer.write(HEADER.pack(3, 9, kind) + b"abc")
        writer.write(request_frame(1, b"Malloc"))
        assert (await frame_from(reader))[:2] == (1, ANSWER)
        writer.close()


@in_event_loop
async def test_a_frame_that_is_too_large_closes_the_lane(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as (_, server), lane_to(server) as other:
        reader, writer = await raw(server)
        writer.write(HEADER.pack((64 << 20) + 1, 1, REQUEST))
        assert await soon(reader.read()) == b""
        assert "a lane is closed: a frame of 67108865 bytes is announced" in caplog.text
        writer.close()
        await malloc_works(other)


@in_event_loop
async def test_a_request_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_PAYLOAD_BYTES", 1000)
    async with served() as (servicer, server), lane_to(server) as lane:
        with pytest.raises(MessageTooLarge, match=r"10\d\d bytes do not fit into a frame of 1000"):
            await lane.call("Execute", pb.ExecuteRequest(passes=[pb.Pass(weights=[1.0] * 125)]), LIMIT_S)
        assert not servicer.started.is_set()
        await malloc_works(lane)


@in_event_loop
async def test_random_bytes_do_not_stop_the_server(caplog: pytest.LogCaptureFixture) -> None:
    generator = random.Random(1)
    async with served() as (_, server), lane_to(server) as lane:

        async def babble() -> None:
            reader, writer = await raw(server)
            with suppress(ConnectionError):
                for _ in range(generator.randrange(1, 20)):
                    noise = generator.randbytes(generator.randrange(1, 200))
                    if generator.random() < 0.7:  # a frame around it
                        noise = HEADER.pack(len(noise), generator.randrange(4), generator.randrange(5)) + noise
                    writer.write(noise)
                    await writer.drain()
                writer.write_eof()
                await soon(reader.read())
            writer.close()

        for _ in range(30):
            await asyncio.gather(*(babble() for _ in range(5)))
            await malloc_works(lane)
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@in_event_loop
async def test_random_bytes_from_a_server_end_the_calls_of_the_client() -> None:
    generator = random.Random(2)
    name = f"dsml-test-{secrets.token_hex(8)}"

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        for _ in range(20):
            noise = generator.randbytes(50)
            writer.write(HEADER.pack(len(noise), generator.randrange(1, 3), generator.randrange(5)) + noise)
        writer.close()

    server = await asyncio.start_unix_server(babble, f"\0{name}")
    async with server:
        for _ in range(20):
            lane = await open_lane(name)
            assert lane is not None
            with pytest.raises(DsmlError):
                await lane.call("Malloc", pb.MallocRequest(), LIMIT_S)
            lane.close()


# ---- what ends calls -------------------------------------------------------------------------------------------------


@in_event_loop
async def test_a_deadline_ends_a_call_at_both_ends() -> None:
    async with served() as (servicer, server), lane_to(server) as lane:
        servicer.act = for_ever
        started = asyncio.get_running_loop().time()
        with pytest.raises(NoAnswer, match="no answer before the call's deadline"):
            await lane.call("Execute", pb.ExecuteRequest(), 0.2)
        assert 0.2 <= asyncio.get_running_loop().time() - started < LIMIT_S
        assert await soon(servicer.ended) == "cancelled"
        await malloc_works(lane)


@in_event_loop
async def test_cancelling_a_call_cancels_it_at_the_server_and_nothing_else() -> None:
    async with served() as (servicer, server), lane_to(server) as lane:
        servicer.act = for_ever
        call = asyncio.ensure_future(lane.call("Execute", pb.ExecuteRequest(), None))
        await soon(servicer.started.wait())
        call.cancel()
        assert await soon(servicer.ended) == "cancelled"
        assert call.cancelled()
        await malloc_works(lane)


@in_event_loop
async def test_a_call_that_the_server_cancels_is_answered() -> None:
    async with served() as (servicer, server), lane_to(server) as lane:

        async def cancel_itself(request: Any) -> Any:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await for_ever(request)

        servicer.act = cancel_itself
        with pytest.raises(OperationAborted):
            await lane.call("Execute", pb.ExecuteRequest(), LIMIT_S)
        await malloc_works(lane)


@pytest.mark.parametrize("end", ["server", "client"])
@in_event_loop
async def test_a_lane_that_breaks_ends_the_calls_at_both_ends(end: str) -> None:
    async with served() as (servicer, server), lane_to(server) as lane:
        servicer.act = for_ever
        call = asyncio.ensure_future(lane.call("Execute", pb.ExecuteRequest(), None))
        await soon(servicer.started.wait())
        if end == "server":
            await server.stop()
        else:
            lane.close()
        with pytest.raises(Unavailable):
            await soon(call)
        assert await soon(servicer.ended) == "cancelled"
        assert not lane.is_open
        with pytest.raises(Unavailable, match="the lane is closed"):
            await lane.call("Malloc", pb.MallocRequest(), LIMIT_S)


@in_event_loop
async def test_a_client_that_is_gone_cancels_what_it_has_started() -> None:
    async with served() as (servicer, server):
        servicer.act = for_ever
        _, writer = await raw(server)
        writer.write(request_frame(1, b"Execute"))
        await soon(servicer.started.wait())
        writer.transport.abort()
        assert await soon(servicer.ended) == "cancelled"


@in_event_loop
async def test_a_server_that_stops_lets_calls_end_and_takes_no_more() -> None:
    async with served() as (servicer, server), lane_to(server) as lane:
        gate = asyncio.Event()

        async def wait(request: Any) -> pb.ExecuteResponse:
            await gate.wait()
            return pb.ExecuteResponse(bytesSent=4)

        servicer.act = wait
        call = asyncio.ensure_future(lane.call("Execute", pb.ExecuteRequest(), None))
        await soon(servicer.started.wait())
        stop = asyncio.ensure_future(server.stop(LIMIT_S))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="the server stops"):
            await lane.call("Malloc", pb.MallocRequest(), LIMIT_S)
        assert await open_lane(server.name) is None
        assert not stop.done()
        gate.set()
        assert (await soon(call)).bytesSent == 4
        await soon(stop)
        await server.stop()


# ---- who may ---------------------------------------------------------------------------------------------------------


@in_event_loop
async def test_a_client_knows_the_process_at_the_other_end_and_hears_of_its_end() -> None:
    async with served() as (_, server), lane_to(server) as lane:
        ended = asyncio.Event()
        lane.on_end = ended.set
        assert lane.server_pid == os.getpid()
        await malloc_works(lane)
        assert not ended.is_set()
        await server.stop()
        await soon(ended.wait())
        assert not lane.is_open


@in_event_loop
async def test_a_name_that_nobody_listens_on_is_no_lane() -> None:
    assert await open_lane("") is None
    assert await open_lane(f"dsml-{secrets.token_hex(16)}") is None


@in_event_loop
async def test_servers_of_one_process_have_names_of_their_own_and_no_files() -> None:
    async with served() as (_, one), served() as (_, other):
        assert one.name != other.name
        assert {one.name, other.name}.isdisjoint(os.listdir())


AS_NOBODY = """
import os, socket, sys
os.setgroups([]), os.setgid(65534), os.setuid(65534)
with socket.socket(socket.AF_UNIX) as peer:
"""
ROOT_ONLY = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be another user")


@ROOT_ONLY
@in_event_loop
async def test_a_process_of_another_user_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as (servicer, server), lane_to(server) as lane:
        servicer.act = raising(DeviceNotFound("reached"))
        script = f"""{AS_NOBODY}
    peer.settimeout({LIMIT_S})
    peer.connect("\\0{server.name}")
    try:
        peer.sendall({request_frame(1, b"Execute")!r})
        answer = peer.recv(100)
    except ConnectionError:
        answer = b""
    sys.exit(len(answer))
"""
        stranger = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
        assert await soon(stranger.wait()) == 0
        assert "the other process is of user 65534, not 0" in caplog.text
        assert not servicer.started.is_set()
        await malloc_works(lane)


@ROOT_ONLY
def test_a_server_of_another_user_is_no_lane(caplog: pytest.LogCaptureFixture) -> None:
    name = f"dsml-{secrets.token_hex(16)}"
    script = f"""{AS_NOBODY}
    peer.bind("\\0{name}")
    peer.listen()
    print("listening", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "listening\n"
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(f"\0{name}")
        assert asyncio.run(open_lane(name)) is None
        stranger.kill()
    assert "the other process is of user 65534, not 0" in caplog.text
