"""Predicted times: what can be worked out by hand comes out exactly."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsml_gpu.schedules import Schedule, Transfer, find_algorithm
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, LINKS_ONLY, CostModel, Costs
from dsml_gpu.schedules.simulator import Prediction, simulate
from dsml_gpu.schedules.topology import Cluster, Link, Topology

KB = 1000
#: A kilobyte takes 1 ms; the way takes 10 us.
LATENCY_S, BYTE_S = 10e-6, 1e-6
LINK = Link(LATENCY_S, 1 / BYTE_S)
FREE = LINKS_ONLY.grpc


def on_one_host(nranks: int, cores: int = 0, link: Link = LINK) -> Topology:
    return Cluster(ranks_per_host=nranks, cores=cores, device=link).topology(nranks)


def model_of(costs: Costs) -> CostModel:
    """The same costs whatever the transport."""
    return CostModel(p2p=costs, grpc=costs)


def broadcast(*edges: tuple[int, int], store_and_forward: bool = False) -> Schedule:
    """One transfer in each step, of the whole block."""
    nranks = 1 + max(max(edge) for edge in edges)
    steps = tuple((Transfer(*edge, 0),) for edge in edges)
    return Schedule("broadcast", "test", nranks, 1, steps, store_and_forward=store_and_forward)


def pairwise_sends(*pairs: tuple[int, int]) -> Schedule:
    """Each pair sends a block of its own, all in one step."""
    step = tuple(Transfer(*pair, block) for block, pair in enumerate(pairs))
    return Schedule("send_recv", "test", 1 + max(map(max, pairs)), 1, (step,), pairs=pairs)


def reduce_to_0(nranks: int) -> Schedule:
    """All send to rank 0 at once."""
    return Schedule("reduce", "test", nranks, 1, (tuple(Transfer(rank, 0, 0, reduce=True) for rank in range(1, nranks)),))


def all_reduce(name: str, nranks: int) -> Schedule:
    return find_algorithm("all_reduce", name).schedule(nranks)


def links_only(schedule: Schedule, nbytes: int, topology: Topology | None = None, **options: int) -> Prediction:
    return simulate(schedule, nbytes, topology or on_one_host(schedule.nranks), LINKS_ONLY, **options)


# ---- links --------------------------------------------------------------------------------------------------------------


def test_one_message_takes_its_transmission_and_one_latency() -> None:
    prediction = links_only(broadcast((0, 1)), KB)
    assert prediction.time_s == pytest.approx(1e-3 + LATENCY_S)
    # The sender is done when the message has left, the receiver when it has it.
    assert prediction.rank_finish_s == pytest.approx((1e-3, 1e-3 + LATENCY_S))
    assert prediction.link_bytes == {"out of device 0": KB, "into device 1": KB}
    assert (prediction.messages, prediction.slice_bytes) == (1, 512 << 10)


def test_nothing_to_send_takes_no_time() -> None:
    assert links_only(all_reduce("ring", 1), KB).time_s == 0
    nothing = links_only(all_reduce("ring", 4), 0)
    assert (nothing.time_s, nothing.messages) == (0, 0)


def test_streams_are_opened_also_for_nothing() -> None:
    costs = model_of(replace(FREE, operation_s=10.0, stream_s=1.0))
    assert simulate(broadcast((0, 1), (1, 2)), 0, on_one_host(3), costs).time_s == pytest.approx(12.0)


@pytest.mark.parametrize("senders", [2, 3, 5])
def test_senders_share_the_receivers_link(senders: int) -> None:
    """Each has a link of its own, so all arrive together, and the receiver's takes one after the other."""
    prediction = links_only(reduce_to_0(senders + 1), KB)
    assert prediction.time_s == pytest.approx(senders * 1e-3 + LATENCY_S)


