"""Rounds of passes that either happen as a whole or not at all.

Passes write to the memory of all ranks. What makes them atomic is described where it happens (`device.pass_phases`); here
it is decided who does what and when:

- One rank has all of the work and stages it first (``RUN``): until it has, a failure means that nothing has been written.
- Or several share it: where it can be done again at any time (``COMMIT``), or from where another one has come to
  (``PIECES``).
- What has been begun goes to its end, whoever is lost: the part of a rank that fails is done by another one, from the
  staging and the memory of the first, which those who have them open have as long as they want. Before that the first is
  made sure not to write any more (`MemoryAccess.stop`).
- If the caller goes away meanwhile, the end is waited for all the same.

Memory without staging ends with its process, as on a GPU: nobody could go on for a rank that is lost. There each rank first
keeps what others will overwrite in its memory, and brings it back when the round fails.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from dsml_gpu.coordinator import passes
from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.control_round import cancel, execute, roll_back, run_round, settle
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.memory_access import MemoryAccess
from dsml_gpu.errors import REFUSALS, BuffersUndefined, DsmlError, OperationAborted, OperationTimeout
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)

T = TypeVar("T")

#: By rank: a request that is under way.
_Attempt = Mapping[int, "asyncio.Task[pb.ExecuteResponse]"]

#: What ranks have staged or kept beyond this is dropped soon when a round has ended well, otherwise with the next one.
_KEPT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Part:
    """The work of one rank, from when the round goes to its end.

    Attributes:
        owner: the rank.
        phase: in which another one is asked for it.
    """

    owner: int
    work: Sequence[pb.Pass]
    phase: pb.ExecuteRequest.Phase


class PassRounds:
    """Runs calls as passes on the ranks of one epoch.

    Args:
        handles: of each rank.
        memories: through which they have joined.
        limit: how many seconds passes may take that read and write so many bytes.
        atomic: a round that fails leaves all buffers as they were; otherwise it leaves them as they are.
    """

    def __init__(
        self,
        comm_id: int,
        epoch: int,
        handles: Sequence[DeviceHandle],
        memories: MemoryAccess,
        team: passes.Team,
        limit: Callable[[int], float],
        *,
        atomic: bool,
    ) -> None:
        self._comm_id = comm_id
        self._epoch = epoch
        self._handles = handles
        self._memories = memories
        self._team = team
        self._limit = limit
        self._atomic = atomic
        self._to_settle: list[Mapping[int, pb.ExecuteRequest]] = []
        self._settling: set[asyncio.Task[Any]] = set()
        #: Number that the last run can be settled by, where ranks have kept what it has overwritten; 0: they have not.
        self.kept_round = 0
        #: What these ranks were told to keep.
        self.keeping: Mapping[int, pb.ExecuteRequest] = {}

    async def runs_of(self, calls: Sequence[CollectiveCall]) -> list[list[CollectiveCall]]:
        """Calls in runs, in order, each of which happens as a whole or not at all (`run`)."""
        return passes.runs_of(calls, await self._staging_bytes())

    async def run(
        self, calls: Sequence[CollectiveCall], begin: Callable[[Iterable[pb.ExecuteRequest]], None] = lambda requests: None
    ) -> int:
        """Runs one run of `runs_of`; returns the bytes that moved between ranks. `settle_later` must follow.

        Args:
            begin: gets what each rank is told to do, before that happens which cannot be undone, but goes to its end.

        It may return although ranks were lost (`DeviceHandle.lost`): then they have done their part before, or others have
        done it for them.

        Raises:
            BuffersUndefined: ranks could not go on with what was begun.
            DsmlError: of all that ranks failed with, what happened first. Where it is atomic, all buffers of all ranks that
                are left are as they were.
            asyncio.CancelledError: it was cancelled, and has ended: as it would have, or nothing was written.
        """
        staging_bytes = await self._staging_bytes()
        self.kept_round, self.keeping = 0, {}
        moved = 0
        for one_round in passes.rounds_of(tuple(calls), self._team, staging_bytes):
            if not self._atomic:
                requests = {rank: self._request(rank, work) for rank, work in one_round.work.items()}
                requests |= {rank: self._request(rank) for rank in self._to_be_asked(one_round)}
                moved += await run_round(self._handles, requests, self._limit(one_round.nbytes), self._memories)
            elif staging_bytes:
                moved += await self._run_staged(one_round, begin)
            else:
                moved += await self._run_kept(one_round)
        return moved

    async def _staging_bytes(self) -> int:
        return await self._memories.staging_bytes(self._handles) if self._atomic else 0

    def _request(self, rank: int, work: Sequence[pb.Pass] = (), **fields: Any) -> pb.ExecuteRequest:
        return pb.ExecuteRequest(
            commId=self._comm_id, deviceId=self._handles[rank].device_id, epoch=self._epoch, passes=work, **fields
        )

    def _to_be_asked(self, one_round: passes.Round) -> list[int]:
        """The ranks without work that must be asked whether they are there; of others the end would be known."""
        return [
            rank for rank, handle in enumerate(self._handles) if rank not in one_round.work and not handle.tells_of_its_end
        ]

    # ---- with staging -------------------------------------------------------------------------------------------------

    async def _run_staged(self, one_round: passes.Round, begin: Callable[[Iterable[pb.ExecuteRequest]], None]) -> int:
        round_id = _new_round()
        limit_s = self._limit(one_round.nbytes)
        asked = self._to_be_asked(one_round)
        if asked:
            # First, so that nothing has happened yet if one is not there.
            everyone = sorted({*asked, *one_round.work})
            requests = {rank: self._request(rank, phase=pb.ExecuteRequest.PREPARE) for rank in everyone}
            await run_round(self._handles, requests, limit_s)
        phase = one_round.phase
        parts = [_Part(owner, work, _RESUMED[phase]) for owner, work in one_round.work.items()]
        requests = {part.owner: self._request(part.owner, part.work, round=round_id, phase=phase) for part in parts}
        begin(requests.values())
        attempt = self._begin(requests)
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + limit_s
        try:
            await asyncio.wait(attempt.values(), timeout=limit_s)
        except asyncio.CancelledError:
            await _to_its_end(self._finish(round_id, parts, requests, attempt, deadline_s - clock(), limit_s))
            raise
        finally:
            if one_round.staged_bytes > _KEPT_BYTES:
                self._to_settle.append(requests)
        # Where all is well, as nearly always, that takes no task of its own.
        if all(task.done() and not task.cancelled() and task.exception() is None for task in attempt.values()):
            return sum(task.result().bytesSent for task in attempt.values())
        return await _to_its_end(self._finish(round_id, parts, requests, attempt, 0, limit_s))

    async def _finish(
        self,
        round_id: int,
        parts: Sequence[_Part],
        requests: Mapping[int, pb.ExecuteRequest],
        attempt: _Attempt,
        left_s: float,
        limit_s: float,
    ) -> int:
        """Runs what is left of a round, to its end: for `left_s`, and then for `limit_s` by each who goes on with it."""
        moved, errors = await self._answers(requests, attempt, left_s)
        if len(errors) == len(parts) and all(error.code in REFUSALS for error in errors.values()):
            raise errors[parts[0].owner]  # before anything was written
        if errors:
            moved += await self._roll_forward(round_id, [part for part in parts if part.owner in errors], errors, limit_s)
        return moved

    async def finish(self, requests: Sequence[pb.ExecuteRequest]) -> bool:
        """Brings a round to its end that another coordinator may have begun, and which no rank runs any more.

        Args:
            requests: of that coordinator, as `begin` of `run` has got them.

        Returns:
            Whether it has happened; otherwise nothing was written.

        Raises:
            DsmlError: it could not be.
        """
        ranks = {handle.device_id: rank for rank, handle in enumerate(self._handles)}
        parts = [_Part(ranks[one.deviceId], list(one.passes), _RESUMED[one.phase]) for one in requests]
        ended = OperationAborted("the coordinator that had begun it has ended")
        try:
            limit_s = self._limit(sum(one.count * (len(one.sources) + 1) for part in parts for one in part.work))
            await self._roll_forward(requests[0].round, parts, dict.fromkeys((part.owner for part in parts), ended), limit_s)
        except OperationAborted as error:
            if error is not ended:
                raise
            return False
        return True

    def _begin(self, requests: Mapping[int, pb.ExecuteRequest]) -> _Attempt:
        return {rank: asyncio.ensure_future(execute(rank, self._handles[rank], one)) for rank, one in requests.items()}

    async def _answers(
        self, requests: Mapping[int, pb.ExecuteRequest], attempt: _Attempt, limit_s: float
    ) -> tuple[int, dict[int, DsmlError]]:
        """Returns, when all have ended, the bytes that those moved who did it, and what the others failed with."""
        try:
            await asyncio.wait(attempt.values(), timeout=limit_s)
        finally:
            await cancel(list(attempt.values()))
        moved = 0
        errors: dict[int, DsmlError] = {}
        for rank, task in attempt.items():
            failure = None if task.cancelled() else task.exception()
            if task.cancelled():
                errors[rank] = OperationTimeout(f"rank {rank} ({self._handles[rank]}) not done after {limit_s:g} s")
            elif isinstance(failure, DsmlError):
                errors[rank] = failure
            elif failure is not None:
                raise failure
            else:
                response = task.result()
                if requests[rank].phase == pb.ExecuteRequest.RESUME and not response.begun:
                    raise _NotBegun
                moved += response.bytesSent
        return moved, errors

    async def _roll_forward(
        self, round_id: int, parts: Sequence[_Part], errors: Mapping[int, DsmlError], limit_s: float
    ) -> int:
        """Has others do the parts of ranks that have failed; returns the bytes that they moved.

        Raises:
            DsmlError: of `errors`, where the work was not begun.
            BuffersUndefined: nobody could.
        """
        able = {rank for rank, handle in enumerate(self._handles) if not handle.lost}
        await self._give_up(sorted(errors), able)
        moved = 0
        # What the staging of a rank says of its own part is needed until that is done: the others' come later.
        unfinished = sorted(parts, key=lambda part: part.owner not in able)
        while unfinished:
            part, *rest = unfinished
            moved += await self._do_for(part, round_id, {one.owner for one in rest}, able, errors[part.owner], limit_s)
            unfinished = rest
        return moved

    async def _do_for(
        self, part: _Part, round_id: int, busy: set[int], able: set[int], first: DsmlError, limit_s: float
    ) -> int:
        """Has one of the able ranks do a part, but none of the busy ones. See `_roll_forward`."""
        tried: list[int] = []
        while True:
            # Itself last: it would fail as before.
            others = able - {*tried} - busy
            doer = min(others, key=lambda rank: (rank == part.owner, rank), default=None)
            if doer is None:
                if all(handle.lost for handle in self._handles):
                    raise first  # nobody is left who could tell what is in the memory of the others
                raise BuffersUndefined(
                    f"ranks {tried} failed to go on with what rank {part.owner} has begun; what is in the buffers is not "
                    f"defined: {first}"
                )
            request = self._request(doer, part.work, round=round_id, phase=part.phase, resumedRanks=[part.owner, *tried])
            tried.append(doer)
            try:
                moved, failures = await self._answers({doer: request}, self._begin({doer: request}), limit_s)
            except _NotBegun:
                raise first from None
            if not failures:
                log.warning("rank %d has done the part of rank %d, which failed: %s", doer, part.owner, first)
                return moved
            log.warning("rank %d cannot go on for rank %d: %s", doer, part.owner, failures[doer])
            await self._give_up([doer], able)

    async def _give_up(self, failed: Sequence[int], able: set[int]) -> None:
        """Sees to it that ranks which have failed write nothing any more.

        Args:
            able: the ranks that can go on for them; those that cannot are taken out.
        """
        lost = await self._memories.stop(self._comm_id, self._handles, failed)
        for rank in lost:
            self._handles[rank].give_up("does not answer")
        able.difference_update([rank for rank in able if self._handles[rank].lost])
        if not lost:
            return
        failures = await self._memories.reopen(self._comm_id, self._handles, self._epoch, sorted(able))
        for rank, error in failures.items():
            log.warning("communicator %d: rank %d cannot go on: %s", self._comm_id, rank, error)
        able.difference_update(failures)

    # ---- without staging ----------------------------------------------------------------------------------------------

    async def _run_kept(self, one_round: passes.Round) -> int:
        round_id = _new_round()
        limit_s = self._limit(one_round.nbytes)
        ranges: defaultdict[int, list[pb.Piece]] = defaultdict(list)
        for work in one_round.work.values():
            for one in work:
                for place in one.destinations:
                    ranges[place.rank].append(pb.Piece(count=one.count, recvAddr=place.addr))
        keeping = {
            rank: self._request(rank, round=round_id, phase=pb.ExecuteRequest.PREPARE, kept=ranges[rank])
            for rank in {*ranges, *one_round.work, *self._to_be_asked(one_round)}
        }
        await run_round(self._handles, keeping, limit_s)
        requests = {
            # Without a number: what it overwrites is kept already.
            rank: self._request(rank, work)
            for rank, work in one_round.work.items()
        }
        try:
            moved = await run_round(self._handles, requests, limit_s, self._memories)
        except BaseException:
            await _to_its_end(roll_back(self._handles, keeping))
            raise
        self.kept_round, self.keeping = round_id, keeping
        self._to_settle.append(keeping)
        return moved

    def settle_later(self) -> None:
        """What ranks have staged or kept for rounds that have ended well is not needed any more; they hear of that soon."""
        while self._to_settle:
            requests = {rank: one for rank, one in self._to_settle.pop().items() if not self._handles[rank].lost}
            settling = asyncio.ensure_future(settle(self._handles, requests, pb.QuiesceRequest.COMMIT))
            self._settling.add(settling)
            settling.add_done_callback(self._settling.discard)


#: How others go on with what a rank has begun.
_RESUMED = {
    pb.ExecuteRequest.RUN: pb.ExecuteRequest.RESUME,
    pb.ExecuteRequest.PIECES: pb.ExecuteRequest.RESUME_PIECES,
    pb.ExecuteRequest.COMMIT: pb.ExecuteRequest.COMMIT,
}


class _NotBegun(Exception):
    """Nothing of the work that another rank was to go on with has been begun."""


def _new_round() -> int:
    return secrets.randbits(63) | 1  # 0 is none


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of work that must not be cancelled; who is cancelled meanwhile hears of it when it is done."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.warning("an operation that nobody waits for failed: %s", failure)
        raise
