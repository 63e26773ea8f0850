"""Exactly once by key: who waits, who gives up, what is kept, and what a coordinator's end does to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest

from dsml_gpu import errors
from dsml_gpu.coordinator.journal import MemoryJournal, open_journal
from dsml_gpu.coordinator.outcomes import Asked, Outcomes, asked
from dsml_gpu.coordinator.records import MAX_OUTCOMES, KnownCommunicator
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.lane import CONNECTION_BROKE
from tests.support.in_this_process import in_event_loop, until

MALLOC = Asked("key", 5, "Malloc")
COLLECTIVE = Asked("key", 5, "Collective")
#: Nothing here takes so long.
LIMIT_S = 10.0


class Context:
    """Of a call over gRPC."""

    def __init__(self, remaining_s: float | None) -> None:
        self._remaining_s = remaining_s

    def time_remaining(self) -> float | None:
        return self._remaining_s


class Work:
    """An operation that ends when it is told to; counts how often it was begun."""

    def __init__(self, answer: Any = None, error: Exception | None = None) -> None:
        self.begun = 0
        self.cancelled = 0
        self.may_end = asyncio.Event()
        self._answer = pb.MallocResponse(memAddr=pb.MemAddr(value=256)) if answer is None else answer
        self._error = error

    async def __call__(self) -> Any:
        self.begun += 1
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._error is not None:
            raise self._error
        return self._answer


def at_once(answer: Any = None, error: Exception | None = None) -> Work:
    work = Work(answer, error)
    work.may_end.set()
    return work


async def begun(calls: Awaitable[Any], work: Work) -> asyncio.Task[Any]:
    """A call whose work has begun."""
    task = asyncio.ensure_future(calls)
    for _ in range(10):
        await asyncio.sleep(0)
    assert work.begun == 1
    return task


async def broken(task: asyncio.Task[Any], *how: str) -> None:
    """A call that is cancelled, as the server's end of a broken connection does it, or of a client that cancels."""
    task.cancel(*how)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, LIMIT_S)


@in_event_loop
async def test_without_a_key_each_call_is_an_operation_that_ends_with_its_caller() -> None:
    outcomes, work = Outcomes(MemoryJournal()), at_once()
    for _ in range(2):
        await outcomes.once(Asked("", 5, "Malloc"), None, work)
    assert work.begun == 2
    work = Work()
    call = await begun(outcomes.once(Asked("", 5, "Malloc"), None, work), work)
    await broken(call, CONNECTION_BROKE)
    assert work.cancelled == 1


@in_event_loop
async def test_a_second_call_waits_for_the_first_ones_answer_or_has_it() -> None:
    outcomes, work = Outcomes(MemoryJournal()), Work()
    first = await begun(outcomes.once(MALLOC, None, work), work)
    second = await begun(outcomes.once(MALLOC, Context(1), work), work)
    work.may_end.set()
    answers = [await first, await second, await outcomes.once(MALLOC, None, work)]
    assert [answer.memAddr.value for answer in answers] == [256] * 3
    assert work.begun == 1


@pytest.mark.parametrize("error", [errors.OutOfMemory("no gap of 7 bytes"), errors.NoAnswer("device 1 does not answer")])
def test_an_error_is_an_outcome(error: errors.DsmlError) -> None:
    @in_event_loop
    async def run() -> None:
        outcomes, work = Outcomes(MemoryJournal()), at_once(error=error)
        for _ in range(2):
            with pytest.raises(errors.BY_REFUSAL[error.refusal], match=f"^{error}$"):
                await outcomes.once(MALLOC, None, work)
        assert work.begun == 1

    run()


@in_event_loop
async def test_a_defect_is_an_outcome() -> None:
    outcomes, work = Outcomes(MemoryJournal()), at_once(error=ZeroDivisionError("by 0"))
    for _ in range(2):
        with pytest.raises(errors.InternalError, match="defect of the server: ZeroDivisionError: by 0"):
            await outcomes.once(MALLOC, None, work)
    assert work.begun == 1


