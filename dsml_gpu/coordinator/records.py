"""What a coordinator's journal keeps (`journal`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

#: Outcomes are kept for so many operations.
MAX_OUTCOMES = 4096


@dataclass(frozen=True, slots=True)
class KnownServer:
    """A device server.

    Attributes:
        address: host:port.
        registered: it has made itself known; otherwise the coordinator was told of it at its start.
    """

    address: str
    registered: bool


@dataclass(frozen=True, slots=True)
class KnownCommunicator:
    """A communicator that was made and not destroyed.

    Attributes:
        transport: number of ``enum Transport`` that it is forced to.
        on_failure: number of ``enum OnFailure``, as CommInit had it.
        finalized: it takes no more operations.
        checkpoint: URL of its last complete checkpoint; empty: there is none.
    """

    comm_id: int
    transport: int
    on_failure: int
    finalized: bool = False
    checkpoint: str = ""


def changed(one: KnownCommunicator, finalized: bool | None, checkpoint: str | None) -> KnownCommunicator:
    """The same but for what is not None."""
    return replace(
        one,
        finalized=one.finalized if finalized is None else finalized,
        checkpoint=one.checkpoint if checkpoint is None else checkpoint,
    )


@dataclass(frozen=True, slots=True)
class Member:
    """A device that has, or had, a rank.

    Attributes:
        process_uid: of the process that it was in; the same device in another process has forgotten everything.
    """

    device_id: int
    address: str
    process_uid: str


@dataclass(frozen=True, slots=True)
class Membership:
    """Who is in a communicator in one of its epochs, in the order of ranks."""

    comm_id: int
    epoch: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """A round of control messages that devices may have begun, and that nobody has settled.

    Attributes:
        number: as in `ExecuteRequest.round`.
        committing: every rank has done its part, so the round is to be brought to its end; otherwise it may be undone.
        requests: what each rank was told, by rank: bytes of `ExecuteRequest`.
        key, method: of the operation that it is the last round of, so that whoever settles it can keep the operation's
            outcome; empty: it has no key, or more rounds follow.
        answer: bytes of the operation's response, which it has once the round is settled.
    """

    comm_id: int
    number: int
    epoch: int
    committing: bool
    requests: Mapping[int, bytes]
    key: str = ""
    method: str = ""
    answer: bytes = b""


@dataclass(frozen=True, slots=True)
class Refused:
    """The error that an operation ended with, as the wire carries it (`errors.error_from`)."""

    code: str
    refusal: str
    message: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the operation with an idempotency key ended.

    Attributes:
        comm_id: its communicator; 0: none.
        method: of GPUCoordinator.
        answer: bytes of its response.
        refused: what it was refused or failed with; None: it ended well.
    """

    key: str
    comm_id: int
    method: str
    answer: bytes = b""
    refused: Refused | None = None


@dataclass(frozen=True, slots=True)
class Recovered:
    """All that a journal keeps.

    Attributes:
        memberships: by communicator and epoch.
        rounds: at most one for each communicator.
        outcomes: the oldest first.
    """

    servers: tuple[KnownServer, ...] = ()
    communicators: tuple[KnownCommunicator, ...] = ()
    memberships: tuple[Membership, ...] = ()
    rounds: tuple[Round, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
