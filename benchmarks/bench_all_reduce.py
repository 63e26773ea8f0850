"""Ring against naive, and the transports, by size. See README.md for how to run it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from dsml_gpu import Client, Communicator
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.cli.measure import count_wrong, expected, inputs
from dsml_gpu.client import connect

FLOAT64 = np.dtype(np.float64)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A client of four device servers, whose devices several communicators use."""
    with Fleet(4) as fleet, connect(fleet.address) as connected:
        yield connected


# The algorithm varies fastest, so that ring and naive are measured right after each other.
@pytest.mark.parametrize("algorithm", ["ring", "naive"])
@pytest.mark.parametrize("elements", [1_000, 10_000, 50_000, 100_000, 200_000, 450_000])
@pytest.mark.parametrize("deployment", ["embedded", "processes"])
def test_all_reduce(benchmark: BenchmarkFixture, comm: Communicator, elements: int, algorithm: str) -> None:
    measure(benchmark, comm, elements, algorithm)


# Transports right after each other as well; p2p, where auto chooses it, against gRPC.
@pytest.mark.parametrize("transport", ["auto", "grpc"])
@pytest.mark.parametrize("nbytes", [8, 8_000, 80_000, 512_000, 3_600_000, 16_000_000])
@pytest.mark.parametrize("ranks", [2, 4])
def test_transport(benchmark: BenchmarkFixture, client: Client, ranks: int, nbytes: int, transport: str) -> None:
    with client.communicator(device_ids=range(1, ranks + 1), transport=transport) as comm:
        measure(benchmark, comm, nbytes // FLOAT64.itemsize, "auto")


def measure(benchmark: BenchmarkFixture, comm: Communicator, elements: int, algorithm: str) -> None:
    """Checks, then times."""
    sources = inputs(comm.nranks, elements, FLOAT64, "sum")
    right = expected(sources, "sum")
    arrays = comm.array(sources)
    all_reduce = partial(comm.all_reduce, arrays, algorithm=algorithm)

    result = all_reduce()
    assert [count_wrong(array.get(), right) for array in arrays] == [0] * comm.nranks
    benchmark.extra_info["transports"] = result.transports
    benchmark.pedantic(all_reduce, rounds=20, warmup_rounds=3)

    for array in arrays:
        array.free()
