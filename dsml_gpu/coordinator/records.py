"""What a coordinator's journal keeps (`journal`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsml_gpu.errors import DsmlError

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
        checkpoint_seats: of the checkpoint's ranks (`epochs`).
    """

    comm_id: int
    transport: int
    on_failure: int
    finalized: bool = False
    checkpoint: str = ""
    checkpoint_seats: tuple[int, ...] = ()


def changed(
    one: KnownCommunicator, finalized: bool | None, checkpoint: tuple[str, tuple[int, ...]] | None
) -> KnownCommunicator:
    """The same but for what is not None.

    Args:
        checkpoint: URL and seats.
    """
    url, seats = (one.checkpoint, one.checkpoint_seats) if checkpoint is None else checkpoint
    return replace(one, finalized=one.finalized if finalized is None else finalized, checkpoint=url, checkpoint_seats=seats)


@dataclass(frozen=True, slots=True)
class Member:
    """A device that has, or had, a rank.

    Attributes:
        process_uid: of the process that it was in; the same device in another process has forgotten everything.
        seat: see `epochs`.
        embedded: it lives in the coordinator's own process, and ends with it.
    """

    device_id: int
    address: str
    process_uid: str
    seat: int
    embedded: bool = False


@dataclass(frozen=True, slots=True)
class Membership:
    """Who is in a communicator in one of its epochs, in the order of ranks."""

    comm_id: int
    epoch: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """How far an operation is. Recorded when a round of control messages has ended well on all ranks of a communicator,
    before any of them is told to forget how to undo it: this is what makes the round irrevocable.

    Attributes:
        key: of the operation; empty: it has none.
        number: the communicator's last atomic round by then, as in `ExecuteRequest.round`; 0: there was none.
        calls: so many of the operation's calls, its first ones, have ended well.
        passes: number of the communicator's last round of passes by then, as in `ExecuteRequest.round`; 0: there was none.
        result: bytes of `CollectiveResult` of these.
    """

    comm_id: int
    key: str
    number: int
    calls: int
    passes: int = 0
    result: bytes = b""


@dataclass(frozen=True, slots=True)
class Begun:
    """A round of passes that is about to begin, and goes to its end from then on, or has not happened.

    Attributes:
        key: of the operation; empty: it has none.
        number: as in `ExecuteRequest.round`.
        calls: so many of the operation's calls will have ended when it has.
        requests: bytes of the `ExecuteRequest` of each rank that has work.
    """

    comm_id: int
    key: str
    number: int
    calls: int
    requests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The error that an operation ended with, as the wire carries it (`errors.error_from`)."""

    code: str
    refusal: str
    message: str

    @classmethod
    def of(cls, error: DsmlError) -> Refused:
        return cls(error.code, error.refusal, str(error))


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the operation with an idempotency key ended.

    Attributes:
        comm_id: its communicator; 0: none.
        method: of GPUCoordinator; empty: not known, of one that was refused or has failed.
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
        rounds: the oldest first.
        begun: at most one for each communicator; it may have ended since.
        outcomes: the oldest first.
    """

    servers: tuple[KnownServer, ...] = ()
    communicators: tuple[KnownCommunicator, ...] = ()
    memberships: tuple[Membership, ...] = ()
    rounds: tuple[Round, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    begun: tuple[Begun, ...] = ()
