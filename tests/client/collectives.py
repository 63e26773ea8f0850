"""What the tests of the client's collectives share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsml_gpu import CollectiveResult, Communicator
from dsml_gpu.schedules import Builder, Schedule

NRANKS = 4


def values(size: int) -> list[np.ndarray]:
    """Unlike numbers, for each rank."""
    return [np.arange(size) + 100.0 * (rank + 1) for rank in range(NRANKS)]


def calls(comm: Communicator, size: int = NRANKS) -> dict[str, Callable[..., CollectiveResult | None]]:
    """Every collective, on arrays of so many elements."""
    arrays, parts = comm.array(values(size)), comm.array(values(size // NRANKS))
    return {
        "all_reduce": lambda **options: comm.all_reduce(arrays, **options),
        "reduce": lambda **options: comm.reduce(arrays, **options),
        "broadcast": lambda **options: comm.broadcast(arrays, **options),
        "reduce_scatter": lambda **options: comm.reduce_scatter(arrays, parts, **options),
        "all_gather": lambda **options: comm.all_gather(parts, arrays, **options),
        "gather": lambda **options: comm.gather(parts, arrays[0], **options),
        "scatter": lambda **options: comm.scatter(arrays[0], parts, **options),
        "all_to_all": lambda **options: comm.all_to_all(arrays, **options),
        "send_recv": lambda **options: comm.send_recv([(arrays[0], arrays[1])], **options),
        "barrier": lambda **options: comm.barrier(**options),
    }


def line_broadcast(root: int = 0) -> Schedule:
    """A schedule of one's own: from rank to rank."""
    builder = Builder("broadcast", "my_line", NRANKS, root=root)
    chunk = builder.chunk(root, 0)
    for distance in range(1, NRANKS):
        chunk = chunk.send((root + distance) % NRANKS)
    return builder.build()
