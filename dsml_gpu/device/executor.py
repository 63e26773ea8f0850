"""Runs one rank's program: slices leave, arrive and are reduced as soon as the data they need is there.

For each chunk the program says in which order the rank reads it (a send) and writes it (a receive). A chunk is cut into
slices, and the order is kept slice by slice, so a slice travels on while the next one is still on its way here. One
coroutine per peer and direction follows that peer's moves in order; each slice counts the reads and writes done on it,
and a move waits for the counts that the program's order demands. `schedules.verify` proved that these waits form no
cycle.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsml_gpu.errors import DsmlError, OperationAborted, OperationTimeout
from dsml_gpu.memory.arena import Arena
from dsml_gpu.reduction import Operator, reduce_into
from dsml_gpu.schedules import Kind, Move, Program, chunk_bounds
from dsml_gpu.transport.link import RecvLink, SendLink


@dataclass(frozen=True, slots=True)
class Operation:
    """One collective on one rank.

    Attributes:
        program: this rank's moves.
        addr: its buffer, reduced in place.
        elements: length of the buffer.
    """

    program: Program
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
        for link in (*self.send.values(), *self.recv.values()):
            link.abort(error)


class GroupExecution:
    """One rank's part of a group of operations, run one after the other over the same links.

    Args:
        arena: the rank's memory.
        nranks: what an average divides by.
        links: open links to all peers of the programs; finished or aborted when `run` ends.
        slice_bytes: chunks are cut into pieces of this size; a multiple of every item size.
        stall_timeout_s: `run` gives up when no slice has come or gone for so long.
    """

    def __init__(self, arena: Arena, nranks: int, links: Links, slice_bytes: int, stall_timeout_s: float) -> None:
        self._arena = arena
        self._nranks = nranks
        self._links = links
        self._slice_bytes = slice_bytes
        self._stall_timeout_s = stall_timeout_s
        self._slices_moved = 0
        self._waiting: dict[str, str] = {}
        self.bytes_sent = 0

    async def run(self, operations: list[Operation]) -> None:
        """Runs the group; on return every buffer holds its result, on an exception none is defined.

        Raises:
            OperationTimeout: nothing moved for the stall timeout; the message says what was waited for.
            PeerUnavailable, OperationAborted, StreamLength: from the links.
        """
        try:
            await self._until_stalled(self._run_all(operations))
        except asyncio.CancelledError:
            self._links.abort(OperationAborted("the operation was cancelled"))
            raise
        except DsmlError as error:
            self._links.abort(OperationAborted(str(error)))
            raise

    async def _run_all(self, operations: list[Operation]) -> None:
        for operation in operations:
            await self._run_one(operation)
        self._arena.backend.synchronize()
        await _all_or_none([link.finish() for link in (*self._links.send.values(), *self._links.recv.values())])

    async def _until_stalled(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        try:
            while True:
                moved_before = self._slices_moved
                await asyncio.wait([task], timeout=self._stall_timeout_s)
                if task.done():
                    return task.result()
                if self._slices_moved == moved_before:
                    waits = "; ".join(self._waiting.values()) or "nothing in particular"
                    raise OperationTimeout(f"nothing moved for {self._stall_timeout_s:g} s; waiting for {waits}")
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _run_one(self, operation: Operation) -> None:
        chunks = _Chunks(operation, self._slice_bytes)
        sends: dict[int, list[_Access]] = defaultdict(list)
        recvs: dict[int, list[_Access]] = defaultdict(list)
        for access in _accesses(operation.program):
            (sends if access.move.kind is Kind.SEND else recvs)[access.move.peer].append(access)
        await _all_or_none(
            [self._send(self._links.send[peer], accesses, chunks) for peer, accesses in sends.items()]
            + [self._receive(self._links.recv[peer], accesses, chunks, operation) for peer, accesses in recvs.items()]
        )
        # A transport that lends memory may still hold slices of it: they are the peer's until it has read them.
        for piece in chunks.all_slices():
            await piece.until(piece.reads_expected, 0)

    async def _send(self, link: SendLink, accesses: list[_Access], chunks: _Chunks) -> None:
        for access in accesses:
            for piece in chunks[access.move.chunk]:
                await piece.until(0, access.writes_before)
                await link.send(self._arena.view(piece.addr, piece.nbytes), piece.count_read)
                self.bytes_sent += piece.nbytes
                self._slices_moved += 1

    async def _receive(self, link: RecvLink, accesses: list[_Access], chunks: _Chunks, operation: Operation) -> None:
        key = f"from {accesses[0].move.peer}"
        for access in accesses:
            move = access.move
            self._waiting[key] = f"chunk {move.chunk} of step {access.step} from rank {move.peer}"
            for piece in chunks[move.chunk]:
                data = await link.recv(piece.nbytes)
                if not piece.has(access.reads_before, access.writes_before):
                    if link.lends:
                        data = data.copy()
                        link.release()
                    await piece.until(access.reads_before, access.writes_before)
                self._apply(move.kind, piece, data, operation)
                link.release()
                piece.count_write()
                self._slices_moved += 1
        del self._waiting[key]

    def _apply(self, kind: Kind, piece: _Slice, data: Any, operation: Operation) -> None:
        target = self._arena.view(piece.addr, piece.nbytes)
        if kind is Kind.COPY:
            target[...] = data
            return
        divisor = self._nranks if operation.operator.averages and kind is Kind.REDUCE_LAST else 1
        reduce_into(
            self._arena.backend.xp, operation.operator, target.view(operation.dtype), data.view(operation.dtype), divisor
        )


@dataclass(frozen=True, slots=True)
class _Access:
    """A move and how many earlier reads and writes of its chunk it must wait for."""

    move: Move
    step: int
    reads_before: int
    writes_before: int


def _accesses(program: Program) -> list[_Access]:
    """The program's moves in order. A send waits for earlier writes of its chunk, a receive for earlier reads as well."""
    reads: dict[int, int] = defaultdict(int)
    writes: dict[int, int] = defaultdict(int)
    accesses = []
    for number, step in enumerate(program.steps):
        for move in step:
            accesses.append(_Access(move, number, reads[move.chunk], writes[move.chunk]))
            (reads if move.kind is Kind.SEND else writes)[move.chunk] += 1
    return accesses