@pytest.mark.parametrize(
    ("context", "how"),
    [(None, (CONNECTION_BROKE,)), (Context(None), ()), (Context(12.0), ())],
    ids=["lane", "grpc", "limit"],
)
def test_an_operation_goes_on_when_its_callers_connection_breaks(context: Context | None, how: tuple[str, ...]) -> None:
    @in_event_loop
    async def run() -> None:
        outcomes, work = Outcomes(MemoryJournal()), Work()
        await broken(await begun(outcomes.once(MALLOC, context, work), work), *how)
        again = await begun(outcomes.once(MALLOC, context, work), work)
        work.may_end.set()
        assert (await again).memAddr.value == 256
        assert (work.begun, work.cancelled) == (1, 0)

    run()


@in_event_loop
async def test_the_outcome_of_an_operation_that_nobody_waits_for_is_kept() -> None:
    journal = MemoryJournal()
    outcomes, work = Outcomes(journal), Work()
    await broken(await begun(outcomes.once(MALLOC, None, work), work), CONNECTION_BROKE)
    work.may_end.set()
    await until(lambda: bool(journal.load().outcomes), "the outcome")
    assert (await outcomes.once(MALLOC, None, work)).memAddr.value == 256
    assert work.begun == 1


@pytest.mark.parametrize("context", [None, Context(0.0)], ids=["lane", "grpc"])
def test_an_operation_is_cancelled_when_the_last_caller_gives_it_up(context: Context | None) -> None:
    @in_event_loop
    async def run() -> None:
        outcomes, work = Outcomes(MemoryJournal()), Work()
        lost = await begun(outcomes.once(MALLOC, Context(12.0), work), work)
        one = await begun(outcomes.once(MALLOC, context, work), work)
        other = await begun(outcomes.once(MALLOC, context, work), work)
        await broken(lost)
        await broken(one)
        assert work.cancelled == 0  # the other one still waits
        await broken(other)
        for _ in range(2):
            with pytest.raises(errors.OperationAborted, match="Malloc was given up by its caller"):
                await outcomes.once(MALLOC, None, work)
        assert (work.begun, work.cancelled) == (1, 1)

    run()


@in_event_loop
async def test_the_coordinators_end_is_no_outcome() -> None:
    journal = MemoryJournal()
    outcomes, work = Outcomes(journal), Work()
    call = await begun(outcomes.once(MALLOC, None, work), work)
    await outcomes.close()
    with pytest.raises(errors.Unavailable, match="stops before the operation has ended"):
        await call
    next_one = Outcomes(journal, journal.load().outcomes)
    assert (await next_one.once(MALLOC, None, at_once())).memAddr.value == 256
    await outcomes.close()


@in_event_loop
async def test_a_key_is_that_of_one_operation() -> None:
    outcomes, work = Outcomes(MemoryJournal()), Work()
    running = await begun(outcomes.once(MALLOC, None, work), work)

    async def refused() -> None:
        for other in (Asked("key", 6, "Malloc"), Asked("key", 5, "Free")):
            with pytest.raises(errors.InvalidValue, match="'key' is that of Malloc of communicator 5, and came again with"):
                await outcomes.once(other, None, work)

    await refused()
    work.may_end.set()
    await running
    await refused()
    assert work.begun == 1


@in_event_loop
async def test_the_oldest_outcomes_are_forgotten() -> None:
    outcomes, work = Outcomes(MemoryJournal()), at_once()
    for number in range(MAX_OUTCOMES + 1):
        await outcomes.once(Asked(str(number), 0, "Malloc"), None, work)
    await outcomes.once(Asked("1", 0, "Malloc"), None, work)
    assert work.begun == MAX_OUTCOMES + 1
    await outcomes.once(Asked("0", 0, "Malloc"), None, work)
    assert work.begun == MAX_OUTCOMES + 2


