"""Exactly once: operations that a client asks for again, because it did not hear how they ended.

A client library draws a key for each call. A second call with the same key is not another operation: it waits for the one
that runs, or has the answer, or the error, with which that one has ended. With a journal that holds across the coordinator's
own end. An error is an outcome as any other, also one by which nobody can tell what has happened: only the caller can decide
to try again, and then draws another key.

A caller that is gone is not one that has given up. Where a call carries a key,

- an operation goes on when the connection to its caller breaks, and its outcome is kept for the caller to ask for;
- it is cancelled when nobody waits for it any more, and the last one to wait has given up: its deadline has passed or, on a
  lane, it said so. Over gRPC a server sees no difference between a client that cancels a call and a connection that breaks,
  so there only the deadline counts.

Without a key a call is cancelled when its caller is gone, for whatever reason.

The coordinator's own end is no outcome: what it cuts short may be asked for again, of the next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from dsml_gpu import failpoints
from dsml_gpu.coordinator.journal import Journal
from dsml_gpu.coordinator.records import MAX_OUTCOMES, Outcome, Refused
from dsml_gpu.errors import DsmlError, InternalError, InvalidValue, OperationAborted, Unavailable, error_from
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.lane import CONNECTION_BROKE

log = logging.getLogger(__name__)

M = TypeVar("M")
_METHODS = pb.DESCRIPTOR.services_by_name["GPUCoordinator"].methods_by_name
#: By so much the clocks of a server and of its client may differ about one deadline.
_DEADLINE_TOLERANCE_S = 0.1


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for: the operation's key, its communicator (0: none), and its method of GPUCoordinator."""

    key: str
    comm_id: int
    method: str


#: The operation that the running code is part of, for those who write a round to the journal; None: it has no key.
asked: ContextVar[Asked | None] = ContextVar("asked", default=None)


class _Running:
    """An operation that runs.

    Attributes:
        task: runs it, and keeps its outcome before it settles this.
        waiters: of the calls that wait for it.
        given_up: nobody wants it.
    """

    def __init__(self, operation: Asked) -> None:
        self.operation = operation
        self.task: asyncio.Task[None]
        self.waiters: set[asyncio.Future[Any]] = set()
        self.given_up = False

    def settle(self, answer: Any, error: Exception | None) -> None:
        """Gives all waiters the answer, or the error where there is one."""
        # Not by the task's own result: that would take the event loop two more rounds, on the way of every collective.
        for waiter in self.waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(answer)
            else:
                waiter.set_exception(error)


