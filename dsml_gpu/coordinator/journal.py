"""A coordinator's journal: what it must not forget, in a file (`journal_file`) or, where it has none, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from dsml_gpu.coordinator.records import (
    MAX_OUTCOMES,
    Begun,
    KnownCommunicator,
    KnownServer,
    Membership,
    Outcome,
    Recovered,
    Round,
    changed,
)
from dsml_gpu.errors import FailedPrecondition


class JournalUnusable(FailedPrecondition):
    """A coordinator cannot start with this file; the message names it and says why."""


class Journal(Protocol):
    """What a coordinator must not forget. All calls come from one thread; they raise InternalError where they fail.

    Attributes:
        lasts: it outlives its process.
    """

    lasts: bool

    def load(self) -> Recovered:
        """All that is known."""

    def together(self) -> Any:
        """A ``with`` block whose records are kept all or none. May be nested."""

    def put_server(self, server: KnownServer) -> None:
        """Replaces what is known of the address."""

    def forget_server(self, address: str) -> None: ...

    def put_communicator(self, communicator: KnownCommunicator) -> None:
        """Replaces what is known of the communicator, but for its memberships and its rounds."""

    def change_communicator(
        self, comm_id: int, *, finalized: bool | None = None, checkpoint: tuple[str, tuple[int, ...]] | None = None
    ) -> None:
        """Changes what is not None. Without effect where the communicator is not known.

        Args:
            checkpoint: URL and seats of the last one.
        """

    def forget_communicator(self, comm_id: int) -> None:
        """Forgets it, its memberships and its rounds. Outcomes stay."""

    def put_membership(self, membership: Membership) -> None: ...

    def put_round(self, one_round: Round) -> None:
        """Replaces the one of the same communicator and key."""

    def forget_round(self, comm_id: int, key: str) -> None:
        """Without effect where it is not known."""

    def put_begun(self, begun: Begun) -> None:
        """Replaces the one of the same communicator."""

    def forget_begun(self, comm_id: int) -> None:
        """Without effect where there is none."""

    def put_outcome(self, outcome: Outcome) -> None:
        """Of many, those of the last `MAX_OUTCOMES` are kept."""

    def close(self) -> None:
        """Idempotent."""


def open_journal(path: Path | None) -> Journal:
    """The journal in a file, which is made where there is none; or in memory, where `path` is None.

    Raises:
        JournalUnusable: another coordinator has it, it is damaged or newer than this program, or it cannot be opened.
    """
    if path is None:
        return MemoryJournal()
    from dsml_gpu.coordinator.journal_file import FileJournal  # which needs what only Unix has

    return FileJournal(path)


class MemoryJournal:
    """A journal that ends with its process."""

    lasts = False

    def __init__(self) -> None:
        self._servers: dict[str, KnownServer] = {}
        self._communicators: dict[int, KnownCommunicator] = {}
        self._memberships: dict[tuple[int, int], Membership] = {}
        self._rounds: dict[tuple[int, str], Round] = {}
        self._begun: dict[int, Begun] = {}
        self._outcomes: dict[str, Outcome] = {}

    def load(self) -> Recovered:
        return Recovered(
            tuple(self._servers.values()),
            tuple(self._communicators.values()),
            tuple(self._memberships[key] for key in sorted(self._memberships)),
            tuple(self._rounds.values()),
            tuple(self._outcomes.values()),
            tuple(self._begun[comm_id] for comm_id in sorted(self._begun)),
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        yield

    def put_server(self, server: KnownServer) -> None:
        self._servers[server.address] = server

    def forget_server(self, address: str) -> None:
        self._servers.pop(address, None)

    def put_communicator(self, communicator: KnownCommunicator) -> None:
        self._communicators[communicator.comm_id] = communicator

    def change_communicator(
        self, comm_id: int, *, finalized: bool | None = None, checkpoint: tuple[str, tuple[int, ...]] | None = None
    ) -> None:
        if comm_id in self._communicators:
            self.put_communicator(changed(self._communicators[comm_id], finalized, checkpoint))

    def forget_communicator(self, comm_id: int) -> None:
        self._communicators.pop(comm_id, None)
        self._begun.pop(comm_id, None)
        for key in [key for key in self._memberships if key[0] == comm_id]:
            del self._memberships[key]
        for key_of_round in [key for key in self._rounds if key[0] == comm_id]:
            del self._rounds[key_of_round]

    def put_membership(self, membership: Membership) -> None:
        self._memberships[membership.comm_id, membership.epoch] = membership

    def put_round(self, one_round: Round) -> None:
        self.forget_round(one_round.comm_id, one_round.key)
        self._rounds[one_round.comm_id, one_round.key] = one_round

    def forget_round(self, comm_id: int, key: str) -> None:
        self._rounds.pop((comm_id, key), None)

    def put_begun(self, begun: Begun) -> None:
        self._begun[begun.comm_id] = begun

    def forget_begun(self, comm_id: int) -> None:
        self._begun.pop(comm_id, None)

    def put_outcome(self, outcome: Outcome) -> None:
        self._outcomes[outcome.key] = outcome
        if len(self._outcomes) > MAX_OUTCOMES:
            del self._outcomes[next(iter(self._outcomes))]

    def close(self) -> None:
        pass
