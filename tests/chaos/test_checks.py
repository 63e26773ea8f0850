"""The oracle of `dsml-gpu chaos`: right results pass, and each kind of wrong one is found."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from dsml_gpu.chaos.checks import Buffers, changed, draw, expected, wrong
from dsml_gpu.chaos.operations import COLLECTIVES, Operation
from dsml_gpu.errors import InvalidValue

NRANKS = 4
MEMBERS = [0, 2, 3]


def operation(collective: str = "all_reduce", *, in_place: bool = False, dtype: str = "int64", op: str = "sum") -> Operation:
    return Operation(collective, NRANKS, 50, dtype, op, in_place=in_place, root=2)


def after(what: Operation, before: list[Buffers], members: list[int]) -> dict[int, Buffers]:
    """What survivors have who did all right; copies, to plant something in."""
    return {
        rank: Buffers(one.source.copy(), None if one.result is None else one.result.copy())
        for rank, one in expected(what, before, members).items()
    }


def target(buffers: Buffers) -> np.ndarray:
    return buffers.source if buffers.result is None else buffers.result


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_what_is_right_passes(collective: str, in_place: bool) -> None:
    what = operation(collective, in_place=in_place)
    before = draw(what, 1)
    assert wrong(what, before, after(what, before, MEMBERS), MEMBERS) == []
    # A rank that has contributed and died is reported, and not there to be looked at.
    left = {rank: one for rank, one in after(what, before, [0, 1, 2, 3]).items() if rank != 1}
    assert wrong(what, before, left, [0, 1, 2, 3]) == []


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_one_wrong_element_is_found(collective: str, in_place: bool) -> None:
    what = operation(collective, in_place=in_place)
    before = draw(what, 2)
    actual = after(what, before, MEMBERS)
    target(actual[3])[17] += 1
    found = wrong(what, before, actual, MEMBERS)
    assert found[0].startswith(f"rank 3, {'input' if in_place else 'output'}: 1 of ")
    assert "the first at 17: expected" in found[0]


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather", "all_to_all"])
def test_a_member_that_is_not_reported_is_found(collective: str) -> None:
    """Also the other way round: the answer must say exactly who took part."""
    what = operation(collective)
    before = draw(what, 3)
    with_all = {rank: one for rank, one in after(what, before, [0, 1, 2, 3]).items() if rank != 1}
    assert wrong(what, before, with_all, MEMBERS) != []
    assert wrong(what, before, after(what, before, MEMBERS), [0, 1, 2, 3]) != []


def test_each_set_of_ranks_has_another_sum_at_each_element() -> None:
    for dtype in ("int32", "int64", "float32", "float64"):
        what = Operation("all_reduce", 8, 5, dtype)
        before = draw(what, 4)
        sets = [members for count in range(1, 9) for members in combinations(range(8), count)]
        sums = np.array([expected(what, before, members)[members[0]].result for members in sets])
        # Whatever the other bits are: the last eight say who is in it.
        masks = np.array([[sum(1 << rank for rank in members)] for members in sets])
        np.testing.assert_array_equal(sums.astype(np.int64) & 255, masks.repeat(5, axis=1))
        np.testing.assert_array_equal(sums, np.array([sum(before[rank].source.astype(object) for rank in s) for s in sets]))


def test_a_survivor_that_the_answer_leaves_out_is_found() -> None:
    what = operation()
    before = draw(what, 5)
    found = wrong(what, before, after(what, before, [0, 1, 2, 3]), MEMBERS)
    assert found[0] == "rank 1 is there, but the answer says that only ranks [0, 2, 3] took part"


def test_buffers_that_mix_two_memberships_are_found() -> None:
    """The first half is of the try before the loss, the second half of the one after it."""
    what = operation(in_place=True)
    before = draw(what, 6)
    actual, first_try = after(what, before, MEMBERS), after(what, before, [0, 1, 2, 3])
    for rank in MEMBERS:
        actual[rank].source[:25] = first_try[rank].source[:25]
    assert [line.split(":")[1] for line in wrong(what, before, actual, MEMBERS)] == [
        " 25 of 50 elements are wrong, the first at 0"
    ] * 3


def test_what_was_reduced_twice_is_found() -> None:
    what = operation(in_place=True)
    before = draw(what, 7)
    once = after(what, before, MEMBERS)
    twice = after(what, [once.get(rank, one) for rank, one in enumerate(before)], MEMBERS)
    assert len(wrong(what, before, twice, MEMBERS)) == 3


def test_an_input_that_was_written_is_found() -> None:
    what = operation()
    before = draw(what, 8)
    actual = after(what, before, MEMBERS)
    actual[0].source[3] = 0
    (found,) = wrong(what, before, actual, MEMBERS)
    assert found.startswith("rank 0, input: 1 of 50 elements are wrong, the first at 3")


def test_a_result_that_never_came_is_told_as_such() -> None:
    what = operation()
    before = draw(what, 9)
    actual = after(what, before, MEMBERS)
    actual[2] = before[2]
    assert wrong(what, before, actual, MEMBERS)[0].endswith(", as before")


def test_a_stale_write_is_found() -> None:
    before = dict(enumerate(draw(operation(), 10)))
    late = {rank: Buffers(one.source.copy(), target(one).copy()) for rank, one in before.items() if rank != 1}
    assert changed(before, late) == []
    target(late[3])[49] = 7
    (found,) = changed(before, late)
    assert found.startswith("rank 3, output, which must be as before: 1 of 50 elements are wrong, the first at 49")


def test_bytes_count_not_values() -> None:
    before = {0: Buffers(np.array([0.0, np.nan]))}
    assert changed(before, {0: Buffers(np.array([0.0, np.nan]))}) == []
    assert len(changed(before, {0: Buffers(np.array([-0.0, np.nan]))})) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floats_may_round_but_alike_everywhere(dtype: str) -> None:
    what = operation(dtype=dtype)
    before = draw(what, 11, whole=False)
    actual = after(what, before, MEMBERS)
    for rank in MEMBERS:
        target(actual[rank])[:] = before[3].source + before[2].source + before[0].source
    assert wrong(what, before, actual, MEMBERS) == []
    bits = target(actual[2]).view(f"u{np.dtype(dtype).itemsize}")
    bits[5] ^= 1
    assert wrong(what, before, actual, MEMBERS) == ["rank 2, output: other bits than at rank 0"]
    target(actual[2])[5] = np.nan
    assert len(wrong(what, before, actual, MEMBERS)) == 2


def test_operations_that_cannot_be() -> None:
    for bad, said in (
        ({"collective": "gossip"}, "unknown collective 'gossip'"),
        ({"elements": 0}, "at least 1 rank and 1 element are needed, got 2 and 0"),
        ({"root": 2}, "root 2 is not one of 2 ranks"),
    ):
        with pytest.raises(InvalidValue, match=said):
            Operation(**({"collective": "broadcast", "nranks": 2, "elements": 1} | bad))  # type: ignore[arg-type]
