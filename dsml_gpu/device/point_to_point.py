"""The low-level way: single transfers that somebody else's coordinator drives by BeginSend and BeginReceive."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from dsml_gpu.device.device import Device, Peer
from dsml_gpu.errors import DsmlError, OperationAborted, OperationTimeout, StreamInUse, StreamLength, StreamNotFound
from dsml_gpu.transport.emulation import DeviceLink
from dsml_gpu.transport.grpc import ChannelPool, GrpcSendLink, early_end
from dsml_gpu.transport.incoming import Incoming, IncomingTable
from dsml_gpu.transport.link import new_stream_id
from dsml_gpu.wire.stubs import COPY_SLICE_BYTES
from dsml_gpu.wire.timeouts import StallWatch, in_time

log = logging.getLogger(__name__)

#: Ended streams whose status is remembered.
_MAX_ENDED = 1 << 16


class StreamState(IntEnum):
    """As ``enum Status`` on the wire."""

    IN_PROGRESS = 0
    SUCCESS = 1
    FAILED = 2


@dataclass(slots=True)
class StreamStatus:
    """How a stream stands, and why when it failed.

    Attributes:
        ends: how many of its ends are on this server and under way; it has succeeded when the last one has.
    """

    state: StreamState = StreamState.IN_PROGRESS
    message: str = ""
    ends: int = 0

    def end(self, failure: str) -> None:
        """One end is over; `failure` is empty when it went well."""
        self.ends -= 1
        if failure and self.state is not StreamState.FAILED:
            self.state, self.message = StreamState.FAILED, failure
        elif not self.ends and self.state is StreamState.IN_PROGRESS:
            self.state = StreamState.SUCCESS


class PointToPoint:
    """The single transfers of one server.

    Args:
        incoming: where StreamSend calls arrive.
        channels: to the peers' servers.
        stall_timeout_s: a transfer that does not move for so long fails.
    """

    def __init__(self, incoming: IncomingTable, channels: ChannelPool, stall_timeout_s: float) -> None:
        self._incoming = incoming
        self._channels = channels
        self._stall_timeout_s = stall_timeout_s
        self._streams: OrderedDict[int, StreamStatus] = OrderedDict()
        self._receiving: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def begin_send(self, device: Device, addr: int, nbytes: int, peer: Peer, link: DeviceLink | None) -> int:
        """Starts to send device memory to a peer; returns the new stream's id at once.

        Args:
            link: the device's, where links are emulated.

        Raises:
            AddressOutOfRange: the buffer leaves the device's memory.
        """
        device.arena.check(addr, nbytes)
        stream_id = new_stream_id()
        sender = GrpcSendLink(self._channels.peer(peer.address), stream_id, device.arena.memory, str(peer), link)
        self._follow(stream_id, self._send(device, addr, nbytes, sender))
        return stream_id

    def begin_receive(self, device: Device, stream_id: int, addr: int, nbytes: int, link: DeviceLink | None) -> None:
        """Starts to receive a stream into device memory; returns at once.

        Args:
            link: the device's, where links are emulated.

        Raises:
            AddressOutOfRange: the buffer leaves the device's memory.
            StreamInUse: the stream has a receiver already.
        """
        device.arena.check(addr, nbytes)
        if stream_id in self._receiving:
            raise StreamInUse(f"stream {stream_id} has a receiver already")
        stream = self._incoming.claim(stream_id, accept_unnamed=True, link=link)
        self._follow(stream_id, self._receive(device, addr, nbytes, stream))
        self._receiving.add(stream_id)

    def status(self, stream_id: int) -> StreamStatus:
        """How a stream stands.

        Raises:
            StreamNotFound: it never was one of this server, or ended very long ago.
        """
        status = self._streams.get(stream_id)
        if status is None:
            raise StreamNotFound(f"no stream {stream_id} on this server")
        return status

    async def close(self) -> None:
        """Gives up all transfers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _follow(self, stream_id: int, transfer: Coroutine[Any, Any, None]) -> None:
        status = self._streams.setdefault(stream_id, StreamStatus())
        status.ends += 1

        async def run() -> None:
            try:
                await transfer
                status.end("")
            except asyncio.CancelledError:
                status.end("the server shut down")
                raise
            except Exception as error:
                if not isinstance(error, DsmlError):
                    log.error("a transfer met a defect of the server", exc_info=error)
                status.end(str(error) or type(error).__name__)
            finally:
                self._forget_oldest()

        task = asyncio.ensure_future(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _forget_oldest(self) -> None:
        while len(self._streams) > _MAX_ENDED:
            stream_id, _ = self._streams.popitem(last=False)
            self._receiving.discard(stream_id)

    async def _send(self, device: Device, addr: int, nbytes: int, sender: GrpcSendLink) -> None:
        sent = 0

        def on_sent() -> None:
            nonlocal sent
            sent += 1

        for start in range(0, nbytes, COPY_SLICE_BYTES):
            sender.send(device.arena.view(addr + start, min(COPY_SLICE_BYTES, nbytes - start)), on_sent)
        sender.end()
        watch = StallWatch(self._stall_timeout_s, lambda: sent)
        try:
            await sender.drain()
        except BaseException:
            sender.abort(OperationAborted("the sender gave up"))
            if watch.stalled:
                raise OperationTimeout(f"the receiver took nothing for {self._stall_timeout_s:g} s") from None
            raise
        finally:
            watch.stop()

    async def _receive(self, device: Device, addr: int, nbytes: int, stream: Incoming) -> None:
        try:
            received = 0
            while (message := await in_time(stream.messages.get(), self._stall_timeout_s, "data")) is not None:
                if received + len(message) > nbytes:
                    raise StreamLength(f"expected {nbytes} bytes, got at least {received + len(message)}")
                await device.arena.write(addr + received, message)
                received += len(message)
            if received < nbytes:
                raise await early_end(stream, f"expected {nbytes} bytes, got {received}")
            await device.arena.memory.finish()
            stream.complete()
        except DsmlError as error:
            stream.fail(error)
            raise
        except asyncio.CancelledError:
            stream.fail(OperationAborted("the receiver shut down"))
            raise
