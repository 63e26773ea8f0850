"""Host memory that other processes of the same user on the same host can open. Linux.

All shared memory of a process is in one file without a name in any folder (a memfd), each arena in a range of its own. The
file lives as long as a process has it open or mapped, so nothing is left behind after kill -9. Others open it through
/proc, where the system lets only the same user do so; a container that does not see the process fails there, or finds
another file, which the file's random name tells.

Pages are taken when they are touched, by whichever process, and given back when the arena's own process lets go of it.

A process that has opened the memory can write there at any time, also long after it should have: `SharedRange.move` takes
the contents to another range of the file, which the other process does not have. The address in this process stays.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dsml_gpu.errors import MemoryNotShared

#: Ranges of the file begin at multiples of this, the size of a large page, which also is one of every page size there is.
_ALIGNMENT = 2 << 20
#: The staging behind an arena begins at a multiple of this.
_PAGE_BYTES = 4096
#: How much `SharedRange.move` has twice at a time.
_MOVED_AT_ONCE = 64 << 20

# Linux, every architecture but Alpha and PA-RISC.
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_MAP_FAILED = ctypes.c_void_p(-1).value


@dataclass(frozen=True, slots=True)
class SharedHandle:
    """Where another process finds memory. See ``message SharedMemory`` in the contract.

    Attributes:
        nbytes: size of the memory.
        boot_id: of the kernel.
        pid, fd, token, offset: of memory on the host; 0 and empty for memory of a GPU.
        cuda_ipc_handle: of memory of a GPU; empty for memory on the host.
        staging_bytes: size of the staging behind the memory; 0: there is none.
    """

    nbytes: int
    boot_id: str
    pid: int = 0
    fd: int = 0
    token: str = ""
    offset: int = 0
    cuda_ipc_handle: bytes = b""
    staging_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Of the range that is mapped: the memory, and its staging."""
        return _total(self.nbytes, self.staging_bytes)

    @classmethod
    def of_message(cls, message: Any) -> SharedHandle:
        """From the fields of a ``SharedMemory`` of the contract."""
        return cls(
            nbytes=message.numBytes,
            boot_id=message.bootId,
            pid=message.pid,
            fd=message.fd,
            token=message.token,
            offset=message.offset,
            cuda_ipc_handle=message.cudaIpcHandle,
            staging_bytes=message.stagingBytes,
        )


def can_share() -> bool:
    """Whether the system has what this module needs."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


@cache
def boot_id() -> str:
    """The same for all processes of one kernel, since it started; empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


class SharedRange:
    """Zeroed memory of this process that others can open.

    Args:
        nbytes: size.
        staging_bytes: size of the staging behind it.

    Attributes:
        array: the memory, as uint8. The pages are given back when nothing refers to it, or its staging, any more.
        staging: what is behind it, as uint8.

    Raises:
        MemoryError: on construction, where there is not so much address space.
    """

    def __init__(self, nbytes: int, staging_bytes: int = 0) -> None:
        self._file = _file()
        total = _total(nbytes, staging_bytes)
        offset = self._file.reserve(total)
        address = _map(self._file.fd, total, offset)
        whole, owner = _array_at(address, total)
        self.array, self.staging = whole[:nbytes], whole[total - staging_bytes :]
        self._address = address
        self._nbytes = total
        #: Offsets of where it is (the last) and was: who has opened it there may still write, and so take memory.
        self._places = [offset]
        self._moving = threading.Lock()
        _when_unused(owner, _release, self._file, address, total, self._places)

    def handle(self) -> SharedHandle:
        """What others open it with."""
        return SharedHandle(
            self.array.nbytes,
            boot_id(),
            pid=os.getpid(),
            fd=self._file.fd,
            token=self._file.token,
            offset=self._places[-1],
            staging_bytes=self.staging.nbytes,
        )

    def give_back_staging(self, start: int) -> None:
        """Gives the memory of the staging from `start` on back to the system; it reads as zeros from then on."""
        with self._moving:
            first = self._places[-1] + self._nbytes - self.staging.nbytes + start
            self._file.give_back(first, self.staging.nbytes - start)

    def move(self) -> None:
        """Takes the contents to fresh memory, where nobody has opened them; views of `array` stay what they are.

        Nothing in this process may use the memory meanwhile. What was never touched is not copied.

        Raises:
            MemoryError: there is not so much address space, or memory.
        """
        with self._moving:
            self._move()

    def _move(self) -> None:
        fd, old = self._file.fd, self._places[-1]
        new = self._file.reserve(self._nbytes)
        target = _map(fd, self._nbytes, new)
        try:
            for start in range(0, self._nbytes, _MOVED_AT_ONCE):
                nbytes = min(_MOVED_AT_ONCE, self._nbytes - start)
                for first, end in _touched(fd, old + start, nbytes):
                    ctypes.memmove(target + start + first, self._address + start + first, end - first)
                _map(fd, nbytes, new + start, at=self._address + start)
                self._file.give_back(old + start, nbytes)
        finally:
            _libc().munmap(target, self._nbytes)
        self._places.append(new)
        for place in self._places[:-1]:
            self._file.give_back(place, _aligned(self._nbytes))


