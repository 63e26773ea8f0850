"""One communicator under trial: its arrays, what must be in them, and operations that are checked to the last element."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

import dsml_gpu
from dsml_gpu.chaos import checks
from dsml_gpu.chaos.checks import Buffers
from dsml_gpu.chaos.operations import Operation, call
from dsml_gpu.chaos.report import AS_BEFORE, HANG, LOST, ON_ALL, RESTARTED
from dsml_gpu.client.results import CollectiveResult
from dsml_gpu.errors import DsmlError, OperationTimeout, RanksLost

#: An operation that has not answered by then hangs.
HANG_S = 10.0
#: So much longer a client may take to say so.
_GRACE_S = 5.0


class Stuck(Exception):
    """A call has not even come back when its deadline was over: nothing more can be tried with this client."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How an operation has ended.

    Attributes:
        result: what it did; None: it failed.
        error: what it failed with.
        began_s, ended_s: by `time.monotonic`.
    """

    result: CollectiveResult | None
    error: DsmlError | None
    began_s: float
    ended_s: float

    @property
    def hangs(self) -> bool:
        return isinstance(self.error, OperationTimeout)

    @property
    def detection_s(self) -> tuple[float, ...]:
        """Of each device that was given up."""
        return () if self.result is None else tuple(one.detection_s for one in self.result.lost)

    @property
    def note(self) -> str:
        return "" if self.error is None else f"{type(self.error).__name__}: {self.error}"


class Exercise:
    """A communicator with arrays on all ranks. Ends with `close` or its ``with`` block.

    Ranks are those at its begin, also after a loss.

    Args:
        device_ids: of its ranks.
        seed, whole: see `checks.draw`.
        on_failure: ``"shrink"`` or ``"fail"``.
        limit_s: an operation that takes longer hangs.
    """

    def __init__(
        self,
        client: dsml_gpu.Client,
        device_ids: Sequence[int],
        operation: Operation,
        seed: int,
        *,
        whole: bool = True,
        on_failure: str = "shrink",
        limit_s: float = HANG_S,
    ) -> None:
        self.operation = operation
        self.device_ids = tuple(device_ids)
        self.contents = checks.draw(operation, seed, whole=whole)
        #: Ranks that may have lost what they had.
        self.harmed: set[int] = set()
        #: Operations so far.
        self.operations = 0
        self._hangs = False
        self._on_failure = on_failure
        self._limit_s = limit_s
        self.comm = client.communicator(device_ids=device_ids, transport=operation.transport, on_failure=on_failure)
        self._fill()

    def _fill(self) -> None:
        self._inputs = self.comm.array([one.source for one in self.contents])
        results = [one.result for one in self.contents if one.result is not None]
        self._outputs = self.comm.array(results) if results else None

    def refill(self, operation: Operation, seed: int) -> None:
        """Goes on with another operation, on the ranks that the communicator has now, with new data."""
        for arrays in (self._inputs, self._outputs or ()):
            for rank, array in enumerate(arrays):
                if rank not in self.harmed:  # what is dead has no memory, also where another one has its id
                    array.free()
        self.operation, self.contents = operation, checks.draw(operation, seed)
        self.device_ids = tuple(device.device_id for device in self.comm.devices)
        self.harmed = set()
        self._fill()

    def save(self, folder: Path) -> None:
        """Makes a checkpoint of all arrays, from which spares can take the places of ranks."""
        arrays = {"input": self._inputs} | ({} if self._outputs is None else {"output": self._outputs})
        self.comm.checkpoint(folder, arrays).wait(self._limit_s)

    def run(self) -> Answer:
        """Runs the operation. Raises Stuck."""
        self.operations += 1
        began_s = time.monotonic()
        result = error = None
        try:
            result = in_time(
                lambda: call(self.comm, self.operation, self._inputs, self._outputs, self._limit_s), self._limit_s + _GRACE_S
            )
        except DsmlError as raised:
            error = raised
        return Answer(result, error, began_s, time.monotonic())

    def rehearse(self) -> tuple[float, list[str]]:
        """Runs it without a fault, and puts the data back; returns how long it took, and what was wrong."""
        before = self.contents
        wrong = []
        for _ in range(2):  # the first one connects, and compiles what it needs
            answer = self.run()
            if answer.error is not None:
                return 0.0, [f"without a fault it failed: {answer.note}"]
            wrong += [f"without a fault: {one}" for one in self.judge(answer)[1]]
        self.contents = before
        for number, buffers in enumerate(before):
            self._inputs[number].set(buffers.source)
            if self._outputs is not None and buffers.result is not None:
                self._outputs[number].set(buffers.result)
        return answer.ended_s - answer.began_s, wrong

    def read(self) -> dict[int, Buffers]:
        """What the ranks have that nobody has harmed. Raises DsmlError where one of these does not answer."""
        return {
            rank: Buffers(self._inputs[rank].get(), None if self._outputs is None else self._outputs[rank].get())
            for rank in range(self.operation.nranks)
            if rank not in self.harmed
        }

    def ranks_of(self, device_ids: Iterable[int]) -> list[int]:
        """Ranks of devices; of one that is none of them, -1."""
        return [self.device_ids.index(one) if one in self.device_ids else -1 for one in device_ids]

    def judge(self, answer: Answer) -> tuple[str, list[str]]:
        """How the latest operation has ended, and what is wrong; from then on the ranks have what they have."""
        if answer.hangs:
            self._hangs = True
            return HANG, []
        actual = self.read()
        if answer.result is None:
            return self._judge_failure(answer, actual)
        members = self.ranks_of(answer.result.device_ids)
        lost = self.ranks_of(one.device_id for one in answer.result.lost)
        wrong = [
            f"device {one.device_id} was given up, and nobody had harmed it: {one.reason}"
            for rank, one in zip(lost, answer.result.lost, strict=True)
            if rank not in self.harmed
        ]
        wrong += checks.wrong(self.operation, self.contents, actual, [rank for rank in members if rank >= 0])
        if -1 in members or len(set(members)) != len(members):
            wrong.append(f"devices {answer.result.device_ids} took part, those of the communicator were {self.device_ids}")
        # A rank that was to die and did not is as it should be, for all that is known: what it has is looked at later.
        after = checks.expected(self.operation, self.contents, [rank for rank in members if rank >= 0])
        self._keep({**{rank: after[rank] for rank in self.harmed if rank in after}, **actual})
        return (ON_ALL if len(members) == self.operation.nranks else RESTARTED), wrong

    def _judge_failure(self, answer: Answer, actual: dict[int, Buffers]) -> tuple[str, list[str]]:
        cannot = any(self.operation.needs(rank) for rank in self.harmed)
        excused = bool(self.harmed) and (self._on_failure == "fail" or (isinstance(answer.error, RanksLost) and cannot))
        wrong = checks.changed(dict(enumerate(self.contents)), actual)
        self._keep(actual)
        return (AS_BEFORE if excused else LOST), wrong

    def unchanged(self) -> list[str]:
        """What has changed since the latest look, though no operation ran; empty: nothing."""
        return checks.changed(dict(enumerate(self.contents)), self.read())

    def go_on(self) -> list[str]:
        """Runs the operation once more, where it still can be; returns what was wrong."""
        if any(self.operation.needs(rank) for rank in self.harmed) or self._on_failure == "fail":
            return []
        answer = self.run()
        ended, found = self.judge(answer)
        wrong = [f"in the next operation: {one}" for one in found]
        return wrong if answer.error is None else [*wrong, f"the next operation: {ended}: {answer.note}"]

    def _keep(self, actual: dict[int, Buffers]) -> None:
        self.contents = [actual.get(rank, old) for rank, old in enumerate(self.contents)]

    def close(self) -> None:
        self.comm.close()

    def __enter__(self) -> Exercise:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not Stuck and not self._hangs:  # it would wait for what hangs
            self.close()


def in_time(work: Callable[[], CollectiveResult], limit_s: float) -> CollectiveResult:
    """What a call returns or raises. Raises Stuck where it does neither; its thread is left to itself then."""
    future: Future[CollectiveResult] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  handed to who waits
            future.set_exception(error)

    threading.Thread(target=run, name="operation", daemon=True).start()
    try:
        return future.result(limit_s)
    except TimeoutError:
        if future.done():  # its own error, which happens to be one
            raise
        raise Stuck(f"an operation has not come back after {limit_s:g} s") from None


class At:
    """Something that happens once, in a thread, so long after `start`. Ends with its ``with`` block.

    Attributes:
        happened_s: when, by `time.monotonic`; None: not yet.
    """

    def __init__(self, after_s: float, happens: Callable[[], None]) -> None:
        self.happened_s: float | None = None
        self._after_s = after_s
        self._happens = happens
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fault", daemon=True)

    def _run(self) -> None:
        time.sleep(self._after_s)
        self.happened_s = time.monotonic()
        try:
            self._happens()
        except BaseException as error:  # noqa: BLE001  raised where the block ends
            self._error = error

    def __enter__(self) -> At:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.join()
        if self._error is not None and error[0] is None:
            raise self._error


def share_of(duration_s: float, fraction: float) -> float:
    """When a fault is due: a share of an operation's time."""
    return float(np.clip(duration_s * fraction, 0.0, HANG_S))
