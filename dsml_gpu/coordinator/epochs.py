"""The epochs of a communicator: who is in it at a time, and what the ranks of one epoch are in another.

A seat is what a device had when it came in, and what another device has that takes its place. Ranks are numbered anew in
each epoch: those whose seats are left, in their order, and behind them those that are new.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsml_gpu.errors import InvalidValue, RanksLost


@dataclass(frozen=True, slots=True)
class Epoch:
    """One version of a communicator's membership.

    Attributes:
        number: from 1.
        seats: of each rank.
    """

    number: int
    seats: tuple[int, ...]

    @property
    def nranks(self) -> int:
        return len(self.seats)


class Epochs:
    """All epochs of a communicator, of which the last is the present one.

    Args:
        epochs: those so far, in order, at least one.
    """

    def __init__(self, epochs: Iterable[Epoch]) -> None:
        self._known = {epoch.number: epoch for epoch in epochs}
        self._first = min(self._known)
        self.present = self._known[max(self._known)]
        #: Answers of `kept` so far, each of which is asked for again and again.
        self._kept: dict[Epoch, tuple[int, ...]] = {}

    @property
    def next_seat(self) -> int:
        """A seat that nobody ever had; those that follow are free as well."""
        return 1 + max(seat for epoch in self._known.values() for seat in epoch.seats)

    def next(self, seats: Iterable[int]) -> Epoch:
        """What the next epoch will be; until `begin` there is none."""
        return Epoch(self.present.number + 1, tuple(seats))

    def begin(self, epoch: Epoch) -> None:
        """The next epoch is the present one from now on."""
        self.present = self._known[epoch.number] = epoch
        self._kept.clear()

    def of(self, number: int) -> Epoch:
        """The epoch of a number; 0 is the first one. Raises InvalidValue where there never was one."""
        epoch = self._known.get(number or self._first)
        if epoch is None:
            raise InvalidValue(f"there is no epoch {number} of the communicator; the present one is {self.present.number}")
        return epoch

    def kept(self, epoch: Epoch) -> tuple[int, ...]:
        """The ranks of an epoch that are left; in this order they are ranks 0, 1 ... of the present one.

        Raises:
            RanksLost: none is left.
            InvalidValue: others have come since, which it does not know.
        """
        known = self._kept.get(epoch)
        if known is not None:
            return known
        kept = tuple(rank for rank, seat in enumerate(epoch.seats) if seat in self.present.seats)
        if len(kept) < self.present.nranks:
            raise InvalidValue(
                f"the communicator has {self.present.nranks} ranks in epoch {self.present.number}, of which epoch "
                f"{epoch.number} knows {len(kept)}; the request must use the numbering of an epoch that has all of them"
            )
        if not kept:
            raise RanksLost(f"all {epoch.nranks} ranks of epoch {epoch.number} are lost")
        self._kept[epoch] = kept
        return kept