def test_receivers_share_the_senders_link() -> None:
    """Slice by slice: both get their last slice at the end."""
    prediction = links_only(pairwise_sends((0, 1), (0, 2)), 4 * KB, slice_bytes=KB)
    assert prediction.time_s == pytest.approx(8e-3 + LATENCY_S)
    assert prediction.rank_finish_s[1] == pytest.approx(7e-3 + LATENCY_S)


def test_links_are_full_duplex() -> None:
    assert links_only(pairwise_sends((0, 1), (1, 0)), KB).time_s == pytest.approx(1e-3 + LATENCY_S)


@pytest.mark.parametrize(("hops", "slices"), [(1, 1), (1, 7), (3, 1), (3, 4), (6, 10)])
def test_a_chain_passes_slices_on(hops: int, slices: int) -> None:
    """The first slice takes the whole way, and the others follow one transmission apart."""
    chain = broadcast(*((rank, rank + 1) for rank in range(hops)))
    prediction = links_only(chain, slices * KB, slice_bytes=KB)
    assert prediction.time_s == pytest.approx(hops * (LATENCY_S + 1e-3) + (slices - 1) * 1e-3)
    assert prediction.messages == hops * slices


@pytest.mark.parametrize(("hops", "slices"), [(1, 1), (3, 1), (3, 4)])
def test_store_and_forward_passes_whole_chunks_on(hops: int, slices: int) -> None:
    chain = broadcast(*((rank, rank + 1) for rank in range(hops)), store_and_forward=True)
    prediction = links_only(chain, slices * KB, slice_bytes=KB)
    assert prediction.time_s == pytest.approx(hops * (LATENCY_S + slices * 1e-3))


@pytest.mark.parametrize("nranks", [2, 3, 4, 7, 8, 16])
def test_ring_takes_its_closed_formula(nranks: int) -> None:
    """2(N-1) steps of one chunk each, where a chunk is one slice (Patarasuk and Yuan 2009)."""
    prediction = links_only(all_reduce("ring", nranks), nranks * KB)
    assert prediction.time_s == pytest.approx(2 * (nranks - 1) * (LATENCY_S + 1e-3))
    assert prediction.rank_finish_s == pytest.approx((prediction.time_s,) * nranks)


@pytest.mark.parametrize("nranks", [2, 4, 8])
def test_ring_hides_the_latency_behind_the_other_slices_of_a_chunk(nranks: int) -> None:
    """The link is never idle, so of all latencies only the last one shows."""
    prediction = links_only(all_reduce("ring", nranks), nranks * 4 * KB, slice_bytes=KB)
    assert prediction.time_s == pytest.approx(2 * (nranks - 1) * 4e-3 + LATENCY_S)


@pytest.mark.parametrize("nranks", [2, 3, 8])
def test_naive_waits_for_all_before_it_sends_back(nranks: int) -> None:
    prediction = links_only(all_reduce("naive", nranks), 4 * KB, slice_bytes=KB)
    assert prediction.time_s == pytest.approx(2 * ((nranks - 1) * 4e-3 + LATENCY_S))


@pytest.mark.parametrize("nic_bytes_per_s", [0.5e6, 1e6, 2e6, 7e6])
def test_a_message_is_as_fast_as_the_slowest_link_of_its_way(nic_bytes_per_s: float) -> None:
    """It passes a link while it is still coming in by the one before; all latencies of the way add up."""
    topology = Cluster(device=LINK, nic=Link(50e-6, nic_bytes_per_s)).topology(2)
    slowest = min(nic_bytes_per_s, 1e6)
    prediction = links_only(broadcast((0, 1)), KB, topology)
    assert prediction.time_s == pytest.approx(KB / slowest + LATENCY_S + 50e-6)
    assert set(prediction.link_bytes) == {"out of device 0", "out of host 0", "into host 1", "into device 1"}


