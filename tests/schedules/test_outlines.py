"""Outlines: they move exactly what the schedules move."""

from __future__ import annotations

from collections import Counter

import pytest

from dsml_gpu.schedules import ALGORITHMS, COLLECTIVES, Algorithm, Layout, Schedule, algorithms_of
from dsml_gpu.schedules.outlines import has_outline, outline_of

OUTLINED = [pytest.param(one, id=f"{one.collective}-{one.name}") for one in ALGORITHMS if has_outline(one)]


def steps_of(schedule: Schedule) -> list[Counter[tuple[int, int, bool]]]:
    """For each step, how many chunks go from where to where."""
    return [Counter((move.src, move.dst, move.reduce) for move in step) for step in schedule.steps]


def hosts_of_unequal_size(nranks: int) -> tuple[int, ...]:
    """1, 2, 3 ... ranks to a host."""
    return tuple(host for host in range(nranks) for _ in range(host + 1))[:nranks]


@pytest.mark.parametrize("algorithm", OUTLINED)
def test_an_outline_is_its_schedule_in_short(algorithm: Algorithm) -> None:
    """Step by step as many chunks, of as many bytes, between the same ranks, reduced or not."""
    collective = COLLECTIVES[algorithm.collective]
    for nranks in range(1, 34):
        roots = {0, nranks // 2, nranks - 1} if collective.rooted else {0}
        for root in roots:
            schedule = algorithm.schedule(nranks, root=root)
            outline = outline_of(algorithm, nranks, root=root)
            assert list(outline.steps()) == steps_of(schedule), (nranks, root)
            blocks_of_a_buffer = 1 if collective.layout is Layout.WHOLE else nranks
            assert outline.chunks == blocks_of_a_buffer * schedule.parts
            assert outline.nranks == nranks
            assert outline.store_and_forward == schedule.store_and_forward
            assert outline.transfers == sum(map(len, schedule.steps))


@pytest.mark.parametrize("ranks_per_host", [1, 2, 3, 4, 8, None])
def test_the_outline_of_hierarchical_follows_the_hosts(ranks_per_host: int | None) -> None:
    hierarchical = algorithms_of("all_reduce")["hierarchical"]
    for nranks in range(1, 34):
        hosts = tuple(rank // ranks_per_host for rank in range(nranks)) if ranks_per_host else hosts_of_unequal_size(nranks)
        schedule = hierarchical.schedule(nranks, hosts=hosts)
        outline = outline_of(hierarchical, nranks, hosts=hosts)
        assert list(outline.steps()) == steps_of(schedule), nranks
        assert outline.chunks == schedule.parts


def test_every_all_reduce_has_an_outline() -> None:
    assert all(map(has_outline, algorithms_of("all_reduce").values()))


def test_what_has_no_outline_says_so() -> None:
    pairwise = algorithms_of("all_to_all")["pairwise"]
    assert not has_outline(pairwise)
    with pytest.raises(KeyError):
        outline_of(pairwise, 4)
