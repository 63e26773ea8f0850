"""Peer-to-peer transport inside one process: the receiver reads the sender's memory itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from dsml_gpu.errors import DsmlError, OperationTimeout, StreamInUse, StreamLength
from dsml_gpu.memory.device_memory import DeviceMemory, DeviceNDArray, Mark
from dsml_gpu.transport.queue import ClosableQueue

#: A slice, when the sender's memory holds it, and what to call when it has been read.
_Slice = tuple[DeviceNDArray, Mark, Callable[[Mark], None]]


@dataclass(eq=False)
class _Pipe:
    slices: ClosableQueue[_Slice | None] = field(default_factory=ClosableQueue)
    all_taken: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    has_sender: bool = False
    has_receiver: bool = False
    ends_closed: int = 0
    expiry: asyncio.TimerHandle | None = None

    def fail(self, error: DsmlError) -> None:
        """Both ends raise `error` from now on."""
        self.slices.close(error)
        if not self.all_taken.done():
            self.all_taken.set_exception(error)
            self.all_taken.exception()  # an error that nobody waits for is no defect


class PipeTable:
    """The pipes of one process, by stream id. The end that comes first makes the pipe; the last one to close removes it.

    Args:
        timeout_s: a pipe whose other end does not come for so long fails.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._pipes: dict[int, _Pipe] = {}

    def __len__(self) -> int:
        return len(self._pipes)

    def open_send(self, stream_id: int, memory: DeviceMemory) -> P2PSendLink:
        """The sending end of a stream, for slices of `memory`. Raises StreamInUse where it was opened before."""
        pipe = self._open(stream_id)
        if pipe.has_sender:
            raise StreamInUse(f"stream {stream_id} has a sender already")
        pipe.has_sender = True
        return P2PSendLink(self, stream_id, pipe, memory)

    def open_recv(self, stream_id: int, memory: DeviceMemory) -> P2PRecvLink:
        """The receiving end of a stream, for work queued on `memory`. Raises StreamInUse where it was opened before."""
        pipe = self._open(stream_id)
        if pipe.has_receiver:
            raise StreamInUse(f"stream {stream_id} has a receiver already")
        pipe.has_receiver = True
        return P2PRecvLink(self, stream_id, pipe, memory)

    def _open(self, stream_id: int) -> _Pipe:
        pipe = self._pipes.get(stream_id)
        if pipe is None:
            pipe = self._pipes[stream_id] = _Pipe()
            loop = asyncio.get_running_loop()
            pipe.expiry = loop.call_later(self._timeout_s, self._expire, stream_id, pipe)
        elif pipe.expiry is not None:
            pipe.expiry.cancel()
            pipe.expiry = None
        return pipe

    def _expire(self, stream_id: int, pipe: _Pipe) -> None:
        pipe.fail(OperationTimeout(f"the other end of stream {stream_id} did not come for {self._timeout_s:g} s"))
        self._pipes.pop(stream_id, None)

    def _close(self, stream_id: int, pipe: _Pipe) -> None:
        pipe.ends_closed += 1
        if pipe.ends_closed == 2:
            self._pipes.pop(stream_id, None)


class _P2PLink:
    def __init__(self, table: PipeTable, stream_id: int, pipe: _Pipe, memory: DeviceMemory) -> None:
        self._table = table
        self._stream_id = stream_id
        self._pipe = pipe
        self._memory = memory
        self._closed = False

    def abort(self, error: DsmlError) -> None:
        self._pipe.fail(error)
        self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._table._close(self._stream_id, self._pipe)


class P2PSendLink(_P2PLink):
    """See `link.SendLink`."""

    needs_drain = False

    def send(self, data: DeviceNDArray, on_sent: Callable[[], None]) -> None:
        def on_read(read: Mark) -> None:
            self._memory.wait(read)
            on_sent()

        self._pipe.slices.put_nowait((data, self._memory.mark(), on_read))

    def end(self) -> None:
        self._pipe.slices.put_nowait(None)

    async def drain(self) -> None:
        await self._pipe.all_taken
        self._close()


class P2PRecvLink(_P2PLink):
    """See `link.RecvLink`."""

    lends = True

    def __init__(self, table: PipeTable, stream_id: int, pipe: _Pipe, memory: DeviceMemory) -> None:
        super().__init__(table, stream_id, pipe, memory)
        self._on_read: Callable[[Mark], None] | None = None

    async def recv(self, nbytes: int) -> DeviceNDArray:
        item = await self._pipe.slices.get()
        if item is None or item[0].nbytes != nbytes:
            actual = "the end of the stream" if item is None else f"{item[0].nbytes} bytes"
            raise StreamLength(f"expected a slice of {nbytes} bytes, got {actual}")
        data, written, self._on_read = item
        self._memory.wait(written)
        return self._memory.near(data)

    def release(self) -> None:
        if self._on_read is not None:
            on_read, self._on_read = self._on_read, None
            on_read(self._memory.mark())

    async def finish(self) -> None:
        # Does not wait for the sender to say that no slice follows: in one process that would cost more than it tells.
        if (item := self._pipe.slices.peek()) is not None:
            raise StreamLength(f"expected the end of the stream, got {item[0].nbytes} bytes more")
        if not self._pipe.all_taken.done():
            self._pipe.all_taken.set_result(None)
        self._close()
