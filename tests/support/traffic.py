"""Collectives that go on while a test does something else."""

from __future__ import annotations

import itertools
import threading

import numpy as np

import dsml_gpu


class Traffic:
    """Collectives, one after the other, on a communicator of a coordinator.

    Attributes:
        done: how many have ended well.
        failure: of the first one that has not.
    """

    def __init__(self, address: str, nranks: int, elements: int) -> None:
        self.done = 0
        self.failure: Exception | None = None
        self._address, self._nranks, self._elements = address, nranks, elements
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """Returns when the last one is done. Idempotent."""
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            with dsml_gpu.connect(self._address) as client, client.communicator(self._nranks) as comm:
                arrays = comm.array([np.ones(self._elements)] * self._nranks)
                for algorithm in itertools.cycle(("auto", "ring")):
                    comm.all_reduce(arrays, op="max", algorithm=algorithm)
                    self.done += 1
                    if self._ends.is_set():
                        return
        except Exception as error:  # noqa: BLE001  the test asserts that there is none
            self.failure = error
