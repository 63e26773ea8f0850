"""A communicator: its ranks, its group, and how its last collective ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, cast

from dsml_gpu.coordinator import plan
from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.choice import Choice, Chooser
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.order import Turn
from dsml_gpu.coordinator.plan import Plan, PlanKey
from dsml_gpu.errors import (
    CommNotFound,
    CommNotReady,
    DsmlError,
    GroupMisuse,
    OperationAborted,
    OperationTimeout,
    PeerUnavailable,
)
from dsml_gpu.observe import metrics
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)

#: After one rank has failed the others are given so long to say why, before they are cancelled: the first to answer is
#: often a peer of the one that knows.
_EXPLANATION_S = 0.5
#: Up to so many ranks a plan takes a few milliseconds at most.
_PLANNED_AT_ONCE_RANKS = 16


@dataclass(frozen=True, slots=True)
class _Planned:
    """A call, and how it is run."""

    call: CollectiveCall
    choice: Choice
    plan: Plan

    @property
    def name(self) -> str:
        return self.call.name

    @property
    def algorithm(self) -> str:
        return self.choice.algorithm

    @property
    def count(self) -> int:
        return self.call.count


class Communicator:
    """Devices with ranks 0..n-1, and the collectives on them.

    Args:
        handles: rank r is ``handles[r]``.
        chooser: chooses algorithms.
        forced_transport: number of ``enum Transport``.
        stall_timeout_ms: a collective in which nothing moves for so long fails.
        operation_timeout_s: a group fails when it takes longer, moving or not.
    """

    def __init__(
        self,
        comm_id: int,
        handles: Sequence[DeviceHandle],
        chooser: Chooser,
        forced_transport: int,
        stall_timeout_ms: int,
        operation_timeout_s: float,
    ) -> None:
        self.comm_id = comm_id
        self.handles = tuple(handles)
        self._chooser = chooser
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
        """Tells every device its rank and its peers. Raises what a device refuses with."""
        devices = [handle.metadata for handle in self.handles]
        await _all_or_first_error(
            [
                handle.call(
                    "JoinComm",
                    pb.JoinCommRequest(
                        commId=self.comm_id,
                        rank=rank,
                        peers=plan.peers_of(devices, rank, self._forced_transport),
                        deviceId=handle.device_id,
                    ),
                )
                for rank, handle in enumerate(self.handles)
            ]
        )

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

    async def drain(self, drain_s: float) -> None:
        """Waits for running collectives and cancels what is not done after `drain_s`."""
        if self._running:
            _, late = await asyncio.wait(list(self._running), timeout=drain_s)
            await _cancel(list(late))

    def _require_open(self) -> None:
        if self._finalized:
            raise CommNotReady(f"communicator {self.comm_id} was finalized and takes no more operations")

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
                planned = await self._plan(calls)
                started_ns = time.perf_counter_ns()
                bytes_sent = await self._control_round(planned)
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
        metrics.count_operations(planned, elapsed_s=elapsed_ns / 1e9)
        algorithms = {one.algorithm for one in planned}
        return pb.CollectiveResult(
            algorithm=algorithms.pop() if len(algorithms) == 1 else "",
            transports=cast("list[pb.Transport]", self._transports(planned)) if bytes_sent else (),
            elapsedNs=elapsed_ns,
            bytesSent=bytes_sent,
            operations=[
                pb.OperationChoice(
                    kind=one.name.upper(),
                    algorithm=one.algorithm,
                    reason=one.choice.reason,
                    predictedNs=min(round(one.choice.predicted_s * 1e9), (1 << 64) - 1),
                )
                for one in planned
            ],
        )

    async def _plan(self, calls: list[CollectiveCall]) -> list[_Planned]:
        """Chooses the algorithm of each call, and plans it.

        In a thread where it can take more than a few milliseconds, once: others are to be served meanwhile.
        """
        devices = [handle.metadata for handle in self.handles]
        planned = []
        for call in calls:
            choice = self._chooser.known_choice(call, devices, self._forced_transport)
            if choice is None:
                choice = await asyncio.to_thread(self._chooser.choose, call, devices, self._forced_transport)
            key = self._key(call, choice.algorithm)
            if self.nranks > _PLANNED_AT_ONCE_RANKS:
                await asyncio.to_thread(plan.plan_of, key)
            planned.append(_Planned(call, choice, plan.plan_of(key)))
        return planned

    def _key(self, call: CollectiveCall, algorithm: str) -> PlanKey:
        hosts = plan.hosts_of([handle.metadata for handle in self.handles])
        return plan.key_of(call, algorithm, hosts)

    async def _control_round(self, planned: list[_Planned]) -> int:
        """One Execute on every rank, side by side; returns the payload bytes that all sent."""
        device_ids = [handle.device_id for handle in self.handles]
        operations = [(one.call, one.plan) for one in planned]
        requests = plan.execute_requests(self.comm_id, device_ids, operations, self._stall_timeout_ms)
        tasks = [
            asyncio.ensure_future(self._execute(rank, handle, request))
            for rank, (handle, request) in enumerate(zip(self.handles, requests, strict=True))
        ]
        try:
            _, unfinished = await asyncio.wait(tasks, timeout=self._operation_timeout_s, return_when=asyncio.FIRST_EXCEPTION)
            if unfinished and not any(task.done() and task.exception() for task in tasks):
                waits = [
                    f"rank {rank} ({handle})"
                    for rank, (handle, task) in enumerate(zip(self.handles, tasks, strict=True))
                    if task in unfinished
                ]
                raise OperationTimeout(f"{', '.join(waits)} not done after {self._operation_timeout_s:g} s")
            if unfinished:
                await asyncio.wait(tasks, timeout=_EXPLANATION_S)
        finally:
            await _cancel(tasks)
        errors = [task.exception() for task in tasks if not task.cancelled() and task.exception()]
        if errors:
            raise min((error for error in errors if error is not None), key=_vagueness)
        return sum(task.result() for task in tasks)

    async def _execute(self, rank: int, handle: DeviceHandle, request: pb.ExecuteRequest) -> int:
        try:
            response = await handle.call("Execute", request, timeout_s=None)
        except CommNotFound:
            raise PeerUnavailable(f"rank {rank}: {handle} has lost the communicator; its server was restarted") from None
        except DsmlError as error:
            raise type(error)(f"rank {rank} ({handle}): {error}") from error
        return int(response.bytesSent)

    def _transports(self, planned: list[_Planned]) -> list[int]:
        devices = [handle.metadata for handle in self.handles]
        pairs = {pair for one in planned for pair in one.plan.pairs}
        used = {plan.choose_transport(devices[src], devices[dst], self._forced_transport) for src, dst in pairs}
        return sorted(used)


def _vagueness(error: BaseException) -> int:
    """Orders the errors of several ranks: what happened first, what followed from it last."""
    if isinstance(error, OperationAborted):
        return 3
    if isinstance(error, OperationTimeout):
        return 2
    return 1 if isinstance(error, PeerUnavailable) else 0


async def _all_or_first_error(work: list[Coroutine[Any, Any, Any]]) -> None:
    tasks = [asyncio.ensure_future(coroutine) for coroutine in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    unfinished = [task for task in tasks if not task.done()]
    for task in unfinished:
        task.cancel()
    if unfinished:
        await asyncio.gather(*unfinished, return_exceptions=True)
