"""Ring against naive, by size, with devices in one process and in a process each. See README.md for how to run it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dsml_gpu import Communicator
from dsml_gpu.cli.measure import count_wrong, expected, inputs

FLOAT64 = np.dtype(np.float64)


# The algorithm varies fastest, so that ring and naive are measured right after each other.
@pytest.mark.parametrize("algorithm", ["ring", "naive"])
@pytest.mark.parametrize("elements", [1_000, 10_000, 50_000, 100_000, 200_000, 450_000])
@pytest.mark.parametrize("deployment", ["embedded", "processes"])
def test_all_reduce(benchmark: BenchmarkFixture, comm: Communicator, elements: int, algorithm: str) -> None:
    sources = inputs(comm.nranks, elements, FLOAT64, "sum")
    right = expected(sources, "sum")
    arrays = comm.array(sources)
    all_reduce = partial(comm.all_reduce, arrays, algorithm=algorithm)

    all_reduce()
    assert [count_wrong(array.get(), right) for array in arrays] == [0] * comm.nranks
    benchmark.pedantic(all_reduce, rounds=20, warmup_rounds=3)

    for array in arrays:
        array.free()
