"""`dsml-gpu tune`: measures a running fleet, fits the cost model to it, and makes its coordinator choose by the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsml_gpu.cli.measure import time_interleaved
from dsml_gpu.cli.serve import fail
from dsml_gpu.cli.units import format_size
from dsml_gpu.client import Client, Communicator, connect
from dsml_gpu.client.collectives import TRANSPORTS
from dsml_gpu.coordinator.choice import format_time, topology_of
from dsml_gpu.coordinator.passes import ALGORITHM
from dsml_gpu.errors import DsmlError
from dsml_gpu.schedules import find_algorithm
from dsml_gpu.schedules.cost_model import CostModel
from dsml_gpu.schedules.fitting import Measured, fit
from dsml_gpu.schedules.topology import Topology

#: Bytes of each rank's buffer: from what a message costs to what a byte costs.
SIZES = (64, 4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
#: Algorithms of all-reduce that together tell the constants apart: by their numbers of streams, messages, bytes and steps.
PROBES = ("ring", "naive", "direct", "recursive_doubling", "double_binary_tree")
#: Runs whose median counts, by size; small ones are noisier and cost less.
_RUNS_SMALL, _RUNS_LARGE = 21, 5


@dataclass(frozen=True, slots=True)
class Setup:
    """What is tuned.

    Attributes:
        target: host:port of the coordinator.
        max_ranks: of the largest communicator that is measured; 0: all devices.
        sizes: bytes of each rank's buffer.
        slice_bytes: into which the devices cut chunks.
    """

    target: str
    max_ranks: int = 0
    sizes: tuple[int, ...] = SIZES
    slice_bytes: int = 512 << 10


@dataclass(frozen=True, slots=True)
class Probe:
    """One measurement, before and after.

    Attributes:
        transport: that carried the data.
    """

    algorithm: str
    transport: str
    measured: Measured


def run(setup: Setup, output: Path | None, keep: bool) -> None:
    """Measures, fits, prints, and stores. Exit status 1, with one line, where that fails.

    Args:
        output: also write the model to this file.
        keep: make the coordinator use it.
    """
    if output is not None and not output.resolve().parent.is_dir():
        fail(f"{output}: there is no such folder")
    console = Console()
    try:
        with connect(setup.target) as client:
            probes = measure(client, setup, console)
            model = fit_all(probes, client.cost_model())
            console.print(table(probes, model))
            if keep:
                client.set_cost_model(model)
                console.print(f"The coordinator at {setup.target} chooses by it from now on.")
            if output is not None:
                output.write_text(model.to_json(), encoding="utf-8")
                console.print(f"Written to {output}; start a coordinator with --cost-model {output} to choose by it.")
    except (DsmlError, OSError) as error:
        fail(str(error))


def fitted_model(client: Client, setup: Setup) -> CostModel:
    """What `run` would store, without a word."""
    return fit_all(measure(client, setup, Console(quiet=True)), client.cost_model())


def fit_all(probes: Sequence[Probe], model: CostModel) -> CostModel:
    """A model fitted to probes, each transport's costs to those that it carried. Mixed ones tell nothing apart."""
    for p2p, name in ((False, "grpc"), (True, "p2p")):
        measured = [probe.measured for probe in probes if probe.transport == name]
        if measured:
            model = fit(measured, model, p2p)
    return model


def communicator_sizes(ndevices: int, max_ranks: int) -> list[int]:
    """Numbers of ranks that are measured: powers of two, and all."""
    most = min(ndevices, max_ranks or ndevices)
    return sorted({2**power for power in range(1, most.bit_length()) if 2**power <= most} | {most} - {1})


def measure(client: Client, setup: Setup, console: Console) -> list[Probe]:
    """Measures all probes on all numbers of ranks, with a bar."""
    devices = client.devices()
    ranks = communicator_sizes(len(devices), setup.max_ranks)
    if not ranks:
        fail(f"tuning needs at least 2 devices; the coordinator at {setup.target} has {len(devices)}")
    probes: list[Probe] = []
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bar:
        task = bar.add_task("measuring", total=None)
        worlds = [(nranks, transport) for nranks in ranks for transport in ("auto", "grpc")]
        bar.update(task, total=len(worlds) * len(setup.sizes))
        for nranks, transport in worlds:
            ids = [device.device_id for device in devices[:nranks]]
            with client.communicator(device_ids=ids, transport=transport) as comm:
                metadata = [device.metadata for device in comm.devices]
                topology = topology_of(metadata, TRANSPORTS[transport])
                if transport == "grpc" and topology == topology_of(metadata, TRANSPORTS["auto"]):
                    bar.advance(task, len(setup.sizes))  # it is what auto has measured
                    continue
                for size in setup.sizes:
                    bar.update(task, description=f"{nranks} ranks, {transport}, {format_size(size)}")
                    probes += measure_size(comm, topology, size, setup.slice_bytes)
                    bar.advance(task)
    return probes


def measure_size(comm: Communicator, topology: Topology, nbytes: int, slice_bytes: int) -> Iterator[Probe]:
    """Measures all probes at one size, in turn."""
    arrays = comm.array([np.zeros(nbytes // 8)] * comm.nranks)
    runs = _RUNS_SMALL if nbytes < 1 << 20 else _RUNS_LARGE
    work = {name: partial(comm.all_reduce, arrays, algorithm=name) for name in PROBES}
    times_s = time_interleaved(work, runs, warmup=2)
    results = {name: comm.all_reduce(arrays, algorithm=name) for name in PROBES}
    for array in arrays:
        array.free()
    for name, result in results.items():
        assert result is not None
        if (name, result.transports) == (ALGORITHM, ("p2p",)):  # passes over memory, which move no slices
            continue
        schedule = find_algorithm("all_reduce", name).schedule(comm.nranks, hosts=topology.host_of)
        measured = Measured(schedule, nbytes, topology, median(times_s[name]), slice_bytes)
        yield Probe(name, "+".join(result.transports), measured)


def table(probes: Sequence[Probe], model: CostModel) -> Table:
    """What was measured beside what the model predicts, and how far they are apart."""
    result = Table(title="Measured and predicted all-reduces", title_justify="left")
    for heading in ("transport", "ranks", "size", "algorithm", "measured", "predicted", "predicted / measured"):
        result.add_column(heading, justify="left" if heading in ("transport", "algorithm") else "right")
    for probe in probes:
        measured, predicted_s = probe.measured, probe.measured.predicted_s(model)
        result.add_row(
            probe.transport,
            str(measured.schedule.nranks),
            format_size(measured.block_bytes),
            probe.algorithm,
            format_time(measured.time_s),
            format_time(predicted_s),
            f"{predicted_s / measured.time_s:.2f}",
        )
    errors = [abs(np.log(probe.measured.predicted_s(model) / probe.measured.time_s)) for probe in probes]
    result.caption = f"half of the predictions are within {np.expm1(np.median(errors)):.0%} of the measured time"
    return result