def test_ranks_of_a_host_share_its_nic_and_not_the_inside() -> None:
    """Hosts 0 = {0, 1, 2} and 1 = {3, 4, 5}."""
    topology = Cluster(ranks_per_host=3, nic=Link(0.0, 1e6), inside=Link(5e-6, 10e6)).topology(6)
    across = pairwise_sends((0, 3), (1, 4), (2, 5))
    assert links_only(across, KB, topology).time_s == pytest.approx(3e-3)
    opposite = pairwise_sends((0, 3), (4, 1), (2, 5))
    assert links_only(opposite, KB, topology).time_s == pytest.approx(2e-3)
    inside = pairwise_sends((0, 1), (1, 2), (3, 5))
    assert links_only(inside, KB, topology).time_s == pytest.approx(0.2e-3 + 5e-6)


def test_an_oversubscribed_core_is_shared_by_all_hosts() -> None:
    """Four hosts' NICs together send twice what the core passes on."""
    cluster = Cluster(nic=Link(0.0, 1e6), oversubscription=2.0)
    everybody = pairwise_sends((0, 1), (1, 2), (2, 3), (3, 0))
    assert links_only(everybody, KB, cluster.topology(4)).time_s == pytest.approx(2e-3)
    assert links_only(everybody, KB, replace(cluster, oversubscription=1.0).topology(4)).time_s == pytest.approx(1e-3)


# ---- processors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constant", "seconds"),
    [
        ("operation_s", 1),
        ("rank_s", 3),  # for each rank
        ("message_s", 4),  # both ends of 2 hops
        ("send_byte_s", 2 * KB),
        ("recv_byte_s", 2 * KB),
        ("copy_byte_s", 2 * KB),
        ("reduce_byte_s", 0),
        ("stream_s", 1 + 2 + 1),  # see below
    ],
)
def test_each_cost_counts_where_it_is_due(constant: str, seconds: int) -> None:
    """0 passes a kilobyte to 1, who passes it to 2.

    Streams are opened first by everybody at the same time: one by ranks 0 and 2, two by rank 1, who is last.
    """
    costs = replace(FREE, **{constant: 1.0})
    prediction = simulate(broadcast((0, 1), (1, 2)), KB, on_one_host(3, link=Link()), model_of(costs))
    assert prediction.time_s == pytest.approx(2 if constant == "stream_s" else seconds)
    if constant not in ("operation_s", "rank_s"):
        assert sum(prediction.busy_s.values()) == pytest.approx(seconds)


def test_a_reduction_costs_what_reductions_cost() -> None:
    costs = replace(FREE, reduce_byte_s=1e-3, copy_byte_s=50.0)
    prediction = simulate(reduce_to_0(3), KB, on_one_host(3, link=Link()), model_of(costs))
    assert prediction.time_s == pytest.approx(2.0)  # both on rank 0
    assert prediction.busy_s == pytest.approx({0: 2.0, 1: 0.0, 2: 0.0})


@pytest.mark.parametrize(("cores", "seconds"), [(1, 6.0), (2, 3.0), (3, 2.0), (5, 2.0), (0, 2.0)])
def test_ranks_of_a_host_share_its_cores(cores: int, seconds: float) -> None:
    """Three pairs; each has a second of work at the sender, then one at the receiver. No core is idle while one waits."""
    topology = on_one_host(6, cores, link=Link())
    schedule = pairwise_sends((0, 1), (2, 3), (4, 5))
    assert simulate(schedule, KB, topology, model_of(replace(FREE, message_s=1.0))).time_s == pytest.approx(seconds)


def test_cores_go_round_the_ranks() -> None:
    """One core: rank 0 has two messages to send, and rank 3 sends its only one before the second of them."""
    topology = on_one_host(5, cores=1, link=Link())
    schedule = pairwise_sends((0, 1), (0, 2), (3, 4))
    prediction = simulate(schedule, KB, topology, model_of(replace(FREE, message_s=1.0)))
    assert prediction.rank_finish_s[3] == pytest.approx(2.0)
    assert prediction.time_s == pytest.approx(6.0)


