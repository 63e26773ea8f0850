"""The data port: gRPC's own clients can call it, what it refuses, and when streams go there or to gRPC's port."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest

from dsml_gpu.device.service import DeviceService
from dsml_gpu.device.settings import TransferSettings
from dsml_gpu.errors import DsmlError, PeerUnavailable
from dsml_gpu.memory.host import HostMemory
from dsml_gpu.transport.data_port import ALTERNATIVE_KEY, prefix_of
from dsml_gpu.transport.data_stream import DataStream, port_of
from dsml_gpu.transport.emulation import DeviceLink, LinkSettings
from dsml_gpu.transport.grpc import ChannelPool, GrpcRecvLink, GrpcSendLink
from dsml_gpu.transport.incoming import IncomingTable
from dsml_gpu.transport.link import new_stream_id
from dsml_gpu.transport.queue import ClosableQueue
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire import http2
from dsml_gpu.wire.gpu_sim_pb2_grpc import GPUDeviceStub
from dsml_gpu.wire.http2_connection import STREAM_WINDOW_BYTES
from dsml_gpu.wire.outgoing import OutgoingStream
from dsml_gpu.wire.server import RpcServer
from dsml_gpu.wire.status import REFUSAL_KEY

MEMORY = HostMemory()
MIB = 1 << 20
TIMEOUT_S = 20


@dataclass
class Served:
    """A server, and who sends to it."""

    server: RpcServer
    service: DeviceService
    channels: ChannelPool

    @property
    def table(self) -> IncomingTable:
        return self.service._incoming

    @property
    def port(self) -> int:
        return port_of([(ALTERNATIVE_KEY, self.service._data_port.alternative)])

    def sender(self, stream_id: int) -> GrpcSendLink:
        return GrpcSendLink(self.channels.peer(self.server.address), stream_id, MEMORY, "the receiver")

    def receiver(self, stream_id: int) -> GrpcRecvLink:
        settings = self.service._settings.link
        link = DeviceLink(settings, self.service._timer) if settings.emulated else None
        return GrpcRecvLink(self.table.claim(stream_id, link=link), MEMORY, "the sender")

    async def carry(self, pieces: list[np.ndarray]) -> type:
        """Sends and receives, and returns what the call was made by."""
        stream_id = new_stream_id()
        sender, receiver = self.sender(stream_id), self.receiver(stream_id)
        for piece in pieces:
            sender.send(piece, lambda: None)
        sender.end()
        draining = asyncio.ensure_future(sender.drain())
        for piece in pieces:
            assert np.array_equal(await asyncio.wait_for(receiver.recv(piece.nbytes), TIMEOUT_S), piece)
            receiver.release()
        await receiver.finish()
        await asyncio.wait_for(draining, TIMEOUT_S)
        return type(sender._stream)

    async def until_known(self) -> None:
        """Returns when streams go to the data port."""
        peer = self.channels.peer(self.server.address)
        for _ in range(500):
            if peer._data is not None and peer._data.usable:
                return
            await asyncio.sleep(0.01)
        pytest.fail("the data port did not become known")


@asynccontextmanager
async def serving(link: LinkSettings | None = None) -> AsyncIterator[Served]:
    server = RpcServer("127.0.0.1", 0)
    server.bind()
    service = DeviceService(server.address, TransferSettings(stall_timeout_s=5.0, link=link or LinkSettings()))
    await server.start({"GPUDevice": service}, 60.0)
    channels = ChannelPool()
    try:
        yield Served(server, service, channels)
    finally:
        await channels.close()
        await server.stop(0)
        await service.close()


def random_bytes(nbytes: int) -> np.ndarray:
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)


def test_the_first_stream_goes_by_grpc_and_the_next_one_by_the_data_port():
    async def scenario() -> None:
        async with serving() as served:
            assert await served.carry([random_bytes(100)]) is OutgoingStream
            await served.until_known()
            assert await served.carry([random_bytes(100), random_bytes(1)]) is DataStream
            assert await served.carry([]) is DataStream

    asyncio.run(scenario())


def test_servers_with_emulated_links_have_none():
    async def scenario() -> None:
        async with serving(LinkSettings(latency_s=1e-4)) as served:
            for _ in range(2):
                assert await served.carry([random_bytes(100)]) is OutgoingStream
            assert served.service._data_port._listener is None
            assert served.channels.peer(served.server.address)._connecting is None

    asyncio.run(scenario())


@pytest.mark.parametrize("nbytes", [1, STREAM_WINDOW_BYTES - 64, STREAM_WINDOW_BYTES + 1, 3 * STREAM_WINDOW_BYTES])
def test_slices_around_the_size_of_the_window_and_far_beyond(nbytes: int):
    async def scenario() -> None:
        async with serving() as served:
            await served.channels.peer(served.server.address).connect(served.port)
            assert await served.carry([random_bytes(nbytes) for _ in range(5)]) is DataStream

    asyncio.run(scenario())


def test_many_streams_at_a_time_share_a_connection():
    async def scenario() -> None:
        async with serving() as served:
            await served.channels.peer(served.server.address).connect(served.port)
            pieces = [random_bytes(300_000 + number) for number in range(6)]
            kinds = await asyncio.gather(*(served.carry(pieces) for _ in range(20)))
            assert set(kinds) == {DataStream}

    asyncio.run(scenario())


def test_what_a_receiver_that_takes_nothing_holds_is_bounded():
    async def scenario() -> None:
        async with serving() as served:
            await served.channels.peer(served.server.address).connect(served.port)
            stream_id = new_stream_id()
            sender = served.sender(stream_id)
            receiver = served.receiver(stream_id)
            for _ in range(100):
                sender.send(np.zeros(MIB, np.uint8), lambda: None)
            sender.end()
            draining = asyncio.ensure_future(sender.drain())
            await asyncio.wait([draining], timeout=0.5)
            messages = served.table._open[stream_id].messages
            assert isinstance(messages, ClosableQueue)
            assert 1 <= len(messages) <= STREAM_WINDOW_BYTES // MIB
            for _ in range(100):
                await asyncio.wait_for(receiver.recv(MIB), TIMEOUT_S)
                receiver.release()
            await receiver.finish()
            await draining

    asyncio.run(scenario())


def test_when_the_port_is_gone_streams_go_by_grpc_again_and_then_to_the_next_one():
    async def scenario() -> None:
        async with serving() as served:
            peer = served.channels.peer(served.server.address)
            await peer.connect(served.port)
            assert await served.carry([random_bytes(10)]) is DataStream
            stream_id = new_stream_id()
            sender = served.sender(stream_id)
            sender.send(random_bytes(10), lambda: None)
            draining = asyncio.ensure_future(sender.drain())
            await served.receiver(stream_id).recv(10)
            served.service._data_port.close()
            with pytest.raises(PeerUnavailable, match="the receiver is gone"):
                await asyncio.wait_for(draining, TIMEOUT_S)
            assert await served.carry([random_bytes(10)]) is OutgoingStream
            await served.until_known()
            assert await served.carry([random_bytes(10)]) is DataStream

    asyncio.run(scenario())


def test_a_port_that_nobody_listens_on_does_no_harm():
    async def scenario() -> None:
        async with serving() as served:
            with socket.create_server(("127.0.0.1", 0)) as unused:
                port = unused.getsockname()[1]
            await served.channels.peer(served.server.address).connect(port)
            assert await served.carry([random_bytes(10)]) is OutgoingStream

    asyncio.run(scenario())


@pytest.mark.parametrize("with_asyncio", [True, False])
def test_a_client_of_grpc_can_call_it(with_asyncio: bool):
    """With generated messages, in the frames that gRPC makes."""
    payload = random_bytes(3 * STREAM_WINDOW_BYTES + 7).tobytes()

    def chunks(stream_id: int) -> Iterator[pb.DataChunk]:
        yield pb.DataChunk(data=payload[:1000], streamId=stream_id)
        yield pb.DataChunk(data=payload[1000:])

    async def scenario() -> None:
        async with serving() as served:
            stream_id = new_stream_id()
            receiver = served.receiver(stream_id)
            options = [("grpc.max_send_message_length", -1)]
            if with_asyncio:
                async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", options=options) as channel:
                    calling = asyncio.ensure_future(_call(channel, list(chunks(stream_id))))
                    await _receive(receiver, payload, 1000)
                    assert (await asyncio.wait_for(calling, TIMEOUT_S)).success
            else:
                with grpc.insecure_channel(f"127.0.0.1:{served.port}", options=options) as blocking:
                    stub = GPUDeviceStub(blocking)
                    calling = asyncio.ensure_future(asyncio.to_thread(stub.StreamSend, chunks(stream_id), timeout=TIMEOUT_S))
                    await _receive(receiver, payload, 1000)
                    assert (await calling).success

    asyncio.run(scenario())


async def _call(channel: grpc.aio.Channel, chunks: list[pb.DataChunk]) -> pb.StreamSendResponse:
    response: pb.StreamSendResponse = await GPUDeviceStub(channel).StreamSend(iter(chunks), timeout=TIMEOUT_S)
    return response


async def _receive(receiver: GrpcRecvLink, payload: bytes, first: int) -> None:
    for expected in (payload[:first], payload[first:]):
        assert (await asyncio.wait_for(receiver.recv(len(expected)), TIMEOUT_S)).tobytes() == expected
        receiver.release()
    await receiver.finish()


@pytest.mark.parametrize(
    ("chunks", "refusal", "words"),
    [
        pytest.param([], "AMBIGUOUS_STREAM", "before its first message", id="no message"),
        pytest.param([pb.DataChunk(data=b"x")], "AMBIGUOUS_STREAM", "names no stream", id="nobody waits"),
        pytest.param([pb.DataChunk(streamId=5)], "STREAM_IN_USE", "5 has a sender already", id="a second sender"),
    ],
)
def test_a_client_of_grpc_learns_what_is_refused(chunks: list[pb.DataChunk], refusal: str, words: str):
    async def scenario() -> None:
        async with serving() as served:
            served.table.offer(5)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
                with pytest.raises(grpc.aio.AioRpcError, match=words) as failure:
                    await _call(channel, chunks)
            assert dict(failure.value.trailing_metadata() or ())[REFUSAL_KEY] == refusal
            served.table._open[5].fail(DsmlError("the test is over"))

    asyncio.run(scenario())


def test_a_client_that_gives_up_is_noticed():
    async def scenario() -> None:
        async with serving() as served:
            stream_id = new_stream_id()
            receiver = served.receiver(stream_id)
            async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
                stub: Any = GPUDeviceStub(channel)
                call = stub.StreamSend()
                await call.write(pb.DataChunk(data=b"x", streamId=stream_id))
                await receiver.recv(1)
                receiver.release()
                call.cancel()
                with pytest.raises(DsmlError, match="the sender gave up"):
                    await asyncio.wait_for(receiver.recv(1), TIMEOUT_S)
            assert len(served.table) == 0

    asyncio.run(scenario())


def _frames(*frames: bytes) -> bytes:
    return http2.PREFACE + http2.settings_frame([]) + b"".join(frames)


_BEGUN = http2.headers_frame(1, 0, [(":method", "POST")])


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP/1"),
        pytest.param(_frames(http2.frame_header(1 << 20, http2.HEADERS, 0, 1)), id="a frame that is too long"),
        pytest.param(_frames(http2.frame(http2.DATA, 0, 0, b"x")), id="data of no stream"),
        pytest.param(_frames(http2.frame(http2.DATA, http2.PADDED, 1, b"\x05abc")), id="more padding than there is"),
        pytest.param(_frames(http2.frame(http2.HEADERS, http2.PADDED, 1, b"\x05abc")), id="headers of padding"),
        pytest.param(
            _frames(http2.frame(http2.HEADERS, 0, 1), http2.frame(http2.PING, 0, 0, bytes(8))), id="headers cut off"
        ),
        pytest.param(_frames(http2.frame(http2.CONTINUATION, 0, 1)), id="headers that never began"),
        pytest.param(_frames(http2.frame(http2.WINDOW_UPDATE, 0, 1, b"x")), id="a number that is none"),
        pytest.param(_frames(http2.frame(http2.SETTINGS, 0, 0, b"x")), id="settings that are none"),
        pytest.param(_frames(_BEGUN, http2.frame(http2.DATA, 0, 1, b"\x01\0\0\0\x01x")), id="compressed"),
        pytest.param(_frames(_BEGUN, http2.frame(http2.DATA, 0, 1, b"\0\xff\xff\xff\xff")), id="4 GiB"),
        pytest.param(_frames(_BEGUN, http2.frame_header(STREAM_WINDOW_BYTES + 1, http2.DATA, 0, 1)), id="beyond the window"),
    ],
)
def test_who_does_not_speak_as_he_should_is_hung_up_on_and_others_are_not(sent: bytes):
    async def scenario() -> None:
        async with serving() as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(sent)
            with closing(writer):
                answer = await asyncio.wait_for(reader.read(), TIMEOUT_S)
            assert http2.frame_header(0, http2.GOAWAY, 0, 0)[3:] in answer
            await served.channels.peer(served.server.address).connect(served.port)
            assert await served.carry([random_bytes(10)]) is DataStream

    asyncio.run(scenario())


def test_what_a_client_may_do_besides():
    """Padding, pings, priorities, headers in two frames, a message byte by byte, and frames of kinds yet unknown."""

    async def scenario() -> None:
        async with serving() as served:
            receiver = served.receiver(7)
            message = pb.DataChunk(streamId=7, data=b"abc").SerializeToString()
            stream = prefix_of(len(message)) + message
            padded = [b"\x03" + bytes([byte]) + bytes(3) for byte in stream]
            sent = _frames(
                http2.frame(http2.HEADERS, http2.PADDED | http2.WITH_PRIORITY, 1, b"\x02" + bytes(5) + b"\x82" + bytes(2)),
                http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1, b"\x83"),
                http2.frame(http2.PRIORITY, 0, 1, bytes(5)),
                http2.frame(77, 0, 1, b"?"),
                http2.frame(http2.PING, 0, 0, b"12345678"),
                *(http2.frame(http2.DATA, http2.PADDED, 1, payload) for payload in padded),
                http2.frame(http2.DATA, http2.END_STREAM, 1),
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            with closing(writer):
                for start in range(len(sent)):
                    writer.write(sent[start : start + 1])
                    await asyncio.sleep(0)
                assert (await asyncio.wait_for(receiver.recv(3), TIMEOUT_S)).tobytes() == b"abc"
                await receiver.finish()
                answer = b""
                while b"grpc-status" not in answer:
                    answer += await asyncio.wait_for(reader.read(1000), TIMEOUT_S)
            assert http2.frame(http2.PING, http2.ACK, 0, b"12345678") in answer

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("value", "port"),
    [('h2c=":1234"', 1234), ('h3=":1", h2c=":65535"; ma=60', 65535), ('h2="other:12"', 0), ("clear", 0), ("", 0)],
)
def test_what_metadata_tell(value: str, port: int):
    assert port_of([("other", "x"), (ALTERNATIVE_KEY, value)]) == port
