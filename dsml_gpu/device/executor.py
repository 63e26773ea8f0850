"""Runs one rank's program: slices leave, arrive and are reduced as soon as the data they need is there.

For each chunk the program says in which order the rank reads it (a send) and writes it (a receive). A chunk is cut into
slices (`slices`), and the order is kept slice by slice, so a slice travels on while the next one is still on its way here.
One coroutine per sending peer follows what comes from there in order, and one outbox per receiving peer what goes there;
each slice counts the reads and writes done on it, and a move waits for the counts that the program's order demands.
`schedules.verify` proved that these waits form no cycle.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from dsml_gpu import failpoints
from dsml_gpu.device.buckets import gathered, spread
from dsml_gpu.device.dataflow import Access
from dsml_gpu.device.device import Device, Membership
from dsml_gpu.device.links import Links
from dsml_gpu.device.operation import Operation
from dsml_gpu.device.progress import Progress
from dsml_gpu.device.slices import Slice, Slices
from dsml_gpu.device.undo import Undo
from dsml_gpu.device.waits import Waits
from dsml_gpu.errors import DsmlError, OperationAborted, OperationTimeout, OutOfMemory
from dsml_gpu.memory.device_memory import DeviceNDArray
from dsml_gpu.transport.link import RecvLink, SendLink
from dsml_gpu.wire.timeouts import StallWatch


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
        slices = Slices(operation, self._arena, self._reducer, self._slice_bytes, self._nranks, buckets, self._undo)
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

    def _on_sent(self, peer: int, piece: Slice) -> None:
        self.waits.taken(peer)
        self.bytes_sent += piece.nbytes
        self._count_moved()
        piece.count_read()

    def _count_moved(self) -> None:
        self._slices_moved += 1
        self._progress.add()
        failpoints.reach("execute.slice", rank=self._rank, device=self._device_id)

    async def _receive(self, link: RecvLink, accesses: Sequence[Access], slices: Slices, outboxes: list[_Outbox]) -> None:
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
        self, access: Access, piece: Slice, data: DeviceNDArray, slices: Slices, outboxes: list[_Outbox]
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
        slices: Slices,
        on_send: Callable[[], None],
        on_sent: Callable[[Slice], None],
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
