"""Bandwidths, data with one right answer, and interleaved runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest

from dsml_gpu.cli.measure import algbw_gb_s, busbw_gb_s, count_wrong, expected, inputs, time_interleaved
from dsml_gpu.reduction import DTYPES

FOLDS = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}


def test_algbw_is_size_by_time() -> None:
    assert algbw_gb_s(1_000_000_000, 0.5) == 2.0


@pytest.mark.parametrize(
    ("nranks", "factor"),
    [(1, 0.0), (2, 1.0), (4, 1.5), (8, 1.75)],  # 2(n-1)/n
)
def test_busbw_is_algbw_by_the_factor_of_all_reduce(nranks: int, factor: float) -> None:
    assert busbw_gb_s(1_000_000_000, 0.5, nranks) == 2.0 * factor


@pytest.mark.parametrize("op", FOLDS)
@pytest.mark.parametrize("nranks", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_inputs_reduce_to_the_same_bits_in_any_order(dtype: np.dtype, nranks: int, op: str) -> None:
    sources = inputs(nranks, 1000, dtype, op)
    right = expected(sources, op)

    forwards, backwards = reduce(FOLDS[op], sources), reduce(FOLDS[op], sources[::-1])

    assert right.dtype == forwards.dtype == dtype
    assert right.tobytes() == forwards.tobytes() == backwards.tobytes()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_sums_of_inputs_do_not_round_before_an_average_divides(dtype: np.dtype) -> None:
    sources = inputs(4, 1000, dtype, "avg")
    exact = np.sum([source.astype(np.int64) for source in sources], axis=0)
    assert np.array_equal(reduce(np.add, sources).astype(np.int64), exact)


def test_inputs_differ_by_rank_and_position() -> None:
    first, second = inputs(2, 1000, np.dtype(np.float64), "sum")
    assert np.mean(first == second) < 0.1
    assert len(np.unique(first)) > 10


@pytest.mark.parametrize(
    ("op", "values"), [("sum", [4, 9]), ("prod", [3, 14]), ("min", [1, 2]), ("max", [3, 7]), ("avg", [2, 4.5])]
)
def test_expected(op: str, values: list[float]) -> None:
    assert expected([np.array([1.0, 7.0]), np.array([3.0, 2.0])], op).tolist() == values


def test_expected_average_of_integers_truncates() -> None:
    assert expected([np.array([1, 7]), np.array([3, 2])], "avg").tolist() == [2, 4]


def test_expected_product_may_leave_the_type() -> None:
    doubled = [np.array([2], dtype=np.int8)] * 8
    assert expected(doubled, "prod").tolist() == [0], "2^8 wraps in 8 bits"
    assert expected([np.array([2], dtype=np.float16)] * 16, "prod").tolist() == [np.inf], "2^16 is above 65504"


def test_count_wrong() -> None:
    right = np.array([1.0, 2.0, 3.0, 4.0])
    assert count_wrong(right.copy(), right) == 0
    assert count_wrong(np.array([1.0, np.nan, 3.0, 4.0 + 1e-15]), right) == 2


def test_runs_are_interleaved_and_those_of_the_warmup_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    called: list[str] = []

    def takes(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now_s
            now_s += seconds * 2 ** called.count(name)  # each run takes twice as long as the one before
            called.append(name)

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: now_s)

    times_s = time_interleaved({"a": takes("a", 1.0), "b": takes("b", 100.0)}, iterations=2, warmup=1)

    assert called == ["a", "b", "a", "b", "a", "b"]
    assert times_s == {"a": [2.0, 4.0], "b": [200.0, 400.0]}
