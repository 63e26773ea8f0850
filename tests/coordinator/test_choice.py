"""Which algorithm is chosen, and what is said of it, without devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from dsml_gpu.coordinator.call import CollectiveCall, call_of
from dsml_gpu.coordinator.choice import Chooser, format_time, topology_of
from dsml_gpu.schedules import algorithms_of
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, LINKS_ONLY
from dsml_gpu.schedules.simulator import simulate
from dsml_gpu.schedules.topology import Link
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.harness import all_reduce_request

FLOAT64 = np.dtype(np.float64)


def devices(
    nranks: int, latency_s: float = 0.0, bytes_per_s: int = 0, processes: Sequence[str] = (), hosts: Sequence[str] = ()
) -> list[pb.DeviceMetadata]:
    return [
        pb.DeviceMetadata(
            deviceId=pb.DeviceId(value=rank + 1),
            address=f"here:{rank}",
            backend="numpy",
            processUid=processes[rank] if processes else str(rank),
            host=hosts[rank] if hosts else "here",
            cores=2,
            linkLatencyNs=round(latency_s * 1e9),
            linkBytesPerS=bytes_per_s,
        )
        for rank in range(nranks)
    ]


def all_reduce(nranks: int, nbytes: int, algorithm: str = "auto") -> CollectiveCall:
    return call_of(all_reduce_request((0,) * nranks, nbytes, FLOAT64, algorithm=algorithm), nranks)


def test_a_topology_has_what_the_devices_say_of_themselves() -> None:
    found = topology_of(devices(4, 1e-4, 125_000_000, processes=("a", "b", "a", "c"), hosts=("x", "x", "x", "y")), pb.AUTO)
    assert found.host_of == (0, 0, 0, 1)
    assert found.process_of[0] == found.process_of[2]
    assert len(set(found.process_of)) == 3
    assert found.cores == (2, 2)
    assert found.devices == (Link(1e-4, 125e6),) * 4
    # Forced to gRPC, they read nobody's memory.
    assert len(set(topology_of(devices(4, processes=("a",) * 4), pb.GRPC).process_of)) == 4
    assert topology_of(devices(2), pb.AUTO).devices == (Link(0.0, math.inf),) * 2


def test_little_data_is_a_matter_of_latency_and_much_of_bandwidth() -> None:
    """On slow links and free processors: the fewest steps, then the least data through any link."""
    chooser, links = Chooser(LINKS_ONLY), devices(8, 1e-3, 125_000_000)
    little = chooser.choose(all_reduce(8, 8), links, pb.AUTO)
    much = chooser.choose(all_reduce(8, 64 << 20), links, pb.AUTO)
    steps = {name: len(one.schedule(8).steps) for name, one in algorithms_of("all_reduce").items()}
    assert steps[little.algorithm] == min(steps.values())
    # 2(N-1)/N of the data through each link, and nothing much beside it.
    assert much.predicted_s == pytest.approx(2 * 7 / 8 * (64 << 20) / 125e6, rel=0.03)


def test_it_is_the_least_of_all_predictions() -> None:
    call, links = all_reduce(4, 1 << 20), devices(4)
    choice = Chooser().choose(call, links, pb.AUTO)
    predicted = {
        name: simulate(one.schedule(4), call.counts, topology_of(links, pb.AUTO), DEFAULT_COST_MODEL).time_s
        for name, one in algorithms_of("all_reduce").items()
    }
    assert choice.predicted_s == min(predicted.values()) == predicted[choice.algorithm]
    assert f"the least of {len(predicted)}" in choice.reason
    second = sorted(predicted.values())[1]
    assert choice.reason.endswith(format_time(second))


def test_what_was_asked_for_is_not_chosen() -> None:
    choice = Chooser().known_choice(all_reduce(4, 80, "naive"), devices(4), pb.AUTO)
    assert choice is not None
    assert (choice.algorithm, choice.reason, choice.predicted_s) == ("naive", "as asked", 0.0)


def test_a_choice_is_made_once_and_again_for_what_differs() -> None:
    chooser, links = Chooser(), devices(4)
    call = all_reduce(4, 8000)
    assert chooser.known_choice(call, links, pb.AUTO) is None
    choice = chooser.choose(call, links, pb.AUTO)
    assert chooser.known_choice(all_reduce(4, 8000), links, pb.AUTO) is choice
    assert chooser.known_choice(all_reduce(4, 8008), links, pb.AUTO) is None
    assert chooser.known_choice(call, links, pb.GRPC) is None
    assert chooser.known_choice(all_reduce(3, 8000), links[:3], pb.AUTO) is None
    chooser.use(replace(DEFAULT_COST_MODEL, p2p=DEFAULT_COST_MODEL.grpc))
    assert chooser.known_choice(call, links, pb.AUTO) is None, "another model may choose otherwise"


@pytest.mark.parametrize(("seconds", "text"), [(2.5, "2.5 s"), (0.0031, "3.1 ms"), (0.00025, "250 us"), (0, "0 us")])
def test_times_for_people(seconds: float, text: str) -> None:
    assert format_time(seconds) == text
