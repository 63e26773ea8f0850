"""The devices of one epoch of a communicator: how they join, and how they run collectives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from dsml_gpu.coordinator import passes, plan
from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.choice import Choice, Chooser
from dsml_gpu.coordinator.control_round import run_round, settle
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.fusion import buckets_of, fused
from dsml_gpu.coordinator.memory_access import MemoryAccess
from dsml_gpu.coordinator.plan import Plan, PlanKey
from dsml_gpu.errors import DsmlError, InvalidValue, ScheduleNotProved
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: A round of passes may take the stall timeout and what it needs at this speed, far below that of any memory.
_SLOWEST_PASSES_BYTES_PER_S = 100e6
#: Up to so many ranks a plan takes a few milliseconds at most.
_PLANNED_AT_ONCE_RANKS = 16
#: What a rank has kept of its buffers during operations that touched more is dropped at once when they have ended well,
#: otherwise with the next operation.
_KEPT_BYTES = 1 << 20
#: For a rank to show that it is alive, and to end what it does.
_PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a communicator runs collectives.

    Attributes:
        forced_transport: number of ``enum Transport``.
        stall_timeout_ms: a collective in which nothing moves for so long fails.
        operation_timeout_s: a group fails when it takes longer, moving or not.
        atomic: a collective that fails leaves all buffers as they were.
    """

    forced_transport: int
    stall_timeout_ms: int
    operation_timeout_s: float
    atomic: bool = True


@dataclass(frozen=True, slots=True)
class Planned:
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
    def parts(self) -> list[Planned]:
        """The calls that it was fused of, or itself alone."""
        calls = self.call.parts
        if not calls:
            return [self]
        choice = replace(
            self.choice,
            reason=f"{self.choice.reason}, in a bucket of {len(calls)}",
            predicted_s=self.choice.predicted_s / len(calls),
        )
        return [Planned(call, choice, self.plan) for call in calls]


