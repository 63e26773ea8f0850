"""Rounds that are done on one rank, and of which nobody has said yet whether they ended well on all."""

from __future__ import annotations

from dsml_gpu.device.undo import Undo

#: A device and a communicator.
Key = tuple[int, int]


class UnsettledRounds:
    """By device and communicator, the last atomic round that is done here, and what it has overwritten.

    A rank does one round after the other, so there is never more than one of a communicator.
    """

    def __init__(self) -> None:
        self._rounds: dict[Key, tuple[int, Undo]] = {}

    def done(self, key: Key, round_id: int, undo: Undo) -> None:
        """A round is done here, or is about to be: `undo` can bring back what it overwrites. The last one is over."""
        self._rounds[key] = round_id, undo

    def next_round(self, key: Key) -> None:
        """Another round begins, so the last one has ended well everywhere: what it has overwritten is needed no more."""
        _, undo = self._rounds.pop(key, (0, None))
        if undo is not None:
            undo.forget()

    def round_of(self, key: Key) -> int:
        """The round that is to be settled; 0: there is none."""
        round_id, _ = self._rounds.get(key, (0, None))
        return round_id

    async def settle(self, key: Key, round_id: int, *, roll_back: bool) -> None:
        """Says how a round has ended. Does nothing where another one, or none, is to be settled.

        Args:
            roll_back: what it has overwritten comes back, and is there when this returns; else it is not needed any more.

        Raises:
            InternalError: from the device's memory.
        """
        unsettled_id, undo = self._rounds.get(key, (0, None))
        if undo is None or unsettled_id != round_id:
            return
        del self._rounds[key]
        if roll_back:
            await undo.roll_back()
        undo.forget()

    def leave(self, key: Key) -> None:
        """The device leaves the communicator: what its last round has overwritten goes with it."""
        self._rounds.pop(key, None)
