"""Measuring collectives: bandwidths as nccl-tests defines them, data with one right answer, interleaved runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

Name = TypeVar("Name")

#: Sums of the inputs stay within this, so that every type holds every partial sum exactly: int8 is the narrowest.
_LARGEST_SUM = 127


def algbw_gb_s(size_bytes: int, time_s: float) -> float:
    """Algorithm bandwidth in GB/s (1e9 bytes): the bytes of one rank's buffer by the time the collective takes."""
    return size_bytes / time_s / 1e9


def busbw_gb_s(size_bytes: int, time_s: float, nranks: int) -> float:
    """Bus bandwidth of an all-reduce in GB/s: algbw * 2(n-1)/n.

    The least that each rank has to send, by the time; comparable to what a link can do, whatever the number of ranks.
    """
    return algbw_gb_s(size_bytes, time_s) * 2 * (nranks - 1) / nranks


def inputs(nranks: int, count: int, dtype: np.dtype[Any], op: str) -> list[np.ndarray]:
    """One array of `count` elements for each rank, such that an all-reduce has one right answer whatever its order.

    Small whole numbers: no sum of them rounds in any type (bfloat16 holds whole numbers to 256). Products are powers of
    two, which are exact up to infinity. An average rounds once, in the division.
    """
    rng = np.random.default_rng(0)
    first, last = (1, 2) if op == "prod" else (0, max(1, _LARGEST_SUM // nranks))
    return [rng.integers(first, last, count, endpoint=True).astype(dtype) for _ in range(nranks)]


def expected(sources: Sequence[np.ndarray], op: str) -> np.ndarray:
    """What an all-reduce of `inputs` must leave on every rank, computed in 64 bits and rounded to the type once."""
    dtype = sources[0].dtype
    wide = np.stack(sources).astype(np.int64 if dtype.kind in "iu" else np.float64)
    with np.errstate(over="ignore"):  # a product may be infinite in the narrow type
        return np.asarray(_REDUCTIONS[op](wide)).astype(dtype)


def _average(stacked: np.ndarray) -> Any:
    total, nranks = np.add.reduce(stacked), len(stacked)
    # Integer averages truncate toward zero; the inputs are not negative, so that is what // does.
    return total // nranks if total.dtype.kind == "i" else total / nranks


_REDUCTIONS: dict[str, Callable[[np.ndarray], Any]] = {
    "sum": np.add.reduce,
    "prod": np.multiply.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "avg": _average,
}


def count_wrong(actual: np.ndarray, right: np.ndarray) -> int:
    """How many elements differ; NaN differs from everything."""
    return int(np.count_nonzero(actual != right))


def time_interleaved(
    work: Mapping[Name, Callable[[], object]], iterations: int, warmup: int = 1
) -> dict[Name, list[float]]:
    """Runs each piece of work `warmup` + `iterations` times, in turn, so that what slows the machine slows all alike.

    Returns:
        Seconds that the last `iterations` runs of each took, by name.
    """
    runs_s: dict[Name, list[float]] = {name: [] for name in work}
    for turn in range(warmup + iterations):
        for name, run in work.items():
            started = time.perf_counter()
            run()
            elapsed_s = time.perf_counter() - started
            if turn >= warmup:
                runs_s[name].append(elapsed_s)
    return runs_s
