"""The slices of an operation on one rank: what each holds, when it may be written, and where what is written goes.

A slice holds the rank's input until it is written for the first time, and what is written goes to its place in the output.
So a collective out of place needs no copy beforehand, and leaves the input as it was. What has no place in the output (a
partial result of others) gets memory of its own, from the first write to the last read.

No slice knows of peers or links: who moves them (`executor`) asks when a slice may be read or written, and says what came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from itertools import chain

from dsml_gpu.device.operation import Block, Operation
from dsml_gpu.device.undo import Undo
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.device_memory import DeviceNDArray
from dsml_gpu.reduction import Reducer
from dsml_gpu.schedules import Kind, chunk_bounds


class Slices:
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

    def __iter__(self) -> Iterator[Slice]:
        return chain.from_iterable(self._chunks)

    def of_chunk(self, chunk: int) -> list[Slice]:
        """The slices of a chunk in order; an empty chunk has none."""
        return self._chunks[chunk]

    def gate(self, piece: Slice, chunk: int) -> Slice:
        """The slice that must have been written before `piece` may be sent on: itself, or the last one of its chunk.

        Whoever writes a chunk writes its slices in order, so after the last one all are written.
        """
        return self._chunks[chunk][-1] if self._operation.dataflow.store_and_forward else piece

    def read(self, piece: Slice) -> DeviceNDArray:
        """What a slice holds."""
        if not piece.is_weighed:
            self._weigh(piece)
        if piece.content is None:
            piece.content = self._memory.allocate(piece.nbytes)
        return piece.content

    def apply(self, kind: Kind, piece: Slice, data: DeviceNDArray, lent: bool) -> None:
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

    def _weigh(self, piece: Slice) -> None:
        """Multiplies what the rank has at the start by its weight, before the first use."""
        weight = self._operation.weight
        assert weight is not None
        target = self._target(piece)
        self._reducer.weigh(self._operation.dtype, piece.content, target, weight)
        piece.content = target
        piece.is_weighed = True

    def _target(self, piece: Slice) -> DeviceNDArray:
        """Where to write, now."""
        if piece.target is None:
            piece.target = self._memory.scratch(piece.nbytes)
        elif piece.is_output:
            piece.is_output = False
            if self._undo is not None:
                self._undo.keep(piece.target)
        return piece.target


class Slice:
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
        """A read has begun."""
        self.issued += 1
        self._wake()

    def count_read(self) -> None:
        """A read is over."""
        self.reads += 1
        if self.passes and self.reads == self.all_reads:
            self.content = self.target = None  # nobody needs it any more
        self._wake()

    def count_write(self) -> None:
        """A write is over."""
        self.writes += 1
        self._wake()

    def _wake(self) -> None:
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)


def _cut(operation: Operation, arena: Arena, slice_bytes: int, buckets: Mapping[int, DeviceNDArray]) -> list[list[Slice]]:
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
                pieces.append(Slice(nbytes, content, target, all_reads, is_weighed, is_output))
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
