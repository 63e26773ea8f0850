"""The journal: what is recorded is there again, also after kill -9, and a file that is not right is refused."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from dsml_gpu.coordinator.journal import Journal, JournalUnusable, MemoryJournal, open_journal
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
)
from dsml_gpu.errors import InternalError

ROOT = Path(__file__).parents[2]
LARGEST = (1 << 64) - 1
#: Of one process that writes; starting it takes most of it.
LIMIT_S = 30.0
COMM = KnownCommunicator(5, transport=2, on_failure=1)
MEMBERS = (Member(1, "10.0.0.5:50051", "uid-1", 0), Member(LARGEST, "[::1]:50051", "ü:2", 7, embedded=True))
ROUND = Round(5, "a key", LARGEST, 3, 1 << 63, b"\x00:17:\xff")
BEGUN = Begun(5, "a key", LARGEST, 3, (b"", b"3:\x00"))
OUTCOME = Outcome("a key", 5, "Collective", b"\x00\xff")


@pytest.fixture(params=["file", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "state" if request.param == "file" else None


def reopened(journal: Journal, path: Path | None) -> Journal:
    """The journal as the next process finds it."""
    if path is None:
        return journal
    journal.close()
    return open_journal(path)


def test_a_new_journal_is_empty(path: Path | None) -> None:
    journal = open_journal(path)
    assert journal.load() == Recovered()
    journal.close()
    journal.close()


def test_all_that_is_recorded_is_there_again(path: Path | None) -> None:
    journal = open_journal(path)
    servers = (KnownServer("10.0.0.5:50051", registered=False), KnownServer("[::1]:50051", registered=True))
    seats = (0, 12, 3)
    comms = (COMM, KnownCommunicator(LARGEST - 1, 0, 3, finalized=True, checkpoint="s3://bücket/x", checkpoint_seats=seats))
    memberships = (Membership(5, 1, MEMBERS), Membership(5, 2, MEMBERS[1:]), Membership(6, 1, ()))
    refused = Outcome("other", 0, "CommInit", refused=Refused("NOT_FOUND", "DEVICE_NOT_FOUND", "no device 7\0"))
    for server in servers:
        journal.put_server(server)
    for comm in comms:
        journal.put_communicator(comm)
    for membership in memberships:
        journal.put_membership(membership)
    rounds = (replace(ROUND, key=""), ROUND, replace(ROUND, comm_id=LARGEST))
    for one_round in (ROUND, *rounds):  # one that is put again is the newest
        journal.put_round(one_round)
    for begun in (replace(BEGUN, calls=1), BEGUN, replace(BEGUN, comm_id=6, requests=())):
        journal.put_begun(begun)
    for outcome in (OUTCOME, refused):
        journal.put_outcome(outcome)
    again = reopened(journal, path)
    recovered = again.load()
    assert recovered.servers == servers
    assert set(recovered.communicators) == set(comms)
    assert recovered.memberships == memberships
    assert recovered.rounds == rounds
    assert recovered.begun == (BEGUN, replace(BEGUN, comm_id=6, requests=()))
    assert recovered.outcomes == (OUTCOME, refused)
    again.close()


def test_what_is_recorded_again_replaces_what_was_there(path: Path | None) -> None:
    journal = open_journal(path)
    journal.put_server(KnownServer("a:1", registered=False))
    journal.put_server(KnownServer("a:1", registered=True))
    finalized = replace(COMM, finalized=True)
    journal.put_communicator(COMM)
    journal.put_membership(Membership(5, 1, MEMBERS))
    journal.put_communicator(finalized)
    later = replace(ROUND, number=4, calls=5)
    journal.put_round(ROUND)
    journal.put_round(later)
    expected = Recovered((KnownServer("a:1", registered=True),), (finalized,), (Membership(5, 1, MEMBERS),), (later,))
    journal = reopened(journal, path)
    assert journal.load() == expected
    journal.forget_round(5, ROUND.key)
    journal.forget_round(5, "another")
    journal.change_communicator(5, checkpoint=("/some/folder", (1, 0)))
    journal.change_communicator(5, finalized=False)
    journal.change_communicator(6, finalized=True)
    journal = reopened(journal, path)
    changed = replace(COMM, checkpoint="/some/folder", checkpoint_seats=(1, 0))
    assert journal.load() == replace(expected, rounds=(), communicators=(changed,))
    journal.close()


def test_what_is_forgotten_is_not_there_again(path: Path | None) -> None:
    journal = open_journal(path)
    others = (replace(COMM, comm_id=6), Membership(6, 1, MEMBERS), replace(ROUND, comm_id=6))
    for comm, membership, one_round in ((COMM, Membership(5, 1, MEMBERS), ROUND), others):
        journal.put_communicator(comm)
        journal.put_membership(membership)
        journal.put_round(one_round)
    journal.put_outcome(OUTCOME)
    journal.put_begun(BEGUN)
    journal.put_server(KnownServer("a:1", registered=True))
    journal.forget_communicator(5)
    journal.forget_server("a:1")
    journal.forget_server("b:1")
    journal = reopened(journal, path)
    assert journal.load() == Recovered((), (others[0],), (others[1],), (others[2],), (OUTCOME,))
    journal.close()


def test_the_newest_outcomes_are_kept(path: Path | None) -> None:
    journal = open_journal(path)
    for number in range(2 * MAX_OUTCOMES):
        journal.put_outcome(replace(OUTCOME, key=str(number)))
    journal = reopened(journal, path)
    keys = [outcome.key for outcome in journal.load().outcomes]
    assert keys[-MAX_OUTCOMES:] == [str(number) for number in range(MAX_OUTCOMES, 2 * MAX_OUTCOMES)]
    assert len(keys) < 1.1 * MAX_OUTCOMES
    journal.close()


def test_records_together_are_kept_all_or_none(tmp_path: Path) -> None:
    journal = open_journal(tmp_path / "state")

    def fail_after(*records: Callable[[], None]) -> None:
        with journal.together():
            for record in records:
                record()
            raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        fail_after(lambda: journal.put_communicator(COMM), lambda: journal.forget_communicator(6))
    assert journal.load() == Recovered()
    with journal.together():
        journal.put_communicator(COMM)
        with journal.together():
            journal.put_outcome(OUTCOME)
    journal.close()
    journal = open_journal(tmp_path / "state")
    assert journal.load() == Recovered(communicators=(COMM,), outcomes=(OUTCOME,))
    journal.close()


# ---- kill -9 ----------------------------------------------------------------------------------------------------------


def record(journal: Journal, number: int) -> None:
    """The record of that number in an endless row of them, of all kinds."""
    comm_id, epoch = number % 7, number // 7
    kind = number % 6
    if kind == 0:
        with journal.together():
            journal.put_communicator(KnownCommunicator(comm_id, 1, epoch))
            journal.put_membership(Membership(comm_id, epoch % 5, MEMBERS * (number % 3)))
    elif kind == 1:
        journal.put_round(Round(comm_id, f"key {number % 5}", number, epoch, 3, b"x" * (number % 997)))
        journal.put_begun(Begun(comm_id, "", number, epoch, (b"z",) * (number % 3)))
    elif kind == 2:
        journal.put_server(KnownServer(f"10.0.0.{number % 250}:1", bool(number % 4)))
    elif kind == 3:
        with journal.together():
            journal.forget_round((number - 2) % 7, f"key {(number - 2) % 5}")
            journal.put_outcome(Outcome(f"key {number}", comm_id, "Collective", b"y" * (number % 301)))
    elif kind == 4:
        journal.put_outcome(Outcome(f"key {number}", 0, "Malloc", refused=Refused("NOT_FOUND", "X", str(number))))
    elif number % 35 == 5:
        journal.forget_communicator(comm_id)


def write_on(path: str, start: str) -> None:
    """The process that is killed: it says of each record that it is there."""
    journal = open_journal(Path(path))
    for number in itertools.count(int(start)):
        record(journal, number)
        sys.stdout.buffer.write(b"%d\n" % number)
        sys.stdout.buffer.flush()


def comparable(recovered: Recovered) -> tuple[object, ...]:
    newest = recovered.outcomes[-MAX_OUTCOMES:]
    return {*recovered.servers}, {*recovered.communicators}, recovered.memberships, _by_comm(recovered), newest


def _by_comm(recovered: Recovered) -> dict[int, list[Round]]:
    return {comm_id: [one for one in recovered.rounds if one.comm_id == comm_id] for comm_id in range(7)}


@pytest.mark.parametrize(
    ("seed", "kills"), [(1, 8), pytest.param(2, 200, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_a_killed_process_has_lost_nothing(tmp_path: Path, seed: int, kills: int) -> None:
    """Each process goes on with the file of the one before, as far as it was told, and is killed at some moment."""
    path, generator = tmp_path / "state", random.Random(seed)
    expected, next_number = MemoryJournal(), 0
    for _ in range(kills):
        start = "import sys, tests.coordinator.test_journal as m; m.write_on(*sys.argv[1:])"
        command = [sys.executable, "-c", start, str(path), str(next_number)]
        writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        with writer.stdout as stdout:
            read = [stdout.readline() for _ in range(generator.randrange(1, 2000))]
            writer.kill()
            read += stdout.readlines()  # it was ahead of us
            assert writer.wait(LIMIT_S) < 0, "the writer ended by itself"
        said = [int(line) for line in read if line.endswith(b"\n")]
        assert said == [*range(next_number, next_number + len(said))]
        for number in said:
            record(expected, number)
        next_number += len(said)
        journal = open_journal(path)
        found = comparable(journal.load())
        journal.close()
        if comparable(expected.load()) != found:  # one more may be there, of which it did not get to say so
            record(expected, next_number)
            next_number += 1
            assert comparable(expected.load()) == found


# ---- files that are not right -----------------------------------------------------------------------------------------


def test_a_second_coordinator_is_refused_and_told_who_has_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    first = open_journal(path)
    (tmp_path / "other name").symlink_to(path)
    for name in ("state", "other name"):
        with pytest.raises(JournalUnusable, match=f"{name} is in use by another coordinator, process {os.getpid()}$"):
            open_journal(tmp_path / name)
    first.put_outcome(OUTCOME)
    first.close()
    second = open_journal(path)
    assert second.load().outcomes == (OUTCOME,)
    second.close()


def refused(path: Path, match: str) -> None:
    """Asserts that the file is refused, twice, and that it stays what it is."""
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(JournalUnusable, match=match) as caught:
            open_journal(path).load()
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"")
    refused(path, "is damaged: it is empty; delete it to begin anew")
    path.write_bytes(b"[section]\nkey = value\n" * 100)
    refused(path, "file is not a database")
    path.unlink()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE t (x)")
    other.close()
    refused(path, "is no journal of a coordinator, but another database")
    with pytest.raises(JournalUnusable, match="cannot be opened"):
        open_journal(tmp_path / "nowhere" / "state")
    with pytest.raises(JournalUnusable, match="cannot be opened"):
        open_journal(tmp_path)


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    open_journal(path).close()
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 3")
    newer.close()
    refused(path, "is of version 3, of a newer dsml-gpu; this one knows up to 2")


def test_an_older_version_is_brought_up(tmp_path: Path) -> None:
    """Its communicators cannot be resumed; servers and outcomes are as they were."""
    path = tmp_path / "state"
    journal = open_journal(path)
    journal.put_server(KnownServer("a:1", registered=True))
    journal.put_outcome(OUTCOME)
    journal.close()
    older = sqlite3.connect(path)
    older.executescript(
        """
        DROP TABLE communicators; DROP TABLE memberships; DROP TABLE rounds; DROP TABLE begun;
        PRAGMA user_version = 1;
        CREATE TABLE communicators (
            comm_id INTEGER PRIMARY KEY, transport INTEGER, on_failure INTEGER, finalized INTEGER, checkpoint TEXT,
            crc INTEGER
        );
        CREATE TABLE memberships (comm_id INTEGER, epoch INTEGER, members BLOB, crc INTEGER, PRIMARY KEY (comm_id, epoch));
        CREATE TABLE rounds (
            comm_id INTEGER PRIMARY KEY, number INTEGER, epoch INTEGER, committing INTEGER, requests BLOB,
            idempotency_key TEXT, method TEXT, answer BLOB, crc INTEGER
        );
        INSERT INTO communicators VALUES (5, 2, 1, 0, '', 0);
        """
    )
    older.close()
    for _ in range(2):
        journal = open_journal(path)
        assert journal.load() == Recovered(servers=(KnownServer("a:1", registered=True),), outcomes=(OUTCOME,))
        journal.close()


def filled(path: Path) -> Recovered:
    """Makes a journal of many pages; returns what is in it."""
    journal = open_journal(path)
    for number in range(600):
        record(journal, number)
    recovered = journal.load()
    journal.close()
    return recovered


def loaded(path: Path) -> Recovered | None:
    """What is in a journal; None where it is refused."""
    try:
        journal = open_journal(path)
        with closing(journal):
            return journal.load()
    except JournalUnusable:
        return None


def test_a_damaged_file_is_refused_or_what_it_was(tmp_path: Path) -> None:
    """Bytes are flipped one by one, anywhere; some are in no record, in what SQLite does not use."""
    whole, path, generator = tmp_path / "whole", tmp_path / "state", random.Random(3)
    expected = filled(whole)
    content = whole.read_bytes()
    nrefused = 0
    for _ in range(200):
        at = generator.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :])
        found = loaded(path)
        assert found in (expected, None), f"byte {at}"
        nrefused += found is None
    assert nrefused > 80


@pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, keep: float) -> None:
    whole, path = tmp_path / "whole", tmp_path / "state"
    filled(whole)
    shutil.copy(whole, path)
    os.truncate(path, int(path.stat().st_size * keep))
    refused(path, "is damaged")


def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    path = tmp_path / "state"
    journal = open_journal(path)
    other = sqlite3.connect(path)
    other.execute("DROP TABLE outcomes")
    other.close()
    with pytest.raises(InternalError, match="state cannot be written: no such table: outcomes"):
        journal.put_outcome(OUTCOME)
    journal.put_communicator(COMM)
    journal.close()


def test_the_log_is_begun_anew_under_load(tmp_path: Path) -> None:
    """SQLite does so by itself only when nobody writes for as long as it takes to bring the log into the database."""
    largest = 0
    with closing(open_journal(tmp_path / "state")) as journal:
        for number in range(8000):
            journal.put_round(replace(ROUND, key=f"key {number}", result=bytes(400)))
            journal.forget_round(ROUND.comm_id, f"key {number - 1}")
            journal.put_outcome(replace(OUTCOME, key=f"key {number}", answer=bytes(400)))
            largest = max(largest, (tmp_path / "state-wal").stat().st_size)
    assert largest < 100 << 20  # otherwise twice as much, and more and more
