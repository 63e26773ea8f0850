"""All algorithms of the catalog, for many numbers of ranks: right on numpy, the same on all ranks, nothing superfluous."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsml_gpu.schedules import (
    ALGORITHMS,
    COLLECTIVES,
    Algorithm,
    InvalidSchedule,
    Layout,
    Schedule,
    algorithms_of,
    chunk_bounds,
)
from tests.schedules.interpreter import interpret

IDS = [f"{algorithm.collective}-{algorithm.name}" for algorithm in ALGORITHMS]
EVERY = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any algorithm for any number of ranks, root, places of hosts, and pairs."""
    algorithm = draw(st.sampled_from(ALGORITHMS))
    nranks = draw(st.integers(1, 33))
    rank = st.integers(0, nranks - 1)
    rooted, listed = COLLECTIVES[algorithm.collective].rooted, algorithm.collective == "send_recv"
    return algorithm.schedule(
        nranks,
        root=draw(rank) if rooted else 0,
        pairs=tuple(draw(st.lists(st.tuples(rank, rank), max_size=40))) if listed else (),
        hosts=tuple(draw(st.lists(st.integers(0, 5), min_size=nranks, max_size=nranks))),
    )


@settings(max_examples=300, deadline=None)
@given(schedules(), st.integers(0, 60))
def test_any_schedule_computes_its_collective_on_numpy(schedule: Schedule, size: int) -> None:
    """Building it has proved it; this runs it, on blocks of uneven sizes, with nothing of the proof."""
    collective, roles = COLLECTIVES[schedule.collective], schedule.roles
    blocks = [
        {rank: np.arange((size + 7 * block) % 61) * (rank + 3) + block for rank in collective.holders(roles, block)}
        for block in range(schedule.nblocks)
    ]

    def chunk_of(array: np.ndarray, chunk: int) -> np.ndarray:
        return array[slice(*chunk_bounds(array.size, schedule.parts, chunk % schedule.parts))]

    combine = np.maximum if schedule.collective == "barrier" else np.add
    held = interpret(schedule, lambda rank, chunk: chunk_of(blocks[chunk // schedule.parts][rank], chunk), combine)
    for block, inputs in enumerate(blocks):
        wanted = combine.reduce(list(inputs.values()))
        for rank in collective.takers(roles, block):
            parts = [held[rank][block * schedule.parts + part] for part in range(schedule.parts)]
            np.testing.assert_array_equal(np.concatenate(parts), wanted)


@EVERY
def test_every_number_of_ranks_and_every_root(algorithm: Algorithm) -> None:
    for nranks in range(1, 18):
        for root in range(nranks) if COLLECTIVES[algorithm.collective].rooted else [0]:
            schedule = algorithm.schedule(nranks, root=root)
            assert (schedule.collective, schedule.algorithm) == (algorithm.collective, algorithm.name)
            assert (schedule.nranks, schedule.root) == (nranks, root)
            assert nranks > 1 or schedule.steps == (), "one rank has nobody to send to"
            assert all(schedule.steps), "no step is empty"


@EVERY
def test_all_ranks_add_up_alike(algorithm: Algorithm) -> None:
    """a + b is b + a to the last bit, (a + b) + c is not a + (b + c): but for the former, results must be made alike."""
    if not COLLECTIVES[algorithm.collective].reduces or algorithm.collective == "barrier":
        return  # nothing is added up
    for nranks in (2, 3, 5, 6, 7, 8, 12, 13):
        schedule = algorithm.schedule(nranks, hosts=tuple(rank % 3 for rank in range(nranks)))
        held: list[dict[int, Any]] = interpret(schedule, lambda rank, chunk: rank, lambda a, b: frozenset({a, b}))
        for block in range(schedule.nblocks):
            takers = COLLECTIVES[schedule.collective].takers(schedule.roles, block)
            for chunk in range(block * schedule.parts, (block + 1) * schedule.parts):
                assert len({held[rank][chunk] for rank in takers}) == 1, f"{schedule}, chunk {chunk}"


@EVERY
@pytest.mark.parametrize("nranks", [2, 3, 5, 8])
def test_every_single_omission_is_noticed(algorithm: Algorithm, nranks: int) -> None:
    """Leaving out any one transfer of a right schedule makes a wrong one."""
    pairs = tuple((rank, (rank + 1) % nranks) for rank in range(nranks)) if algorithm.collective == "send_recv" else ()
    schedule = algorithm.schedule(nranks, root=nranks - 1 if COLLECTIVES[algorithm.collective].rooted else 0, pairs=pairs)
    for number, index in _places(schedule):
        step = schedule.steps[number]
        shorter = (*step[:index], *step[index + 1 :])
        with pytest.raises(InvalidSchedule):
            replace(schedule, steps=(*schedule.steps[:number], shorter, *schedule.steps[number + 1 :]))


def _places(schedule: Schedule) -> Iterator[tuple[int, int]]:
    for number, step in enumerate(schedule.steps):
        for index in range(len(step)):
            yield number, index


def test_names_are_unique_and_every_collective_has_algorithms() -> None:
    assert max(Counter((one.collective, one.name) for one in ALGORITHMS).values()) == 1
    assert {one.collective for one in ALGORITHMS} == set(COLLECTIVES)
    for collective in COLLECTIVES:
        assert list(algorithms_of(collective)) == [one.name for one in ALGORITHMS if one.collective == collective]


# ---- what the literature says of them; messages and data of each rank are in `test_counts` --------------------------------


def rounds(nranks: int) -> int:
    """ceil(log2 N)."""
    return (nranks - 1).bit_length()


def folded(nranks: int) -> int:
    """Steps of a recursive doubling: log2 N, or two more than floor(log2 N)."""
    whole = nranks.bit_length() - 1
    return whole if nranks == 1 << whole else whole + 2


NUMBERS = [2, 3, 4, 5, 7, 8, 9, 16, 17, 33]
#: Steps by the number of ranks.
STEPS = {
    ("all_reduce", "ring"): lambda n: 2 * (n - 1),
    ("all_reduce", "bidirectional_ring"): lambda n: 2 * (n - 1),
    ("all_reduce", "naive"): lambda n: 2,
    ("all_reduce", "binomial_tree"): lambda n: 2 * rounds(n),
    ("all_reduce", "recursive_doubling"): folded,
    ("all_reduce", "halving_doubling"): lambda n: folded(n) + n.bit_length() - 1,
    ("all_reduce", "bruck"): lambda n: 2 * rounds(n),
    ("all_reduce", "direct"): lambda n: 2,
    ("reduce", "ring"): lambda n: n - 1,
    ("reduce", "binomial_tree"): rounds,
    ("reduce", "bruck"): lambda n: 2 * rounds(n),
    ("reduce", "direct"): lambda n: 1,
    ("broadcast", "ring"): lambda n: n - 1,
    ("broadcast", "binomial_tree"): rounds,
    ("broadcast", "scatter_all_gather"): lambda n: rounds(n) + n - 1,
    ("broadcast", "direct"): lambda n: 1,
    ("reduce_scatter", "ring"): lambda n: n - 1,
    ("reduce_scatter", "bruck"): rounds,
    ("reduce_scatter", "direct"): lambda n: 1,
    ("all_gather", "ring"): lambda n: n - 1,
    ("all_gather", "recursive_doubling"): folded,
    ("all_gather", "bruck"): rounds,
    ("all_gather", "direct"): lambda n: 1,
    ("gather", "binomial_tree"): rounds,
    ("gather", "direct"): lambda n: 1,
    ("scatter", "binomial_tree"): rounds,
    ("scatter", "direct"): lambda n: 1,
    ("all_to_all", "direct"): lambda n: 1,
    ("all_to_all", "pairwise"): lambda n: n - 1,
    ("all_to_all", "bruck"): rounds,
    ("barrier", "dissemination"): rounds,
    ("barrier", "binomial_tree"): lambda n: 2 * rounds(n),
}


def test_numbers_of_steps() -> None:
    named = {(algorithm.collective, algorithm.name): algorithm for algorithm in ALGORITHMS}
    # Those three have tests of their own.
    others = {("all_reduce", "double_binary_tree"), ("all_reduce", "hierarchical"), ("send_recv", "direct")}
    assert set(STEPS) == set(named) - others
    for key, steps in STEPS.items():
        for nranks in NUMBERS:
            assert len(named[key].schedule(nranks).steps) == steps(nranks), (key, nranks)


@pytest.mark.parametrize("nranks", NUMBERS)
def test_rings_send_to_neighbours_only(nranks: int) -> None:
    for step in algorithms_of("all_reduce")["ring"].schedule(nranks).steps:
        assert {(t.dst - t.src) % nranks for t in step} == {1}
        assert Counter(t.src for t in step) == Counter(range(nranks))
    for step in algorithms_of("all_reduce")["bidirectional_ring"].schedule(nranks).steps:
        ways = Counter((t.src, (t.dst - t.src) % nranks) for t in step)
        assert ways == Counter([(rank, way % nranks) for rank in range(nranks) for way in (1, -1)])


def test_naive_goes_through_rank_0_and_is_not_pipelined() -> None:
    schedule = algorithms_of("all_reduce")["naive"].schedule(5)
    gather, scatter = schedule.steps
    assert [(t.src, t.dst, t.reduce) for t in gather] == [(rank, 0, True) for rank in range(1, 5)]
    assert [(t.src, t.dst, t.reduce) for t in scatter] == [(0, rank, False) for rank in range(1, 5)]
    assert schedule.store_and_forward
    assert not any(algorithm.schedule(4).store_and_forward for algorithm in ALGORITHMS if algorithm.name != "naive"), (
        "all others are"
    )


@pytest.mark.parametrize(("nhosts", "size"), [(2, 2), (2, 4), (3, 3), (4, 2), (1, 5), (5, 1)])
def test_a_hierarchy_spares_the_ways_between_hosts(nhosts: int, size: int) -> None:
    nranks = nhosts * size
    hosts = tuple(rank % nhosts for rank in range(nranks))
    schedule = algorithms_of("all_reduce")["hierarchical"].schedule(nranks, hosts=hosts)
    assert len(schedule.steps) == 2 * (size - 1) + 2 * (nhosts - 1)
    between = Counter(t.src for step in schedule.steps for t in step if hosts[t.src] != hosts[t.dst])
    inside = Counter(t.src for step in schedule.steps for t in step if hosts[t.src] == hosts[t.dst])
    # 2(H-1)/(HM) of the data to another host and 2(M-1)/M inside, in chunks of 1/(HM).
    assert set(between.values()) == ({2 * (nhosts - 1)} if nhosts > 1 else set())
    assert set(inside.values()) == ({2 * (size - 1) * nhosts} if size > 1 else set())


def test_pairs_are_sent_at_once_and_what_stays_is_not_sent() -> None:
    schedule = algorithms_of("send_recv")["direct"].schedule(3, pairs=((0, 1), (1, 1), (0, 1), (2, 0)))
    assert [[(t.src, t.dst, t.chunk) for t in step] for step in schedule.steps] == [[(0, 1, 0), (0, 1, 2), (2, 0, 3)]]
    assert algorithms_of("send_recv")["direct"].schedule(3, pairs=((1, 1),)).steps == ()


def test_layouts_number_their_blocks() -> None:
    found = {name: Schedule(name, "none", 1, 1, ()).nblocks for name in COLLECTIVES if name != "send_recv"}
    assert set(found.values()) == {1}
    layouts = {name: collective.layout for name, collective in COLLECTIVES.items()}
    assert layouts["all_to_all"] is Layout.PER_PAIR
    assert algorithms_of("all_to_all")["direct"].schedule(5).nblocks == 25
    assert algorithms_of("all_gather")["direct"].schedule(5).nblocks == 5
    assert algorithms_of("send_recv")["direct"].schedule(5, pairs=((0, 1),) * 3).nblocks == 3
