"""What a running execution waits for at a moment, peer by peer: who looks for the one that holds all others up needs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from dsml_gpu.device.dataflow import Access, Dataflow
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: A wait is one that takes at least so long: a slice that is on its way is none.
_A_WHILE_S = 0.1


@dataclass(frozen=True, slots=True)
class Wait:
    """What a rank has not got from a peer, or a peer has not taken.

    Attributes:
        peer: the rank.
        operation: index of the operation in its group. The number of operations: all of them are over here, and only the
            peer's end of the stream is not.
        waited_s: since when, on the link, nothing came or went.
        sends: the peer does not take what this rank sends; else it has not sent what this rank is to get.
        chunk, step, steps: of what it has not sent, from 0, as this rank's program counts; `steps` is 0 where there is
            no chunk.
    """

    peer: int
    operation: int
    waited_s: float
    sends: bool = False
    chunk: int = 0
    step: int = 0
    steps: int = 0

    def to_wire(self) -> pb.Wait:
        """As it is shipped."""
        return pb.Wait(
            rank=self.peer,
            chunk=self.chunk,
            step=self.step,
            steps=self.steps,
            waitedMs=round(self.waited_s * 1000),
            sends=self.sends,
            operation=self.operation,
        )

    def __str__(self) -> str:
        if self.sends:
            return f"rank {self.peer} to take what was sent"
        if not self.steps:
            return f"the end of what rank {self.peer} sends"
        return f"chunk {self.chunk} of step {self.step + 1}/{self.steps} from rank {self.peer}"


@dataclass(slots=True)
class _Sent:
    """What a peer has not taken yet: how many slices, and since when it took none."""

    slices: int = 0
    since_s: float = 0.0


class Waits:
    """Those of one execution, which tells of every slice that it waits for, sends, or has got rid of.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._operation = 0
        self._steps = 0
        #: By peer, what is to come next, and since when; None: no slice, but the end of the stream.
        self._expected: dict[int, tuple[float, Access | None]] = {}
        self._sent: dict[int, _Sent] = {}
        self._kept: tuple[Wait, ...] | None = None

    def begin(self, operation: int, flow: Dataflow) -> None:
        """The next operation of the group begins; nothing is under way."""
        self._operation = operation
        moves = (*flow.sends.values(), *flow.receives.values())
        self._steps = 1 + max((accesses[-1].step for accesses in moves), default=-1)

    def end(self, operations: int) -> None:
        """All operations are over, of which there were so many; what follows are the ends of streams."""
        self._operation, self._steps = operations, 0

    def expect(self, peer: int, access: Access | None) -> None:
        """A slice of a chunk is to come, or the end of the stream."""
        self._expected[peer] = self._clock(), access

    def came(self, peer: int) -> None:
        """It came."""
        del self._expected[peer]

    def send(self, peer: int) -> None:
        """A slice, or the end of the stream, is under way to a peer."""
        sent = self._sent.setdefault(peer, _Sent())
        if not sent.slices:
            sent.since_s = self._clock()
        sent.slices += 1

    def taken(self, peer: int) -> None:
        """The oldest of what is under way there was taken."""
        sent = self._sent[peer]
        sent.slices -= 1
        sent.since_s = self._clock()

    def keep(self) -> None:
        """The execution is given up: these are its waits from now on. The first time counts."""
        self._kept = self.present()

    def present(self) -> tuple[Wait, ...]:
        """Those that have lasted a while, or had when the execution was given up, by peer."""
        if self._kept is not None:
            return self._kept
        now_s = self._clock()
        waits = []
        for peer, (since_s, access) in self._expected.items():
            if access is None:
                waits.append(Wait(peer, self._operation, now_s - since_s))
            else:
                of_chunk = (access.move.chunk, access.step, self._steps)
                waits.append(Wait(peer, self._operation, now_s - since_s, False, *of_chunk))
        for peer, sent in self._sent.items():
            if sent.slices:
                waits.append(Wait(peer, self._operation, now_s - sent.since_s, sends=True))
        long = [wait for wait in waits if wait.waited_s >= _A_WHILE_S]
        return tuple(sorted(long, key=lambda wait: (wait.peer, wait.sends)))
