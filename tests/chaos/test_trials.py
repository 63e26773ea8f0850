"""The plan of `dsml-gpu chaos`: made from a seed, of all that was wished for and nothing else."""

from __future__ import annotations

import pytest

from dsml_gpu.chaos.operations import COLLECTIVES
from dsml_gpu.chaos.trials import PASS_PLACES, PLACES, Wishes, plan
from dsml_gpu.errors import InvalidValue


def test_a_seed_is_a_plan() -> None:
    assert plan(50, 3) == plan(50, 3)
    assert plan(20, 3) == plan(50, 3)[:20]
    assert plan(50, 3) != plan(50, 4)


def test_all_kinds_come() -> None:
    trials = plan(400, 1)
    operations = [trial.operation for trial in trials]
    assert {one.nranks for one in operations} == set(range(2, 9))
    assert {one.collective for one in operations} == set(COLLECTIVES)
    assert sum(one.collective == "all_reduce" for one in operations) > 200
    assert {one.dtype for one in operations} == {"int32", "int64", "float32", "float64"}
    assert {(one.transport, one.algorithm) for one in operations if one.collective == "all_reduce"} == {
        ("p2p", "direct"),
        ("grpc", "ring"),
        ("grpc", "direct"),
        ("auto", "ring"),
    }
    assert {one.in_place for one in operations} == {True, False}
    assert min(one.nbytes for one in operations) < 64
    assert 4 << 20 < max(one.nbytes for one in operations) <= 16 << 20
    assert {trial.moment.place for trial in trials} == {"", *PLACES, *PASS_PLACES}
    assert 150 < sum(not trial.moment.place for trial in trials) < 250


def test_nothing_is_tried_that_cannot_be() -> None:
    for trial in plan(1000, 2):
        operation = trial.operation
        assert 0 <= trial.victim < operation.nranks
        assert 0 <= trial.moment.fraction <= 1
        if operation.transport == "p2p":
            assert operation.algorithm == "direct"
            assert trial.moment.place in ("", *PASS_PLACES)
            assert not (operation.collective == "all_to_all" and operation.in_place)


def test_wishes_are_met() -> None:
    wishes = Wishes((3, 5), ("grpc",), 1 << 16, False, ("broadcast", "all_gather"), True)
    for trial in plan(200, 5, wishes):
        operation = trial.operation
        assert 3 <= operation.nranks <= 5
        assert operation.nbytes <= 1 << 16
        assert operation.collective in ("broadcast", "all_gather")
        assert (operation.transport, operation.in_place, trial.moment.place) == ("grpc", True, "")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"ranks": (5, 3)}, r"ranks must be LEAST\.\.LARGEST with at least 1, got 5\.\.3"),
        ({"largest_bytes": 4}, "buffers of 8 ranks take at least 64 bytes, got 4"),
        ({"transports": ("smoke",)}, r"transports must be of .*, got \['smoke'\]"),
    ],
)
def test_wishes_that_nobody_can_meet(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidValue, match=said):
        Wishes(**wrong)  # type: ignore[arg-type]
