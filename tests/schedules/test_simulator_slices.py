"""Slices that stand for several: predictions from fewer messages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsml_gpu.schedules import Schedule, Transfer, find_algorithm
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, LINKS_ONLY, CostModel
from dsml_gpu.schedules.simulator import Prediction, simulate
from dsml_gpu.schedules.topology import Cluster, Link

KB = 1000
CLUSTER = Cluster(ranks_per_host=16, cores=4, device=Link(10e-6, 1e6))


def chain_of(hops: int) -> Schedule:
    """A broadcast from each rank to the next."""
    steps = tuple((Transfer(rank, rank + 1, 0),) for rank in range(hops))
    return Schedule("broadcast", "test", hops + 1, 1, steps)


def predicted(schedule: Schedule, nbytes: int, max_messages: int, model: CostModel = LINKS_ONLY) -> Prediction:
    return simulate(schedule, nbytes, CLUSTER.topology(schedule.nranks), model, KB, max_messages)


@pytest.mark.parametrize(("hops", "max_messages"), [(1, 3), (1, 200), (4, 16), (4, 100), (9, 18)])
def test_they_take_as_long_as_those_that_they_stand_for(hops: int, max_messages: int) -> None:
    exact, coarse = (predicted(chain_of(hops), 1024 * KB, limit) for limit in (10**6, max_messages))
    assert coarse.slice_bytes > KB
    assert coarse.messages <= 1.5 * max_messages
    assert coarse.time_s == pytest.approx(exact.time_s)
    assert coarse.rank_finish_s[1:] == pytest.approx(exact.rank_finish_s[1:])


@pytest.mark.parametrize("nranks", [2, 5, 16])
def test_they_are_never_faster_than_the_links(nranks: int) -> None:
    """A ring hides the latency when a chunk is two slices, and not when it is one: a straight line would go astray."""
    ring = find_algorithm("all_reduce", "ring").schedule(nranks)
    exact, coarse = (predicted(ring, nranks * 128 * KB, limit) for limit in (10**6, 1))
    assert coarse.messages == 2 * (nranks - 1) * nranks * 3  # two slices for a chunk, then one
    assert coarse.time_s == pytest.approx(exact.time_s, rel=1e-3)
    assert coarse.time_s >= exact.least_s


def test_they_cost_as_much_as_those_that_they_stand_for() -> None:
    free = LINKS_ONLY.grpc
    model = CostModel(p2p=free, grpc=replace(free, message_s=1.0))
    busy = [predicted(chain_of(1), 64 * KB, limit, model).busy_s for limit in (64, 16, 2)]
    assert busy == [pytest.approx({0: 64.0, 1: 64.0})] * 3


@pytest.mark.parametrize("name", ["binomial_tree", "double_binary_tree", "halving_doubling", "direct", "naive"])
@pytest.mark.parametrize("nranks", [4, 7])
@pytest.mark.parametrize("model", [LINKS_ONLY, DEFAULT_COST_MODEL])
def test_they_are_a_tenth_off_at_most_where_ways_depend_on_them(name: str, nranks: int, model: CostModel) -> None:
    schedule = find_algorithm("all_reduce", name).schedule(nranks)
    topology = Cluster(ranks_per_host=16, cores=2, device=Link(100e-6, 125e6)).topology(nranks)
    exact, coarse = (simulate(schedule, 32 << 20, topology, model, max_messages=limit).time_s for limit in (10**6, 300))
    assert coarse == pytest.approx(exact, rel=0.1)
