"""The Builder: built-in algorithms written with it, the steps it chooses, and what it refuses."""

from __future__ import annotations

import doctest
from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dsml_gpu.schedules import (
    ALGORITHMS,
    Algorithm,
    Builder,
    InvalidSchedule,
    Schedule,
    StaleChunk,
    Transfer,
    builder,
    find_algorithm,
)
from dsml_gpu.schedules.builder import earliest_steps
from dsml_gpu.schedules.steps import Steps
from dsml_gpu.schedules.verify import _check_progress

# ---- built-in algorithms ------------------------------------------------------------------------------------------------


def ring(nranks: int) -> Schedule:
    b = Builder("all_reduce", "my_ring", nranks, parts=nranks)
    for index in range(nranks):
        c = b.chunk((index + 1) % nranks, index)
        for distance in range(2, nranks + 1):
            c = c.reduce((index + distance) % nranks)
        for distance in range(1, nranks):
            c = c.send((index + distance) % nranks)
    return b.build()


def binomial_tree(nranks: int) -> Schedule:
    """Reductions fall into the right steps by themselves. A root could send to all its children at once, but shall not."""
    b = Builder("all_reduce", "my_binomial_tree", nranks)
    distances = [1 << power for power in range((nranks - 1).bit_length())]
    for distance in distances:
        for parent in range(0, nranks - distance, 2 * distance):
            b.chunk(parent + distance, 0).reduce(parent)
    for distance in reversed(distances):
        b.step()
        for parent in range(0, nranks - distance, 2 * distance):
            b.chunk(parent, 0).send(parent + distance)
    return b.build()


def as_sets(steps: Steps) -> list[set[Transfer]]:
    return [set(step) for step in steps]


@pytest.mark.parametrize("nranks", range(1, 17))
def test_the_ring_is_the_built_in_one(nranks: int) -> None:
    mine, built_in = ring(nranks), find_algorithm("all_reduce", "ring").schedule(nranks)
    assert as_sets(mine.steps) == as_sets(built_in.steps)
    assert (mine.nchunks, mine.collective, mine.algorithm) == (built_in.nchunks, "all_reduce", "my_ring")


@pytest.mark.parametrize("nranks", range(1, 17))
def test_the_binomial_tree_is_the_built_in_one(nranks: int) -> None:
    mine, built_in = binomial_tree(nranks), find_algorithm("all_reduce", "binomial_tree").schedule(nranks)
    assert len(mine.steps) <= len(built_in.steps)
    assert Counter(chain(*mine.steps)) == Counter(chain(*built_in.steps))
    if nranks & (nranks - 1) == 0:  # otherwise some subtrees are so small that they can begin earlier
        assert as_sets(mine.steps) == as_sets(built_in.steps)


def written_with_it(built_in: Schedule, with_steps: bool) -> Schedule:
    """The transfers of a schedule, in order, written with a Builder, which is told or not told its steps."""
    b = Builder(built_in.collective, "mine", built_in.nranks, built_in.parts, root=built_in.root, pairs=built_in.pairs)
    for step in built_in.steps:
        handles = [b.chunk(transfer.src, transfer.chunk) for transfer in step]  # what it reads is as it was before the step
        for handle, transfer in zip(handles, step, strict=True):
            (handle.reduce if transfer.reduce else handle.send)(transfer.dst)
        if with_steps:
            b.step()
    return b.build()


#: Ranks exchange a chunk within a step.
EXCHANGES = {("all_reduce", "recursive_doubling"), ("barrier", "dissemination")}


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: f"{algorithm.collective}-{algorithm.name}")
@pytest.mark.parametrize("nranks", [2, 5, 8])
def test_all_other_built_in_algorithms_can_be_written(algorithm: Algorithm, nranks: int) -> None:
    pairs = tuple((rank, (rank + 1) % nranks) for rank in range(nranks)) if algorithm.collective == "send_recv" else ()
    built_in = algorithm.schedule(nranks, pairs=pairs, hosts=tuple(rank % 2 for rank in range(nranks)))
    if (algorithm.collective, algorithm.name) in EXCHANGES:
        with pytest.raises(StaleChunk):
            written_with_it(built_in, with_steps=True)
        return
    assert written_with_it(built_in, with_steps=True).steps == built_in.steps
    mine = written_with_it(built_in, with_steps=False)
    assert len(mine.steps) <= len(built_in.steps)
    assert Counter(chain(*mine.steps)) == Counter(chain(*built_in.steps))


