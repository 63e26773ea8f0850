"""What an all-reduce must give, by exact arithmetic."""

from __future__ import annotations

import numpy as np

from dsml_gpu.schedules import ALL_REDUCE
from tests.collectives.harness import Ranks

ALGORITHMS = sorted(ALL_REDUCE)
OPS = ["SUM", "PROD", "MIN", "MAX", "AVG"]


def inputs_for(dtype: np.dtype, op: str, nranks: int, count: int) -> list[np.ndarray]:
    """Small whole numbers, so that every order of summation gives the same exact result in every type."""
    generator = np.random.default_rng([nranks, count])
    low, high = (1, 3) if op == "PROD" else (0, 8) if dtype.kind == "u" else (-7, 8)
    return [generator.integers(low, high, count).astype(dtype) for _ in range(nranks)]


def expected(inputs: list[np.ndarray], op: str) -> np.ndarray:
    """The result by exact arithmetic, rounded once."""
    dtype = inputs[0].dtype
    exact = np.stack([values.astype(np.float64) for values in inputs])
    if op == "AVG":
        total = exact.sum(axis=0)
        if dtype.kind in "iu":
            return np.trunc(total / len(inputs)).astype(dtype)
        wide = np.float32 if dtype.itemsize == 2 else dtype.type
        return (total.astype(wide) / wide(len(inputs))).astype(dtype)
    reduced = {"SUM": np.sum, "PROD": np.prod, "MIN": np.min, "MAX": np.max}[op](exact, axis=0)
    if dtype.kind in "iu":  # 2**9 leaves 8 bits
        return np.asarray(reduced.astype(np.int64).astype(dtype))
    return np.asarray(reduced.astype(dtype))


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
