"""Measuring collectives: bandwidths as nccl-tests defines them, data with one right answer, interleaved runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
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
    return [rng.integers(first, last, count, dtype=np.int8, endpoint=True).astype(dtype) for _ in range(nranks)]


def expected(sources: Sequence[np.ndarray], op: str) -> np.ndarray:
    """What an all-reduce of `inputs` must leave on every rank, computed in 64 bits and rounded to the type once."""
    dtype = sources[0].dtype
    integer = dtype.kind in "iu"
    wide = np.dtype(np.int64 if integer else np.float64)
    result: np.ndarray = reduce(_FUNCTIONS[op], (source.astype(wide) for source in sources))
    if op == "avg":
        # Integer averages truncate toward zero; the inputs are not negative, so that is what // does.
        result = result // len(sources) if integer else result / len(sources)
    with np.errstate(over="ignore"):  # a product may be infinite in the narrow type
        return result.astype(dtype)


_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "sum": np.add,
    "avg": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
}


def count_wrong(actual: np.ndarray, right: np.ndarray) -> int:
    """How many elements differ; NaN differs from everything."""
    return int(np.count_nonzero(actual != right))


def time_interleaved(work: Mapping[Name, Callable[[], object]], iterations: int, warmup: int = 1) -> dict[Name, list[float]]:
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