def test_the_example_in_the_docstring_runs() -> None:
    results = doctest.testmod(builder)
    assert results.attempted > 3
    assert results.failed == 0


# ---- steps --------------------------------------------------------------------------------------------------------------

NRANKS, NCHUNKS = 4, 2


@st.composite
def operations(draw: st.DrawFn) -> Transfer:
    rank = st.integers(0, NRANKS - 1)
    src, dst = draw(st.tuples(rank, rank).filter(lambda pair: pair[0] != pair[1]))
    return Transfer(src, dst, draw(st.integers(0, NCHUNKS - 1)), draw(st.booleans()))


def run(steps: Steps) -> dict[tuple[int, int], str]:
    """Executes steps on terms: what every chunk is made of, and in which order."""
    held = {(rank, chunk): f"{rank}" for rank in range(NRANKS) for chunk in range(NCHUNKS)}
    for step in steps:
        incoming = [held[transfer.src, transfer.chunk] for transfer in step]
        written: dict[tuple[int, int], list[Transfer]] = {}
        for transfer, term in zip(step, incoming, strict=True):
            target = (transfer.dst, transfer.chunk)
            written.setdefault(target, []).append(transfer)
            held[target] = f"({held[target]}+{term})" if transfer.reduce else term
        for transfers in written.values():
            assert len(transfers) == 1 or all(transfer.reduce for transfer in transfers), "a copy shares its step"
    return held


#: The last of them must wait for the second, which reads late what it overwrites; the third reads it too, but early.
READ_LATE_THEN_EARLY = [Transfer(2, 1, 0), Transfer(0, 1, 0), Transfer(0, 2, 0), Transfer(3, 0, 0)]


@given(st.lists(st.lists(operations(), max_size=12), max_size=3))
@example([READ_LATE_THEN_EARLY])
def test_steps_mean_what_the_operations_mean_one_after_the_other(sections: list[list[Transfer]]) -> None:
    steps = earliest_steps(sections)
    in_order = [transfer for section in sections for transfer in section]
    assert run(steps) == run(tuple((transfer,) for transfer in in_order))
    assert sorted(map(str, in_order)) == sorted(str(transfer) for step in steps for transfer in step)
    assert all(steps)
    _check_progress(SimpleNamespace(steps=steps, algorithm="any"))  # type: ignore[arg-type]  # raises on a deadlock


@given(st.lists(operations(), max_size=16))
def test_every_transfer_has_a_reason_not_to_come_earlier(in_order: list[Transfer]) -> None:
    steps = earliest_steps([in_order])
    for before, step in pairwise(steps):
        for index, transfer in enumerate(step):
            source, target = (transfer.src, transfer.chunk), (transfer.dst, transfer.chunk)
            reads_what_comes_before = any((other.dst, other.chunk) == source for other in before)
            copies = any((other.dst, other.chunk) == target and not (other.reduce and transfer.reduce) for other in before)
            overwrites_what_is_read = any((other.src, other.chunk) == target for other in step[:index])
            is_reduced_after_others = any((other.dst, other.chunk) == target for other in step[:index])
            assert reads_what_comes_before or copies or overwrites_what_is_read or is_reduced_after_others


def test_step_keeps_apart_what_could_be_together() -> None:
    def build(with_step: bool) -> Schedule:
        b = Builder("broadcast", "mine", 3)
        b.chunk(0, 0).send(1)
        if with_step:
            b.step()
        b.chunk(0, 0).send(2)
        return b.build()

    assert build(False).steps == ((Transfer(0, 1, 0), Transfer(0, 2, 0)),)
    assert build(True).steps == ((Transfer(0, 1, 0),), (Transfer(0, 2, 0),))


