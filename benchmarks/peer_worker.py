"""One rank of another library's all-reduce; `compare_peers.py` starts it. See README.md.

It does what the driver says over a Unix socket, one command a line, and waits for the next in a read of that socket: no
processor time, and no call of the library, goes into waiting. It ends when the driver closes the socket or is gone.

    prepare BYTES   Makes the buffer, runs one all-reduce and answers how many elements are wrong.
    run TIMES       Answers the seconds of each of so many all-reduces, each after a barrier.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from dsml_gpu.cli.measure import count_wrong, expected, inputs


@dataclass(frozen=True)
class Library:
    """What is measured, as one rank sees it.

    Attributes:
        bind: gives a call that sums one buffer, in place, over all ranks.
    """

    rank: int
    nranks: int
    barrier: Callable[[], object]
    bind: Callable[[np.ndarray], Callable[[], object]]
    close: Callable[[], object]


def gloo(store: str, rank: str, nranks: str) -> Library:
    """torch.distributed over gloo; the ranks find each other by a file."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(nranks))

    def bind(buffer: np.ndarray) -> Callable[[], object]:
        return partial(dist.all_reduce, torch.from_numpy(buffer))

    return Library(int(rank), int(nranks), dist.barrier, bind, dist.destroy_process_group)


def openmpi() -> Library:
    """mpi4py; the ranks are those of mpirun."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD

    def bind(buffer: np.ndarray) -> Callable[[], object]:
        return partial(world.Allreduce, MPI.IN_PLACE, buffer)

    return Library(world.Get_rank(), world.Get_size(), world.Barrier, bind, MPI.Finalize)


LIBRARIES: dict[str, Callable[..., Library]] = {"gloo": gloo, "openmpi": openmpi}


def answers(library: Library, commands: Iterable[str]) -> Iterator[str]:
    """The answer to each command."""
    buffer = np.empty(0)
    for command in commands:
        name, number = command.split()
        if name == "prepare":
            del buffer  # before the next is made: they may be large
            # The same numbers as float64, in an eighth of the memory; the sum fits as well.
            sources = inputs(library.nranks, int(number) // 8, np.dtype(np.int8), "sum")
            buffer = sources[library.rank].astype(np.float64)
            library.bind(buffer)()
            yield str(count_wrong(buffer, expected(sources, "sum")))
            buffer[:] = 0  # sums of sums would overflow
        else:
            yield " ".join(map(repr, timed(library, library.bind(buffer), int(number))))


def timed(library: Library, all_reduce: Callable[[], object], times: int) -> list[float]:
    """Seconds that each of so many calls takes on this rank."""
    times_s = []
    for _ in range(times):
        library.barrier()
        started = time.perf_counter()
        all_reduce()
        times_s.append(time.perf_counter() - started)
    return times_s


def main(name: str, address: str, *arguments: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        with connection.makefile("rw", encoding="utf-8") as stream:
            library = LIBRARIES[name](*arguments)
            stream.write("ready\n")
            stream.flush()
            for answer in answers(library, stream):
                stream.write(f"{answer}\n")
                stream.flush()
            library.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
