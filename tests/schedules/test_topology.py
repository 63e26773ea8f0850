"""Where ranks are, and which links are between them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from dsml_gpu.schedules.topology import DEFAULT_CLUSTER, Cluster, Link, Topology

DEVICE, INSIDE, NIC = Link(1e-6, 1e9), Link(2e-6, 2e9), Link(4e-6, 4e9)
CLUSTER = Cluster(ranks_per_host=3, device=DEVICE, inside=INSIDE, nic=NIC, oversubscription=2.0)


def way(topology: Topology, src: int, dst: int) -> list[str]:
    links, crossed = topology.paths(np.array([src]), np.array([dst]))
    return [topology.link_name(number) for number in links[:, 0][crossed[:, 0]].tolist()]


def test_ways_between_ranks() -> None:
    topology = CLUSTER.topology(8)
    assert way(topology, 0, 2) == ["out of device 0", "inside host 0", "into device 2"]
    assert way(topology, 7, 6) == ["out of device 7", "inside host 2", "into device 6"]
    assert way(topology, 1, 7) == [
        "out of device 1", "out of host 0", "core switch", "into host 2", "into device 7"
    ]  # fmt: skip


def test_ranks_of_a_process_meet_inside_the_host() -> None:
    topology = Cluster(ranks_per_host=4, ranks_per_process=2).topology(4)
    assert topology.process_of == (0, 0, 1, 1)
    assert way(topology, 0, 1) == ["inside host 0"]
    assert way(topology, 1, 2) == ["out of device 1", "inside host 0", "into device 2"]


def test_ways_of_many_pairs_are_those_of_each() -> None:
    topology = CLUSTER.topology(8)
    src, dst = (ranks.ravel() for ranks in np.meshgrid(np.arange(8), np.arange(8)))
    links, crossed = topology.paths(src, dst)
    for column, pair in enumerate(zip(src.tolist(), dst.tolist(), strict=True)):
        single, single_crossed = topology.paths(*(np.array([rank]) for rank in pair))
        assert (links[:, column] == single[:, 0]).all()
        assert (crossed[:, column] == single_crossed[:, 0]).all()


def test_every_link_has_a_name_of_its_own_and_its_numbers() -> None:
    topology = CLUSTER.topology(5)
    names = [topology.link_name(number) for number in range(topology.nlinks)]
    assert len(set(names)) == topology.nlinks == len(topology.latencies_s) == len(topology.byte_times_s)
    latency_us = dict(zip(names, (topology.latencies_s * 1e6).tolist(), strict=True))
    gigabyte_s = dict(zip(names, (topology.byte_times_s * 1e9).tolist(), strict=True))
    expected = {
        "out of device 4": (1, 1), "into device 4": (0, 1), "inside host 1": (2, 0.5),
        "out of host 1": (4, 0.25), "into host 1": (0, 0.25),
        # The core passes on half of what two NICs send.
        "core switch": (0, 0.25),
    }  # fmt: skip
    for name, (latency, byte_time) in expected.items():
        assert (latency_us[name], gigabyte_s[name]) == pytest.approx((latency, byte_time)), name


@pytest.mark.parametrize("oversubscription", [0.25, 1.0])
def test_a_core_that_is_not_oversubscribed_is_no_limit(oversubscription: float) -> None:
    topology = Cluster(nic=NIC, oversubscription=oversubscription).topology(4)
    assert topology.byte_times_s[-1] == 0


def test_unlimited_links_take_no_time() -> None:
    topology = Topology((0, 1))
    assert not topology.byte_times_s.any()
    assert not topology.latencies_s.any()


def test_ranks_fill_one_host_after_the_other() -> None:
    topology = Cluster(ranks_per_host=4, cores=8, ranks_per_process=2).topology(10)
    assert topology.host_of == (0, 0, 0, 0, 1, 1, 1, 1, 2, 2)
    assert topology.process_of == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
    assert topology.cores == (8, 8, 8)
    assert (topology.nranks, topology.nhosts) == (10, 3)


def test_the_default_cluster_is_one_device_to_a_host_at_100_gbit_s() -> None:
    topology = DEFAULT_CLUSTER.topology(2)
    assert topology.nhosts == 2
    assert topology.nic == Link(5e-6, 12.5e9)


def test_a_cluster_may_end() -> None:
    cluster = Cluster(ranks_per_host=4, hosts=2)
    assert cluster.topology(8).nhosts == 2
    with pytest.raises(ValueError, match="9 ranks do not fit: 2 hosts with 4 devices each have 8"):
        cluster.topology(9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"host_of": ()}, "the host of at least one rank"),
        ({"host_of": (0, -1)}, "as numbers from 0"),
        ({"host_of": (0, 1), "process_of": (0,)}, "process_of has 1 values, expected 2 or none"),
        ({"host_of": (0, 1), "devices": (Link(),) * 3}, "devices has 3 values, expected 2 or none"),
        ({"host_of": (0, 1), "cores": (1,)}, "cores has 1 values, expected 2 or none"),
        ({"host_of": (0, 1), "cores": (1, -2)}, "a host cannot have -2 cores"),
        ({"host_of": (0, 1), "oversubscription": 0.0}, "oversubscription must be a number above 0, not 0.0"),
        ({"host_of": (0, 1), "oversubscription": math.nan}, "oversubscription must be a number above 0, not nan"),
        ({"host_of": (0, 1), "process_of": (7, 7)}, "process 7 is on host 0 and on host 1"),
    ],
)
def test_a_topology_that_does_not_fit_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Topology(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ranks_per_host": 0}, "ranks_per_host must be 1 or more, not 0"),
        ({"hosts": 0}, "hosts must be 1 or more, not 0"),
        ({"cores": -1}, "cores must be 0 or more, not -1"),
        ({"ranks_per_process": 0}, "ranks_per_process must be 1 or more, not 0"),
        ({"ranks_per_host": 4, "ranks_per_process": 3}, "4 ranks of a host cannot be 3 to a process"),
    ],
)
def test_a_cluster_that_does_not_fit_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Cluster(**arguments)


@pytest.mark.parametrize(
    ("latency_s", "bytes_per_s", "said"),
    [
        (-1e-6, 1.0, "a latency must be a number of seconds from 0 up, not -1e-06"),
        (math.inf, 1.0, "a latency"),
        (math.nan, 1.0, "a latency"),
        (0.0, 0.0, "a bandwidth must be above 0 bytes a second, not 0.0"),
        (0.0, math.nan, "a bandwidth"),
    ],
)
def test_a_link_that_cannot_be_is_refused(latency_s: float, bytes_per_s: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Link(latency_s, bytes_per_s)