def test_a_rank_does_one_thing_at_a_time() -> None:
    schedule = pairwise_sends((0, 1), (0, 2), (0, 3))
    prediction = simulate(schedule, KB, on_one_host(4, link=Link()), model_of(replace(FREE, message_s=1.0)))
    assert prediction.rank_finish_s == pytest.approx((3.0, 2.0, 3.0, 4.0))


def test_work_overlaps_with_links() -> None:
    """While a slice leaves, processors have the ones before: only the first one's way is seen, then the slower of both."""
    costs = model_of(replace(FREE, message_s=0.25e-3))
    prediction = simulate(broadcast((0, 1)), 10 * KB, on_one_host(2), costs, slice_bytes=KB)
    assert prediction.time_s == pytest.approx(10e-3 + LATENCY_S + 0.5e-3)
    costs = model_of(replace(FREE, message_s=3e-3))
    prediction = simulate(broadcast((0, 1)), 10 * KB, on_one_host(2), costs, slice_bytes=KB)
    assert prediction.time_s == pytest.approx(1e-3 + LATENCY_S + 10 * 3e-3 + 3e-3)


def test_ranks_of_one_process_share_its_thread_and_cross_no_link_of_a_device() -> None:
    topology = Cluster(ranks_per_host=4, ranks_per_process=4, device=LINK, inside=Link(1e-6)).topology(4)
    costs = CostModel(p2p=replace(FREE, copy_byte_s=1e-3), grpc=replace(FREE, operation_s=7.0))
    prediction = simulate(pairwise_sends((0, 1), (2, 3)), KB, topology, costs)
    assert prediction.time_s == pytest.approx(2.0 + 1e-6)
    assert prediction.link_bytes == {}
    assert prediction.busy_s == pytest.approx({0: 2.0})


def test_between_processes_the_costs_are_those_of_grpc() -> None:
    """Ranks 0 and 1 share a process; the block goes from 0 to 1, and on to 2."""
    topology = Topology(host_of=(0, 0, 0), process_of=(0, 0, 1))
    costs = CostModel(
        p2p=replace(FREE, message_s=1.0, operation_s=50.0), grpc=replace(FREE, message_s=10.0, operation_s=5.0)
    )
    assert simulate(broadcast((0, 1), (1, 2)), KB, topology, costs).time_s == pytest.approx(5 + 1 + 1 + 10 + 10)


# ---- the executor's order -----------------------------------------------------------------------------------------------


def test_what_arrives_before_its_place_was_read_is_kept_meanwhile() -> None:
    """Rank 1 sends what it has to 2, then to 0, and has what 0 sends after 1 ms, when its own is still needed for a ms."""
    steps = (
        (Transfer(1, 2, 0, reduce=True), Transfer(1, 0, 0, reduce=True), Transfer(0, 1, 0, reduce=True)),
        (Transfer(1, 2, 0, reduce=True),),
        (Transfer(2, 0, 0, reduce=True), Transfer(2, 1, 0, reduce=True)),
    )
    schedule = Schedule("barrier", "test", 3, 1, steps)
    costs = model_of(replace(FREE, reduce_byte_s=1e-7))
    prediction = simulate(schedule, KB, on_one_host(3, link=Link(0.0, 1e6)), costs)
    # Rank 1: sent to 0 at 2.0 ms, reduced at 2.1, sent to 2 at 3.1. Rank 2: reduced at 3.2, sent at 4.2 and 5.2.
    assert prediction.time_s == pytest.approx(5.3e-3)


def test_reductions_keep_the_order_of_the_schedule() -> None:
    """What rank 2 sends in the second step is there first; it waits for what rank 1 sends in the first, by a slow link."""
    steps = ((Transfer(1, 0, 0, reduce=True),), (Transfer(2, 0, 0, reduce=True),))
    topology = replace(on_one_host(3), devices=(Link(0.0, 1e6), Link(0.0, 0.2e6), Link(0.0, 1e6)))
    costs = model_of(replace(FREE, reduce_byte_s=1e-7))
    prediction = simulate(Schedule("reduce", "test", 3, 1, steps), KB, topology, costs)
    assert prediction.time_s == pytest.approx(5.2e-3)  # 5 ms on the link, then two reductions