def test_a_step_without_operations_is_none() -> None:
    b = Builder("broadcast", "mine", 2)
    b.step()
    b.step()
    b.chunk(0, 0).send(1)
    b.step()
    assert b.build().steps == ((Transfer(0, 1, 0),),)


# ---- refusals -----------------------------------------------------------------------------------------------------------


def test_a_stale_handle_names_the_places() -> None:
    b = Builder("all_reduce", "mine", 3)
    stale = b.chunk(0, 0)
    b.chunk(1, 0).reduce(0)
    with pytest.raises(StaleChunk, match="is stale: rank 1 reduced into it at") as error:
        stale.send(2)
    place = Path(__file__).name
    first, second = (int(part.split(",")[0]) for part in str(error.value).split(f"{place}:")[1:])
    assert second == first + 1, "the lines where it was made and overwritten"
    assert Path(__file__).read_text().splitlines()[first - 1].strip() == "stale = b.chunk(0, 0)"
    assert "chunk 0 of rank 0" in str(error.value)


def test_a_handle_outlives_sending() -> None:
    b = Builder("broadcast", "mine", 3)
    c = b.chunk(0, 0)
    c.send(1)
    c.send(2)
    assert len(b.build().steps) == 1


def test_an_overwritten_handle_is_stale_where_a_copy_did_it() -> None:
    b = Builder("all_gather", "mine", 3)
    c = b.chunk(0, 0).send(1)
    b.chunk(0, 0).send(1)
    with pytest.raises(StaleChunk, match="rank 0 overwrote it at"):
        c.send(2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda b: b.chunk(4, 0), "rank 4 is not one of 4 ranks"),
        (lambda b: b.chunk(-1, 0), "rank -1 is not one of 4 ranks"),
        (lambda b: b.chunk(0, 8), "chunk 8 is not one of 8 chunks"),
        (lambda b: b.chunk(0, 2), "rank 0 does not hold chunk 2 of all_gather at the start, nor yet"),
        (lambda b: b.chunk(0, 0).send(0), "rank 0 cannot send chunk 0 to itself"),
        (lambda b: b.chunk(0, 0).send(4), "rank 4 is not one of 4 ranks"),
    ],
)
def test_impossible_operations(wrong: Callable[[Builder], object], message: str) -> None:
    b = Builder("all_gather", "mine", 4, parts=2)
    with pytest.raises(ValueError, match=message):
        wrong(b)
    b.chunk(0, 1).send(3)
    b.chunk(3, 1).send(2)  # it has it now


@pytest.mark.parametrize("name", ["ring", "auto", ""])
def test_names_that_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"the name '{name}' of an algorithm of all_reduce is taken"):
        Builder("all_reduce", name, 2)
    if name == "ring":
        Builder("barrier", name, 2)  # free there


def test_an_unknown_collective() -> None:
    with pytest.raises(ValueError, match="unknown collective 'all_reduced'; known: all_reduce, "):
        Builder("all_reduced", "mine", 2)


def test_build_proves() -> None:
    b = Builder("all_reduce", "mine", 3)
    b.chunk(0, 0).reduce(1)
    with pytest.raises(InvalidSchedule, match="mine: at the end rank 0 holds the contributions of rank 0"):
        b.build()
    b.chunk(1, 0).reduce(2).send(0)
    b.chunk(2, 0).send(1)
    assert [len(step) for step in b.build().steps] == [1, 1, 2]
    b.chunk(0, 0).reduce(1)
    with pytest.raises(InvalidSchedule, match="would be reduced twice"):
        b.build()


def test_root_pairs_and_store_and_forward_reach_the_schedule() -> None:
    b = Builder("broadcast", "mine", 2, root=1, store_and_forward=True)
    b.chunk(1, 0).send(0)
    assert (b.build().root, b.build().store_and_forward) == (1, True)
    b = Builder("send_recv", "mine", 2, parts=2, pairs=((1, 0),))
    b.chunk(1, 0).send(0)
    b.chunk(1, 1).send(0)
    assert b.build().pairs == ((1, 0),)
