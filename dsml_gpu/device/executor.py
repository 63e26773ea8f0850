"""Runs one rank's program: slices leave, arrive and are reduced as soon as the data they need is there.

For each chunk the program says in which order the rank reads it (a send) and writes it (a receive). A chunk is cut into
slices, and the order is kept slice by slice, so a slice travels on while the next one is still on its way here. One
coroutine per sending peer follows what comes from there in order, and one outbox per receiving peer what goes there; each
slice counts the reads and writes done on it, and a move waits for the counts that the program's order demands.
`schedules.verify` proved that these waits form no cycle.

A slice holds the rank's input until it is written for the first time, and what is written goes to its place in the output.
So a collective out of place needs no copy beforehand, and leaves the input as it was. What has no place in the output (a
partial result of others) gets memory of its own, from the first write to the last read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from dsml_gpu import failpoints
from dsml_gpu.device.buckets import Piece, gathered, spread
from dsml_gpu.device.dataflow import Access, Dataflow
from dsml_gpu.device.device import Device, Membership
from dsml_gpu.device.progress import Progress
from dsml_gpu.device.undo import Undo
from dsml_gpu.device.waits import Waits
from dsml_gpu.errors import DsmlError, OperationAborted, OperationTimeout, OutOfMemory
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.device_memory import DeviceNDArray
from dsml_gpu.reduction import Operator, Reducer
from dsml_gpu.schedules import Kind, chunk_bounds
from dsml_gpu.transport.link import RecvLink, SendLink
from dsml_gpu.wire.timeouts import StallWatch


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a collective's data on one rank.

    Attributes:
        elements: its length.
        send: address of what the rank has of it at the start; None: nothing, or a token of zeros.
        recv: address of the rank's result; None: it passes through. The same as `send` where it is in place.
        pieces: of what the block is gathered; empty: it is in one place. `send` and `recv` are then no addresses.
    """

    elements: int
    send: int | None
    recv: int | None
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """One collective on one rank.

    Attributes:
        dataflow: this rank's moves.
        blocks: those of the dataflow. No two ranges overlap but the two of a block that is in place.
        weight: what the rank has at the start is multiplied by it; None: it is not.
        copies_input: ranges of `send` may overlap those of `recv` after all: the input is copied first.
    """

    dataflow: Dataflow
    blocks: tuple[Block, ...]
    dtype: np.dtype[Any]
    operator: Operator
    weight: np.generic | None = None
    copies_input: bool = False


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
        membership: the device's place among the ranks.
        links: open links to all peers of the programs; finished or aborted when `run` ends.
        slice_bytes: chunks are cut into pieces of this size; a multiple of every item size.
        stall_timeout_s: `run` gives up when no slice has come or gone for so long.
        progress: counts the slices that come and go.
        undo: gets what is overwritten; None: it is lost.

    Attributes:
        waits: what it waits for, or did when it was given up.
        bytes_sent: of payload, so far.
    """

    def __init__(
        self,
        device: Device,
        membership: Membership,
        links: Links,
        slice_bytes: int,
        stall_timeout_s: float,
        progress: Progress,
        undo: Undo | None = None,
    ) -> None:
        self._arena = device.arena
        self._memory = device.arena.memory
        self._reducer = device.reducer
        self._device_id = device.device_id
        self._rank, self._nranks = membership.rank, membership.nranks
        self._links = links
        self._slice_bytes = slice_bytes
        self._stall_timeout_s = stall_timeout_s
        self._progress = progress
        self._undo = undo
        self._slices_moved = 0
        self.waits = Waits()
        self.bytes_sent = 0

    async def run(self, operations: Sequence[Operation]) -> None:
        """Runs the group; on return every output holds its result. On an exception none is defined, but for `undo`.

        Raises:
            OperationTimeout: nothing moved for the stall timeout; the message says what was waited for.
            PeerUnavailable, OperationAborted, StreamLength: from the links.
        """
        watch = StallWatch(self._stall_timeout_s, lambda: self._slices_moved)
        try:
            drains = [self._drain(peer, link) for peer, link in self._links.send.items() if link.needs_drain]
            await _all_or_none([self._run_all(operations), *drains])
        except asyncio.CancelledError:
            self.waits.keep()
            if not watch.stalled:
                self._links.abort(OperationAborted("the operation was cancelled"))
                raise
            waits = ", ".join(map(str, self.waits.present())) or "something of this rank itself"
            error = OperationTimeout(f"nothing moved for {self._stall_timeout_s:g} s; waited for {waits}")
            self._links.abort(OperationAborted(str(error)))
            raise error from None
        except Exception as error:
            self.waits.keep()
            self._links.abort(OperationAborted(str(error) or type(error).__name__))
            if isinstance(error, MemoryError) and not isinstance(error, DsmlError):
                raise OutOfMemory(f"an operation needs more memory than there is: {error}") from error
            raise
        finally:
            watch.stop()

    async def _run_all(self, operations: Sequence[Operation]) -> None:
        for number, operation in enumerate(operations):
            self.waits.begin(number, operation.dataflow)
            await self._run_one(operation)
        self.waits.end(len(operations))
        await self._memory.finish()
        for peer, send in self._links.send.items():
            self.waits.send(peer)
            send.end()
        for peer, recv in self._links.recv.items():
            self.waits.expect(peer, None)
            await recv.finish()
            self.waits.came(peer)
        for peer, send in self._links.send.items():
            if not send.needs_drain:
                await self._drain(peer, send)

    async def _drain(self, peer: int, link: SendLink) -> None:
        await link.drain()
        self.waits.taken(peer)

    async def _run_one(self, operation: Operation) -> None:
        flow = operation.dataflow
        buckets = {
            number: gathered(block.pieces, self._arena) for number, block in enumerate(operation.blocks) if block.pieces
        }
        slices = _Slices(operation, self._arena, self._reducer, self._slice_bytes, self._nranks, buckets, self._undo)
        outboxes = [
            _Outbox(self._links.send[peer], accesses, slices, partial(self.waits.send, peer), partial(self._on_sent, peer))
            for peer, accesses in flow.sends.items()
        ]
        for outbox in outboxes:
            outbox.send_what_is_ready()
        await _all_or_none(
            [
                *(
                    self._receive(self._links.recv[peer], accesses, slices, outboxes)
                    for peer, accesses in flow.receives.items()
                ),
                slices.settle(),
            ]
        )
        # What is still being sent must not be overwritten by the next operation.
        for piece in slices:
            await piece.until_read()
        for number, bucket in buckets.items():
            spread(operation.blocks[number].pieces, bucket, self._arena, self._undo)

    def _on_sent(self, peer: int, piece: _Slice) -> None:
        self.waits.taken(peer)
        self.bytes_sent += piece.nbytes
        self._count_moved()
        piece.count_read()

    def _count_moved(self) -> None:
        self._slices_moved += 1
        self._progress.add()
        failpoints.reach("execute.slice", rank=self._rank, device=self._device_id)

    async def _receive(self, link: RecvLink, accesses: Sequence[Access], slices: _Slices, outboxes: list[_Outbox]) -> None:
        source = accesses[0].move.peer
        for access in accesses:
            reads, writes = access.reads_before, access.writes_before
            # Slices that may not be applied yet are kept, so that taking a chunk never waits for applying it: the proof
            # of progress (`schedules.verify`) rests on this. Between peers that exchange a chunk they are few.
            kept: list[asyncio.Task[None]] = []
            try:
                for piece in slices.of_chunk(access.move.chunk):
                    self.waits.expect(source, access)
                    data = await link.recv(piece.nbytes)
                    self.waits.came(source)
                    if piece.may_be_written(reads, writes):
                        slices.apply(access.move.kind, piece, data, link.lends)
                    else:
                        own = self._memory.clone(data) if link.lends else data
                        kept.append(asyncio.ensure_future(self._apply_later(access, piece, own, slices, outboxes)))
                    link.release()
                    self._count_moved()
                    for outbox in outboxes:
                        outbox.send_what_is_ready()
                for task in kept:
                    await task
            finally:
                for task in kept:
                    task.cancel()

    async def _apply_later(
        self, access: Access, piece: _Slice, data: DeviceNDArray, slices: _Slices, outboxes: list[_Outbox]
    ) -> None:
        await piece.until(access.reads_before, access.writes_before)
        slices.apply(access.move.kind, piece, data, lent=False)
        for outbox in outboxes:
            outbox.send_what_is_ready()


class _Outbox:
    """What one operation sends to one peer, slice by slice in the order of the program, each as soon as it is ready."""

    def __init__(
        self,
        link: SendLink,
        accesses: Sequence[Access],
        slices: _Slices,
        on_send: Callable[[], None],
        on_sent: Callable[[_Slice], None],
    ) -> None:
        self._link = link
        self._slices = slices
        self._on_send = on_send
        self._on_sent = on_sent
        #: Slices to send, each with the one that must have been written first, and how often.
        self._waiting = deque(
            (piece, slices.gate(piece, access.move.chunk), access.writes_before)
            for access in accesses
            for piece in slices.of_chunk(access.move.chunk)
        )

    def send_what_is_ready(self) -> None:
        waiting = self._waiting
        while waiting and waiting[0][1].writes >= waiting[0][2]:
            piece, _, _ = waiting.popleft()
            self._on_send()
            self._link.send(self._slices.read(piece), partial(self._on_sent, piece))
            piece.count_issued()


class _Slices:
    """The slices of an operation's chunks, and what is done to them.

    Args:
        arena: where the operation's buffers are.
        reducer: reduces there.
        slice_bytes: chunks are cut into pieces of this size.
        nranks: what an average divides by.
        buckets: memory of the blocks that have pieces, by their numbers.
        undo: gets what is overwritten of the operation's buffers; None: it is lost.
    """

    def __init__(
        self,
        operation: Operation,
        arena: Arena,
        reducer: Reducer,
        slice_bytes: int,
        nranks: int,
        buckets: Mapping[int, DeviceNDArray],
        undo: Undo | None,
    ) -> None:
        self._undo = undo
        self._operation = operation
        self._memory = arena.memory
        self._reducer = reducer
        self._divisor = nranks if operation.operator.averages else 1
        self._chunks = _cut(operation, arena, slice_bytes, buckets)

    def __iter__(self) -> Iterator[_Slice]:
        return chain.from_iterable(self._chunks)

    def of_chunk(self, chunk: int) -> list[_Slice]:
        """The slices of a chunk in order; an empty chunk has none."""
        return self._chunks[chunk]

    def gate(self, piece: _Slice, chunk: int) -> _Slice:
        """The slice that must have been written before `piece` may be sent on: itself, or the last one of its chunk.

        Whoever writes a chunk writes its slices in order, so after the last one all are written.
        """
        return self._chunks[chunk][-1] if self._operation.dataflow.store_and_forward else piece

    def read(self, piece: _Slice) -> DeviceNDArray:
        """What a slice holds."""
        if not piece.is_weighed:
            self._weigh(piece)
        if piece.content is None:
            piece.content = self._memory.allocate(piece.nbytes)
        return piece.content

    def apply(self, kind: Kind, piece: _Slice, data: DeviceNDArray, lent: bool) -> None:
        """Writes to a slice.

        Args:
            lent: `data` is memory that somebody else will need again.
        """
        if kind is Kind.COPY:
            if piece.target is None and not lent:
                piece.content = data
            else:
                piece.content = self._target(piece)
                self._memory.copy(piece.content, data)
        else:
            divisor = self._divisor if kind is Kind.REDUCE_LAST else 1
            held, target = self.read(piece), self._target(piece)
            self._reducer.reduce(self._operation.operator, self._operation.dtype, (held, data), (target,), divisor)
            piece.content = target
        piece.is_weighed = True
        piece.count_write()

    async def settle(self) -> None:
        """Brings what the rank has and keeps, and nobody sends it, to where its result goes."""
        flow = self._operation.dataflow
        for chunk, writes in enumerate(flow.writes):
            if writes:
                continue
            for piece in self._chunks[chunk]:
                if piece.target is None or (piece.content is piece.target and piece.is_weighed):
                    continue
                if not piece.is_weighed:
                    self._weigh(piece)
                elif piece.content is not None:
                    self._memory.copy(self._target(piece), piece.content)
                await asyncio.sleep(0)  # others are served between two slices

    def _weigh(self, piece: _Slice) -> None:
        """Multiplies what the rank has at the start by its weight, before the first use."""
        weight = self._operation.weight
        assert weight is not None
        target = self._target(piece)
        self._reducer.weigh(self._operation.dtype, piece.content, target, weight)
        piece.content = target
        piece.is_weighed = True

    def _target(self, piece: _Slice) -> DeviceNDArray:
        """Where to write, now."""
        if piece.target is None:
            piece.target = self._memory.scratch(piece.nbytes)
        elif piece.is_output:
            piece.is_output = False
            if self._undo is not None:
                self._undo.keep(piece.target)
        return piece.target


class _Slice:
    """A piece of a chunk.

    Attributes:
        content: what it holds: the rank's input before the first write; None: nothing.
        target: where what is written goes; None: memory that is taken at the first write.
        all_reads: how often it is read in all.
        is_output: the target is memory of the caller's that was not written yet.
        is_weighed: the rank's weight is in the content.
        issued: how many of its reads are under way or over; from then on they read what it held at that moment.
        reads, writes: how many are over.
    """

    __slots__ = (
        "_waiters",
        "all_reads",
        "content",
        "is_output",
        "is_weighed",
        "issued",
        "nbytes",
        "passes",
        "reads",
        "target",
        "writes",
    )

    def __init__(
        self,
        nbytes: int,
        content: DeviceNDArray | None,
        target: DeviceNDArray | None,
        all_reads: int,
        is_weighed: bool,
        is_output: bool,
    ) -> None:
        self.nbytes = nbytes
        self.content = content
        self.target = target
        self.all_reads = all_reads
        self.is_weighed = is_weighed
        self.is_output = is_output
        self.passes = target is None
        self.issued = 0
        self.reads = 0
        self.writes = 0
        self._waiters: list[asyncio.Future[None]] = []

    def may_be_written(self, reads: int, writes: int) -> bool:
        """Whether so many reads and writes, which come before a write, are over as far as the write concerns them.

        A write to other memory than the reads are from need not wait until they are over, only until they have begun.
        """
        return self.writes >= writes and (self.reads if self.content is self.target else self.issued) >= reads

    async def until(self, reads: int, writes: int) -> None:
        """Returns when it may be written after so many reads and writes."""
        while not self.may_be_written(reads, writes):
            await self._next_count()

    async def until_read(self) -> None:
        """Returns when all its reads are over."""
        while self.reads < self.all_reads:
            await self._next_count()

    async def _next_count(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def count_issued(self) -> None:
        self.issued += 1
        self._wake()

    def count_read(self) -> None:
        self.reads += 1
        if self.passes and self.reads == self.all_reads:
            self.content = self.target = None  # nobody needs it any more
        self._wake()

    def count_write(self) -> None:
        self.writes += 1
        self._wake()

    def _wake(self) -> None:
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)


def _cut(operation: Operation, arena: Arena, slice_bytes: int, buckets: Mapping[int, DeviceNDArray]) -> list[list[_Slice]]:
    """The slices of each chunk."""
    flow, itemsize = operation.dataflow, operation.dtype.itemsize
    chunks = []
    for block_number, block in enumerate(operation.blocks):
        for part in range(flow.parts):
            first, last = chunk_bounds(block.elements, flow.parts, part)
            all_reads = flow.reads[block_number * flow.parts + part]
            pieces = []
            for start in range(first * itemsize, last * itemsize, slice_bytes):
                nbytes = min(slice_bytes, last * itemsize - start)
                content, target = _views(block, buckets.get(block_number), arena, start, nbytes)
                if operation.copies_input and content is not None:
                    content = arena.memory.clone(content)
                is_weighed = operation.weight is None or content is None
                is_output = target is not None and block_number not in buckets
                pieces.append(_Slice(nbytes, content, target, all_reads, is_weighed, is_output))
            chunks.append(pieces)
    return chunks


def _views(
    block: Block, bucket: DeviceNDArray | None, arena: Arena, start: int, nbytes: int
) -> tuple[DeviceNDArray | None, DeviceNDArray | None]:
    """Where a part of a block is, and where its result goes: the same array where that is in place."""
    if bucket is not None:
        piece = bucket[start : start + nbytes]
        return None if block.send is None else piece, None if block.recv is None else piece
    content = None if block.send is None else arena.view(block.send + start, nbytes)
    if block.recv == block.send:
        return content, content
    return content, None if block.recv is None else arena.view(block.recv + start, nbytes)


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
