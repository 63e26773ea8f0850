"""Runs one rank's program: slices leave, arrive and are reduced as soon as the data they need is there.

For each chunk the program says in which order the rank reads it (a send) and writes it (a receive). A chunk is cut into
slices, and the order is kept slice by slice, so a slice travels on while the next one is still on its way here. One
coroutine per sending peer follows what comes from there in order, and one outbox per receiving peer what goes there; each
slice counts the reads and writes done on it, and a move waits for the counts that the program's order demands.
`schedules.verify` proved that these waits form no cycle.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dsml_gpu.device.dataflow import Access, Dataflow
from dsml_gpu.device.device import Device
from dsml_gpu.errors import DsmlError, OperationAborted, OperationTimeout, OutOfMemory
from dsml_gpu.memory.arena import Arena
from dsml_gpu.reduction import Operator
from dsml_gpu.schedules import Kind, chunk_bounds
from dsml_gpu.transport.link import RecvLink, SendLink
from dsml_gpu.wire.timeouts import StallWatch


@dataclass(frozen=True, slots=True)
class Operation:
    """One collective on one rank.

    Attributes:
        dataflow: this rank's moves.
        addr: its buffer, reduced in place.
        elements: length of the buffer.
    """

    dataflow: Dataflow
    addr: int
    elements: int
    dtype: np.dtype[Any]
    operator: Operator


@dataclass(frozen=True, slots=True)
class Links:
    """The open links of a rank during a group, by peer."""

    send: Mapping[int, SendLink]
    recv: Mapping[int, RecvLink]

    def abort(self, error: DsmlError) -> None:
        """Tells all peers that this rank gives up, and why."""
        for send in self.send.values():
            send.abort(error)
        for recv in self.recv.values():
            recv.abort(error)


class GroupExecution:
    """One rank's part of a group of operations, run one after the other over the same links.

    Args:
        device: the rank's; its reducer is ready for the operations.
        nranks: what an average divides by.
        links: open links to all peers of the programs; finished or aborted when `run` ends.
        slice_bytes: chunks are cut into pieces of this size; a multiple of every item size.
        stall_timeout_s: `run` gives up when no slice has come or gone for so long.
    """

    def __init__(self, device: Device, nranks: int, links: Links, slice_bytes: int, stall_timeout_s: float) -> None:
        self._arena = device.arena
        self._memory = device.arena.memory
        self._reducer = device.reducer
        self._nranks = nranks
        self._links = links
        self._slice_bytes = slice_bytes
        self._stall_timeout_s = stall_timeout_s
        self._slices_moved = 0
        self._waiting: dict[str, str] = {}
        self.bytes_sent = 0

    async def run(self, operations: Sequence[Operation]) -> None:
        """Runs the group; on return every buffer holds its result, on an exception none is defined.

        Raises:
            OperationTimeout: nothing moved for the stall timeout; the message says what was waited for.
            PeerUnavailable, OperationAborted, StreamLength: from the links.
        """
        watch = StallWatch(self._stall_timeout_s, lambda: self._slices_moved)
        try:
            drained = [link for link in self._links.send.values() if link.needs_drain]
            await _all_or_none([self._run_all(operations), *(link.drain() for link in drained)])
        except asyncio.CancelledError:
            if not watch.stalled:
                self._links.abort(OperationAborted("the operation was cancelled"))
                raise
            waits = "; ".join(self._waiting.values()) or "its peers to take what it sent"
            error = OperationTimeout(f"nothing moved for {self._stall_timeout_s:g} s; waited for {waits}")
            self._links.abort(OperationAborted(str(error)))
            raise error from None
        except Exception as error:
            self._links.abort(OperationAborted(str(error) or type(error).__name__))
            if isinstance(error, MemoryError) and not isinstance(error, DsmlError):
                raise OutOfMemory(f"an operation needs more memory than there is: {error}") from error
            raise
        finally:
            watch.stop()

    async def _run_all(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            await self._run_one(operation)
        await self._memory.finish()
        for send in self._links.send.values():
            send.end()
        for recv in self._links.recv.values():
            await recv.finish()
        for send in self._links.send.values():
            if not send.needs_drain:
                await send.drain()

    async def _run_one(self, operation: Operation) -> None:
        chunks = _cut(operation, self._slice_bytes)
        flow = operation.dataflow
        outboxes = [
            _Outbox(self._links.send[peer], accesses, chunks, self._arena, self._count_sent)
            for peer, accesses in flow.sends.items()
        ]
        for outbox in outboxes:
            outbox.send_what_is_ready()
        await _all_or_none(
            [
                self._receive(self._links.recv[peer], accesses, chunks, operation, outboxes)
                for peer, accesses in flow.receives.items()
            ]
        )
        # What is still being sent must not be overwritten by the next operation.
        for chunk, reads in zip(chunks, flow.reads, strict=True):
            for piece in chunk:
                if piece.reads < reads:
                    await piece.until(reads, 0)

    def _count_sent(self, piece: _Slice) -> None:
        self.bytes_sent += piece.nbytes
        self._slices_moved += 1
        piece.count_read()

    async def _receive(
        self,
        link: RecvLink,
        accesses: Sequence[Access],
        chunks: list[list[_Slice]],
        operation: Operation,
        outboxes: list[_Outbox],
    ) -> None:
        source = f"rank {accesses[0].move.peer}"
        for access in accesses:
            reads, writes = access.reads_before, access.writes_before
            self._waiting[source] = f"chunk {access.move.chunk} of step {access.step} from {source}"
            # Slices that may not be applied yet are kept, so that taking a chunk never waits for applying it: the proof
            # of progress (`schedules.verify`) rests on this. Between peers that exchange a chunk they are few.
            kept: deque[tuple[_Slice, Any]] = deque()
            for piece in chunks[access.move.chunk]:
                data = await link.recv(piece.nbytes)
                if piece.reads < reads or piece.writes < writes:
                    kept.append((piece, self._memory.clone(data) if link.lends else data))
                else:
                    self._apply(access.move.kind, piece, data, operation)
                link.release()
                self._slices_moved += 1
                for outbox in outboxes:
                    outbox.send_what_is_ready()
            while kept:
                piece, data = kept.popleft()
                await piece.until(reads, writes)
                self._apply(access.move.kind, piece, data, operation)
                for outbox in outboxes:
                    outbox.send_what_is_ready()
        del self._waiting[source]

    def _apply(self, kind: Kind, piece: _Slice, data: Any, operation: Operation) -> None:
        self._combine(kind, piece, data, operation)
        piece.count_write()

    def _combine(self, kind: Kind, piece: _Slice, data: Any, operation: Operation) -> None:
        target = self._arena.view(piece.addr, piece.nbytes)
        if kind is Kind.COPY:
            self._memory.copy(target, data)
            return
        divisor = self._nranks if operation.operator.averages and kind is Kind.REDUCE_LAST else 1
        self._reducer.reduce(operation.operator, operation.dtype, (target, data), (target,), divisor)


class _Outbox:
    """What one operation sends to one peer, slice by slice in the order of the program, each as soon as it is ready."""

    def __init__(
        self,
        link: SendLink,
        accesses: Sequence[Access],
        chunks: list[list[_Slice]],
        arena: Arena,
        on_sent: Callable[[_Slice], None],
    ) -> None:
        self._link = link
        self._arena = arena
        self._on_sent = on_sent
        self._waiting = deque((piece, access.writes_before) for access in accesses for piece in chunks[access.move.chunk])

    def send_what_is_ready(self) -> None:
        waiting = self._waiting
        while waiting and waiting[0][0].writes >= waiting[0][1]:
            piece, _ = waiting.popleft()
            self._link.send(self._arena.view(piece.addr, piece.nbytes), partial(self._on_sent, piece))


class _Slice:
    """A piece of a chunk, and how often it has been read and written so far."""

    __slots__ = ("_waiters", "addr", "nbytes", "reads", "writes")

    def __init__(self, addr: int, nbytes: int) -> None:
        self.addr = addr
        self.nbytes = nbytes
        self.reads = 0
        self.writes = 0
        self._waiters: list[asyncio.Future[None]] = []

    async def until(self, reads: int, writes: int) -> None:
        """Returns when it has been read and written so often."""
        while self.reads < reads or self.writes < writes:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def count_read(self) -> None:
        self.reads += 1
        if self._waiters:
            self._wake()

    def count_write(self) -> None:
        self.writes += 1
        if self._waiters:
            self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


def _cut(operation: Operation, slice_bytes: int) -> list[list[_Slice]]:
    """The slices of each chunk; an empty chunk has none."""
    itemsize, nchunks = operation.dtype.itemsize, operation.dataflow.nchunks
    chunks = []
    for chunk in range(nchunks):
        first, last = chunk_bounds(operation.elements, nchunks, chunk)
        start, end = operation.addr + first * itemsize, operation.addr + last * itemsize
        chunks.append([_Slice(addr, min(slice_bytes, end - addr)) for addr in range(start, end, slice_bytes)])
    return chunks


async def _all_or_none(work: list[Coroutine[Any, Any, None]]) -> None:
    """Runs coroutines side by side; when one fails the others are cancelled and its exception is raised."""
    if len(work) == 1:  # no other that could fail; a task of its own would only cost time
        return await work[0]
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(coroutine) for coroutine in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        unfinished = [task for task in tasks if not task.done()]
        if unfinished:
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
