"""A coordinator's journal in a file of SQLite.

A record is in the file when its method returns, so it outlives the process, whatever ends it. It does not wait for the
disk: when the whole machine stops, the last records may be lost, but what is there then is as it was some moments before.
Waiting would take some 200 us instead of 10 on an SSD (``synchronous=FULL`` instead of ``NORMAL``), on the way of every
collective.

Writes are that short because they only append to the write-ahead log. The event loop makes them itself; a thread brings the
log's content into the database now and then, which does wait for the disk.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import sqlite3
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dsml_gpu.coordinator.journal import JournalUnusable
from dsml_gpu.coordinator.records import (
    MAX_OUTCOMES,
    Begun,
    KnownCommunicator,
    KnownServer,
    Member,
    Membership,
    Outcome,
    Recovered,
    Refused,
    Round,
    changed,
)
from dsml_gpu.errors import InternalError

log = logging.getLogger(__name__)

#: Of the file's form. One that is newer than this is refused; an older one becomes a present one (`_bring_up`).
#: 1: nothing of seats, and no rounds. 2: both.
VERSION = 2
#: SQLite's application_id, by which a journal is told from other databases.
_APPLICATION_ID = 0x64736D6C
#: So many records are written before the log's content goes into the database.
_RECORDS_PER_CHECKPOINT = 1000
#: A log of more pages of 4 KiB is begun anew.
_LONG_LOG_PAGES = 4096
#: Outcomes are deleted so many at a time.
_OUTCOMES_PER_DELETION = 256

_COMMUNICATORS = """
CREATE TABLE communicators (
    comm_id INTEGER PRIMARY KEY, transport INTEGER, on_failure INTEGER, finalized INTEGER, checkpoint TEXT,
    checkpoint_seats BLOB, crc INTEGER
);
CREATE TABLE memberships (comm_id INTEGER, epoch INTEGER, members BLOB, crc INTEGER, PRIMARY KEY (comm_id, epoch));
CREATE TABLE rounds (
    position INTEGER PRIMARY KEY, comm_id INTEGER, idempotency_key TEXT, number INTEGER, calls INTEGER, passes INTEGER,
    result BLOB, crc INTEGER, UNIQUE (comm_id, idempotency_key)
);
CREATE TABLE begun (
    comm_id INTEGER PRIMARY KEY, idempotency_key TEXT, number INTEGER, calls INTEGER, requests BLOB, crc INTEGER
);
"""
_SCHEMA = f"""{_COMMUNICATORS}
CREATE TABLE servers (address TEXT PRIMARY KEY, registered INTEGER, crc INTEGER);
CREATE TABLE outcomes (
    number INTEGER PRIMARY KEY, idempotency_key TEXT UNIQUE, comm_id INTEGER, method TEXT, answer BLOB, code TEXT,
    refusal TEXT, message TEXT, crc INTEGER
);
"""


class FileJournal:
    """A journal in a file of SQLite, for one coordinator at a time. See `open_journal`."""

    lasts = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._depth = 0
        self._records = 0
        self._checkpoint: _Checkpoint | None = None
        self._lock = _lock(path)
        try:
            if not path.exists():
                _create(path)
            self._database = _opened(path)
            self._noutcomes, self._last_outcome = self._database.execute(
                "SELECT count(*), coalesce(max(number), 0) FROM outcomes"
            ).fetchone()
            (self._last_position,) = self._database.execute("SELECT coalesce(max(position), 0) FROM rounds").fetchone()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, sqlite3.Error | OSError | UnicodeDecodeError):  # names in it may be what is damaged
                raise JournalUnusable(f"the journal {path} is damaged or cannot be opened: {error}") from None
            raise

    def load(self) -> Recovered:
        return Recovered(
            tuple(KnownServer(address, bool(registered)) for address, registered in self._rows("servers", "address")),
            self._communicators("comm_id"),
            tuple(
                Membership(_unsigned(comm_id), _unsigned(epoch), _members_of(members))
                for comm_id, epoch, members in self._rows("memberships", "comm_id, epoch")
            ),
            tuple(
                Round(_unsigned(comm_id), key, _unsigned(number), calls, _unsigned(of_passes), result)
                for _, comm_id, key, number, calls, of_passes, result in self._rows("rounds", "position")
            ),
            tuple(
                Outcome(key, _unsigned(comm_id), method, answer, Refused(code, refusal, message) if code else None)
                for _, key, comm_id, method, answer, code, refusal, message in self._rows("outcomes", "number")
            ),
            tuple(
                Begun(_unsigned(comm_id), key, _unsigned(number), calls, tuple(_split(requests)))
                for comm_id, key, number, calls, requests in self._rows("begun", "comm_id")
            ),
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        if self._depth == 0:
            self._execute("BEGIN IMMEDIATE")
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self._execute("COMMIT")
        except BaseException:
            if self._depth == 1:
                with suppress(sqlite3.Error):  # it may be that SQLite has done so
                    self._database.execute("ROLLBACK")
            raise
        finally:
            self._depth -= 1

    def put_server(self, server: KnownServer) -> None:
        self._put("servers", server.address, int(server.registered))

    def forget_server(self, address: str) -> None:
        self._execute("DELETE FROM servers WHERE address = ?", address)

    def put_communicator(self, communicator: KnownCommunicator) -> None:
        one = communicator
        seats = _fields([b"%d" % seat for seat in one.checkpoint_seats])
        values = (one.transport, one.on_failure, int(one.finalized), one.checkpoint, seats)
        self._put("communicators", _signed(one.comm_id), *values)

    def change_communicator(
        self, comm_id: int, *, finalized: bool | None = None, checkpoint: tuple[str, tuple[int, ...]] | None = None
    ) -> None:
        for communicator in self._communicators("comm_id", "WHERE comm_id = ?", _signed(comm_id)):
            self.put_communicator(changed(communicator, finalized, checkpoint))

    def forget_communicator(self, comm_id: int) -> None:
        with self.together():
            for table in ("communicators", "memberships", "rounds", "begun"):
                self._execute(f"DELETE FROM {table} WHERE comm_id = ?", _signed(comm_id))

    def put_membership(self, membership: Membership) -> None:
        ids = (_signed(membership.comm_id), _signed(membership.epoch))
        self._put("memberships", *ids, _fields([field for member in membership.members for field in _fields_of(member)]))

    def put_round(self, one_round: Round) -> None:
        one = one_round
        self._last_position += 1
        numbers = (_signed(one.number), one.calls, _signed(one.passes))
        self._put("rounds", self._last_position, _signed(one.comm_id), one.key, *numbers, one.result)

    def forget_round(self, comm_id: int, key: str) -> None:
        self._execute("DELETE FROM rounds WHERE comm_id = ? AND idempotency_key = ?", _signed(comm_id), key)

    def put_begun(self, begun: Begun) -> None:
        numbers = (_signed(begun.number), begun.calls)
        self._put("begun", _signed(begun.comm_id), begun.key, *numbers, _fields(begun.requests))

    def forget_begun(self, comm_id: int) -> None:
        self._execute("DELETE FROM begun WHERE comm_id = ?", _signed(comm_id))

    def put_outcome(self, outcome: Outcome) -> None:
        self._last_outcome += 1
        refused = outcome.refused or Refused("", "", "")
        self._put(
            "outcomes",
            self._last_outcome,
            outcome.key,
            _signed(outcome.comm_id),
            outcome.method,
            outcome.answer,
            refused.code,
            refused.refusal,
            refused.message,
        )
        self._noutcomes += 1
        if self._noutcomes >= MAX_OUTCOMES + _OUTCOMES_PER_DELETION:
            self._execute("DELETE FROM outcomes WHERE number <= ?", self._last_outcome - MAX_OUTCOMES)
            self._noutcomes = MAX_OUTCOMES

    def close(self) -> None:
        if self._lock < 0:
            return
        if self._checkpoint is not None:
            self._checkpoint.join()
        with suppress(sqlite3.Error):  # what it has to say was said when it was written
            self._database.close()
        os.close(self._lock)
        self._lock = -1

    def _put(self, table: str, *values: Any) -> None:
        marks = ", ".join("?" * (len(values) + 1))
        self._execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", *values, _crc(values))

    def _execute(self, statement: str, *values: Any) -> None:
        try:
            self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise InternalError(f"the journal {self.path} cannot be written: {error}") from error
        self._records += 1
        if not self._database.in_transaction:
            self._keep_log_short()

    def _keep_log_short(self) -> None:
        """Has the log brought into the database, and begun anew where it is long.

        SQLite begins it anew when all of it is in the database while somebody writes. A thread brings most of it there,
        which takes long, as the system has to have it on the disk; what has been written meanwhile is little.
        """
        if self._checkpoint is None:
            if self._records >= _RECORDS_PER_CHECKPOINT:
                self._records = 0
                self._checkpoint = _Checkpoint(self.path)
                self._checkpoint.start()
        elif not self._checkpoint.is_alive():
            if self._checkpoint.log_pages > _LONG_LOG_PAGES:
                with suppress(sqlite3.Error):  # then it is longer, until the next time
                    self._database.execute("PRAGMA wal_checkpoint(PASSIVE)")
            self._checkpoint = None

    def _communicators(self, order: str, where: str = "", *values: Any) -> tuple[KnownCommunicator, ...]:
        return tuple(
            KnownCommunicator(
                _unsigned(comm_id), transport, on_failure, bool(finalized), checkpoint, tuple(map(int, _split(seats)))
            )
            for comm_id, transport, on_failure, finalized, checkpoint, seats in self._rows(
                "communicators", order, where, *values
            )
        )

    def _rows(self, table: str, order: str, where: str = "", *values: Any) -> Iterator[Sequence[Any]]:
        """Rows of a table. Raises JournalUnusable where one is not what was written."""
        try:
            rows = self._database.execute(f"SELECT * FROM {table} {where} ORDER BY {order}", values).fetchall()
        except sqlite3.Error as error:
            raise JournalUnusable(f"the journal {self.path} is damaged: {error}") from None
        for *values, crc in rows:
            if crc != _crc(values):
                raise JournalUnusable(f"the journal {self.path} is damaged: a row of its {table} is not what was written")
            yield values


def _lock(path: Path) -> int:
    """Takes the file for this process, until the descriptor that it returns is closed. Raises JournalUnusable."""
    beside = path.resolve()
    beside = beside.with_name(f"{beside.name}.lock")
    try:
        # A file of its own: closing any descriptor of the database would end SQLite's locks.
        lock = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise JournalUnusable(f"the journal {path} cannot be opened: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    except OSError as error:
        pid = os.pread(lock, 20, 0).decode("ascii", "replace").strip() or "?"
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise JournalUnusable(f"the journal {path} is in use by another coordinator, process {pid}") from None
        raise JournalUnusable(f"the journal {path} cannot be locked: {error}") from None
    return lock


def _create(path: Path) -> None:
    """Makes an empty journal, whole or not at all: a file without content is then never one that was just begun."""
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        database = sqlite3.connect(beside, isolation_level=None)
        database.executescript(
            f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {VERSION}; BEGIN; {_SCHEMA} COMMIT;"
        )
        database.close()
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _opened(path: Path) -> sqlite3.Connection:
    """The database, once it is clear that it is one of ours, and whole. Raises sqlite3.Error and JournalUnusable."""
    if path.stat().st_size == 0:
        raise JournalUnusable(f"the journal {path} is damaged: it is empty; delete it to begin anew")
    database = sqlite3.connect(path, isolation_level=None)
    try:
        # Nothing is written before that: somebody else's file stays what it is.
        (application,), (version,) = (
            database.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        if application != _APPLICATION_ID:
            raise JournalUnusable(f"{path} is no journal of a coordinator, but another database")
        if version > VERSION:
            raise JournalUnusable(
                f"the journal {path} is of version {version}, of a newer dsml-gpu; this one knows up to {VERSION}"
            )
        ((result,), *_) = database.execute("PRAGMA quick_check").fetchall()
        if result != "ok":
            raise JournalUnusable(f"the journal {path} is damaged: {result}")
        _use_log(database, path)
        if version < VERSION:
            _bring_up(database, path, version)
    except BaseException:
        database.close()
        raise
    return database


def _bring_up(database: sqlite3.Connection, path: Path, version: int) -> None:
    """Makes a file of an older version one of this one, whole or not at all.

    Communicators of version 1 are forgotten: what they need to go on was not recorded. Servers and outcomes stay.
    """
    log.warning(
        "the journal %s is of version %d; its communicators are forgotten, as no coordinator can resume them", path, version
    )
    tables = "".join(f"DROP TABLE {table}; " for table in ("communicators", "memberships", "rounds"))
    database.executescript(f"BEGIN IMMEDIATE; {tables} {_COMMUNICATORS} PRAGMA user_version = {VERSION}; COMMIT;")


def _use_log(database: sqlite3.Connection, path: Path) -> None:
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute("PRAGMA wal_autocheckpoint = 0")
    (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise JournalUnusable(f"the journal {path} is where SQLite can have no write-ahead log, such as a network share")


class _Checkpoint(threading.Thread):
    """Brings the log's content into the database, while others go on writing.

    Attributes:
        log_pages: that the log had when it ended; 0: not known.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(name="dsml-gpu-journal", daemon=True)
        self._path = path
        self.log_pages = 0

    def run(self) -> None:
        with suppress(sqlite3.Error, JournalUnusable):  # then the log is longer, until the next time
            database = sqlite3.connect(self._path, isolation_level=None)
            try:
                _use_log(database, self._path)
                _, self.log_pages, _ = database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            finally:
                database.close()