def test_what_is_kept_of_another_ranks_memory_is_copied() -> None:
    """Two ranks of a process: the first message is copied, and the other rank's memory is free; then both are reduced."""
    step = (Transfer(0, 1, 0, reduce=True), Transfer(1, 0, 0, reduce=True))
    topology = Cluster(ranks_per_host=2, ranks_per_process=2).topology(2)
    costs = model_of(replace(FREE, copy_byte_s=1e-3, reduce_byte_s=1e-2))
    prediction = simulate(Schedule("all_reduce", "test", 2, 1, (step,)), KB, topology, costs)
    assert prediction.time_s == pytest.approx(1.0 + 2 * 10.0)


def test_who_receives_from_several_at_a_time_needs_longer() -> None:
    """Two ranks send to a third one in one step, or one after the other."""
    to_root = Transfer(1, 0, 0, reduce=True), Transfer(2, 0, 0, reduce=True)
    costs = model_of(replace(FREE, recv_byte_s=1e-3, meet_byte_s=1e-2))
    together = simulate(Schedule("reduce", "test", 3, 1, (to_root,)), KB, on_one_host(3, link=Link()), costs)
    apart = simulate(Schedule("reduce", "test", 3, 1, tuple((t,) for t in to_root)), KB, on_one_host(3, link=Link()), costs)
    assert together.time_s == pytest.approx(2 * (1.0 + 10.0))
    assert apart.time_s == pytest.approx(2 * 1.0)


def test_a_stream_is_first_in_first_out() -> None:
    """Rank 0 has block 0 only when it came from 2, and block 1 at once; to rank 1 it sends them in the program's order."""
    steps = ((Transfer(2, 0, 0),), (Transfer(0, 1, 0), Transfer(0, 1, 1)))
    schedule = Schedule("send_recv", "test", 3, 1, steps, pairs=((2, 1), (0, 1)))
    assert links_only(schedule, KB).time_s == pytest.approx(2 * (1e-3 + LATENCY_S) + 1e-3)


def test_other_streams_do_not_wait() -> None:
    steps = ((Transfer(2, 0, 0),), (Transfer(0, 1, 0), Transfer(0, 3, 1)))
    schedule = Schedule("send_recv", "test", 4, 1, steps, pairs=((2, 1), (0, 3)))
    assert links_only(schedule, KB).time_s == pytest.approx(2 * (1e-3 + LATENCY_S))


def test_blocks_of_different_sizes() -> None:
    prediction = simulate(pairwise_sends((0, 1), (2, 3)), [KB, 5 * KB], on_one_host(4), LINKS_ONLY)
    assert prediction.rank_finish_s == pytest.approx((1e-3, 1e-3 + LATENCY_S, 5e-3, 5e-3 + LATENCY_S))


def test_a_sender_stops_when_too_much_is_on_its_way() -> None:
    """4 MiB, which is 8 slices: the last of 32 leaves when the receiver, who takes a second for each, has taken 24."""
    costs = model_of(replace(FREE, recv_byte_s=1 / (512 << 10)))
    prediction = simulate(broadcast((0, 1)), 32 * 512 << 10, on_one_host(2, link=Link()), costs)
    assert prediction.rank_finish_s == pytest.approx((24.0, 32.0))


# ---- properties ---------------------------------------------------------------------------------------------------------

#: Algorithms in which all ranks do the same; others may well be faster on a slower network, as Graham's anomalies have it.
SYMMETRIC = st.sampled_from(["ring", "naive"])
SECONDS = st.floats(1e-6, 1e-2)