def open_shared(handle: SharedHandle) -> np.ndarray:
    """The memory behind a handle of another process, as a uint8 array; mapped until nothing refers to it any more.

    Raises:
        MemoryNotShared: it cannot be opened from here; the message says why.
    """
    whole = _whole(handle)
    with _opening:
        known = _arenas.get(handle)
        if known is None:
            known = _arenas[handle] = whole[: handle.nbytes]
        return known


def open_staging(handle: SharedHandle) -> np.ndarray:
    """The staging behind the same memory, as `open_shared`. Raises MemoryNotShared, also where there is none."""
    if handle.staging_bytes == 0:
        raise MemoryNotShared("it has no staging")
    return _whole(handle)[handle.total_bytes - handle.staging_bytes :]


def _whole(handle: SharedHandle) -> np.ndarray:
    if not can_share():
        raise MemoryNotShared(f"{sys.platform} has no memfd")
    if handle.cuda_ipc_handle:
        raise MemoryNotShared("it is memory of a GPU")
    if handle.boot_id != boot_id():
        raise MemoryNotShared("it is on another host")
    with _opening:
        known = _opened.get(handle)
        if known is None:
            known = _opened[handle] = _open(handle)
        return known


#: What is open already, so that two communicators with the same devices share the mapping and its page tables. A view of
#: such an array keeps it, also when the process that it is of is gone.
_opened: weakref.WeakValueDictionary[SharedHandle, np.ndarray] = weakref.WeakValueDictionary()
#: The views of them that are without the staging.
_arenas: weakref.WeakValueDictionary[SharedHandle, np.ndarray] = weakref.WeakValueDictionary()
_opening = threading.Lock()


def _open(handle: SharedHandle) -> np.ndarray:
    path = f"/proc/{handle.pid}/fd/{handle.fd}"
    try:
        # Looked at before it is opened: where process ids mean something else, it can be anything.
        if Path(path).readlink().name != f"memfd:{_name(handle.token)} (deleted)":
            raise MemoryNotShared(f"{path} is another file here; the process is in another container")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise MemoryNotShared(f"{path}: {error.strerror}") from None
    try:
        if os.fstat(fd).st_size < handle.offset + handle.total_bytes:
            raise MemoryNotShared(f"{path} is shorter than {handle.offset} + {handle.total_bytes} bytes")
        address = _map(fd, handle.total_bytes, handle.offset)
    except MemoryError as error:
        raise MemoryNotShared(str(error)) from None
    finally:
        os.close(fd)
    array, owner = _array_at(address, handle.total_bytes)
    _when_unused(owner, _libc().munmap, address, handle.total_bytes)
    return array


class _File:
    """The memfd of this process."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self._pid = os.getpid()
        self.fd = os.memfd_create(_name(self.token), os.MFD_CLOEXEC)
        self._nbytes = 0
        self._lock = threading.Lock()

    def reserve(self, nbytes: int) -> int:
        """Offset of a range that was never used. No memory is taken: the file has holes."""
        with self._lock:
            offset = self._nbytes
            end = offset + _aligned(nbytes)
            try:
                os.ftruncate(self.fd, end)
            except (OSError, OverflowError) as error:
                raise MemoryError(f"cannot reserve {nbytes} bytes of shared memory: {error}") from error
            self._nbytes = end
        return offset

    def give_back(self, offset: int, nbytes: int) -> None:
        """Gives the memory of a range back to the system: its whole pages."""
        if os.getpid() == self._pid:  # what a fork of the process lets go of, the process still has
            _libc().fallocate(self.fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, nbytes)


def _total(nbytes: int, staging_bytes: int) -> int:
    return -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES + staging_bytes if staging_bytes else nbytes


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _name(token: str) -> str:
    return f"dsml-{token}"


@cache
def _file() -> _File:
    # A fork makes a file of its own for what it takes from then on: both would give out the same ranges.
    os.register_at_fork(after_in_child=_file.cache_clear)
    return _File()


def _array_at(address: int, nbytes: int) -> tuple[np.ndarray, Any]:
    """An array over memory, and the object that lives as long as any view of it."""
    owner = (ctypes.c_ubyte * nbytes).from_address(address)
    return np.frombuffer(memoryview(owner), np.uint8), owner


def _when_unused(owner: Any, act: Callable[..., Any], *arguments: Any) -> None:
    # Not when the interpreter ends: threads may still be at work then, and the system takes all back anyway.
    weakref.finalize(owner, act, *arguments).atexit = False


def _map(fd: int, nbytes: int, offset: int, at: int | None = None) -> int:
    """Maps a range of a file; returns its address, which is `at` where that is given, whatever was there before."""
    flags = mmap.MAP_SHARED | _MAP_NORESERVE | (0 if at is None else _MAP_FIXED)
    address = _libc().mmap(at, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)
    if address is None or address == _MAP_FAILED:
        error = ctypes.get_errno()
        raise MemoryError(f"cannot map {nbytes} bytes of shared memory: {os.strerror(error)}")
    return int(address)


def _touched(fd: int, offset: int, nbytes: int) -> list[tuple[int, int]]:
    """The parts of a range that have memory, as distances from its beginning."""
    parts = []
    position, end = offset, offset + nbytes
    while position < end:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # no more
            break
        if start >= end:
            break
        position = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        parts.append((start - offset, position - offset))
    return parts


def _release(file: _File, address: int, nbytes: int, places: list[int]) -> None:
    _libc().munmap(address, nbytes)
    for place in places:
        file.give_back(place, _aligned(nbytes))


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return libc
