"""Folders of files, on a disk of this host or wherever fsspec reaches.

A file appears under its name when it is whole, or not at all. On a disk it is then there to stay: written, synced, renamed,
and the folder synced. Elsewhere it is renamed where the store can, and otherwise put: such stores show a file when it is
closed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from dsml_gpu.errors import CheckpointNotFound, DsmlError, InvalidValue, StorageUnavailable

#: What the names of files that are not whole match.
TEMPORARY = r"\.[0-9a-f]{8}\.tmp"


class Writer(Protocol):
    """A file that is not there yet."""

    def write(self, data: Any) -> None:
        """Appends bytes."""

    def sync(self) -> None:
        """What was written is to stay, as far as the store tells."""

    def commit(self) -> None:
        """The file is whole: it gets its name."""

    def discard(self) -> None:
        """The file will not be. Idempotent, and without effect on one that is whole."""


class Folder(Protocol):
    """A folder.

    Methods raise StorageUnavailable where the store fails, and those that read CheckpointNotFound for a file that is not
    there.
    """

    url: str

    def create(self, name: str) -> Writer:
        """Begins a file, which replaces one of that name. Makes the folder where there is none."""

    def put(self, name: str, data: bytes) -> None:
        """A small file, whole."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """Bytes of a file from `start` on; fewer where it ends before."""

    def names(self) -> list[str]:
        """What the folder has; nothing where it is not there."""

    def remove(self, name: str) -> None:
        """Removes a file. Idempotent."""


def folder_at(url: str) -> Folder:
    """The folder of a URL as fsspec takes it: an absolute path, or ``file://``, ``s3://`` ...

    Raises:
        InvalidValue: no URL, or one that nothing here knows.
        StorageUnavailable: what is installed here does not reach it.
    """
    check_url(url)
    # Not before it is needed: it takes a while.
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        filesystem, path = url_to_fs(url.rstrip("/"))
    except ValueError as error:
        raise InvalidValue(f"{url}: {error}") from error
    except Exception as error:
        raise StorageUnavailable(f"{url}: {error}") from error
    if isinstance(filesystem, LocalFileSystem):
        return LocalFolder(Path(path), url.rstrip("/"))
    return RemoteFolder(filesystem, path, url.rstrip("/"))


def check_url(url: str) -> None:
    """Raises InvalidValue unless it is an absolute path or a URL."""
    if not url.strip("/"):
        raise InvalidValue(f"url is {url!r}, expected a folder")
    if "://" not in url and "::" not in url and not os.path.isabs(url):
        raise InvalidValue(f"url is {url!r}, expected an absolute path or a URL: each process has its own working directory")


class LocalFolder:
    """See `Folder`; on a disk of this host."""

    def __init__(self, path: Path, url: str) -> None:
        self.url = url
        self._path = path

    def create(self, name: str) -> Writer:
        with storage_errors(f"{self.url}/{name}"):
            _make_folder(self._path)
            return _LocalWriter(self._path, name, self.url)

    def put(self, name: str, data: bytes) -> None:
        write_whole(self.create(name), data)

    def size(self, name: str) -> int:
        with storage_errors(f"{self.url}/{name}", missing=True):
            return (self._path / name).stat().st_size

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        with storage_errors(f"{self.url}/{name}", missing=True), (self._path / name).open("rb", buffering=0) as file:
            file.seek(start)
            return _read_up_to(file, nbytes)

    def names(self) -> list[str]:
        with storage_errors(self.url):
            return os.listdir(self._path) if self._path.is_dir() else []

    def remove(self, name: str) -> None:
        with storage_errors(f"{self.url}/{name}"), suppress(FileNotFoundError):
            os.unlink(self._path / name)


class _LocalWriter:
    """See `Writer`."""

    def __init__(self, folder: Path, name: str, url: str) -> None:
        self._folder, self._url = folder, f"{url}/{name}"
        self._target, self._temporary = folder / name, folder / _temporary(name)
        self._file = self._temporary.open("wb")

    def write(self, data: Any) -> None:
        with storage_errors(self._url):
            self._file.write(data)

    def sync(self) -> None:
        with storage_errors(self._url):
            self._file.flush()
            os.fsync(self._file.fileno())

    def commit(self) -> None:
        self.sync()
        with storage_errors(self._url):
            self._file.close()
            os.replace(self._temporary, self._target)
            _sync_folder(self._folder)

    def discard(self) -> None:
        with suppress(OSError):  # the one that ended it is the error to be seen
            self._file.close()
        with suppress(OSError):
            os.unlink(self._temporary)


class RemoteFolder:
    """See `Folder`; wherever fsspec reaches.

    Args:
        filesystem: an ``fsspec.AbstractFileSystem``.
        path: of the folder, as it calls it.
    """

    def __init__(self, filesystem: Any, path: str, url: str) -> None:
        from fsspec import AbstractFileSystem

        self.url = url
        self._filesystem = filesystem
        self._path = path.rstrip("/")
        # Others have written since it last looked.
        filesystem.invalidate_cache()
        # What a store inherits is no renaming but a copy, which is no better than to put the file under its name at once.
        self._renames = type(filesystem).mv is not AbstractFileSystem.mv

    def create(self, name: str) -> Writer:
        with storage_errors(f"{self.url}/{name}"):
            self._filesystem.makedirs(self._path, exist_ok=True)
            return _RemoteWriter(self._filesystem, f"{self._path}/{name}", self._renames, f"{self.url}/{name}")

    def put(self, name: str, data: bytes) -> None:
        if self._renames:
            write_whole(self.create(name), data)
            return
        with storage_errors(f"{self.url}/{name}"):
            self._filesystem.makedirs(self._path, exist_ok=True)
            self._filesystem.pipe_file(f"{self._path}/{name}", data)

    def size(self, name: str) -> int:
        with storage_errors(f"{self.url}/{name}", missing=True):
            return int(self._filesystem.size(f"{self._path}/{name}"))

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        if not nbytes:
            return b""
        with storage_errors(f"{self.url}/{name}", missing=True):
            return bytes(self._filesystem.cat_file(f"{self._path}/{name}", start=start, end=start + nbytes))

    def names(self) -> list[str]:
        with storage_errors(self.url):
            try:
                paths = self._filesystem.ls(self._path, detail=False)
            except FileNotFoundError:
                return []
            return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def remove(self, name: str) -> None:
        with storage_errors(f"{self.url}/{name}"), suppress(FileNotFoundError):
            self._filesystem.rm_file(f"{self._path}/{name}")


class _RemoteWriter:
    """See `Writer`."""

    def __init__(self, filesystem: Any, target: str, renames: bool, url: str) -> None:
        self._filesystem, self._target, self._url = filesystem, target, url
        self._opened = _temporary(target) if renames else target
        self._file = filesystem.open(self._opened, "wb")
        self._whole = False

    def write(self, data: Any) -> None:
        with storage_errors(self._url):
            self._file.write(data)

    def sync(self) -> None:
        pass

    def commit(self) -> None:
        with storage_errors(self._url):
            self._file.close()
            if self._opened != self._target:
                self._filesystem.mv(self._opened, self._target)
        self._whole = True

    def discard(self) -> None:
        if self._whole:
            return
        with suppress(Exception):  # the one that ended it is the error to be seen
            self._file.close()
        with suppress(Exception):
            self._filesystem.rm_file(self._opened)


def write_whole(writer: Writer, data: bytes) -> None:
    """Writes all of a file."""
    try:
        writer.write(data)
        writer.commit()
    finally:
        writer.discard()


@contextmanager
def storage_errors(what: str, *, missing: bool = False) -> Iterator[None]:
    """What a store fails with becomes StorageUnavailable: plug-ins raise anything.

    Args:
        missing: a file that is not there becomes CheckpointNotFound.
    """
    try:
        yield
    except DsmlError:
        raise
    except Exception as error:
        if missing and isinstance(error, FileNotFoundError):
            raise CheckpointNotFound(f"{what} does not exist") from None
        raise StorageUnavailable(f"{what}: {str(error) or type(error).__name__}") from error


def _temporary(name: str) -> str:
    # One of its own for each writer: a late one must not write to what is another's by now.
    return f"{name}.{secrets.token_hex(4)}.tmp"


def _read_up_to(file: FileIO, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    filled = 0
    while filled < nbytes and (count := file.readinto(memoryview(data)[filled:])):
        filled += count
    return bytes(data) if filled == nbytes else bytes(data[:filled])


def _make_folder(path: Path) -> None:
    """Makes a folder and those that it is in, all of them to stay."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(path: Path) -> None:
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