@settings(max_examples=30, deadline=None)
@given(SYMMETRIC, st.integers(2, 9), st.integers(1, 10**6), SECONDS, st.floats(1e5, 1e9), st.integers(0, 3))
def test_no_link_and_no_core_does_more_than_it_can(
    name: str, nranks: int, nbytes: int, latency_s: float, bytes_per_s: float, cores: int
) -> None:
    topology = on_one_host(nranks, cores, Link(latency_s, bytes_per_s))
    prediction = simulate(all_reduce(name, nranks), nbytes, topology, DEFAULT_COST_MODEL, slice_bytes=64 << 10)
    run_s = prediction.time_s - DEFAULT_COST_MODEL.grpc.control_s(nranks)
    assert run_s * bytes_per_s * (1 + 1e-9) >= max(prediction.link_bytes.values())
    assert run_s * (cores or nranks) * (1 + 1e-9) >= sum(prediction.busy_s.values())
    assert run_s * (1 + 1e-9) >= max(prediction.busy_s.values())
    assert max(prediction.rank_finish_s) == pytest.approx(prediction.time_s)


@settings(max_examples=30, deadline=None)
@given(SYMMETRIC, st.integers(2, 9), st.integers(1, 10**6), st.tuples(SECONDS, SECONDS), st.tuples(SECONDS, SECONDS))
def test_worse_links_and_more_data_take_longer(
    name: str, nranks: int, nbytes: int, latencies_s: tuple[float, float], kilobyte_s: tuple[float, float]
) -> None:
    schedule = all_reduce(name, nranks)

    def time_s(latency_s: float, kb_s: float, size: int) -> float:
        return links_only(schedule, size, on_one_host(nranks, link=Link(latency_s, KB / kb_s)), slice_bytes=64 << 10).time_s

    best = time_s(min(latencies_s), min(kilobyte_s), nbytes)
    for latency_s, kb_s, size in (
        (max(latencies_s), min(kilobyte_s), nbytes),
        (min(latencies_s), max(kilobyte_s), nbytes),
        (min(latencies_s), min(kilobyte_s), nbytes + nranks),  # a byte more in every chunk
    ):
        assert time_s(latency_s, kb_s, size) >= best * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@given(SYMMETRIC, st.integers(2, 9), st.integers(1, 10**6), st.sampled_from([1 / 64, 0.5, 2.0, 1024.0]), st.integers(0, 2))
def test_a_world_that_is_slower_by_a_factor_takes_longer_by_it(
    name: str, nranks: int, nbytes: int, factor: float, cores: int
) -> None:
    """Powers of two, which change no rounding, and so not who of two comes first."""
    schedule, costs = all_reduce(name, nranks), DEFAULT_COST_MODEL.grpc
    slower = Costs(*(factor * getattr(costs, field) for field in Costs.__dataclass_fields__))
    slower_link = Link(factor * LATENCY_S, 1 / (factor * BYTE_S))
    usual = simulate(schedule, nbytes, on_one_host(nranks, cores), model_of(costs), 64 << 10)
    slow = simulate(schedule, nbytes, on_one_host(nranks, cores, slower_link), model_of(slower), 64 << 10)
    assert slow.time_s == factor * usual.time_s


# ---- what is refused, and speed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((KB, on_one_host(3)), "the topology has 3 ranks, the schedule 4"),
        (([KB, KB], on_one_host(4)), "the schedule has 1 blocks, 2 sizes were given"),
        ((-1, on_one_host(4)), "a block cannot have -1 bytes"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[int, Topology], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        simulate(all_reduce("ring", 4), *arguments, LINKS_ONLY)


def test_slices_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="slices cannot have 0 bytes"):
        links_only(all_reduce("ring", 4), KB, slice_bytes=0)


@pytest.mark.alone
def test_it_is_fast() -> None:
    """8 events for each message, at 10 us each; some 1 us on a quiet machine."""
    schedule, topology = all_reduce("ring", 16), on_one_host(16, cores=2)
    started = time.process_time()
    prediction = simulate(schedule, 64 << 20, topology, DEFAULT_COST_MODEL, slice_bytes=128 << 10)
    assert prediction.messages == 30 * 16 * 32
    assert time.process_time() - started < 80e-6 * prediction.messages
