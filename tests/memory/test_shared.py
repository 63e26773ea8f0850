"""Memory that other processes open: what they see and write, who may, and what is left of it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsml_gpu.errors import MemoryNotShared
from dsml_gpu.memory import shared
from dsml_gpu.memory.shared import SharedHandle, SharedRange, can_share, open_shared
from tests.support.other_process import ROOT, OtherProcess

MIB = 1 << 20
#: A user that is not us. Linux has it everywhere, and it owns nothing.
NOBODY = 65534
pytestmark = pytest.mark.skipif(not can_share(), reason="memory is shared by memfd, which is Linux's")


@pytest.fixture(scope="module")
def other() -> Iterator[OtherProcess]:
    with OtherProcess() as other:
        yield other


@pytest.fixture
def mortal() -> Iterator[OtherProcess]:
    """To be killed."""
    with OtherProcess() as mortal:
        yield mortal


def committed(handle: SharedHandle) -> int:
    """Bytes of memory that all shared memory of the handle's process takes."""
    return os.stat(f"/proc/{handle.pid}/fd/{handle.fd}").st_blocks * 512


def mappings(handle: SharedHandle) -> list[str]:
    """Where this process has mapped memory of the handle's process."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if handle.token in line]


# ---- two processes ---------------------------------------------------------------------------------------------------


def test_both_see_what_either_writes(other: OtherProcess) -> None:
    memory = SharedRange(5 * MIB + 12)
    last = memory.array.size - 1
    assert not memory.array.any()
    memory.array[[0, last]] = 7, 8
    other.open(memory.handle())
    assert other.read(0, 2) + other.read(last, 1) == bytes([7, 0, 8])
    other.write(1, b"abc")
    other.write(last, b"z")
    assert memory.array[:4].tobytes() + memory.array[last:].tobytes() == b"\x07abcz"


def test_ours_and_theirs_are_the_same_in_the_other_direction(other: OtherProcess) -> None:
    theirs = open_shared(other.make(3 * MIB))
    other.write(2 * MIB, b"theirs")
    assert theirs[2 * MIB : 2 * MIB + 6].tobytes() == b"theirs"
    theirs[:4] = np.frombuffer(b"ours", np.uint8)
    assert other.read(0, 4) == b"ours"


def test_ranges_of_one_process_are_apart(other: OtherProcess) -> None:
    sizes = [1, 4096, 2 * MIB, 2 * MIB + 1, 100]
    ranges = [SharedRange(size) for size in sizes]
    for number, (memory, size) in enumerate(zip(ranges, sizes, strict=True), 1):
        other.open(memory.handle())
        other.write(0, bytes([number]) * size)
    for number, (memory, size) in enumerate(zip(ranges, sizes, strict=True), 1):
        assert memory.array.tobytes() == bytes([number]) * size


def test_ranges_made_by_several_threads_are_apart() -> None:
    ranges: list[SharedRange] = []
    threads = [threading.Thread(target=lambda: ranges.extend([SharedRange(3 * MIB) for _ in range(40)])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    offsets = sorted(memory.handle().offset for memory in ranges)
    assert len(offsets) == 240
    assert min(np.diff(offsets)) >= 3 * MIB


def test_what_is_opened_twice_is_mapped_once_and_until_nothing_uses_it(other: OtherProcess) -> None:
    handle = other.make(4 * MIB)
    first = open_shared(handle)
    assert open_shared(handle) is first
    part = first[MIB : 2 * MIB]
    assert len(mappings(handle)) == 1
    del first
    other.write(MIB, b"still there")
    assert part[:11].tobytes() == b"still there"
    del part
    assert mappings(handle) == []


def test_memory_is_given_back_when_nothing_uses_it_any_more() -> None:
    memory = SharedRange(8 * MIB + 5)
    handle = memory.handle()
    before = committed(handle)
    memory.array[...] = 1
    view = memory.array[: 4 * MIB]
    assert committed(handle) - before >= 8 * MIB
    del memory
    assert view.all(), "a view keeps it"
    del view
    assert committed(handle) == before
    assert not [line for line in mappings(handle) if int(line.split()[2], 16) == handle.offset]


def test_memory_is_taken_page_by_page_as_it_is_touched(other: OtherProcess) -> None:
    memory = SharedRange(1 << 34)
    before = committed(memory.handle())
    memory.array[-1] = 1
    other.open(memory.handle())
    other.write(1 << 33, b"x")
    assert committed(memory.handle()) - before <= 4 * MIB


@pytest.mark.parametrize("nbytes", [1 << 62, 1 << 63, (1 << 64) - 1])
def test_more_than_there_is_is_a_memory_error_and_does_no_harm(nbytes: int) -> None:
    for _ in range(3):
        with pytest.raises(MemoryError, match=f"cannot .* {nbytes} bytes of shared memory"):
            SharedRange(nbytes)
    memory = SharedRange(4096)
    memory.array[...] = 1
    assert memory.array.all()


# ---- who may not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token": "0" * 32}, "is another file here; the process is in another container"),
        ({"token": ""}, "is another file here"),
        ({"token": "../x"}, "is another file here"),
        ({"boot_id": "00000000-0000-0000-0000-000000000000"}, "it is on another host"),
        ({"boot_id": ""}, "it is on another host"),
        ({"fd": 0}, "/fd/0 is another file here"),
        ({"fd": 999_999}, "/fd/999999: No such file or directory"),
        ({"pid": 1 << 40}, r"/proc/\d+/fd/\d+: No such file or directory"),
        ({"pid": (1 << 64) - 1}, r"/proc/\d+/fd/\d+: No such file or directory"),
        ({"nbytes": 1 << 40}, rf"is shorter than \d+ \+ {1 << 40} bytes"),
        ({"nbytes": (1 << 64) - 1}, "is shorter than"),
        ({"offset": 1 << 62}, rf"is shorter than {1 << 62} \+ \d+ bytes"),
        ({"offset": (1 << 64) - 2 * MIB}, "is shorter than"),
        ({"offset": 8, "nbytes": 4096}, "cannot map"),
        ({"nbytes": 0}, "cannot map"),
        ({"cuda_ipc_handle": bytes(64)}, "it is memory of a GPU"),
    ],
    ids=str,
)
def test_what_is_not_the_memory_is_not_opened(other: OtherProcess, changes: dict[str, object], reason: str) -> None:
    handle = other.make(4 * MIB)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MemoryNotShared, match=reason):
        open_shared(replace(handle, **changes))  # type: ignore[arg-type]
    assert len(os.listdir("/proc/self/fd")) == before
    assert open_shared(handle).size == 4 * MIB, "the right one can be opened"


def test_memory_of_a_process_that_has_ended_is_not_opened(mortal: OtherProcess) -> None:
    handle = mortal.make(4 * MIB)
    mortal.kill()
    with pytest.raises(MemoryNotShared, match=f"/proc/{handle.pid}/fd/{handle.fd}: No such file"):
        open_shared(handle)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be another user")
def test_another_user_is_refused() -> None:
    memory = SharedRange(4 * MIB)
    with OtherProcess(user=NOBODY) as stranger:
        with pytest.raises(MemoryNotShared, match=rf"/proc/{os.getpid()}/fd/\d+: Permission denied"):
            stranger.open(memory.handle())
        with OtherProcess(user=NOBODY) as friend:  # it is not that this user can open nothing
            stranger.open(friend.make(MIB))


# ---- what is left ----------------------------------------------------------------------------------------------------


def test_after_kill_9_nothing_is_left_but_what_others_have_open(mortal: OtherProcess) -> None:
    before = sorted(os.listdir("/dev/shm"))
    handle = mortal.make(4 * MIB)
    mortal.write(0, b"last words")
    theirs = open_shared(handle)
    assert sorted(os.listdir("/dev/shm")) == before
    mortal.kill()
    assert theirs[:10].tobytes() == b"last words"
    theirs[-1] = 1  # into memory that nobody else has
    assert sorted(os.listdir("/dev/shm")) == before
    del theirs
    assert mappings(handle) == []


def test_a_fork_neither_takes_memory_from_its_parent_nor_shares_what_it_makes() -> None:
    script = """
