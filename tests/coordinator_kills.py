"""Kills a coordinator at random moments while sums in place run, and looks whether each has happened once.

    python -m tests.coordinator_kills --n 200 --seed 1 --transport grpc

Prints what became of each kill, and at the end how long it took until operations ended again.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dsml_gpu
from dsml_gpu.cli.fleet import ServerProcess
from tests.support.coordinators import Coordinators

NRANKS = 3
ELEMENTS = 20_000
#: Of one call, with the start of a process on a machine that is busy.
LIMIT_S = 60.0
#: A coordinator is killed at most so long after it has started to serve.
_LONGEST_S = 0.3


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        operations: that had ended before it.
        resumed_s: from the start of the next coordinator's process to the end of the operation that was under way.
    """

    operations: int
    resumed_s: float


@contextmanager
def devices() -> Iterator[list[ServerProcess]]:
    """Device servers for the length of a block."""
    with ExitStack() as stack:
        options = ["--memory", "64MiB", "--slice", "16KiB"]
        yield [stack.enter_context(ServerProcess("device", "--id", str(rank + 1), *options)) for rank in range(NRANKS)]


def kills(folder: Path, servers: Sequence[ServerProcess], n: int, seed: int, transport: str) -> Iterator[Kill]:
    """Kills n coordinators, one after the other. Raises AssertionError where a sum has not happened, or twice."""
    generator = random.Random(seed)
    coordinators = Coordinators(folder, list(servers), folder / "state", "--transport", transport)
    coordinators.start()
    stops = False
    ended = 0
    with ExitStack() as stack:
        stack.callback(coordinators.stop)
        client = stack.enter_context(dsml_gpu.connect(coordinators.address, timeout_s=LIMIT_S, reconnect_s=LIMIT_S))
        comm = client.communicator(NRANKS)
        contents = [np.arange(ELEMENTS, dtype=np.int64) + rank for rank in range(NRANKS)]
        arrays = comm.array(contents)
        pool = stack.enter_context(ThreadPoolExecutor(1))

        def work() -> None:
            nonlocal ended
            while not stops:
                comm.all_reduce(arrays, algorithm="ring" if transport == "grpc" else "", timeout_s=LIMIT_S)
                ended += 1

        working = pool.submit(work)
        try:
            for _ in range(n):
                _wait(lambda before=ended: ended > before or working.done())
                time.sleep(generator.random() * _LONGEST_S)  # the moment is what is drawn
                coordinators.kill()
                before, started_s = ended, time.monotonic()
                coordinators.start()
                _wait(lambda before=before: ended > before or working.done())
                yield Kill(before, time.monotonic() - started_s)
        finally:
            stops = True
            working.result(LIMIT_S)
        # After the first sum all ranks have the same; each of the others makes it three times as much, modulo 2**64.
        expected = np.sum(contents, axis=0).astype(np.uint64) * np.uint64(pow(NRANKS, ended - 1, 1 << 64))
        for rank, array in enumerate(arrays):
            got = array.get().astype(np.uint64)
            assert np.array_equal(got, expected), f"rank {rank} does not have what {ended} sums give"
        assert (comm.nranks, comm.epoch) == (NRANKS, 1)


def _wait(holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < until_s, f"no operation ended within {LIMIT_S:g} s"
        time.sleep(0.005)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--transport", default="grpc")
    options = parser.parse_args()
    resumed = []
    with tempfile.TemporaryDirectory() as folder, devices() as servers:
        for kill in kills(Path(folder), servers, options.n, options.seed, options.transport):
            resumed.append(kill.resumed_s)
            print(
                f"kill {len(resumed)} after {kill.operations} operations; resumed after {kill.resumed_s:.2f} s", flush=True
            )
    print(
        f"{len(resumed)} kills, every operation happened once; resumed after {statistics.median(resumed):.2f} s in the "
        f"median, {max(resumed):.2f} s at most"
    )


if __name__ == "__main__":
    main()
