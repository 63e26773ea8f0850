"""A communicator: its epochs, its group, and how its last collective ended."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dsml_gpu import failpoints
from dsml_gpu.coordinator import plan
from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.choice import Chooser
from dsml_gpu.coordinator.commits import Commits, Progress
from dsml_gpu.coordinator.control_round import cancel
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.diagnosis import HeldUp, HeldUpByLost
from dsml_gpu.coordinator.epochs import Epoch, Epochs
from dsml_gpu.coordinator.members import Keeper, Members
from dsml_gpu.coordinator.order import Turn
from dsml_gpu.coordinator.ranks import Ranks, RunSettings
from dsml_gpu.coordinator.records import Begun
from dsml_gpu.coordinator.results import Done, result_of
from dsml_gpu.coordinator.resume import Past
from dsml_gpu.errors import (
    BuffersUndefined,
    CommNotReady,
    DsmlError,
    GroupMisuse,
    InternalError,
    OutOfDevices,
    PeerUnavailable,
)
from dsml_gpu.observe import metrics
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)


class _Asked(NamedTuple):
    """A call, in the numbering of an epoch, and its own number in the communicator, from 1."""

    call: CollectiveCall
    epoch: Epoch
    number: int = 0


class Communicator:
    """Devices with ranks 0..n-1, and the collectives on them.

    When a device dies, what runs is undone and run again on those that are left, in a new epoch; see ``enum OnFailure`` in
    the contract.

    Args:
        handles: rank r of the first epoch is ``handles[r]``.
        chooser: chooses algorithms.
        on_failure: number of ``enum OnFailure``, not 0.
        keeper: hears of new epochs before they are used.
        commits: hear of rounds that have ended well before they are made irrevocable.
        past: what it was with the coordinator before; None: it is new.
    """

    def __init__(
        self,
        comm_id: int,
        handles: Sequence[DeviceHandle],
        chooser: Chooser,
        settings: RunSettings,
        on_failure: int,
        keeper: Keeper,
        commits: Commits,
        past: Past | None = None,
    ) -> None:
        self.comm_id = comm_id
        self._on_failure = on_failure
        self._settings = settings
        self._commits = commits
        epochs = Epochs([Epoch(1, tuple(range(len(handles))))] if past is None else past.epochs)
        uids = None if past is None else past.process_uids
        ranks = Ranks(comm_id, epochs.present.number, handles, chooser, settings, uids)
        self._members = Members(
            comm_id,
            epochs,
            ranks,
            lambda number, handles: Ranks(comm_id, number, handles, chooser, settings),
            on_failure,
            keeper,
        )
        self._group: list[_Asked] | None = None
        self._numbers = itertools.count(1)
        self._finalized = past is not None and past.finalized
        self._running: set[asyncio.Task[Any]] = set()
        self._last_status, self._last_message = (pb.IN_PROGRESS, "") if past is None else past.status

    @property
    def handles(self) -> tuple[DeviceHandle, ...]:
        """Rank r of the present epoch is ``handles[r]``."""
        return self._members.handles

    @property
    def epoch(self) -> Epoch:
        """The present one."""
        return self._members.epoch

    def nranks_of(self, epoch: int) -> int:
        """The number of ranks of an epoch, 0 for the first. Raises InvalidValue where there never was one."""
        return self._members.epoch_of(epoch).nranks

    def kept(self, epoch: int) -> tuple[int, ...]:
        """The ranks of an epoch that are left, which are those of the present one, in order. Raises as `Epochs.kept`."""
        return self._members.kept(self._members.epoch_of(epoch))

    @property
    def status(self) -> tuple[pb.Status, str]:
        """IN_PROGRESS until the first collective has ended and while one runs, else how the last one ended and why."""
        if self._running:
            return pb.IN_PROGRESS, ""
        return self._last_status, self._last_message

    async def join(self) -> None:
        """Tells every device its rank and its peers.

        Raises:
            InvalidValue: p2p is forced, and the devices cannot open each other's memory.
            DsmlError: what a device refuses with.
        """
        await self._members.ranks.join()

    async def finish(self, begun: Begun) -> bool:
        """Brings a round of passes to its end that the coordinator before may have begun; returns whether it has happened.

        To be called before anything else.

        Raises:
            DsmlError: it could not be, and may have begun: what is in its buffers is not defined.
        """
        try:
            has_happened = await self._members.ranks.finish([pb.ExecuteRequest.FromString(one) for one in begun.requests])
        except DsmlError as error:
            self._last_status, self._last_message = pb.FAILED, str(error)
            raise
        if has_happened:
            devices, epoch = self._members.ranks.device_ids, self.epoch.number
            self._commits.finish(begun, pb.CollectiveResult(transports=[pb.P2P], deviceIds=devices, epoch=epoch))
        return has_happened

    async def leave(self) -> None:
        """Tells every device that the communicator is over."""
        results = await asyncio.gather(*(handle.leave(self.comm_id) for handle in self.handles), return_exceptions=True)
        for handle, result in zip(self.handles, results, strict=True):
            if isinstance(result, DsmlError):
                log.warning("%s was not told that communicator %d is over: %s", handle, self.comm_id, result)
            elif isinstance(result, BaseException):
                raise result

    # ---- what clients ask for -----------------------------------------------------------------------------------------

    def group_start(self) -> None:
        """Opens a group. Raises GroupMisuse where one is open."""
        self._require_open()
        if self._group is not None:
            raise GroupMisuse(f"communicator {self.comm_id} has an open group of {len(self._group)} operations already")
        self._group = []

    async def group_end(self, wait: bool) -> pb.CollectiveResult | None:
        """Runs the open group. Raises GroupMisuse where none is open, and what the group fails with when `wait` is set."""
        task = self._start(self._close_group())
        if wait:
            return await task
        # Nobody waits: the status keeps the error.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return None

    def group_discard(self) -> None:
        """Drops the open group. Raises GroupMisuse where none is open."""
        self._close_group()

    def _close_group(self) -> list[_Asked]:
        if self._group is None:
            raise GroupMisuse(f"communicator {self.comm_id} has no open group")
        group, self._group = self._group, None
        return group

    async def submit(self, call: CollectiveCall, epoch: int = 0) -> pb.CollectiveResult | None:
        """Checks a call against the devices' memory and its schedule, then queues it in the open group or runs it.

        Args:
            epoch: whose numbering of ranks the call uses; 0: the first one's.

        Returns:
            What it did; None when queued.

        Raises:
            AddressOutOfRange: a buffer leaves its device's memory.
            InvalidValue, ScheduleNotProved: see `plan.plan_of`; or the epoch knows nothing of ranks that came later.
            RanksLost: it cannot be done without the ranks that are lost.
        """
        self._require_open()
        asked = _Asked(call, self._members.epoch_of(epoch))
        await self.check(asked.call, epoch)
        if call.own_schedule:
            self._require_open()  # the proof took its time
        self._members.ranks.require_links(self._members.in_present(asked.call, asked.epoch))
        asked = asked._replace(number=next(self._numbers))
        if self._group is not None:
            self._group.append(asked)
            return None
        return await self._start([asked])

    async def check(self, call: CollectiveCall, epoch: int = 0) -> None:
        """Raises what `submit` refuses a call with for its buffers, its algorithm or its schedule."""
        asked = _Asked(call, self._members.epoch_of(epoch))
        for handle, rank in zip(self.handles, self._members.kept(asked.epoch), strict=True):
            for addr, nbytes in call.ranges[rank]:
                handle.check(addr, nbytes)
        if call.own_schedule:
            # Proved before it is queued, beside the event loop: nobody knows how large it is.
            await self._members.ranks.prove(self._members.in_present(asked.call, asked.epoch))
        elif call.algorithm:
            plan.require_known(call.name, call.algorithm)

    async def finalize(self) -> None:
        """Takes no more collectives, drops an open group, and waits for those that run. Idempotent."""
        self._finalized = True
        self._group = None
        if self._running:
            await asyncio.wait(list(self._running))

    async def drain(self, drain_s: float) -> None:
        """Waits for running collectives and cancels what is not done after `drain_s`."""
        if self._running:
            _, late = await asyncio.wait(list(self._running), timeout=drain_s)
            await cancel(list(late))

    def _require_open(self) -> None:
        if self._finalized:
            raise CommNotReady(f"communicator {self.comm_id} was finalized and takes no more operations")

    # ---- who is in it -------------------------------------------------------------------------------------------------

    async def retire(self, handle: DeviceHandle) -> None:
        """Goes on without a device that leaves, after what was issued before; returns when it has.

        With ``FAIL``, or where it is the only one, it only waits: what comes later fails.
        """
        async with self._turn():
            self._members.retire(handle)

    def check_growing(self, number: int) -> None:
        """Raises what `grow` refuses so many devices with, whichever they are.

        Raises:
            CommNotReady, GroupMisuse: it was finalized, or a group is open.
            PeerUnavailable: devices are lost, and it does not go on without them.
            OutOfDevices: it would have more than `MAX_RANKS`.
        """
        self._require_open()
        self._members.require_whole()
        if self._group is not None:
            raise GroupMisuse(f"communicator {self.comm_id} has an open group, and cannot grow before its end")
        if self.epoch.nranks + number > plan.MAX_RANKS:
            raise OutOfDevices(
                f"a communicator has at most {plan.MAX_RANKS} ranks; {number} more than {self.epoch.nranks} were asked for"
            )

    async def leave_lost_behind(self) -> None:
        """Goes on without devices that are lost, as the next operation would. Raises PeerUnavailable where it cannot."""
        async with self._turn():
            gone = self._members.ranks.gone()
            if gone:
                await self._members.go_on_after(gone, [])

    async def grow(self, handles: Sequence[DeviceHandle]) -> None:
        """Takes in devices, which get the ranks behind the last one, after what was issued before.

        Raises:
            DsmlError: see `check_growing`; or a device cannot join: then none has.
        """
        self.check_growing(len(handles))
        async with self._turn(handles):
            self.check_growing(len(handles))
            while True:
                try:
                    await self._members.grow(handles)
                    return
                except DsmlError:
                    # Of those that were in it one may have died, which nobody had noticed yet.
                    gone = self._members.ranks.gone()
                    if not gone or any(handle.lost for handle in handles):
                        raise
                    await self._members.go_on_after(gone, [])

    def _turn(self, more: Sequence[DeviceHandle] = ()) -> Turn:
        return Turn([*self.handles, *more], self._settings.operation_timeout_s)

    # ---- how calls are run --------------------------------------------------------------------------------------------

    def _start(self, asked: list[_Asked]) -> asyncio.Task[pb.CollectiveResult]:
        # The place in the order is taken here and now, not when the task gets to run.
        turn = self._turn()
        task = asyncio.ensure_future(self._run(asked, turn))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: turn.end())
        return task

    async def _run(self, asked: list[_Asked], turn: Turn) -> pb.CollectiveResult:
        if not asked:
            return pb.CollectiveResult()
        calls = [one.call for one in asked]
        what = str(calls[0]) if len(calls) == 1 else f"a group of {len(calls)} operations"
        done: list[Done] = []
        lost: list[pb.LostDevice] = []
        progress = self._commits.begin(self.comm_id)
        started_ns = time.perf_counter_ns()

        def record(number: int, ncalls: int) -> None:
            elapsed_ns = time.perf_counter_ns() - started_ns
            progress.record(number, progress.calls + ncalls, lambda: result_of(done, lost, elapsed_ns))

        try:
            async with turn:
                started_ns = time.perf_counter_ns()
                try:
                    await self._run_all(asked[progress.calls :], done, lost, progress, record)
                except BaseException:
                    progress.give_up()
                    raise
                elapsed_ns = time.perf_counter_ns() - started_ns
        except asyncio.CancelledError:
            self._last_status, self._last_message = pb.FAILED, f"{what}: cancelled by the caller"
            raise
        except DsmlError as error:
            is_named = isinstance(error, (HeldUp, HeldUpByLost))
            named = error if is_named else type(error)(f"{what}: {error}")
            self._last_status, self._last_message = pb.FAILED, str(named)
            metrics.count_operations(calls, failed=True)
            if is_named:
                raise
            raise named from error
        except Exception as error:
            self._last_status, self._last_message = pb.FAILED, f"{what}: defect of the server: {error!r}"
            log.exception("%s met a defect of the server", what)
            raise
        self._last_status, self._last_message = pb.SUCCESS, ""
        metrics.count_operations(
            [part for one in done for each in one.planned for part in each.parts], elapsed_s=elapsed_ns / 1e9
        )
        return progress.total((lambda: result_of(done, lost, elapsed_ns)) if done else None)

    async def _run_all(
        self,
        asked: Sequence[_Asked],
        done: list[Done],
        lost: list[pb.LostDevice],
        progress: Progress,
        record: Callable[[int, int], None],
    ) -> None:
        """Runs calls in order, again and again on those that are left where devices die; each loss costs a rank.

        Args:
            done: gets what has ended well.
            lost: gets the devices that were left behind.
            progress: of the operation; these are the calls that no earlier try has done.
            record: gets the number of each round that has ended well, and how many calls have in all.
        """
        members, remaining = self._members, list(asked)

        def in_present(some: Sequence[_Asked]) -> list[CollectiveCall]:
            return [members.in_present(one.call, one.epoch) for one in some]

        def begin(ncalls: int, requests: Iterable[pb.ExecuteRequest]) -> None:
            progress.begin(progress.calls + len(asked) - len(remaining) + ncalls, requests)
            failpoints.reach("round.begun")

        while remaining:
            members.require_whole()
            gone = members.ranks.gone()
            if gone:
                lost += await members.go_on_after(gone, in_present(remaining))
            ranks = members.ranks
            try:
                planned = await ranks.plan(in_present(remaining))
                async for some, moved in ranks.run(planned, [one.number for one in remaining], begin):
                    failpoints.reach("round.done")
                    done.append(Done(ranks, some, moved))
                    del remaining[: sum(len(one.parts) for one in some)]
                    try:
                        record(ranks.last_round, len(asked) - len(remaining))
                    except InternalError as error:
                        if await ranks.undo_last():
                            raise
                        log.error("communicator %d: what has happened could not be recorded: %s", self.comm_id, error)
                    failpoints.reach("round.recorded")
            except DsmlError as error:
                gone = await members.gone_after(error, self._settings.stall_timeout_ms)
                if not gone:
                    raise
                is_undefined = not self._settings.atomic or isinstance(error, BuffersUndefined)
                try:
                    if is_undefined:
                        # What is in the buffers is not what was there before: there is nothing to run it on again.
                        members.go_on_without(gone)
                        raise
                    lost += await members.go_on_after(gone, in_present(remaining))
                except PeerUnavailable as end:
                    if isinstance(error, BuffersUndefined):
                        raise error from end
                    if isinstance(error, HeldUp) and self._on_failure == pb.FAIL:
                        raise HeldUpByLost(str(error)) from end
                    raise