import os
import numpy as np
from dsml_gpu.memory.shared import SharedRange, open_shared

memory = SharedRange(4 << 20)
memory.array[...] = 7
child = os.fork()
if child == 0:
    mine = SharedRange(4 << 20)
    mine.array[...] = 9
    assert open_shared(mine.handle())[0] == 9
    del memory
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert (memory.array == 7).all(), "the fork has given the memory back"
more = SharedRange(4 << 20)
assert not more.array.any()
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=30)


# ---- moving ----------------------------------------------------------------------------------------------------------


def test_who_had_it_open_before_it_moved_neither_sees_nor_reaches_it(other: OtherProcess) -> None:
    memory = SharedRange(4 * MIB)
    view = memory.array[MIB : MIB + 8].view(np.uint64)
    view[0] = 1
    other.open(memory.handle())
    before = memory.handle()
    memory.move()
    assert memory.handle() != before
    assert view[0] == 1
    other.write(MIB, b"too late")
    assert view[0] == 1
    view[0] = 2
    assert memory.array[MIB : MIB + 8].view(np.uint64)[0] == 2
    assert other.read(MIB, 8) == b"too late"
    other.open(memory.handle())
    assert other.read(MIB, 8) == (2).to_bytes(8, "little")
    other.write(MIB, b"at last!")
    assert view.tobytes() == b"at last!"


