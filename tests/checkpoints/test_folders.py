"""Folders on disks and elsewhere: a file is there when it is whole, or not at all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from dsml_gpu.checkpoints.folders import Folder, RemoteFolder, folder_at
from dsml_gpu.errors import CheckpointNotFound, InvalidValue, StorageUnavailable

_NUMBERS = itertools.count()


class RenamingStore(MemoryFileSystem):
    """A store that is no disk of this host and renames, as one behind SFTP does. Keeps what was done."""

    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012  as in its base
    pseudo_dirs = [""]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, ...]] = []

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        self.done.append(("mv", path1, path2))
        self.store[path2] = self.store.pop(path1)


def on_disk(tmp_path: Path) -> Folder:
    return folder_at(str(tmp_path / "new" / "folder"))


def by_file_url(tmp_path: Path) -> Folder:
    return folder_at(f"file://{tmp_path}/new/folder/")


def in_memory(tmp_path: Path) -> Folder:
    return folder_at(f"memory://{next(_NUMBERS)}/folder")


def renaming(tmp_path: Path) -> Folder:
    return RemoteFolder(RenamingStore(), f"/{next(_NUMBERS)}/folder", "renaming://folder")


@pytest.fixture(params=[on_disk, by_file_url, in_memory, renaming])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    make: Callable[[Path], Folder] = request.param
    return make(tmp_path)


def test_a_file_comes_and_goes(folder: Folder):
    assert folder.names() == []
    writer = folder.create("a")
    writer.write(b"01234")
    writer.sync()
    writer.write(memoryview(b"56789"))
    writer.commit()
    writer.discard()
    folder.put("b", b"b")
    assert sorted(folder.names()) == ["a", "b"]
    assert folder.size("a") == 10
    assert [folder.read("a", *place) for place in ((0, 10), (3, 4), (8, 9), (4, 0))] == [b"0123456789", b"3456", b"89", b""]
    folder.put("b", b"another")
    assert folder.read("b", 0, 100) == b"another"
    folder.remove("a")
    folder.remove("a")
    assert folder.names() == ["b"]


def test_a_file_that_was_given_up_is_not_there(folder: Folder):
    folder.put("b", b"b")
    writer = folder.create("a")
    writer.write(b"half of it")
    writer.discard()
    writer.discard()
    assert folder.names() == ["b"]


@pytest.mark.parametrize("make", [on_disk, renaming])
def test_a_file_has_its_name_when_it_is_whole(make: Callable[[Path], Folder], tmp_path: Path):
    folder = make(tmp_path)
    folder.put("a", b"the one before")
    writer = folder.create("a")
    writer.write(b"half of it")
    writer.sync()
    assert folder.read("a", 0, 100) == b"the one before"
    writer.commit()
    assert folder.read("a", 0, 100) == b"half of it"
    assert folder.names() == ["a"]


def test_files_that_are_not_there(folder: Folder):
    folder.put("b", b"b")
    for look in (lambda: folder.size("a"), lambda: folder.read("a", 0, 1)):
        with pytest.raises(CheckpointNotFound, match="folder/a does not exist"):
            look()


def test_a_store_without_renaming_is_not_made_to_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    copied: list[object] = []
    monkeypatch.setattr(MemoryFileSystem, "cp_file", lambda *arguments, **options: copied.append(arguments))
    folder = in_memory(tmp_path)
    writer = folder.create("a")
    writer.write(b"a")
    writer.commit()
    folder.put("b", b"b")
    assert (sorted(folder.names()), copied) == (["a", "b"], [])


def test_a_folder_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").touch()
    folder = folder_at(str(tmp_path / "file"))
    with pytest.raises(StorageUnavailable, match="file/a"):
        folder.put("a", b"")


def test_a_store_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no credentials")

    folder = in_memory(tmp_path)
    monkeypatch.setattr(MemoryFileSystem, "_open", fail)
    with pytest.raises(StorageUnavailable, match="folder/a: no credentials"):
        folder.create("a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageUnavailable, match="Permission denied"):
        folder_at(str(tmp_path)).put("a", b"")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "expected a folder"),
        ("/", "expected a folder"),
        ("some/folder", "expected an absolute path or a URL"),
        ("nosuchprotocol://folder", "nosuchprotocol"),
    ],
)
def test_what_is_no_folder(url: str, said: str):
    with pytest.raises(InvalidValue, match=said):
        folder_at(url)


def test_a_plug_in_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    missing = {"class": "no_such_package.FileSystem", "err": "install no_such_package"}
    monkeypatch.setitem(known_implementations, "missing", missing)
    with pytest.raises(StorageUnavailable, match="install no_such_package"):
        folder_at("missing://folder")
