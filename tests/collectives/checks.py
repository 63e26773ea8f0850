"""All-reduces in place against exact arithmetic."""

from __future__ import annotations

import numpy as np

from dsml_gpu.schedules import algorithms_of
from tests.collectives.harness import Ranks
from tests.collectives.oracle import OPS, reduced, values_for

__all__ = ["ALGORITHMS", "OPS", "check", "expected", "inputs_for"]

ALGORITHMS = sorted(algorithms_of("all_reduce"))


def inputs_for(dtype: np.dtype, op: str, nranks: int, count: int) -> list[np.ndarray]:
    """One array for each rank; see `values_for`."""
    return [values_for(dtype, op, count, [rank, nranks, count]) for rank in range(nranks)]


def expected(inputs: list[np.ndarray], op: str) -> np.ndarray:
    """See `reduced`."""
    return reduced(inputs, op)


async def check(world: Ranks, dtype: np.dtype, op: str, algorithm: str, count: int) -> None:
    nranks = len(world.devices)
    inputs = inputs_for(dtype, op, nranks, count)
    results = await world.all_reduce(inputs, op, algorithm)
    for rank, result in enumerate(results):
        np.testing.assert_array_equal(
            result.astype(np.float64),
            expected(inputs, op).astype(np.float64),
            err_msg=f"{dtype} {op} {algorithm}, rank {rank} of {nranks}, {count} elements",
        )
