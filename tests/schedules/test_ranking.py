"""Which algorithm is the fastest, and by which method that is worked out."""

from __future__ import annotations

import pytest

from dsml_gpu.schedules import Algorithm, Layout, Schedule, Transfer, algorithms_of, find_algorithm
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, LINKS_ONLY
from dsml_gpu.schedules.ranking import buffer_bytes, predictors, rank_algorithms
from dsml_gpu.schedules.simulator import simulate
from dsml_gpu.schedules.topology import DEFAULT_CLUSTER, Cluster, Link

ALL_REDUCE = tuple(algorithms_of("all_reduce").values())
RING, NAIVE = find_algorithm("all_reduce", "ring"), find_algorithm("all_reduce", "naive")


def test_the_fastest_comes_first() -> None:
    topology = DEFAULT_CLUSTER.topology(8)
    ranked = rank_algorithms(ALL_REDUCE, 1 << 24, topology, LINKS_ONLY)
    assert {one.algorithm for one in ranked} == set(ALL_REDUCE)
    times_s = [one.time_s for one in ranked]
    assert times_s == sorted(times_s)
    assert ranked[-1].algorithm is NAIVE
    for one in ranked:
        assert one.method == "events"
        schedule = one.algorithm.schedule(8, hosts=topology.host_of)
        assert one.time_s == simulate(schedule, 1 << 24, topology, LINKS_ONLY, max_messages=20_000).time_s


def test_latency_decides_for_little_data_and_bandwidth_for_much() -> None:
    algorithms = [find_algorithm("all_reduce", name) for name in ("ring", "recursive_doubling")]
    topology = DEFAULT_CLUSTER.topology(16)
    little, much = (rank_algorithms(algorithms, nbytes, topology, LINKS_ONLY) for nbytes in (1 << 10, 1 << 30))
    assert [one.algorithm.name for one in little] == ["recursive_doubling", "ring"]
    assert [one.algorithm.name for one in much] == ["ring", "recursive_doubling"]


def test_of_equal_ones_the_first_stays_first() -> None:
    topology = DEFAULT_CLUSTER.topology(4)
    other = Algorithm("all_reduce", "the ring again", RING.build, "")
    for algorithms in ((RING, other), (other, RING)):
        ranked = rank_algorithms(algorithms, 1 << 20, topology, LINKS_ONLY)
        assert tuple(one.algorithm for one in ranked) == algorithms


def test_one_that_has_too_many_transfers_makes_all_go_by_rounds() -> None:
    """So that all are compared by the same method. A ring on 8 has 112 transfers, of two messages at least."""
    topology = DEFAULT_CLUSTER.topology(8)
    for limit, method in ((223, "rounds"), (224, "events")):
        made = predictors((NAIVE, RING), topology, LINKS_ONLY, max_messages=limit)
        assert [one.method for one in made] == [method, method]


def test_what_has_no_outline_goes_by_events_always() -> None:
    def chain(nranks: int) -> Schedule:
        up = tuple((Transfer(rank, rank - 1, 0, reduce=True),) for rank in range(nranks - 1, 0, -1))
        down = tuple((Transfer(rank, rank + 1, 0),) for rank in range(nranks - 1))
        return Schedule("all_reduce", "chain", nranks, 1, up + down)

    own = Algorithm("all_reduce", "chain", chain, "")
    made = predictors((own, RING), DEFAULT_CLUSTER.topology(100), LINKS_ONLY, max_messages=300)
    assert [one.method for one in made] == ["events", "rounds"]
    assert all(one.time_s(1 << 20) > 0 for one in made)


def test_hosts_and_roots_are_passed_on() -> None:
    """Everything comes from rank 3, whose host has a slow NIC and fast devices: others of the host have it first."""
    topology = Cluster(ranks_per_host=4, device=Link(1e-6, 1e9), nic=Link(1e-6, 1e6)).topology(8)
    (broadcast,) = rank_algorithms(
        [find_algorithm("broadcast", "binomial_tree")], 1000, topology, DEFAULT_COST_MODEL, root=3
    )
    schedule = find_algorithm("broadcast", "binomial_tree").schedule(8, root=3)
    assert broadcast.time_s == simulate(schedule, 1000, topology, DEFAULT_COST_MODEL).time_s
    (hierarchical,) = rank_algorithms([find_algorithm("all_reduce", "hierarchical")], 10**6, topology, LINKS_ONLY)
    assert hierarchical.time_s == pytest.approx(1.0, rel=0.05)  # a quarter of the data, 4 ranks, through 1 MB/s


@pytest.mark.parametrize("max_messages", [20_000, 0])
def test_both_methods_know_the_root(max_messages: int) -> None:
    """Hosts of 4 and 2 ranks: from rank 0 two messages cross the NIC, from rank 5 four."""
    topology = Cluster(ranks_per_host=4, nic=Link(0.0, 1e6)).topology(6)
    times_s = [
        rank_algorithms(
            [find_algorithm("broadcast", "direct")], 1000, topology, LINKS_ONLY, root=root, max_messages=max_messages
        )[0].time_s
        for root in (0, 5)
    ]
    assert times_s == pytest.approx([2e-3, 4e-3])


def test_pairs_are_passed_on() -> None:
    (direct,) = rank_algorithms(
        [find_algorithm("send_recv", "direct")],
        (1000, 2000),
        Cluster(device=Link(0.0, 1e6)).topology(3),
        LINKS_ONLY,
        pairs=((0, 1), (1, 2)),
    )
    assert direct.time_s == pytest.approx(2e-3)


@pytest.mark.parametrize("collective", ["all_gather", "reduce_scatter", "all_to_all", "gather", "broadcast"])
def test_blocks_count_alike_by_both_methods(collective: str) -> None:
    direct = find_algorithm(collective, "direct")
    topology = Cluster(device=Link(1e-6, 1e9)).topology(6)
    by_events, by_rounds = (predictors([direct], topology, LINKS_ONLY, max_messages=limit)[0] for limit in (20_000, 1))
    assert (by_events.method, by_rounds.method) == ("events", "rounds")
    assert by_rounds.time_s(300_000) == pytest.approx(by_events.time_s(300_000), rel=0.01)


@pytest.mark.parametrize(
    ("layout", "block_bytes", "nbytes"),
    [
        (Layout.WHOLE, 100, 100),
        (Layout.WHOLE, (100,), 100),
        (Layout.PER_RANK, 100, 400),
        (Layout.PER_RANK, (10, 20, 30, 40), 100),
        (Layout.PER_PAIR, 100, 400),
        (Layout.PER_PAIR, (10,) * 16, 40),
    ],
)
def test_a_buffer_is_its_blocks(layout: Layout, block_bytes: int | tuple[int, ...], nbytes: int) -> None:
    assert buffer_bytes(layout, block_bytes, 4) == nbytes