class _Slice:
    """A piece of a chunk, and how often it has been read and written so far."""

    __slots__ = ("_reads", "_waiters", "_writes", "addr", "nbytes", "reads_expected")

    def __init__(self, addr: int, nbytes: int, reads_expected: int) -> None:
        self.addr = addr
        self.nbytes = nbytes
        self.reads_expected = reads_expected
        self._reads = 0
        self._writes = 0
        self._waiters: list[asyncio.Future[None]] = []

    def has(self, reads: int, writes: int) -> bool:
        return self._reads >= reads and self._writes >= writes

    async def until(self, reads: int, writes: int) -> None:
        while not self.has(reads, writes):
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def count_read(self) -> None:
        self._reads += 1
        self._wake()

    def count_write(self) -> None:
        self._writes += 1
        self._wake()

    def _wake(self) -> None:
        if self._waiters:
            waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)


class _Chunks:
    """The slices of each chunk of one operation; an empty chunk has none."""

    def __init__(self, operation: Operation, slice_bytes: int) -> None:
        program, itemsize = operation.program, operation.dtype.itemsize
        reads: dict[int, int] = defaultdict(int)
        for step in program.steps:
            for move in step:
                reads[move.chunk] += move.kind is Kind.SEND
        self._slices: list[list[_Slice]] = []
        for chunk in range(program.nchunks):
            first, last = (bound * itemsize for bound in chunk_bounds(operation.elements, program.nchunks, chunk))
            self._slices.append(
                [
                    _Slice(operation.addr + start, min(slice_bytes, last - start), reads[chunk])
                    for start in range(first, last, slice_bytes)
                ]
            )

    def __getitem__(self, chunk: int) -> list[_Slice]:
        return self._slices[chunk]

    def all_slices(self) -> list[_Slice]:
        return [piece for chunk in self._slices for piece in chunk]


async def _all_or_none(work: list[Coroutine[Any, Any, None]]) -> None:
    """Runs coroutines side by side; when one fails the others are cancelled and its exception is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        unfinished = [task for task in tasks if not task.done()]
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.gather(*unfinished, return_exceptions=True)