@in_event_loop
async def test_the_running_code_knows_whose_it_is() -> None:
    outcomes = Outcomes(MemoryJournal())
    seen: list[Asked | None] = []

    async def work() -> pb.MallocResponse:
        seen.append(asked.get())
        seen.append(await asyncio.ensure_future(of_a_task_of_its_own()))
        return pb.MallocResponse()

    async def of_a_task_of_its_own() -> Asked | None:
        return asked.get()

    await outcomes.once(MALLOC, None, work)
    await outcomes.once(Asked("", 5, "Malloc"), None, work)
    assert seen == [MALLOC, MALLOC, None, None]


# ---- with a journal ---------------------------------------------------------------------------------------------------


def over_a_restart(
    path: Path, first: Callable[[Outcomes], Awaitable[None]], then: Callable[[Outcomes], Awaitable[None]]
) -> None:
    """Two coordinators one after the other."""
    for part in (first, then):
        with closing(open_journal(path)) as journal:
            asyncio.run(_awaited(part(Outcomes(journal, journal.load().outcomes))))


async def _awaited(work: Awaitable[None]) -> None:
    await work


@pytest.mark.parametrize("error", [None, errors.OutOfMemory("no gap of 7 bytes")])
def test_outcomes_outlive_the_coordinator(tmp_path: Path, error: errors.DsmlError | None) -> None:
    async def ask(outcomes: Outcomes) -> None:
        with pytest.raises(errors.OutOfMemory, match="no gap") if error else nullcontext():
            assert (await outcomes.once(MALLOC, None, at_once(error=error))).memAddr.value == 256

    async def ask_again(outcomes: Outcomes) -> None:
        work = Work()  # which would never end
        with pytest.raises(errors.OutOfMemory, match="no gap") if error else nullcontext():
            assert (await outcomes.once(MALLOC, None, work)).memAddr.value == 256
        assert work.begun == 0

    over_a_restart(tmp_path / "state", ask, ask_again)


def test_what_only_was_queued_is_asked_for_anew(tmp_path: Path) -> None:
    """The answer of a call in an open group, which has ended with the coordinator."""
    queued = pb.CollectiveResponse(success=True)
    done = pb.CollectiveResponse(success=True, result=pb.CollectiveResult())

    async def ask(outcomes: Outcomes) -> None:
        work = at_once(queued)
        for _ in range(2):
            assert await outcomes.once(COLLECTIVE, None, work) == queued
        assert work.begun == 1

    async def ask_again(outcomes: Outcomes) -> None:
        assert await outcomes.once(COLLECTIVE, None, at_once(done)) == done

    over_a_restart(tmp_path / "state", ask, ask_again)


def test_what_an_operation_changes_is_kept_with_its_outcome_or_not_at_all(tmp_path: Path) -> None:
    with closing(open_journal(tmp_path / "state")) as journal:
        outcomes = Outcomes(journal)

        def keep(answer: pb.MallocResponse) -> None:
            journal.put_communicator(KnownCommunicator(answer.memAddr.value, 0, 0))
            if not journal.load().communicators[1:]:
                return
            raise RuntimeError("a defect")

        asyncio.run(_awaited(_once(outcomes, Asked("1", 0, "Malloc"), keep)))
        with pytest.raises(errors.InternalError, match="a defect"):
            asyncio.run(_awaited(_once(outcomes, Asked("2", 0, "Malloc"), keep, addr=512)))
        recovered = journal.load()
    assert [one.comm_id for one in recovered.communicators] == [256]
    assert [(one.key, one.refused is None) for one in recovered.outcomes] == [("1", True), ("2", False)]


async def _once(outcomes: Outcomes, operation: Asked, keep: Callable[[Any], None], addr: int = 256) -> None:
    await outcomes.once(operation, None, at_once(pb.MallocResponse(memAddr=pb.MemAddr(value=addr))), keep)
