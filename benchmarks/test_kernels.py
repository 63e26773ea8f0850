"""Bytes per second of the reduction kernels on a GPU, beside a copy of as many bytes and beside CuPy's own additions.

    python -m pytest benchmarks/test_kernels.py -m gpu --benchmark-json kernels.json

Every figure is the median of CUDA events around one launch, or one chain of launches, over buffers larger than the GPU's
cache; bytes are those read and those written. All figures of a row come from one run, taken in turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest

from dsml_gpu.memory.backend import BackendUnavailable, select_backends
from dsml_gpu.reduction import DTYPES, OPERATORS

BUFFER_BYTES = 256 << 20
ROUNDS = 20
#: Sources and destinations: receive and reduce, an all-reduce of 4 and of 8 in one pass, a broadcast.
SHAPES = [(2, 1), (4, 4), (8, 8), (1, 4)]
OPS = {operator.name: operator for operator in OPERATORS}


class Bench:
    """Buffers on the GPU, and what is timed on them."""

    def __init__(self) -> None:
        try:
            (backend, *_), _ = select_backends("cupy", [0])
        except BackendUnavailable as reason:
            pytest.skip(f"needs CuPy and a CUDA GPU: {reason}")
        import cupy as cp

        from dsml_gpu.reduction.cuda import CudaReducer

        self.cp = cp
        memory: Any = backend.open()
        self.memory = memory
        self.reducer = CudaReducer(memory.gpu, memory.compute)
        self.buffers = [self.memory.allocate(BUFFER_BYTES) for _ in range(16)]

    def medians_ms(self, works: dict[str, Callable[[], None]]) -> dict[str, float]:
        """Median time of each, taken in turn."""
        cp, stream = self.cp, self.memory.compute
        times: dict[str, list[float]] = {name: [] for name in works}
        with cp.cuda.Device(self.memory.gpu), stream:
            for work in works.values():
                work()
            for _ in range(ROUNDS):
                for name, work in works.items():
                    start, end = cp.cuda.Event(), cp.cuda.Event()
                    stream.record(start)
                    work()
                    stream.record(end)
                    end.synchronize()
                    times[name].append(cp.cuda.get_elapsed_time(start, end))
        return {name: statistics.median(taken) for name, taken in times.items()}

    def kernel(self, op: str, dtype: Any, nsources: int, ndestinations: int) -> Callable[[], None]:
        sources, destinations = self.buffers[:nsources], self.buffers[8 : 8 + ndestinations]
        divisor = nsources if op == "AVG" else 1
        return lambda: self.reducer.reduce(OPS[op], dtype, sources, destinations, divisor)

    def copy(self, nbytes: int) -> Callable[[], None]:
        """Reads and writes `nbytes` in all, in pieces of a buffer."""
        pieces, rest = divmod(nbytes // 2, BUFFER_BYTES)
        sizes = [BUFFER_BYTES] * pieces + ([rest] if rest else [])

        def run() -> None:
            for number, size in enumerate(sizes):
                self.memory.copy(self.buffers[8 + number][:size], self.buffers[number][:size])

        return run

    def additions(self, name: str, nsources: int, ndestinations: int) -> Callable[[], None] | None:
        """What one writes without such kernels: one addition after the other, then copies. CuPy has no bfloat16."""
        if name == "BFLOAT16" or nsources < 2:
            return None
        cp = self.cp
        typed = [buffer.view(DTYPES[name]) for buffer in self.buffers]

        def run() -> None:
            total = typed[8]
            cp.add(typed[0], typed[1], out=total)
            for source in typed[2:nsources]:
                cp.add(total, source, out=total)
            for number in range(1, ndestinations):
                self.memory.copy(self.buffers[8 + number], self.buffers[8])

        return run


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def rows() -> list[Any]:
    of_all_types = [("SUM", name, shape) for name in DTYPES for shape in SHAPES]
    of_all_operators = [(op, name, (4, 4)) for op in OPS if op != "SUM" for name in ("FLOAT32", "BFLOAT16", "INT64")]
    return [
        pytest.param(op, name, *shape, id=f"{op}-{name}-{shape[0]}to{shape[1]}")
        for op, name, shape in of_all_types + of_all_operators
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "name", "nsources", "ndestinations"), rows())
def test_kernel(bench: Bench, benchmark: Any, op: str, name: str, nsources: int, ndestinations: int) -> None:
    nbytes = (nsources + ndestinations) * BUFFER_BYTES
    works = {"kernel": bench.kernel(op, DTYPES[name], nsources, ndestinations), "copy": bench.copy(nbytes)}
    additions = bench.additions(name, nsources, ndestinations) if op == "SUM" else None
    if additions is not None:
        works["additions"] = additions
    milliseconds = bench.medians_ms(works)
    speeds = {what: nbytes / taken / 1e6 for what, taken in milliseconds.items()}
    benchmark.extra_info.update(
        op=op,
        dtype=name,
        sources=nsources,
        destinations=ndestinations,
        buffer_bytes=BUFFER_BYTES,
        gigabytes_per_s=speeds,
        kernel_to_copy=speeds["kernel"] / speeds["copy"],
    )

    def whole() -> None:
        works["kernel"]()
        bench.memory.compute.synchronize()

    benchmark.pedantic(whole, rounds=3, warmup_rounds=1)
