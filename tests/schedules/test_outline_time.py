"""Times by rounds: closed formulas come out exactly, and event simulation about."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest

from dsml_gpu.schedules import algorithms_of
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, LINKS_ONLY, CostModel
from dsml_gpu.schedules.outline_time import OutlineTimer
from dsml_gpu.schedules.outlines import outline_of
from dsml_gpu.schedules.simulator import simulate
from dsml_gpu.schedules.topology import Cluster, Link

ALL_REDUCE = algorithms_of("all_reduce")
#: A megabyte takes 1 ms.
LATENCY_S, BYTES_PER_S = 20e-6, 1e9
MB, SLICE = 1_000_000, 100_000
FLAT = Cluster(device=Link(LATENCY_S, BYTES_PER_S))
POD = Cluster(ranks_per_host=4, device=Link(1e-6, 50e9), nic=Link(5e-6, 12.5e9), oversubscription=2.0)


def by_rounds(
    name: str, nranks: int, nbytes: int, cluster: Cluster = FLAT, model: CostModel = LINKS_ONLY, slice_bytes: int = SLICE
) -> float:
    topology = cluster.topology(nranks)
    outline = outline_of(ALL_REDUCE[name], nranks, hosts=topology.host_of)
    return OutlineTimer(outline, topology, model).time_s(nbytes, slice_bytes)


# ---- formulas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nranks", [2, 3, 8, 1000, 65536])
def test_ring_of_single_slices(nranks: int) -> None:
    """2(N-1)(latency + S/(N B))."""
    nbytes = nranks * SLICE // 2
    expected_s = 2 * (nranks - 1) * (LATENCY_S + SLICE / 2 / BYTES_PER_S)
    assert by_rounds("ring", nranks, nbytes) == pytest.approx(expected_s)


@pytest.mark.parametrize("nranks", [2, 3, 8, 1000, 65536])
def test_ring_of_many_slices_hides_the_latency(nranks: int) -> None:
    """2(N-1) S/(N B) + latency."""
    nbytes = nranks * 20 * SLICE
    assert by_rounds("ring", nranks, nbytes) == pytest.approx(2 * (nranks - 1) * 20 * SLICE / BYTES_PER_S + LATENCY_S)


@pytest.mark.parametrize("nranks", [2, 16, 4096])
def test_recursive_doubling(nranks: int) -> None:
    """log2(N) (latency + S/B)."""
    steps = nranks.bit_length() - 1
    assert by_rounds("recursive_doubling", nranks, SLICE) == pytest.approx(steps * (LATENCY_S + SLICE / BYTES_PER_S))


@pytest.mark.parametrize("nranks", [2, 16, 4096])
def test_naive_goes_through_one_link_one_after_the_other(nranks: int) -> None:
    """2 ((N-1) S/B + latency)."""
    assert by_rounds("naive", nranks, MB) == pytest.approx(2 * ((nranks - 1) * 1e-3 + LATENCY_S))


def test_a_deep_tree_lets_slices_flow() -> None:
    """Twice the data at most, and the first slice's way up and down; not the depth times the data."""
    nranks, nbytes = 65536, 1000 * MB
    depth_s = 2 * nranks.bit_length() * (LATENCY_S + SLICE / BYTES_PER_S)
    assert 2 * nbytes / BYTES_PER_S < by_rounds("double_binary_tree", nranks, nbytes) < 2 * nbytes / BYTES_PER_S + depth_s


def test_ranks_of_a_host_share_its_nic() -> None:
    """Hosts of 4: recursive doubling crosses the NIC with all 4 ranks in all steps but two."""
    cluster = Cluster(ranks_per_host=4, nic=Link(0.0, BYTES_PER_S))
    assert by_rounds("recursive_doubling", 64, SLICE, cluster) == pytest.approx(4 * 4 * SLICE / BYTES_PER_S)


def test_everybody_to_everybody_is_counted_and_not_listed() -> None:
    """Twice (N-1) parts of 1/N through each device's link: like a ring, but for the latency."""
    nranks, nbytes = 65536, 65536 * SLICE
    expected_s = 2 * (nranks - 1) * SLICE / BYTES_PER_S + 2 * LATENCY_S
    assert by_rounds("direct", nranks, nbytes) == pytest.approx(expected_s, rel=1e-4)


def test_control_messages_come_first() -> None:
    control_s = DEFAULT_COST_MODEL.grpc.control_s(8)
    streams_s = 2 * DEFAULT_COST_MODEL.grpc.stream_s  # one to the right and one from the left
    assert by_rounds("ring", 8, 0, model=DEFAULT_COST_MODEL) == pytest.approx(control_s + streams_s)


def test_another_number_of_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="the topology has 5 ranks, the outline 4"):
        OutlineTimer(outline_of(ALL_REDUCE["ring"], 4), FLAT.topology(5), LINKS_ONLY)


# ---- against events ------------------------------------------------------------------------------------------------------


def ratios(name: str, cluster: Cluster, model: CostModel) -> Iterator[tuple[float, int, int]]:
    """Time by rounds by time by events, on a grid of ranks and sizes."""
    for nranks in (2, 4, 5, 8, 12, 16, 33):
        topology = cluster.topology(nranks)
        schedule = ALL_REDUCE[name].schedule(nranks, hosts=topology.host_of)
        timer = OutlineTimer(outline_of(ALL_REDUCE[name], nranks, hosts=topology.host_of), topology, model)
        for nbytes in (64 << 10, 1 << 20, 16 << 20):
            events = simulate(schedule, nbytes, topology, model, max_messages=3000)
            yield timer.time_s(nbytes) / events.time_s, nranks, nbytes


@pytest.mark.parametrize(("cluster", "model"), [(FLAT, LINKS_ONLY), (POD, LINKS_ONLY), (FLAT, DEFAULT_COST_MODEL)])
@pytest.mark.parametrize("name", ALL_REDUCE)
def test_rounds_agree_with_events(name: str, cluster: Cluster, model: CostModel) -> None:
    """Within a factor of 1.4 everywhere, and within 8 % in the middle of the grid."""
    found = list(ratios(name, cluster, model))
    for ratio, nranks, nbytes in found:
        assert 1 / 1.4 < ratio < 1.4, (ratio, nranks, nbytes)
    assert statistics.median(ratio for ratio, _, _ in found) == pytest.approx(1, abs=0.08)
