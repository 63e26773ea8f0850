"""`dsml-gpu explain`: which algorithm would run a collective, how long each would take, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dsml_gpu.cli.serve import cost_model_or_exit, fail
from dsml_gpu.cli.units import format_size
from dsml_gpu.client import connect
from dsml_gpu.client.collectives import TRANSPORTS
from dsml_gpu.coordinator.choice import format_time, time_of_passes_s, topology_of
from dsml_gpu.coordinator.passes import ALGORITHM, Team, may_open_memory
from dsml_gpu.device.service import usable_cores
from dsml_gpu.errors import DsmlError
from dsml_gpu.schedules import COLLECTIVES, Layout, Roles, Schedule, algorithms_of, chunk_bounds
from dsml_gpu.schedules.cost_model import CostModel
from dsml_gpu.schedules.ranking import Ranked, rank_algorithms
from dsml_gpu.schedules.topology import Topology


@dataclass(frozen=True, slots=True)
class Setup:
    """What is to be explained.

    Attributes:
        collective: by name.
        nbytes: of the largest buffer of a rank.
        nranks: number of ranks.
        root: of a rooted collective.

    Raises:
        ValueError: on construction, where a value does not do.
    """

    collective: str
    nbytes: int
    nranks: int
    root: int = 0

    def __post_init__(self) -> None:
        if self.collective not in COLLECTIVES or self.collective == "send_recv":
            known = ", ".join(name for name in COLLECTIVES if name != "send_recv")
            raise ValueError(f"unknown collective {self.collective!r}; known: {known}")
        if not 0 <= self.root < self.nranks:
            raise ValueError(f"root {self.root} is not one of {self.nranks} ranks")

    @property
    def block_bytes(self) -> list[int]:
        """Bytes of each block: a rank's largest buffer has one, or one for each rank."""
        layout = COLLECTIVES[self.collective].layout
        nblocks = COLLECTIVES[self.collective].nblocks(Roles(self.nranks))
        if self.collective == "barrier":
            return [1]
        return [self.nbytes if layout is Layout.WHOLE else self.nbytes // self.nranks] * nblocks

    @property
    def bytes_of_passes(self) -> int:
        """Bytes that are read and written where all ranks have each other's memory open."""
        collective, roles = COLLECTIVES[self.collective], Roles(self.nranks, self.root)
        return sum(
            nbytes * (len(collective.holders(roles, block)) + len(collective.takers(roles, block)))
            for block, nbytes in enumerate(self.block_bytes)
        )


def run(setup: Setup, target: str | None, cost_model_file: Path | None) -> None:
    """Prints the candidates. Exit status 1, with one line, where that is not possible.

    Args:
        target: explain the choice of this coordinator, on its first devices; None: of ranks in processes of this machine.
        cost_model_file: None: the coordinator's, or the default.
    """
    try:
        team = None
        if target is None:
            model, topology = cost_model_or_exit(cost_model_file), _this_machine(setup.nranks)
            where = "in processes of this machine, over gRPC"
        else:
            model, topology, team = _of_coordinator(target, setup.nranks)
            where = f"on devices of {target}"
            if cost_model_file is not None:
                model = cost_model_or_exit(cost_model_file)
    except DsmlError as error:
        fail(str(error))
    ranked = rank_algorithms(algorithms_of(setup.collective).values(), setup.block_bytes, topology, model, root=setup.root)
    console = Console()
    console.print(table(setup, ranked, topology, where))
    if team is not None and setup.collective != "barrier":
        nbytes = setup.bytes_of_passes
        predicted_s = time_of_passes_s(model, nbytes, len(team.workers(nbytes)))
        console.print(
            f"All these ranks can have each other's memory open, and where they do, {ALGORITHM} is chosen: by one pass over "
            f"the memory, predicted {format_time(predicted_s)}."
        )


def table(setup: Setup, ranked: Sequence[Ranked], topology: Topology, where: str) -> Table:
    """The candidates that send slices, the fastest first."""
    result = Table(
        title=f"{setup.collective} of {format_size(setup.nbytes)} on {setup.nranks} ranks {where}",
        title_justify="left",
        caption="chunks and bytes: of the rank that sends the most",
        caption_justify="left",
    )
    for heading in ("algorithm", "predicted", "of the best", "steps", "chunks", "bytes", "source"):
        result.add_column(heading, justify="left" if heading in ("algorithm", "source") else "right")
    for one in ranked:
        schedule = one.algorithm.schedule(setup.nranks, root=setup.root, hosts=topology.host_of)
        chunks, nbytes = sent_by_busiest(schedule, setup.block_bytes)
        result.add_row(
            one.algorithm.name,
            format_time(one.time_s),
            f"{one.time_s / (ranked[0].time_s or 1):.2f}",
            str(len(schedule.steps)),
            str(chunks),
            format_size(nbytes),
            one.algorithm.source,
            style="bold" if one is ranked[0] else "",
        )
    return result


def sent_by_busiest(schedule: Schedule, block_bytes: Sequence[int]) -> tuple[int, int]:
    """Chunks and bytes that the rank sends which sends the most of each."""
    chunks: Counter[int] = Counter()
    nbytes: Counter[int] = Counter()
    for step in schedule.steps:
        for transfer in step:
            block, part = divmod(transfer.chunk, schedule.parts)
            first, last = chunk_bounds(block_bytes[block], schedule.parts, part)
            chunks[transfer.src] += 1
            nbytes[transfer.src] += last - first
    return max(chunks.values(), default=0), max(nbytes.values(), default=0)


def _this_machine(nranks: int) -> Topology:
    return Topology(host_of=(0,) * nranks, cores=(usable_cores(),))


def _of_coordinator(target: str, nranks: int) -> tuple[CostModel, Topology, Team | None]:
    """Its cost model, where its first devices are, and who does the work if they can open each other's memory."""
    with connect(target) as client:
        devices = client.devices()
        if len(devices) < nranks:
            fail(f"{nranks} ranks need as many devices; the coordinator at {target} has {len(devices)}")
        metadata = [device.metadata for device in devices[:nranks]]
        team = Team.of(metadata) if may_open_memory(metadata) else None
        return client.cost_model(), topology_of(metadata, TRANSPORTS["auto"]), team
