"""The devices of one epoch of a communicator: how they join, and how they run collectives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

from dsml_gpu.coordinator import diagnosis, passes, plan
from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.choice import Choice, Chooser
from dsml_gpu.coordinator.control_round import RoundTimeout, roll_back, run_round, settle
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.fusion import buckets_of, fused
from dsml_gpu.coordinator.memory_access import MemoryAccess
from dsml_gpu.coordinator.pass_rounds import PassRounds
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
        process_uids: of the processes that the ranks are; None: those that the devices are in now.

    Attributes:
        last_round: number that the last round can be settled by; 0: there is nothing to settle.
    """

    def __init__(
        self,
        comm_id: int,
        epoch: int,
        handles: Sequence[DeviceHandle],
        chooser: Chooser,
        settings: RunSettings,
        process_uids: Sequence[str] | None = None,
    ) -> None:
        self.comm_id = comm_id
        self.epoch = epoch
        self.handles = tuple(handles)
        self._chooser = chooser
        self._settings = settings
        self._memories = MemoryAccess(settings.forced_transport)
        self._process_uids = process_uids or [handle.metadata.processUid for handle in handles]
        self._team = passes.Team.of(self._devices)
        self._passes = PassRounds(
            comm_id, epoch, self.handles, self._memories, self._team, self._limit_s, atomic=settings.atomic
        )
        self._settling: set[asyncio.Task[object]] = set()
        self._joined = False
        self._last_requests: Mapping[int, pb.ExecuteRequest] = {}
        self.last_round = 0

    @property
    def nranks(self) -> int:
        return len(self.handles)

    @property
    def _devices(self) -> list[pb.DeviceMetadata]:
        return [handle.metadata for handle in self.handles]

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

    async def finish(self, requests: Sequence[pb.ExecuteRequest]) -> bool:
        """See `pass_rounds.PassRounds.finish`. Before they join."""
        self._memories.resume(self.handles)
        return requests[0].epoch == self.epoch and await self._passes.finish(requests)

    def require_links(self, call: CollectiveCall) -> None:
        """Raises InvalidValue where p2p is forced, and a call needs slices to go between processes.

        Who has not joined yet does not know; `plan` looks again then.
        """
        if self._joined:
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
            for call in calls:
                self.require_links(call)
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

    async def run(
        self,
        planned: Sequence[Planned],
        numbers: Sequence[int],
        begin: Callable[[int, Iterable[pb.ExecuteRequest]], None],
    ) -> AsyncGenerator[tuple[Sequence[Planned], int], None]:
        """Runs calls in order, in as few rounds of control messages as they allow.

        Args:
            numbers: of each call in its communicator, those that are fused one by one.
            begin: see `pass_rounds.PassRounds.run`; gets the number of calls first.

        Yields:
            What has ended well, and the bytes that moved between ranks for it. It can be undone until the next is asked for.

        Raises:
            HeldUp: a rank, or its connection to another one, holds the others up.
            DsmlError: what else the calls fail with that were not yielded.
        """
        number = iter(numbers)
        for by_passes, group in groupby(planned, key=lambda one: one.plan is None):
            some = list(group)
            of_some = [[next(number) for _ in one.parts] for one in some]
            if by_passes:
                for one_run in await self._passes.runs_of([one.call for one in some]):
                    self.last_round, self._last_requests = 0, {}
                    moved = await self._passes.run(one_run, partial(begin, len(one_run)))
                    self.last_round, self._last_requests = self._passes.kept_round, self._passes.keeping
                    yield some[: len(one_run)], moved
                    self._passes.settle_later()
                    some = some[len(one_run) :]
            else:
                moved, requests = await self._run_plans(some, of_some)
                yield some, moved
                if self._settings.atomic and sum(one.count for one in some) > _KEPT_BYTES:
                    self._begin_commit(requests)

    async def _run_plans(
        self, planned: Sequence[Planned], numbers: Sequence[Sequence[int]]
    ) -> tuple[int, Mapping[int, pb.ExecuteRequest]]:
        """Returns how many bytes moved between ranks, and what each was told."""
        operations = [(one.call, one.plan) for one in planned if one.plan is not None]
        settings = self._settings
        requests = dict(
            enumerate(
                plan.execute_requests(
                    self.comm_id, self.device_ids, operations, settings.stall_timeout_ms, self.epoch, atomic=settings.atomic
                )
            )
        )
        try:
            moved = await run_round(self.handles, requests, settings.operation_timeout_s)
        except RoundTimeout as error:
            raise self._held_up(error, planned, numbers) from error
        self.last_round, self._last_requests = requests[0].round, requests
        return moved, requests

    async def undo_last(self) -> bool:
        """Undoes what `run` has yielded last; returns False where it cannot be any more.

        Ranks that do not hear of it are given up.
        """
        if not self.last_round:
            return False
        await asyncio.shield(roll_back(self.handles, self._last_requests))
        return True

    def _begin_commit(self, requests: Mapping[int, pb.ExecuteRequest]) -> None:
        settling = asyncio.ensure_future(settle(self.handles, requests, pb.QuiesceRequest.COMMIT))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)

    def _held_up(
        self, error: RoundTimeout, planned: Sequence[Planned], numbers: Sequence[Sequence[int]]
    ) -> diagnosis.HeldUp:
        """Who has held up a round of plans.

        Args:
            numbers: of the calls of each.
        """
        silent = error.answers.silent
        waits = {rank: [_in_schedule(wait, rank, planned) for wait in some] for rank, some in error.answers.waits.items()}
        rank = diagnosis.blamed(waits, silent)
        # The ends of streams come after the last operation.
        index = min(diagnosis.held_up_operation(rank, waits), len(planned) - 1)
        one = planned[index]
        subject = diagnosis.Subject(one.name, numbers[index][0], numbers[index][-1], one.algorithm, one.count, self.epoch)
        text = diagnosis.message(subject, waits, silent, [str(handle) for handle in self.handles], str(error))
        why, waited_ms = "", 0
        if rank is not None:
            why, waited_ms = diagnosis.failing(rank, waits), diagnosis.longest_ms(rank, waits)
        return diagnosis.HeldUp(text, rank, why, waited_ms, is_silent=rank in silent)

    def _limit_s(self, nbytes: int) -> float:
        """For passes that read and write so many bytes."""
        timeout_s = self._settings.stall_timeout_ms / 1000 + nbytes / _SLOWEST_PASSES_BYTES_PER_S
        return min(timeout_s, self._settings.operation_timeout_s)

    def transports(self, planned: Sequence[Planned]) -> list[int]:
        """Numbers of the transports that calls use."""
        devices, forced = self._devices, self._settings.forced_transport
        pairs = {pair for one in planned if one.plan is not None for pair in one.plan.pairs}
        used = {plan.choose_transport(devices[src], devices[dst], forced) for src, dst in pairs}
        if any(one.plan is None for one in planned):
            used.add(pb.P2P)
        return sorted(used)


def _in_schedule(wait: pb.Wait, rank: int, planned: Sequence[Planned]) -> pb.Wait:
    """A wait of a round of plans, in the numbers of its operation's schedule."""
    one = planned[wait.operation].plan if wait.steps and wait.operation < len(planned) else None
    return wait if one is None else diagnosis.in_schedule(wait, rank, one.schedule, one.blocks[rank])


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
