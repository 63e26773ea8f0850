"""The summary of `dsml-gpu chaos`: what counts, what is told, and what fails."""

from __future__ import annotations

import pytest

from dsml_gpu.chaos.report import AS_BEFORE, HANG, LOST, ON_ALL, RESTARTED, Outcome, Summary, ends, growth, quantiles


def summary(*outcomes: Outcome, **limits_s: float) -> Summary:
    return Summary("kill --n 3", 42, list(outcomes), limits_s)


def test_a_run_without_failures_passes_and_says_what_happened() -> None:
    result = summary(
        Outcome("one", RESTARTED, True, detection_s=(0.01,), recovery_s=0.03, operations=3),
        Outcome("two", ON_ALL, True, recovery_s=0.001),
        Outcome("three", ON_ALL, False),
        Outcome("four", AS_BEFORE, True),
    )
    assert result.passed
    rows = dict(result.rows())
    assert rows["seed"] == "42"
    assert rows["trials"] == "4, with 6 operations"
    assert rows["faults that fired"] == "3"
    assert rows["did not fire in the operation"] == "1, counted apart"
    assert (rows[ON_ALL], rows[RESTARTED], rows[AS_BEFORE]) == ("1", "1", "1")
    assert rows["detection"] == "p50 10.0 ms, p99 10.0 ms, max 10.0 ms"
    assert result.lines()[-1] == "passed"


@pytest.mark.parametrize(
    "bad",
    [
        Outcome("x", HANG, True),
        Outcome("x", LOST, True, note="PeerUnavailable: it is gone"),
        Outcome("x", ON_ALL, False, wrong=("rank 0, input: ...",)),
    ],
    ids=["hang", "lost", "wrong"],
)
def test_one_failure_fails_the_run_and_names_the_seed(bad: Outcome) -> None:
    result = summary(Outcome("fine", ON_ALL, True), bad)
    assert not result.passed
    assert result.lines()[-1] == "FAILED; again with the same options and --seed 42"
    assert any(line.startswith("FAILED x") for line in result.lines())


def test_what_is_too_late_fails() -> None:
    late = Outcome("x", RESTARTED, True, detection_s=(2.0, 3.5), recovery_s=4.0)
    assert summary(late, detection=3.6, recovery=4.0).passed
    result = summary(late, detection=3.0, recovery=5.0)
    assert result.late == ["x: detection took 3.50 s, 3 s are allowed"]
    assert not result.passed


def test_problems_of_the_run_fail_it() -> None:
    result = summary()
    result.problems.append("it was broken off")
    assert "FAILED it was broken off" in result.lines()
    assert not result.passed


def test_quantiles() -> None:
    assert quantiles([]) == "-"
    assert quantiles([0.001] * 99 + [1.0]).startswith("p50 1.0 ms, p99 ")


def test_growth_is_of_the_ends() -> None:
    assert ends([1.0, 3.0] * 10 + [5.0] * 20) == (2.0, 5.0)
    assert growth([100.0] * 50 + [103.0] * 50) == pytest.approx(0.03)
    assert growth([100, 100, 500, 100, 100]) == 0
    assert growth([90.0, 110.0] * 100) == pytest.approx(0)
    assert growth([0, 0]) == 0
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        growth([1.0])
