"""Which algorithm a call is run by, and why."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.passes import ALGORITHM, bytes_of
from dsml_gpu.coordinator.plan import choose_transport, hosts_of
from dsml_gpu.schedules import algorithms_of
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, CostModel
from dsml_gpu.schedules.ranking import rank_algorithms
from dsml_gpu.schedules.topology import Link, Topology
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: Choices that are remembered.
_MAX_REMEMBERED = 4096
#: Messages of a simulation; above it slices are taken together, which costs accuracy where it does not matter.
_MAX_MESSAGES = 4000


@dataclass(frozen=True, slots=True)
class Choice:
    """An algorithm, and why it was chosen.

    Attributes:
        algorithm: its name.
        reason: for people.
        predicted_s: what the cost model predicts for the operation alone; 0 where it was not asked.
    """

    algorithm: str
    reason: str
    predicted_s: float = 0.0


class Chooser:
    """Chooses algorithms by a cost model, and remembers what it chose.

    Args:
        model: replaced by `use`.
    """

    def __init__(self, model: CostModel = DEFAULT_COST_MODEL) -> None:
        self.model = model
        self._remembered: OrderedDict[tuple[object, ...], Choice] = OrderedDict()

    def use(self, model: CostModel) -> None:
        """Chooses by another model from now on."""
        self.model = model
        self._remembered.clear()

    def known_choice(self, call: CollectiveCall, devices: Sequence[pb.DeviceMetadata], transport: int) -> Choice | None:
        """The choice where it costs next to nothing to tell: it was asked for, or made before."""
        if call.own_schedule:
            return Choice(pb.Schedule.FromString(call.own_schedule).algorithm or "unnamed", "the caller's own schedule")
        if call.algorithm:
            return Choice(call.algorithm, "as asked")
        return self._remembered.get(_key(call, devices, transport))

    def choice_of_passes(self, call: CollectiveCall, nworkers: int) -> Choice:
        """The choice for a call that is run as passes over memory that all ranks have open, by so many of them."""
        if call.algorithm:
            return Choice(ALGORITHM, "as asked")
        predicted_s = time_of_passes_s(self.model, bytes_of(call), nworkers)
        reason = f"predicted {format_time(predicted_s)}, by one pass over memory that all ranks have open"
        return Choice(ALGORITHM, reason, predicted_s)

    def choose(self, call: CollectiveCall, devices: Sequence[pb.DeviceMetadata], transport: int) -> Choice:
        """The fastest algorithm by the cost model. Takes milliseconds to seconds; for a thread.

        Args:
            devices: of each rank.
            transport: the one that is forced, AUTO for none.
        """
        model = self.model
        ranked = rank_algorithms(
            algorithms_of(call.name).values(),
            call.counts,
            topology_of(devices, transport),
            model,
            root=call.roles.root,
            pairs=call.roles.pairs,
            max_messages=_MAX_MESSAGES,
        )
        best, *others = ranked
        reason = f"predicted {format_time(best.time_s)}, the least of {len(ranked)}"
        if others:
            reason += f"; next {others[0].algorithm.name}, {format_time(others[0].time_s)}"
        choice = Choice(best.algorithm.name, reason, best.time_s)
        if model is self.model:
            self._remembered[_key(call, devices, transport)] = choice
            while len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return choice


def time_of_passes_s(model: CostModel, nbytes: int, nworkers: int) -> float:
    """What the cost model predicts for passes over memory (`passes`).

    Args:
        nbytes: that are read and written.
        nworkers: ranks that share the work.
    """
    # A reduction of what was received reads two operands and writes one.
    return model.p2p.control_s(nworkers) + nbytes / 3 * model.p2p.reduce_byte_s / nworkers


def topology_of(devices: Sequence[pb.DeviceMetadata], transport: int) -> Topology:
    """Where the ranks of a communicator are.

    Args:
        devices: of each rank.
        transport: the one that is forced, AUTO for none.
    """
    hosts, processes = hosts_of(devices), _processes_of(devices, transport)
    cores = dict(zip(hosts, (device.cores for device in devices), strict=True))
    # Where nobody uses the grpc transport, emulated links slow nobody down.
    links = [Link(device.linkLatencyNs / 1e9, device.linkBytesPerS or math.inf) for device in devices]
    return Topology(
        host_of=hosts,
        process_of=processes,
        cores=tuple(cores[host] for host in range(len(cores))),
        devices=tuple(links) if len(set(processes)) > 1 else (),
    )


def _processes_of(devices: Sequence[pb.DeviceMetadata], transport: int) -> tuple[int, ...]:
    """The process of each device, as numbers: devices have one in common where they read each other's memory."""
    numbers: list[int] = []
    for rank, device in enumerate(devices):
        mate = next((other for other in range(rank) if choose_transport(devices[other], device, transport) == pb.P2P), None)
        numbers.append(rank if mate is None else numbers[mate])
    return tuple(numbers)


def format_time(seconds: float) -> str:
    """``"3.1 ms"``, ``"250 us"``, ``"1.2 s"``."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _key(call: CollectiveCall, devices: Sequence[pb.DeviceMetadata], transport: int) -> tuple[object, ...]:
    return (call.name, call.roles, call.counts, transport, tuple(device.deviceId.value for device in devices))