# ---- values as SQLite has them ----------------------------------------------------------------------------------------


def _signed(number: int) -> int:
    """An unsigned number of 64 bits as a signed one, as SQLite has them."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _unsigned(number: int) -> int:
    return number % (1 << 64)


def _crc(values: Sequence[Any]) -> int:
    """By which a row that is not what was written is found; SQLite checks only how its pages hang together."""
    crc = 0
    for value in values:
        piece = value if isinstance(value, bytes) else str(value).encode()
        crc = zlib.crc32(piece, zlib.crc32(b"%d:" % len(piece), crc))
    return crc


def _fields(fields: Sequence[bytes]) -> bytes:
    """Pieces of any length as one."""
    return b"".join(b"%d:" % len(field) + field for field in fields)


def _split(whole: bytes) -> list[bytes]:
    """The pieces that `_fields` has made one of."""
    fields, start = [], 0
    while start < len(whole):
        colon = whole.index(b":", start)
        start, end = colon + 1, colon + 1 + int(whole[start:colon])
        fields.append(whole[start:end])
        start = end
    return fields


def _fields_of(member: Member) -> tuple[bytes, ...]:
    uid, numbers = member.process_uid.encode(), (b"%d" % member.seat, b"%d" % member.embedded)
    return b"%d" % member.device_id, member.address.encode(), uid, *numbers


def _members_of(whole: bytes) -> tuple[Member, ...]:
    fields = iter(_split(whole))
    return tuple(
        Member(int(device_id), address.decode(), process_uid.decode(), int(seat), bool(int(embedded)))
        for device_id, address, process_uid, seat, embedded in zip(*[fields] * 5, strict=True)
    )
