"""How far operations are, in the journal: what makes a round of control messages irrevocable.

The order is always the same, and all of it happens within an operation's turn, before any other work on the devices begins:

1. all ranks have done their part, and have kept how to undo it;
2. the journal has that (`Progress.record`);
3. the ranks are told to forget how to undo it, by a COMMIT or by another round.

A coordinator that dies before 2 leaves ranks that its successor has undo what they did; after 2, the successor has them
keep it (`resume`). The client's second request for the operation finds here which of its calls are done: these are not run
again, and where all are done, the answer is here. The operation's outcome is recorded a moment later; until then its round
stays known, whatever comes after it.

A round of passes over shared memory cannot be undone once it has begun to write: it goes to its end. So what each rank has
to do is recorded before (`Progress.begin`), and the successor has it done, or finds that it was not begun.

With a journal that does not outlive its process nothing is recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

from dsml_gpu.coordinator.journal import Journal
from dsml_gpu.coordinator.outcomes import asked
from dsml_gpu.coordinator.records import Begun, Round
from dsml_gpu.errors import InternalError
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)

#: Operations of one communicator that were begun, and whose end nobody has recorded: their callers are gone, or did not
#: wait. The oldest are forgotten.
_MAX_OPEN = 64


class Progress:
    """How far one operation is.

    Args:
        known: what an earlier try of it has done; None: nothing.
        put: takes what is to be recorded of a round that has ended; None: nothing is.
        put_begun: takes what is to be recorded of a round of passes that begins.
        forget_begun: called when it has ended, but is not going to be recorded as done.

    Attributes:
        calls: so many of its calls have been done by an earlier try.
    """

    def __init__(
        self,
        known: Round | None,
        put: Callable[[int, int, bytes], None] | None = None,
        put_begun: Callable[[int, int, tuple[bytes, ...]], None] | None = None,
        forget_begun: Callable[[], None] = lambda: None,
    ) -> None:
        self.calls = 0 if known is None else known.calls
        self._before = None if known is None else pb.CollectiveResult.FromString(known.result)
        self._put = put
        self._put_begun = put_begun
        self._forget_begun = forget_begun
        self._has_begun = False
        self._recorded: pb.CollectiveResult | None = None

    def begin(self, calls: int, requests: Iterable[pb.ExecuteRequest]) -> None:
        """A round of passes is about to begin, which then goes to its end, whoever dies.

        Args:
            calls: that are done in all when it has ended.
            requests: of the ranks that have work.

        Raises:
            InternalError: the journal cannot be written.
        """
        if self._put_begun is not None:
            some = tuple(requests)
            self._has_begun = True
            self._put_begun(some[0].round, calls, tuple(request.SerializeToString() for request in some))

    def record(self, number: int, calls: int, result: Callable[[], pb.CollectiveResult]) -> None:
        """Another round has ended well on all ranks.

        Args:
            number: that it can be settled by, as in `ExecuteRequest.round`; 0: there is nothing to settle.
            calls: that are done in all.
            result: of those that this try has done.

        Raises:
            InternalError: the journal cannot be written.
        """
        if self._put is not None:
            recorded = self._sum(result)
            self._put(number, calls, recorded.SerializeToString())
            self._recorded, self._has_begun = recorded, False

    def give_up(self) -> None:
        """The operation has ended without having been recorded as done: nothing of it may be done later."""
        if self._has_begun:
            try:
                self._forget_begun()
            except InternalError as error:
                log.error("a later coordinator may do again what has ended: %s", error)

    def total(self, result: Callable[[], pb.CollectiveResult] | None) -> pb.CollectiveResult:
        """What all tries have done, when the last one has ended.

        Args:
            result: of this one; None: it had nothing to do.
        """
        return self._sum(result) if self._recorded is None else self._recorded

    def _sum(self, result: Callable[[], pb.CollectiveResult] | None) -> pb.CollectiveResult:
        if self._before is None:
            return pb.CollectiveResult() if result is None else result()
        return self._before if result is None else _sum(self._before, result())


class Commits:
    """Of the operations of one coordinator. All calls come from one event loop.

    Args:
        known, begun: from before.
        has_outcome: whether the outcome of the operation with a key is in the journal.
    """

    def __init__(
        self, journal: Journal, known: Iterable[Round], begun: Iterable[Begun], has_outcome: Callable[[str], bool]
    ) -> None:
        self._journal = journal
        self._has_outcome = has_outcome
        #: By communicator and key of the operation, the oldest first.
        self._rounds: dict[int, dict[str, Round]] = {}
        for one in known:
            self._rounds.setdefault(one.comm_id, {})[one.key] = one
        self._begun = {one.comm_id: one for one in begun}

    def begin(self, comm_id: int) -> Progress:
        """Of the operation of a communicator that the running code is part of."""
        if not self._journal.lasts:
            return Progress(None)
        operation = asked.get()
        key = "" if operation is None else operation.key
        known = self._rounds.get(comm_id, {}).get(key) if key else None
        return Progress(
            known,
            partial(self._put, comm_id, key),
            partial(self._put_begun, comm_id, key),
            partial(self.forget_begun, comm_id),
        )

    def numbers(self, comm_id: int) -> frozenset[int]:
        """Numbers of the rounds of a communicator that are irrevocable, of those that a device may not have settled yet."""
        return frozenset(one.number for one in self._rounds.get(comm_id, {}).values())

    def unfinished(self, comm_id: int) -> Begun | None:
        """The round of passes of a communicator that is to go to its end, if it has begun; None: there is none."""
        begun = self._begun.get(comm_id)
        return None if begun is None or begun.number == self._last(comm_id)[1] else begun

    def finish(self, begun: Begun, result: pb.CollectiveResult) -> None:
        """A round of passes that was unfinished has come to its end.

        Args:
            result: of all calls whose end that is.
        """
        known = self._rounds.get(begun.comm_id, {}).get(begun.key) if begun.key else None
        total = Progress(known).total(lambda: result)
        self._put(begun.comm_id, begun.key, 0, begun.calls, total.SerializeToString())

    def forget(self, comm_id: int) -> None:
        """The communicator has ended; the journal forgets what it has of its rounds with it."""
        self._rounds.pop(comm_id, None)
        self._begun.pop(comm_id, None)

    def _last(self, comm_id: int) -> tuple[int, int]:
        """Numbers of the last round that can be settled, and of the last one of passes."""
        rounds = self._rounds.get(comm_id)
        last = next(reversed(rounds.values())) if rounds else None
        return (0, 0) if last is None else (last.number, last.passes)

    def _put_begun(self, comm_id: int, key: str, number: int, calls: int, requests: tuple[bytes, ...]) -> None:
        begun = Begun(comm_id, key, number, calls, requests)
        self._journal.put_begun(begun)
        self._begun[comm_id] = begun

    def forget_begun(self, comm_id: int) -> None:
        """The last round of passes of a communicator has ended. Without effect where there is none."""
        self._begun.pop(comm_id, None)
        self._journal.forget_begun(comm_id)

    def _put(self, comm_id: int, key: str, number: int, calls: int, result: bytes) -> None:
        begun = self._begun.get(comm_id)
        number = number or self._last(comm_id)[0]
        one = Round(comm_id, key, number, calls, 0 if begun is None else begun.number, result)
        rounds = self._rounds.setdefault(comm_id, {})
        self._journal.put_round(one)
        rounds.pop(key, None)
        rounds[key] = one
        # Never before the new one is there: what a device has not settled yet must be known.
        for other in [other for other in rounds if other != key]:
            if not other or self._has_outcome(other) or len(rounds) > _MAX_OPEN:
                del rounds[other]
                self._journal.forget_round(comm_id, other)


def _sum(before: pb.CollectiveResult, after: pb.CollectiveResult) -> pb.CollectiveResult:
    """The result of calls that two tries have done, one after the other."""
    result = pb.CollectiveResult()
    result.CopyFrom(after)
    del result.operations[:], result.lost[:], result.transports[:]
    result.operations.extend([*before.operations, *after.operations])
    result.lost.extend([*before.lost, *after.lost])
    result.transports.extend(cast("list[pb.Transport]", sorted({*before.transports, *after.transports})))
    result.algorithm = after.algorithm if before.algorithm == after.algorithm else ""
    result.elapsedNs = before.elapsedNs + after.elapsedNs
    result.bytesSent = before.bytesSent + after.bytesSent
    return result
