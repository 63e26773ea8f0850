"""A communicator that works all the time, while devices come and go: for `join` and `soak`."""

from __future__ import annotations

import random
from collections.abc import Sequence

import dsml_gpu
from dsml_gpu.chaos.exercise import Answer, Exercise
from dsml_gpu.chaos.operations import Operation
from dsml_gpu.chaos.report import AS_BEFORE, HANG, LOST, RESTARTED


class Traffic:
    """All-reduces one after the other, each of which is checked to the last element.

    All calls come from one thread, but for `harm`.

    Args:
        nbytes: of each rank's buffer.

    Attributes:
        done: operations that have ended well.
        wrong: what was wrong, and what failed.
        restarted: operations that ran again without a device.
    """

    def __init__(self, client: dsml_gpu.Client, device_ids: Sequence[int], nbytes: int, seed: int) -> None:
        self._client = client
        self._rng = random.Random(seed)
        self._nbytes = nbytes
        self._drawn = 0
        self.done = self.restarted = self.hangs = self.failed = 0
        self.wrong: list[str] = []
        self.detection_s: list[float] = []
        self._exercise = self._make(device_ids)

    @property
    def device_ids(self) -> tuple[int, ...]:
        """Of the devices that are in the communicator."""
        return tuple(device.device_id for device in self._exercise.comm.devices)

    def harm(self, device_id: int) -> None:
        """A device is about to die, or to leave: what it has is not looked at any more."""
        self._exercise.harmed.update(rank for rank in self._exercise.ranks_of([device_id]) if rank >= 0)

    def step(self) -> Answer:
        """One operation. Raises Stuck."""
        exercise = self._exercise
        answer = exercise.run()
        ended, wrong = exercise.judge(answer)
        self.wrong += wrong
        self.detection_s += answer.detection_s
        self.hangs += ended == HANG
        self.restarted += ended == RESTARTED and bool(answer.detection_s)
        if ended in (HANG, LOST, AS_BEFORE):
            self.failed += 1
            self.wrong.append(f"operation {self.done + self.failed}: {ended}: {answer.note}")
        else:
            self.done += 1
        return answer

    def renew(self, device_ids: Sequence[int]) -> None:
        """Goes on with another communicator, of these devices."""
        self._exercise.close()
        self._exercise = self._make(device_ids)

    def grow(self, device_ids: Sequence[int]) -> None:
        """Takes devices into the communicator."""
        comm = self._exercise.comm
        comm.grow(device_ids=device_ids)
        self._exercise.refill(self._operation(comm.nranks), self._rng.randrange(1 << 31))

    def refill(self) -> None:
        """New data, in new arrays, on the devices that are left."""
        self._exercise.refill(self._operation(self._exercise.comm.nranks), self._rng.randrange(1 << 31))

    def close(self) -> None:
        self._exercise.close()

    def _make(self, device_ids: Sequence[int]) -> Exercise:
        operation = self._operation(len(device_ids))
        return Exercise(self._client, device_ids, operation, self._rng.randrange(1 << 31))

    def _operation(self, nranks: int) -> Operation:
        # In place the numbers grow, and wrap; whole numbers do so in numpy as they do here. In place and not, by turns, so
        # that as much memory is in use over any longer time.
        self._drawn += 1
        algorithm = self._rng.choice(("ring", "direct", "auto"))
        return Operation(
            "all_reduce", nranks, max(1, self._nbytes // 8), "int64", "sum", algorithm, in_place=self._drawn % 2 == 0
        )
