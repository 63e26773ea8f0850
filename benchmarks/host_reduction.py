"""Reductions in host memory: what numpy alone does, and what compiled loops (the extra `fast`) do.

First the sum of four buffers into all four, in place, which is an all-reduce of four devices in one process: against numpy
over the whole buffers, and against numpy block by block. Then ``out = a + b`` in each float type: numpy's own function
against ours without and with compiled loops, in bytes of one operand.

Exit status 1 when a result is wrong; or, with numba installed, when the sum of four is slower than the faster of the other
two, or a half type is not so many times as fast as numpy's own as 8 GB/s are on a quiet machine (27 and 5.7 times).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dsml_gpu.reduction import DTYPES, OPERATORS
from dsml_gpu.reduction.host import BLOCK_BYTES, HostReducer

SUM = OPERATORS[0]
RANKS = 4
SIZES = (3_600_000, 64_000_000)
ELEMENTS = 1 << 20
WHOLE, BLOCKS, OURS, COMPILED = "numpy", "numpy, blocks", "ours", "ours, compiled"
#: How many times as fast as numpy's own: 8 GB/s against 0.3 and 1.4.
LEAST_HALF_RATIOS = {"FLOAT16": 8 / 0.3, "BFLOAT16": 8 / 1.4}


def reducers() -> dict[str, HostReducer]:
    """Ours without and, where numba is installed, with compiled loops."""
    made = {OURS: HostReducer(compiles=False)}
    if find_spec("numba") is not None:
        made[COMPILED] = HostReducer()
    return made


def medians_s(work: Mapping[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median seconds by name, of work done in turn.

    Each is timed after an untimed run of its own: what another leaves in the cache, or drives out of it, is not its merit.
    """
    runs_s: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeat):
        for name, run in work.items():
            run()
            started = time.perf_counter()
            run()
            runs_s[name].append(time.perf_counter() - started)
    return {name: median(times_s) for name, times_s in runs_s.items()}


def numpy_sum(buffers: Sequence[np.ndarray], block: int) -> None:
    """In place, the shortest way in numpy, `block` elements at a time."""
    for start in range(0, buffers[0].size, block):
        first, *others = (buffer[start : start + block] for buffer in buffers)
        for other in others:
            np.add(first, other, out=first)
        for other in others:
            np.copyto(other, first)


def sums_of_four(dtype: np.dtype[Any], nbytes: int, repeat: int) -> tuple[dict[str, float], int]:
    """Median seconds by name, and how many elements a first sum got wrong."""
    elements = nbytes // dtype.itemsize
    buffers = [np.empty(elements, dtype) for _ in range(RANKS)]
    operands = [buffer.view(np.uint8) for buffer in buffers]
    work: dict[str, Callable[[], object]] = {
        WHOLE: partial(numpy_sum, buffers, elements),
        BLOCKS: partial(numpy_sum, buffers, BLOCK_BYTES // dtype.itemsize),
    }
    for name, reducer in reducers().items():
        reducer.prepare(SUM, dtype)
        work[name] = partial(reducer.reduce, SUM, dtype, operands, operands)
    wrong = 0
    for run in work.values():
        for rank, buffer in enumerate(buffers):
            buffer[:] = np.arange(elements) % 1000 + rank
        run()
        right = np.arange(elements, dtype=dtype) % 1000 * RANKS + sum(range(RANKS))
        wrong += sum(int(np.count_nonzero(buffer != right)) for buffer in buffers)
    for buffer in buffers:
        buffer[:] = 0  # or sums of sums would overflow
    return medians_s(work, repeat), wrong


def additions(dtype: np.dtype[Any], repeat: int) -> tuple[dict[str, float], int]:
    """Median seconds of ``out = a + b`` by name, and how many elements a first one got wrong."""
    rng = np.random.default_rng(0)
    left, right = (rng.integers(-99, 99, ELEMENTS).astype(dtype) for _ in range(2))
    out = np.empty_like(left)
    operands = [array.view(np.uint8) for array in (left, right, out)]
    work: dict[str, Callable[[], object]] = {WHOLE: partial(np.add, left, right, out=out)}
    for name, reducer in reducers().items():
        reducer.prepare(SUM, dtype)
        work[name] = partial(reducer.reduce, SUM, dtype, operands[:2], operands[2:])
    wrong = 0
    for run in work.values():
        out[:] = 0
        run()
        wrong += int(np.count_nonzero(out.astype(int) != left.astype(int) + right.astype(int)))
    return medians_s(work, repeat), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=31, help="runs of each, whose median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    arguments = parser.parse_args()

    names = [WHOLE, BLOCKS, *reducers()]
    failures: list[str] = []
    figures: dict[str, Any] = {"repeat": arguments.repeat, "sum_of_four_s": {}, "addition_gb_s": {}}

    print(f"sum of {RANKS} buffers into all of them, in place; medians of {arguments.repeat} runs")
    print("ratio: the faster of the two of numpy, to ours")
    print(f"{'':<20}" + "".join(f"{name:>22}" for name in names))
    for dtype_name in ("FLOAT32", "FLOAT64"):
        dtype = DTYPES[dtype_name]
        for nbytes in SIZES:
            times_s, wrong = sums_of_four(dtype, nbytes, arguments.repeat)
            least_s = min(times_s[WHOLE], times_s[BLOCKS])
            row = f"{dtype!s:<10}{nbytes / 1e6:7.1f} MB"
            for name in names:
                ratio = "" if name in (WHOLE, BLOCKS) else f"{least_s / times_s[name]:.2f}x"
                row += f"{times_s[name] * 1e3:12.2f} ms {ratio:>6}"
            print(row)
            figures["sum_of_four_s"][f"{dtype} {nbytes}"] = times_s
            if wrong:
                failures.append(f"{wrong} wrong elements of {dtype}")
            if COMPILED in times_s and times_s[COMPILED] > least_s:
                failures.append(f"{dtype} of {nbytes} bytes: compiled loops are slower than numpy")

    print(f"\nout = a + b, {ELEMENTS} elements; GB of one operand in a second")
    names = [WHOLE, *reducers()]
    print(f"{'':<20}" + "".join(f"{name:>18}" for name in names))
    for dtype_name in ("FLOAT64", "FLOAT32", *LEAST_HALF_RATIOS):
        dtype = DTYPES[dtype_name]
        times_s, wrong = additions(dtype, arguments.repeat)
        gb_s = {name: ELEMENTS * dtype.itemsize / time_s / 1e9 for name, time_s in times_s.items()}
        print(f"{dtype!s:<20}" + "".join(f"{gb_s[name]:18.2f}" for name in names))
        figures["addition_gb_s"][str(dtype)] = gb_s
        if wrong:
            failures.append(f"{wrong} wrong elements of {dtype}")
        as_fast = gb_s.get(COMPILED, 0) / gb_s[WHOLE]
        if COMPILED in gb_s and as_fast < LEAST_HALF_RATIOS.get(dtype_name, 0):
            failures.append(f"{dtype}: {as_fast:.1f} times numpy's own, expected {LEAST_HALF_RATIOS[dtype_name]:.1f}")
    if COMPILED not in names:
        print("\nno compiled loops: numba is not installed (pip install 'dsml-gpu[fast]')")

    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
