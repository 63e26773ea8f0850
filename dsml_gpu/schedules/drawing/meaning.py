"""What is to be seen and said of the chunks of a collective and of their transfers."""

from __future__ import annotations

from dataclasses import dataclass

from dsml_gpu.schedules.collectives import COLLECTIVES, Collective, Layout
from dsml_gpu.schedules.drawing.palette import owner, partial
from dsml_gpu.schedules.drawing.shapes import Arrow, Cell
from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.verify import Contributions, promised_contributions


@dataclass(frozen=True, slots=True)
class Meaning:
    """Of one schedule's chunks."""

    schedule: Schedule

    @property
    def collective(self) -> Collective:
        return COLLECTIVES[self.schedule.collective]

    @property
    def names_ways(self) -> bool:
        """Each block has a way, from one rank to another, by which it is named."""
        return self.collective.layout in (Layout.PER_PAIR, Layout.LISTED)

    def is_result(self, rank: int, chunk: int, contributions: Contributions) -> bool:
        """Whether these contributions are what the collective promises to the rank in this chunk."""
        return contributions == self.promised(chunk) and rank in self._takers(chunk)

    def promised(self, chunk: int) -> Contributions:
        """What the result holds in a chunk, wherever it is promised."""
        return promised_contributions(self.collective, self.schedule.roles, chunk // self.schedule.parts)

    def colour(self, chunk: int, contributions: Contributions) -> str:
        """The name of a cell's colour; "" for that of an empty one."""
        if not contributions:
            return ""
        if not self.collective.reduces:
            return self.colour_of_owner(self.holder(chunk))
        return self.colour_of_count(contributions.bit_count(), self.promised(chunk).bit_count())

    def colour_of_owner(self, rank: int) -> str:
        """Of what a rank had, where nothing is reduced."""
        return owner(rank / max(1, self.schedule.nranks - 1))

    def colour_of_count(self, count: int, promised: int) -> str:
        """Of so many contributions out of those promised."""
        return "complete" if count == promised else partial((count - 1) / max(1, promised - 2))

    def arrow(self, reduce: bool, begin: tuple[float, float], end: tuple[float, float], width: float) -> Arrow:
        """An arrow as all are drawn that reduce, or that copy. Those that copy are dashed where others reduce."""
        colour, dashed = ("reduce", False) if reduce else ("copy", self.collective.reduces)
        return Arrow(*begin, *end, colour, width, open_head=not reduce, dashed=dashed)

    def label(self, chunk: int, contributions: Contributions) -> str:
        """What is written into a cell where there is room: how many contributions, or whose it is."""
        if not contributions:
            return ""
        if self.collective.reduces:
            return str(contributions.bit_count())
        return f"{self.holder(chunk)}>{self._takers(chunk)[0]}" if self.names_ways else str(self.holder(chunk))

    def note(self, cell: Cell) -> str:
        """What there is to say about a cell."""
        when = f"after step {cell.row - 1}" if cell.row else "at the start"
        return f"rank {cell.rank}, {self._name(cell.chunk)}, {when}: {self._content(cell)}"

    def note_of_transfer(self, step: int, transfer: Transfer) -> str:
        """What there is to say about an arrow."""
        what = "reduced into what it holds" if transfer.reduce else "copied"
        return f"step {step}: {self._name(transfer.chunk)} goes from rank {transfer.src} to rank {transfer.dst}, {what}"

    def _name(self, chunk: int) -> str:
        if not self.names_ways:
            return f"chunk {chunk}"
        return f"chunk {chunk} (from rank {self.holder(chunk)} to rank {self._takers(chunk)[0]})"

    def _content(self, cell: Cell) -> str:
        if not cell.contributions:
            return "nothing"
        result = ", the result" if cell.is_result else ""
        if not self.collective.reduces:
            return f"what rank {self.holder(cell.chunk)} had{result}"
        ranks = [rank for rank in range(self.schedule.nranks) if cell.contributions >> rank & 1]
        promised = self.promised(cell.chunk).bit_count()
        if len(ranks) == promised:
            return f"all {promised} contributions{result}"
        return f"{len(ranks)} of {promised} contributions, of rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"

    def holder(self, chunk: int) -> int:
        """Who has a chunk at the start, where nothing is reduced."""
        return self.collective.holders(self.schedule.roles, chunk // self.schedule.parts)[0]

    def _takers(self, chunk: int) -> tuple[int, ...]:
        return tuple(self.collective.takers(self.schedule.roles, chunk // self.schedule.parts))
