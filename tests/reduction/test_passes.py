"""The plan of a reduction, executed with symbols in the place of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsml_gpu.reduction.passes import MAX_OPERANDS, TEMPORARY, Pass, plan_passes


def execute(passes: tuple[Pass, ...], nsources: int, aliases: tuple[int | None, ...]) -> dict[int, tuple[int, ...]]:
    """What each buffer holds in the end: the sources that are in it, in the order they were taken."""
    held: dict[int, tuple[int, ...]] = {source: (source,) for source in range(nsources)}
    for step in passes:
        # A buffer that holds nothing yet is no key: reading it fails the test.
        result = tuple(part for buffer in step.sources for part in held[buffer])
        for buffer in step.destinations:
            held[buffer] = result
    return held


@st.composite
def reductions(draw: st.DrawFn) -> tuple[int, tuple[int | None, ...]]:
    nsources = draw(st.integers(1, 40))
    in_place = draw(st.lists(st.integers(0, nsources - 1), unique=True, max_size=20))
    out_of_place: list[None] = [None] * draw(st.integers(0 if in_place else 1, 20))
    return nsources, tuple(draw(st.permutations([*in_place, *out_of_place])))


@given(reductions())
def test_every_destination_gets_every_source_once_in_order(reduction: tuple[int, tuple[int | None, ...]]) -> None:
    nsources, aliases = reduction
    passes = plan_passes(nsources, aliases)

    held = execute(passes, nsources, aliases)

    complete = tuple(range(nsources))
    destinations = [nsources + own if alias is None else alias for own, alias in enumerate(aliases)]
    assert [held[buffer] for buffer in destinations] == [complete] * len(aliases)
    # Sources that are no destination are as they were.
    assert all(held[source] == (source,) for source in set(range(nsources)) - set(destinations))


@given(reductions())
def test_the_form_that_kernels_rely_on(reduction: tuple[int, tuple[int | None, ...]]) -> None:
    nsources, aliases = reduction
    passes = plan_passes(nsources, aliases)

    for step in passes:
        assert 1 <= len(step.sources) <= MAX_OPERANDS
        assert 1 <= len(step.destinations) <= MAX_OPERANDS
        assert len(set(step.destinations)) == len(step.destinations)
        assert len(set(step.sources)) == len(step.sources)
    # Exactly one takes the divisor; those before it reduce, those after it copy.
    (last,) = (number for number, step in enumerate(passes) if step.last)
    assert not any(step.copies for step in passes[: last + 1])
    assert all(step.copies for step in passes[last + 1 :])
    # As few as there can be: all operands in the first, then one place of each is taken by what is there already.
    assert last + 1 == 1 + max(0, -(-(nsources - MAX_OPERANDS) // (MAX_OPERANDS - 1)))
    assert len(passes) - last == -(-len(aliases) // MAX_OPERANDS)


@given(reductions())
def test_a_temporary_buffer_only_where_no_destination_can_accumulate(reduction: tuple[int, tuple[int | None, ...]]) -> None:
    nsources, aliases = reduction
    used = any(TEMPORARY in step.destinations for step in plan_passes(nsources, aliases))
    free = any(alias is None or alias < MAX_OPERANDS for alias in aliases)
    assert used == (nsources > MAX_OPERANDS and not free)


def test_an_all_reduce_in_place_of_16() -> None:
    assert plan_passes(16, tuple(range(16))) == (
        Pass((0, 1, 2, 3, 4, 5, 6, 7), (0,)),
        Pass((0, 8, 9, 10, 11, 12, 13, 14), (0,)),
        Pass((0, 15), (0, 1, 2, 3, 4, 5, 6, 7), last=True),
        Pass((0,), (8, 9, 10, 11, 12, 13, 14, 15)),
    )


def test_a_destination_that_is_still_to_be_read_accumulates_nothing() -> None:
    assert plan_passes(9, (8,)) == (
        Pass((0, 1, 2, 3, 4, 5, 6, 7), (TEMPORARY,)),
        Pass((TEMPORARY, 8), (8,), last=True),
    )
    # Its own memory is index 9 + 1: the second destination, after nine sources.
    assert plan_passes(9, (8, None)) == (
        Pass((0, 1, 2, 3, 4, 5, 6, 7), (10,)),
        Pass((10, 8), (8, 10), last=True),
    )


def test_one_source() -> None:
    assert plan_passes(1, (None,)) == (Pass((0,), (1,), last=True),)
    assert not plan_passes(1, (None,))[0].copies


@pytest.mark.parametrize(
    ("nsources", "aliases", "message"),
    [
        (0, (None,), "not 0 and 1"),
        (2, (), "not 2 and 0"),
        (2, (2,), r"destinations are sources \[2\], but there are 2"),
        (2, (-1,), r"destinations are sources \[-1\]"),
        (2, (1, None, 1), r"the same memory: sources \[1, 1\]"),
    ],
)
def test_what_is_no_reduction_is_refused(nsources: int, aliases: tuple[int | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_passes(nsources, aliases)