class Outcomes:
    """The operations with keys, of one coordinator. All calls come from one event loop.

    Args:
        journal: takes outcomes before anybody has an answer.
        known: outcomes from before.
    """

    def __init__(self, journal: Journal, known: Iterable[Outcome] = ()) -> None:
        self._journal = journal
        self._known = {outcome.key: outcome for outcome in known}
        self._running: dict[str, _Running] = {}
        #: Keys of those that are known, but are not in the journal.
        self._passing: set[str] = set()

    async def once(
        self,
        operation: Asked,
        context: Any,
        work: Callable[[], Awaitable[M]],
        keep: Callable[[M], None] | None = None,
    ) -> M:
        """The answer of an operation, which is run unless it runs or has ended already.

        Args:
            context: of the call; None: it came by a lane.
            work: the operation.
            keep: writes to the journal what the operation has changed, together with its outcome. It is not called where
                the operation fails.

        Raises:
            InvalidValue: the key is that of another operation.
            Unavailable: the coordinator stops before it has ended.
            DsmlError: what it fails or has failed with.
        """
        if not operation.key:
            answer = await work()
            if keep is not None:
                keep(answer)
            return answer
        known = self._known.get(operation.key)
        if known is not None:
            _require_same(operation, known.method, known.comm_id)
            log.info("%s was asked for again; it has ended", operation.method)
            known_answer: M = _answer_of(known)
            return known_answer
        running = self._running.get(operation.key)
        if running is None:
            running = self._start(operation, work, keep)
        else:
            _require_same(operation, running.operation.method, running.operation.comm_id)
            log.info("%s was asked for again; it runs", operation.method)
        new_answer: M = await self._wait_for(running, context)
        return new_answer

    def has(self, key: str) -> bool:
        """Whether the journal has, or is about to have, the outcome of the operation with a key."""
        return key in self._known and key not in self._passing

    def keep(self, outcome: Outcome) -> None:
        """Keeps the outcome of an operation, also of one that ended otherwise than by `once`."""
        self._remember(outcome)
        self._journal.put_outcome(outcome)

    async def close(self) -> None:
        """Cancels what runs. That is no outcome."""
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _start(self, operation: Asked, work: Callable[[], Awaitable[Any]], keep: Callable[[Any], None] | None) -> _Running:
        running = self._running[operation.key] = _Running(operation)
        running.task = asyncio.ensure_future(self._run(running, work, keep))
        running.task.add_done_callback(lambda task: self._end(running))
        return running

    def _end(self, running: _Running) -> None:
        del self._running[running.operation.key]
        if running.task.cancelled():
            running.settle(None, Unavailable("the coordinator stops before the operation has ended"))
        elif (defect := running.task.exception()) is not None:
            running.settle(None, InternalError(f"defect of the server: {defect!r}"))

    @staticmethod
    async def _wait_for(running: _Running, context: Any) -> Any:
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        running.waiters.add(waiter)
        try:
            return await waiter
        except asyncio.CancelledError as cancelled:
            if len(running.waiters) == 1 and _has_given_up(context, cancelled):
                running.given_up = True
                running.task.cancel()
            raise
        finally:
            running.waiters.discard(waiter)

    async def _run(self, running: _Running, work: Callable[[], Awaitable[Any]], keep: Callable[[Any], None] | None) -> None:
        operation = running.operation
        asked.set(operation)
        answer: Any = None
        error: DsmlError | None = None
        try:
            answer = await work()
            failpoints.reach("outcomes.done", method=operation.method)
            self._ended(operation, answer, keep)
        except DsmlError as refusal:
            error = refusal
        except asyncio.CancelledError:
            if not running.given_up:
                raise
            error = OperationAborted(f"{operation.method} was given up by its caller")
        except Exception as defect:
            log.exception("%s met a defect of the server", operation.method)
            error = InternalError(f"defect of the server: {type(defect).__name__}: {defect}")
        if error is not None:
            try:
                self.keep(Outcome(operation.key, operation.comm_id, operation.method, refused=Refused.of(error)))
            except InternalError as unkept:
                log.error("the next coordinator will not know that %s has failed: %s", operation.method, unkept)
        failpoints.reach("outcomes.kept", method=operation.method)
        running.settle(answer, error)

    def _ended(self, operation: Asked, answer: Any, keep: Callable[[Any], None] | None) -> None:
        outcome = Outcome(operation.key, operation.comm_id, operation.method, answer.SerializeToString())
        if keep is not None:
            with self._journal.together():
                keep(answer)
                self._journal.put_outcome(outcome)
        elif _lasts(answer):
            self._journal.put_outcome(outcome)
        else:
            self._passing.add(operation.key)
        self._remember(outcome)

    def _remember(self, outcome: Outcome) -> None:
        self._known[outcome.key] = outcome
        if len(self._known) > MAX_OUTCOMES:
            oldest = next(iter(self._known))
            del self._known[oldest]
            self._passing.discard(oldest)


def _require_same(operation: Asked, method: str, comm_id: int) -> None:
    if (operation.method, operation.comm_id) != (method or operation.method, comm_id):
        raise InvalidValue(
            f"the idempotency key {operation.key!r} is that of {method} of communicator {comm_id}, and came again with "
            f"{operation.method} of communicator {operation.comm_id}"
        )


def _answer_of(outcome: Outcome) -> Any:
    if outcome.refused is not None:
        raise error_from(outcome.refused.code, outcome.refused.message, outcome.refused.refusal)
    return getattr(pb, _METHODS[outcome.method].output_type.name).FromString(outcome.answer)


def _lasts(answer: Any) -> bool:
    """Whether an answer is worth something to the next process: one without a result is of what is queued, or runs on."""
    return "result" not in answer.DESCRIPTOR.fields_by_name or bool(answer.HasField("result"))


def _has_given_up(context: Any, cancelled: asyncio.CancelledError) -> bool:
    """Whether the caller of a call that is cancelled wants its answer no more; otherwise it may ask again."""
    if context is None:
        return CONNECTION_BROKE not in cancelled.args
    remaining_s = context.time_remaining()
    return remaining_s is not None and remaining_s <= _DEADLINE_TOLERANCE_S
