"""gRPC transport: one StreamSend call carries a rank's slices to one peer, as many in flight as flow control lets.

The first call to a server goes through gRPC, and its answer tells of the server's data port, to which later ones go
(`data_port`). Calls over emulated links all go through gRPC.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import grpc

from dsml_gpu.errors import AmbiguousStream, DsmlError, OperationAborted, PeerUnavailable, StreamLength
from dsml_gpu.memory.device_memory import DeviceMemory, DeviceNDArray, Download, Staged
from dsml_gpu.transport.data_stream import DataConnection, DataStream, connect, port_of
from dsml_gpu.transport.emulation import DelayLine, DeviceLink
from dsml_gpu.transport.incoming import Incoming, IncomingTable
from dsml_gpu.transport.queue import ClosableQueue
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.outgoing import OutgoingStream
from dsml_gpu.wire.stubs import channel_options, device_stub

#: How long after the end of a stream its cancellation may become known.
_CANCELLATION_FOLLOWS_S = 0.5
#: Slices of a stream that are copied from device to host at a time.
_DOWNLOADS_AHEAD = 4


class Peer:
    """The connections to one other device server.

    Args:
        address: host:port of its gRPC server.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        # Its own connection: another channel's could be one that is not tried again for a while.
        options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(address, options=options)
        #: Of GPUDevice, over gRPC.
        self.stub = device_stub(self._channel)
        self._data: DataConnection | None = None
        self._connecting: asyncio.Task[None] | None = None

    @property
    def put_off(self) -> bool:
        """It could not connect, and does not try again for a while: calls fail until then."""
        return self._channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE

    def stream_send(self, by_grpc: bool = False) -> OutgoingStream | DataStream:
        """Begins a StreamSend call.

        Args:
            by_grpc: to gRPC's own port, whether there is a data port or not.
        """
        if not by_grpc and self._data is not None and self._data.usable:
            return self._data.open()
        return OutgoingStream(self.stub.StreamSend())

    async def learn(self, stream: OutgoingStream) -> None:
        """Takes from the answer of a call by gRPC where the data port is, for the calls after it."""
        port = port_of(await stream.metadata())
        if port and self._connecting is None and (self._data is None or self._data.closed):
            self._connecting = asyncio.ensure_future(self.connect(port))

    async def connect(self, port: int) -> None:
        """Connects to the server's data port. Where that does not come about, calls go on to gRPC's."""
        try:
            host = self._address.rpartition(":")[0].strip("[]")
            self._data = await connect(host, port, self._address)
        finally:
            self._connecting = None

    async def close(self) -> None:
        """Closes them; calls on them end."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._data is not None:
            self._data.close("the connection was closed here")
        await self._channel.close()


class ChannelPool:
    """Connections to other device servers, by address, made at first use and kept."""

    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def stub(self, address: str) -> Any:
        """The GPUDevice stub of a server."""
        return self.peer(address).stub

    def peer(self, address: str) -> Peer:
        """A server, for streams."""
        peer = self._peers.get(address)
        if peer is not None and peer.put_off:
            # Who asks for it takes the server to be there: it may be another one, at the same place.
            closing = asyncio.ensure_future(peer.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            peer = None
        if peer is None:
            peer = self._peers[address] = Peer(address)
        return peer

    async def close(self) -> None:
        """Closes all connections; calls on them end with CANCELLED."""
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            await peer.close()
        await asyncio.gather(*self._closing)


class _EndedEarlyError(DsmlError):
    """The call of a link has ended while the link waited for slices; the call knows why."""


class _Slice(NamedTuple):
    """A slice that waits to be sent, since `queued_s` (which is looked at where the link is emulated)."""

    data: DeviceNDArray
    on_sent: Callable[[], None]
    queued_s: float


class GrpcSendLink:
    """See `link.SendLink`.

    Args:
        server: the peer's.
        stream_id: the stream, which the peer claims under the same number.
        memory: that slices come from.
        peer: who the peer is, for error messages.
        link: of the device that sends, where links are emulated.
    """

    needs_drain = True

    def __init__(
        self, server: Peer, stream_id: int, memory: DeviceMemory, peer: str, link: DeviceLink | None = None
    ) -> None:
        self._server = server
        self._stream = server.stream_send(by_grpc=link is not None)
        self._line = DelayLine(self._stream, link) if link is not None and isinstance(self._stream, OutgoingStream) else None
        self._memory = memory
        self._peer = peer
        self._header = pb.DataChunk(streamId=stream_id)
        self._slices: ClosableQueue[_Slice | None] = ClosableQueue()
        # A sender that has nothing to send at the moment hears of the end as well.
        self._stream.on_end(lambda: self._close(_EndedEarlyError()))

    def send(self, data: DeviceNDArray, on_sent: Callable[[], None]) -> None:
        with suppress(_EndedEarlyError):  # `drain` says why
            self._slices.put_nowait(_Slice(data, on_sent, 0.0 if self._line is None else time.monotonic()))

    def end(self) -> None:
        with suppress(_EndedEarlyError):
            self._slices.put_nowait(None)

    async def drain(self) -> None:
        under_way: deque[tuple[Download, _Slice]] = deque()
        try:
            await self._drain(under_way)
        except _EndedEarlyError:
            raise self._named_error(await self._stream.why_ended()) from None
        except DsmlError as error:
            raise self._named_error(error) from None
        finally:
            for download, _ in under_way:
                download.release()
            if self._line is not None:
                await self._line.stop()

    async def _drain(self, under_way: deque[tuple[Download, _Slice]]) -> None:
        header: pb.DataChunk | None = self._header
        ended = False
        while under_way or not ended:
            # While one slice is on the network, the next ones come to the host.
            while not ended and len(under_way) < _DOWNLOADS_AHEAD and (not under_way or self._slices):
                piece = await self._slices.get()
                if piece is None:
                    ended = True
                else:
                    under_way.append((self._memory.begin_download(piece.data), piece))
            if under_way:
                download, piece = under_way[0]
                await self._write(Chunk(await download.wait(), header), piece.queued_s)
                under_way.popleft()
                download.release()
                piece.on_sent()
                header = None
        if header is not None:
            await self._write(Chunk(b"", header), time.monotonic())
        await (self._stream if self._line is None else self._line).end()
        await self._stream.response()
        if isinstance(self._stream, OutgoingStream) and self._line is None:
            await self._server.learn(self._stream)

    async def _write(self, chunk: Chunk, ready_s: float) -> None:
        if self._line is None:
            await self._stream.write(chunk)
        else:
            await self._line.write(chunk, ready_s)

    def abort(self, error: DsmlError) -> None:
        self._close(error)
        self._stream.cancel()

    def _close(self, error: DsmlError) -> None:
        self._slices.close(error)
        if self._line is not None:
            self._line.close(error)

    def _named_error(self, error: DsmlError) -> DsmlError:
        if error.code == "UNAVAILABLE":
            return PeerUnavailable(f"{self._peer} is gone: {error}")
        return OperationAborted(f"{self._peer} gave up: {error}")


class GrpcRecvLink:
    """See `link.RecvLink`.

    Args:
        incoming: the claimed stream.
        memory: that slices go to.
        peer: who the peer is, for error messages.
    """

    def __init__(self, incoming: Incoming, memory: DeviceMemory, peer: str) -> None:
        self.lends = memory.lends_staged
        self._incoming = incoming
        self._memory = memory
        self._peer = peer
        self._staged: Staged | None = None

    async def recv(self, nbytes: int) -> DeviceNDArray:
        message = await self._incoming.messages.get()
        if message is None:
            raise await early_end(self._incoming, f"expected a slice of {nbytes} bytes from {self._peer}")
        if len(message) != nbytes:
            raise StreamLength(f"expected a slice of {nbytes} bytes from {self._peer}, got {len(message)} bytes")
        self._staged = await self._memory.stage(message)
        return self._staged.array

    def release(self) -> None:
        if self._staged is not None:
            self._staged.release()
            self._staged = None

    async def finish(self) -> None:
        message = await self._incoming.messages.get()
        if message is not None:
            raise StreamLength(f"expected the end of the stream from {self._peer}, got {len(message)} bytes more")
        self._incoming.complete()

    def abort(self, error: DsmlError) -> None:
        self.release()
        self._incoming.fail(error)


async def early_end(incoming: Incoming, expected: str) -> DsmlError:
    """Why a stream ended before its time.

    A call that the sender cancelled, or whose connection broke, first looks like one that ended well; the cancellation
    follows.
    """
    await asyncio.wait([incoming.ended], timeout=_CANCELLATION_FOLLOWS_S)
    if incoming.ended.done() and (error := incoming.ended.exception()) is not None:
        assert isinstance(error, DsmlError)
        return error
    return StreamLength(f"{expected}, got the end of the stream")


async def serve_stream_send(table: IncomingTable, chunks: AsyncIterator[Chunk]) -> None:
    """The server's side of one StreamSend call: hands the messages to whoever claims the stream, returns when it has all.

    Raises:
        StreamInUse, AmbiguousStream, TooManyStreams: see `IncomingTable.offer`.
        OperationTimeout: no receiver came.
        DsmlError: whatever the receiver gave up with.
    """
    first = await anext(chunks, None)
    if first is None:
        raise AmbiguousStream("StreamSend ended before its first message")
    incoming = table.offer(first.header.streamId if first.header is not None else 0)
    # A task of its own: the receiver may give up while nothing comes.
    passing_on = asyncio.ensure_future(_pass_on(first, chunks, incoming))
    try:
        await asyncio.wait([passing_on, incoming.ended], return_when=asyncio.FIRST_COMPLETED)
        if passing_on.done():
            passing_on.result()
        await asyncio.shield(incoming.ended)
    except asyncio.CancelledError:
        # The peer has given up or is gone; those who talk to it themselves can tell which.
        incoming.fail(OperationAborted("the sender gave up, or its connection broke"))
        raise
    except DsmlError as error:
        incoming.fail(error)
        raise
    finally:
        passing_on.cancel()
        await asyncio.gather(passing_on, return_exceptions=True)


async def _pass_on(first: Chunk, chunks: AsyncIterator[Chunk], incoming: Incoming) -> None:
    chunk: Chunk | None = first
    while chunk is not None:
        message = memoryview(chunk.data)
        if message.nbytes:
            await incoming.messages.put(message)
        chunk = await anext(chunks, None)
    await incoming.messages.put(None)