class Ranks:
    """The devices of one epoch.

    Args:
        epoch: its number.
        handles: rank r is ``handles[r]``.
        chooser: chooses algorithms.
    """

    def __init__(
        self, comm_id: int, epoch: int, handles: Sequence[DeviceHandle], chooser: Chooser, settings: RunSettings
    ) -> None:
        self.comm_id = comm_id
        self.epoch = epoch
        self.handles = tuple(handles)
        self._chooser = chooser
        self._settings = settings
        self._memories = MemoryAccess(settings.forced_transport)
        self._devices = [handle.metadata for handle in self.handles]
        self._process_uids = [handle.metadata.processUid for handle in handles]
        self._team = passes.Team.of(self._devices)
        self._settling: set[asyncio.Task[None]] = set()
        self._joined = False

    @property
    def nranks(self) -> int:
        return len(self.handles)

    @property
    def device_ids(self) -> list[int]:
        return [handle.device_id for handle in self.handles]

    def gone(self) -> list[int]:
        """The ranks whose devices are lost, or whose servers are not those that joined."""
        return [
            rank
            for rank, (handle, process_uid) in enumerate(zip(self.handles, self._process_uids, strict=True))
            if handle.lost or handle.metadata.processUid != process_uid
        ]

    async def join(self) -> None:
        """Tells every device its rank and its peers.

        Raises:
            InvalidValue: p2p is forced, and the devices cannot open each other's memory.
            DsmlError: what a device refuses with.
        """
        await self._memories.join(self.comm_id, self.handles, self.epoch)
        self._joined = True

    async def probe(self) -> list[int]:
        """Ends what the ranks still do; returns those that do not answer that, or not as the process that joined."""
        answers = await asyncio.gather(
            *(_answers(self.comm_id, *member) for member in zip(self.handles, self._process_uids, strict=True))
        )
        return [rank for rank, has_answered in enumerate(answers) if not has_answered]

    def require_links(self, call: CollectiveCall) -> None:
        """Raises InvalidValue where p2p is forced, and a call needs slices to go between processes."""
        self._memories.require_links(call, self._by_passes(call))

    async def prove(self, call: CollectiveCall) -> None:
        """Proves the schedule that a call brings, beside the event loop: nobody knows how large it is.

        Raises:
            ScheduleNotProved: it is not proved.
        """
        await asyncio.to_thread(plan.plan_of, self._key(call, ""))

    async def plan(self, calls: Sequence[CollectiveCall]) -> list[Planned]:
        """Chooses the algorithm of each call, and plans it; first has all join where they have not, or memory has moved.

        In a thread where it can take more than a few milliseconds, once: others are to be served meanwhile.
        """
        if not self._joined or self._memories.has_moved(self.handles):
            await self.join()
        planned = []
        for by_passes, group in groupby(calls, key=self._by_passes):
            if by_passes:
                for call in group:
                    choice = self._chooser.choice_of_passes(call, len(self._team.workers(passes.bytes_of(call))))
                    planned.append(Planned(call, choice, None))
                continue
            planned += [await self._plan_one(call) for call in map(fused, buckets_of(list(group)))]
        return planned

    async def _plan_one(self, call: CollectiveCall) -> Planned:
        transport = self._settings.forced_transport
        chosen = self._chooser.known_choice(call, self._devices, transport)
        if chosen is None:
            chosen = await asyncio.to_thread(self._chooser.choose, call, self._devices, transport)
        key = self._key(call, chosen.algorithm)
        try:
            if self.nranks > _PLANNED_AT_ONCE_RANKS:
                await asyncio.to_thread(plan.plan_of, key)
            return Planned(call, chosen, plan.plan_of(key))
        except (InvalidValue, ScheduleNotProved):
            if self.epoch == 1 or not call.algorithm or call.own_schedule:
                raise
            # It was asked for when there were other ranks: an algorithm need not be for any number of them.
            return await self._plan_one(replace(call, algorithm=""))

    def _by_passes(self, call: CollectiveCall) -> bool:
        """Whether a call is run as passes over memory that all ranks have open."""
        return self._memories.all_open and passes.has_passes(call) and call.algorithm in ("", passes.ALGORITHM)

    def _key(self, call: CollectiveCall, algorithm: str) -> PlanKey:
        return plan.key_of(call, algorithm, plan.hosts_of(self._devices))

    async def run(self, planned: Sequence[Planned]) -> AsyncGenerator[tuple[Sequence[Planned], int], None]:
        """Runs calls in order, in as few rounds of control messages as they allow.

        Yields:
            What has ended well, and the bytes that moved between ranks for it.

        Raises:
            DsmlError: what the calls fail with that were not yielded.
        """
        for by_passes, group in groupby(planned, key=lambda one: one.plan is None):
            some = list(group)
            if by_passes:
                for one_run in passes.runs_of([one.call for one in some]):
                    yield some[: len(one_run)], await self._run_passes(tuple(one_run))
                    some = some[len(one_run) :]
            else:
                yield some, await self._run_plans(some)

    async def _run_plans(self, planned: Sequence[Planned]) -> int:
        operations = [(one.call, one.plan) for one in planned if one.plan is not None]
        settings = self._settings
        requests = dict(
            enumerate(
                plan.execute_requests(
                    self.comm_id, self.device_ids, operations, settings.stall_timeout_ms, self.epoch, atomic=settings.atomic
                )
            )
        )
        moved = await run_round(self.handles, requests, settings.operation_timeout_s)
        if settings.atomic and sum(one.count for one in planned) > _KEPT_BYTES:
            settling = asyncio.ensure_future(settle(self.handles, requests, pb.QuiesceRequest.COMMIT))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)
        return moved

    async def _run_passes(self, calls: tuple[CollectiveCall, ...]) -> int:
        moved = 0
        for one_round in passes.rounds_of(calls, self._team):
            timeout_s = self._settings.stall_timeout_ms / 1000 + one_round.nbytes / _SLOWEST_PASSES_BYTES_PER_S
            limit_s = min(timeout_s, self._settings.operation_timeout_s)
            moved += await run_round(self.handles, self._requests_of_passes(one_round), limit_s, self._memories)
        return moved

    def _requests_of_passes(self, one_round: passes.Round) -> dict[int, pb.ExecuteRequest]:
        # Also a rank that has nothing to do must be there; one whose end would be known need not be asked.
        return {
            rank: pb.ExecuteRequest(
                commId=self.comm_id, deviceId=handle.device_id, epoch=self.epoch, passes=one_round.work.get(rank, ())
            )
            for rank, handle in enumerate(self.handles)
            if rank in one_round.work or not handle.tells_of_its_end
        }

    def transports(self, planned: Sequence[Planned]) -> list[int]:
        """Numbers of the transports that calls use."""
        devices, forced = self._devices, self._settings.forced_transport
        pairs = {pair for one in planned if one.plan is not None for pair in one.plan.pairs}
        used = {plan.choose_transport(devices[src], devices[dst], forced) for src, dst in pairs}
        if any(one.plan is None for one in planned):
            used.add(pb.P2P)
        return sorted(used)


async def _answers(comm_id: int, handle: DeviceHandle, process_uid: str) -> bool:
    """Whether a device is the one that joined, and has ended what it did for a communicator."""
    try:
        metadata, _ = await asyncio.gather(
            handle.call("GetDeviceMetadata", pb.GetDeviceMetadataRequest(deviceId=handle.device_id), _PROBE_TIMEOUT_S),
            handle.call("Quiesce", pb.QuiesceRequest(commId=comm_id, deviceId=handle.device_id), _PROBE_TIMEOUT_S),
        )
    except DsmlError:
        return False
    return bool(metadata.metadata.processUid == process_uid)
