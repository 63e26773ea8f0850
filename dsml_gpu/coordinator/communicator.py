"""A communicator: its ranks, its group, and how its last collective ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

from dsml_gpu.coordinator import passes, plan
from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.choice import Choice, Chooser
from dsml_gpu.coordinator.control_round import cancel, lost_communicator, run_round, settle
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.fusion import buckets_of, fused
from dsml_gpu.coordinator.memory_access import MemoryAccess
from dsml_gpu.coordinator.order import Turn
from dsml_gpu.coordinator.plan import Plan, PlanKey
from dsml_gpu.errors import CommNotReady, DsmlError, GroupMisuse
from dsml_gpu.observe import metrics
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)

#: A round of passes may take the stall timeout and what it needs at this speed, far below that of any memory.
_SLOWEST_PASSES_BYTES_PER_S = 100e6
#: Up to so many ranks a plan takes a few milliseconds at most.
_PLANNED_AT_ONCE_RANKS = 16
#: What a rank has kept of its buffers during operations that touched more is dropped at once when they have ended well,
#: otherwise with the next operation.
_KEPT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Planned:
    """A call, and how it is run: by a plan, or by passes over memory where that is None."""

    call: CollectiveCall
    choice: Choice
    plan: Plan | None

    @property
    def name(self) -> str:
        return self.call.name

    @property
    def algorithm(self) -> str:
        return self.choice.algorithm

    @property
    def count(self) -> int:
        return self.call.count

    @property
    def parts(self) -> list[_Planned]:
        """The calls that it was fused of, or itself alone."""
        calls = self.call.parts
        if not calls:
            return [self]
        choice = replace(
            self.choice,
            reason=f"{self.choice.reason}, in a bucket of {len(calls)}",
            predicted_s=self.choice.predicted_s / len(calls),
        )
        return [_Planned(call, choice, self.plan) for call in calls]


class Communicator:
    """Devices with ranks 0..n-1, and the collectives on them.

    Args:
        handles: rank r is ``handles[r]``.
        chooser: chooses algorithms.
        forced_transport: number of ``enum Transport``.
        stall_timeout_ms: a collective in which nothing moves for so long fails.
        operation_timeout_s: a group fails when it takes longer, moving or not.
        atomic: a collective by a schedule that fails leaves all buffers as they were.
    """

    def __init__(
        self,
        comm_id: int,
        handles: Sequence[DeviceHandle],
        chooser: Chooser,
        forced_transport: int,
        stall_timeout_ms: int,
        operation_timeout_s: float,
        *,
        atomic: bool = True,
    ) -> None:
        self._atomic = atomic
        self._settling: set[asyncio.Task[None]] = set()
        self.comm_id = comm_id
        self.handles = tuple(handles)
        self._chooser = chooser
        self._memories = MemoryAccess(forced_transport)
        self._process_uids = [handle.metadata.processUid for handle in handles]
        self._team = passes.Team.of([handle.metadata for handle in handles])
        self._forced_transport = forced_transport
        self._stall_timeout_ms = stall_timeout_ms
        self._operation_timeout_s = operation_timeout_s
        self._group: list[CollectiveCall] | None = None
        self._finalized = False
        self._running: set[asyncio.Task[Any]] = set()
        self._last_status: pb.Status = pb.IN_PROGRESS
        self._last_message = ""

    @property
    def nranks(self) -> int:
        return len(self.handles)

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
        await self._memories.join(self.comm_id, self.handles)

    async def leave(self) -> None:
        """Tells every device that the communicator is over."""
        results = await asyncio.gather(*(handle.leave(self.comm_id) for handle in self.handles), return_exceptions=True)
        for handle, result in zip(self.handles, results, strict=True):
            if isinstance(result, DsmlError):
                log.warning("%s was not told that communicator %d is over: %s", handle, self.comm_id, result)
            elif isinstance(result, BaseException):
                raise result

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

    def _close_group(self) -> list[CollectiveCall]:
        if self._group is None:
            raise GroupMisuse(f"communicator {self.comm_id} has no open group")
        group, self._group = self._group, None
        return group

    async def submit(self, call: CollectiveCall) -> pb.CollectiveResult | None:
        """Checks a call against the devices' memory and its schedule, then queues it in the open group or runs it.

        Returns:
            What it did; None when queued.

        Raises:
            AddressOutOfRange: a buffer leaves its device's memory.
            InvalidValue, ScheduleNotProved: see `plan.plan_of`.
        """
        self._require_open()
        for handle, ranges in zip(self.handles, call.ranges, strict=True):
            for addr, nbytes in ranges:
                handle.check(addr, nbytes)
        if call.own_schedule:
            # Proved before it is queued, beside the event loop: nobody knows how large it is.
            await asyncio.to_thread(plan.plan_of, self._key(call, ""))
            self._require_open()
        elif call.algorithm:
            plan.require_known(call.name, call.algorithm)
        self._memories.require_links(call, self._by_passes(call))
        if self._group is not None:
            self._group.append(call)
            return None
        return await self._start([call])

    async def finalize(self) -> None:
        """Takes no more collectives, drops an open group, and waits for those that run. Idempotent."""
        self._finalized = True
        self._group = None
        if self._running:
            await asyncio.wait(list(self._running))

    async def retire(self, handle: DeviceHandle) -> None:
        """Returns when the operations that run have ended. Those that come later fail: one of the ranks leaves."""
        log.warning(
            "communicator %d loses %s, which leaves; what comes after its running operation fails", self.comm_id, handle
        )
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

    def _require_same_processes(self) -> None:
        """Raises PeerUnavailable where a device's server is not the one that joined: it would have to join, empty as it is.

        Who takes part in an operation says so itself (`control_round`). A rank that has nothing to do is not even asked.
        """
        for rank, (handle, process_uid) in enumerate(zip(self.handles, self._process_uids, strict=True)):
            if handle.metadata.processUid != process_uid:
                raise lost_communicator(rank, handle)

    def _start(self, calls: list[CollectiveCall]) -> asyncio.Task[pb.CollectiveResult]:
        # The place in the order is taken here and now, not when the task gets to run.
        turn = Turn(self.handles, self._operation_timeout_s)
        task = asyncio.ensure_future(self._run(calls, turn))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: turn.end())
        return task

    async def _run(self, calls: list[CollectiveCall], turn: Turn) -> pb.CollectiveResult:
        if not calls:
            return pb.CollectiveResult()
        what = str(calls[0]) if len(calls) == 1 else f"a group of {len(calls)} operations"
        try:
            async with turn:
                self._require_same_processes()
                if self._memories.has_moved(self.handles):
                    await self.join()
                planned = await self._plan(calls)
                started_ns = time.perf_counter_ns()
                bytes_sent = await self._run_rounds(planned)
                elapsed_ns = time.perf_counter_ns() - started_ns
        except asyncio.CancelledError:
            self._last_status, self._last_message = pb.FAILED, f"{what}: cancelled by the caller"
            raise
        except DsmlError as error:
            named = type(error)(f"{what}: {error}")
            self._last_status, self._last_message = pb.FAILED, str(named)
            metrics.count_operations(calls, failed=True)
            raise named from error
        except Exception as error:
            self._last_status, self._last_message = pb.FAILED, f"{what}: defect of the server: {error!r}"
            log.exception("%s met a defect of the server", what)
            raise
        self._last_status, self._last_message = pb.SUCCESS, ""
        metrics.count_operations([part for one in planned for part in one.parts], elapsed_s=elapsed_ns / 1e9)
        algorithms = {one.algorithm for one in planned}
        return pb.CollectiveResult(
            algorithm=algorithms.pop() if len(algorithms) == 1 else "",
            transports=cast("list[pb.Transport]", self._transports(planned)) if bytes_sent else (),
            elapsedNs=elapsed_ns,
            bytesSent=bytes_sent,
            operations=[
                pb.OperationChoice(
                    kind=part.name.upper(),
                    algorithm=part.algorithm,
                    reason=part.choice.reason,
                    predictedNs=min(round(part.choice.predicted_s * 1e9), (1 << 64) - 1),
                )
                for one in planned
                for part in one.parts
            ],
        )

    async def _plan(self, calls: list[CollectiveCall]) -> list[_Planned]:
        """Chooses the algorithm of each call, and plans it.

        In a thread where it can take more than a few milliseconds, once: others are to be served meanwhile.
        """
        devices = [handle.metadata for handle in self.handles]
        planned = []
        for by_passes, group in groupby(calls, key=self._by_passes):
            if by_passes:
                for call in group:
                    choice = self._chooser.choice_of_passes(call, len(self._team.workers(passes.bytes_of(call))))
                    planned.append(_Planned(call, choice, None))
                continue
            for call in map(fused, buckets_of(list(group))):
                chosen = self._chooser.known_choice(call, devices, self._forced_transport)
                if chosen is None:
                    chosen = await asyncio.to_thread(self._chooser.choose, call, devices, self._forced_transport)
                key = self._key(call, chosen.algorithm)
                if self.nranks > _PLANNED_AT_ONCE_RANKS:
                    await asyncio.to_thread(plan.plan_of, key)
                planned.append(_Planned(call, chosen, plan.plan_of(key)))
        return planned

    def _by_passes(self, call: CollectiveCall) -> bool:
        """Whether a call is run as passes over memory that all ranks have open."""
        return self._memories.all_open and passes.has_passes(call) and call.algorithm in ("", passes.ALGORITHM)

    def _key(self, call: CollectiveCall, algorithm: str) -> PlanKey:
        hosts = plan.hosts_of([handle.metadata for handle in self.handles])
        return plan.key_of(call, algorithm, hosts)

    async def _run_rounds(self, planned: list[_Planned]) -> int:
        """Runs calls in order, in as few rounds of control messages as they allow; returns the bytes that moved."""
        moved = 0
        for by_passes, group in groupby(planned, key=lambda one: one.plan is None):
            some = list(group)
            if not by_passes:
                requests = self._requests_of_plans(some)
                moved += await run_round(self.handles, requests, self._operation_timeout_s)
                if self._atomic and sum(one.count for one in some) > _KEPT_BYTES:
                    settling = asyncio.ensure_future(settle(self.handles, requests, pb.QuiesceRequest.COMMIT))
                    self._settling.add(settling)
                    settling.add_done_callback(self._settling.discard)
                continue
            for one_round in passes.rounds_of(tuple(one.call for one in some), self._team):
                timeout_s = self._stall_timeout_ms / 1000 + one_round.nbytes / _SLOWEST_PASSES_BYTES_PER_S
                limit_s = min(timeout_s, self._operation_timeout_s)
                moved += await run_round(self.handles, self._requests_of_passes(one_round), limit_s, self._memories)
        return moved

    def _requests_of_plans(self, planned: list[_Planned]) -> dict[int, pb.ExecuteRequest]:
        device_ids = [handle.device_id for handle in self.handles]
        operations = [(one.call, one.plan) for one in planned if one.plan is not None]
        return dict(
            enumerate(
                plan.execute_requests(self.comm_id, device_ids, operations, self._stall_timeout_ms, atomic=self._atomic)
            )
        )

    def _requests_of_passes(self, one_round: passes.Round) -> dict[int, pb.ExecuteRequest]:
        # Also a rank that has nothing to do must be there; one whose end would be known need not be asked.
        return {
            rank: pb.ExecuteRequest(commId=self.comm_id, deviceId=handle.device_id, passes=one_round.work.get(rank, ()))
            for rank, handle in enumerate(self.handles)
            if rank in one_round.work or not handle.tells_of_its_end
        }

    def _transports(self, planned: list[_Planned]) -> list[int]:
        devices = [handle.metadata for handle in self.handles]
        pairs = {pair for one in planned if one.plan is not None for pair in one.plan.pairs}
        used = {plan.choose_transport(devices[src], devices[dst], self._forced_transport) for src, dst in pairs}
        if any(one.plan is None for one in planned):
            used.add(pb.P2P)
        return sorted(used)