def test_memory_moves_as_often_as_it_must_and_others_stay(other: OtherProcess) -> None:
    neighbours = SharedRange(4 * MIB), SharedRange(4 * MIB), SharedRange(4 * MIB)
    for number, memory in enumerate(neighbours):
        memory.array[...] = number + 1
    handles = set()
    for _ in range(5):
        neighbours[1].move()
        handles.add(neighbours[1].handle())
        assert [np.unique(memory.array).tolist() for memory in neighbours] == [[1], [2], [3]]
    assert len(handles) == 5
    for number, memory in enumerate(neighbours):
        other.open(memory.handle())
        assert other.read(4 * MIB - 4, 4) == bytes([number + 1]) * 4


@pytest.mark.parametrize("at_once", [1 << 16, 3 << 16, 64 << 20])
def test_all_that_was_touched_moves_and_nothing_else_is_taken(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(shared, "_MOVED_AT_ONCE", at_once)
    memory = SharedRange((1 << 30) - 100)
    handle = memory.handle()
    before = committed(handle)
    generator = np.random.default_rng(1)
    starts = [0, 4096, 3 * 4096, 1 << 16, 5 << 16, 64 * MIB - 4096, 64 * MIB, 700 * MIB + 12345, memory.array.size - 5000]
    for start in starts:
        memory.array[start : start + 4900] = generator.integers(0, 256, 4900, dtype=np.uint8)
    expected = {start: memory.array[start : start + 4900].copy() for start in starts}
    taken = committed(handle) - before
    memory.move()
    for start, values in expected.items():
        np.testing.assert_array_equal(memory.array[start : start + 4900], values)
    assert committed(memory.handle()) - before <= taken
    assert not memory.array[2 << 28 : (2 << 28) + MIB].any()


def test_only_a_part_of_memory_is_there_twice_while_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_MOVED_AT_ONCE", 2 * MIB)
    memory = SharedRange(32 * MIB)
    memory.array[...] = 5
    before, most = committed(memory.handle()), 0

    def watched(*arguments: int) -> None:
        nonlocal most
        copy(*arguments)
        most = max(most, committed(memory.handle()))
        assert memory.array.all(), "who reads it meanwhile still finds it"

    copy = ctypes.memmove
    monkeypatch.setattr(ctypes, "memmove", watched)
    memory.move()
    assert before < most <= before + 2 * MIB


def test_what_others_write_to_where_it_was_is_given_back_with_it(other: OtherProcess) -> None:
    memory = SharedRange(4 * MIB)
    handle = memory.handle()
    before = committed(handle)
    other.open(handle)
    memory.move()
    other.write(0, bytes(3 * MIB))
    assert committed(handle) - before >= 3 * MIB
    memory.move()
    assert committed(handle) == before
    other.write(0, bytes(3 * MIB))
    del memory
    assert committed(handle) == before


def test_who_moves_memory_that_moves_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_MOVED_AT_ONCE", 1 << 16)
    memory = SharedRange(8 * MIB)
    memory.array[...] = 9
    threads = [threading.Thread(target=memory.move) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (memory.array == 9).all()
    assert (open_shared(memory.handle()) == 9).all()


def test_memory_that_cannot_be_moved_stays_where_it_is(monkeypatch: pytest.MonkeyPatch, other: OtherProcess) -> None:
    memory = SharedRange(4 * MIB)
    memory.array[...] = 3
    handle = memory.handle()

    def full(*arguments: object, **named: object) -> int:
        raise MemoryError("cannot map")

    with monkeypatch.context() as patched:
        patched.setattr(shared, "_map", full)
        with pytest.raises(MemoryError):
            memory.move()
    assert memory.handle() == handle
    other.open(memory.handle())
    assert other.read(0, 4 * MIB) == bytes([3]) * 4 * MIB
    memory.move()
    assert memory.array.all()
