"""A disk whose power can fail: what is certainly there after each step, and what may be.

A system may keep what was written in its own memory until it is synced. After a power failure a file has what it had when it
was synced the last time, and a folder the names of its last sync, or those of any later moment.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

#: Contents of files, by name.
Files = dict[str, bytes]


@dataclass(frozen=True)
class Step:
    """What the disk may have after a power failure behind one operation.

    Attributes:
        what: the operation and the names of its files.
        possible: contents of the folder, each of which may be found.
    """

    what: tuple[str, ...]
    possible: tuple[Files, ...]


class RecordingDisk:
    """Watches one folder while the ``with`` block runs.

    Attributes:
        steps: in order.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.steps: list[Step] = []
        self._synced: dict[int, bytes] = {}  # contents by inode
        self._entries: dict[str, int] = {}  # inodes by name, as of the last sync of the folder
        self._removed: set[str] = set()  # since then
        self._lock = threading.RLock()
        self._patches = [mock.patch.object(os, name, self._watched(name)) for name in ("fsync", "replace", "unlink")]

    @property
    def done(self) -> list[tuple[str, ...]]:
        return [step.what for step in self.steps]

    def _watched(self, name: str) -> Callable[..., None]:
        real, note = getattr(os, name), getattr(self, f"_{name}")

        def watched(*arguments: object) -> None:
            with self._lock:
                what = note(*arguments)
                real(*arguments)
                if what is not None:
                    self.steps.append(Step(what, self._possible()))

        return watched

    def _fsync(self, number: int) -> tuple[str, ...] | None:
        inode = os.fstat(number).st_ino
        names = {os.stat(path).st_ino: path.name for path in self._paths()}
        if inode in names:
            self._synced[inode] = (self._folder / names[inode]).read_bytes()
            return "sync", _plain(names[inode])
        if self._folder.exists() and inode == self._folder.stat().st_ino:
            self._entries = {name: inode for inode, name in names.items()}
            self._removed = set()
            return ("sync folder",)
        return None

    def _replace(self, source: Path, target: Path) -> tuple[str, ...] | None:
        return ("rename", _plain(Path(source).name), Path(target).name) if Path(target).parent == self._folder else None

    def _unlink(self, path: Path) -> tuple[str, ...] | None:
        path = Path(path)
        if path.parent != self._folder or not path.exists():
            return None
        self._removed.add(path.name)
        return "remove", _plain(path.name)

    def _possible(self) -> tuple[Files, ...]:
        now = {path.name: os.stat(path).st_ino for path in self._paths()}
        without_removed = {name: inode for name, inode in self._entries.items() if name not in self._removed}
        return tuple(
            {name: self._synced.get(inode, b"") for name, inode in entries.items()}
            for entries in (now, self._entries, without_removed)
        )

    def _paths(self) -> list[Path]:
        return list(self._folder.iterdir()) if self._folder.is_dir() else []

    def __enter__(self) -> RecordingDisk:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        for patch in self._patches:
            patch.stop()


def _plain(name: str) -> str:
    """Without what is different each time."""
    return name.split(".", 2)[0] + ".tmp" if name.endswith(".tmp") else name
