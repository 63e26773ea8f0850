"""After a power failure at any moment there is the checkpoint before or the new one, whole; and the new one when it was
said to be complete. What holds that together is left out, one by one, and missed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from unittest import mock

import pytest

from dsml_gpu.checkpoints import folders
from dsml_gpu.checkpoints.folders import folder_at
from dsml_gpu.checkpoints.manifest import MANIFEST, read_manifest, remove_older, write_manifest
from dsml_gpu.coordinator import checkpoints
from dsml_gpu.errors import CheckpointDamaged, CheckpointNotFound
from tests.checkpoints.disk import Files, RecordingDisk
from tests.checkpoints.rig import NRANKS, Rig, number_of

#: Small: every crash is a folder of its own.
COUNTS = {"weights": 700, "step": 3}


class Broken(AssertionError):
    """A promise that was not kept."""


def survivor(found: Files, folder: Path) -> int | None:
    """The number of the checkpoint that is left, or None where there is none. Raises Broken where it is damaged."""
    folder.mkdir()
    for name, data in found.items():
        (folder / name).write_bytes(data)
    try:
        return number_of(str(folder), range(3), COUNTS)
    except CheckpointNotFound as error:
        if MANIFEST in found:
            raise Broken(f"a file is missing: {error}") from error
        return None
    except CheckpointDamaged as error:
        raise Broken(str(error)) from error


def write_two(tmp_path: Path) -> tuple[RecordingDisk, list[int]]:
    """Checkpoints 1 and 2 under one URL; returns the number of steps after which each was said to be complete, too."""

    async def write() -> list[int]:
        rig = Rig(COUNTS)
        complete = []
        for number in (1, 2):
            await rig.write(number)
            assert (await rig.checkpoint(str(folder)))[-1].complete
            complete.append(len(disk.steps))
        await rig.close()
        return complete

    folder = tmp_path / "checkpoint"
    with RecordingDisk(folder) as disk:
        return disk, asyncio.run(write())


def check_all_crashes(disk: RecordingDisk, complete: list[int], tmp_path: Path) -> int:
    """Raises Broken where a crash loses a checkpoint. Returns how many crashes there were."""
    crashes = 0
    for count, step in enumerate(disk.steps, 1):
        last_complete = sum(one <= count for one in complete)
        for files in step.possible:
            crashes += 1
            found = survivor(files, tmp_path / f"crash-{crashes}")
            if (found or 0) < last_complete:
                raise Broken(f"after {step.what}: checkpoint {last_complete} was complete, {found} is there")
            if found is not None and found > last_complete + 1:
                raise Broken(f"after {step.what}: checkpoint {found} is not begun")
    return crashes


def test_a_power_failure_at_any_moment(tmp_path: Path):
    disk, complete = write_two(tmp_path)
    # Each rank's file: two syncs, a rename and a sync of the folder at least; the manifest likewise.
    assert len(disk.steps) >= 2 * 3 * (NRANKS + 1) + NRANKS
    assert check_all_crashes(disk, complete, tmp_path) == 3 * len(disk.steps)


def test_the_order_of_steps(tmp_path: Path):
    disk, (first, _) = write_two(tmp_path)
    done = disk.done[first:]
    removed = [what for what in done if what[0] == "remove"]
    shards = [file.name for file in read_manifest(folder_at(str(tmp_path / "checkpoint"))).files]
    renames = {name: done.index(("rename", f"{name.split('.')[0]}.tmp", name)) for name in (*shards, MANIFEST)}
    for name, renamed in renames.items():
        assert done.index(("sync", f"{name.split('.')[0]}.tmp")) < renamed
        assert ("sync folder",) in done[renamed:]
    assert max(renames[name] for name in shards) < renames[MANIFEST]
    # All shards are in a folder that is synced before the manifest is so much as begun.
    begun = done.index(("sync", "manifest.tmp"))
    assert ("sync folder",) in done[max(renames[name] for name in shards) : begun]
    # What was before goes last, after the manifest is there to stay.
    assert len(removed) == NRANKS
    assert done[renames[MANIFEST] + 1] == ("sync folder",)
    assert done[-NRANKS:] == removed


def _no_sync(self):
    self._file.flush()


_commit = folders._LocalWriter.commit


def _manifest_before_files(self):
    """The files are there when the manifest is, and not to stay."""
    if self._target.name == MANIFEST:
        _commit(self)
        return
    self._file.close()
    os.replace(self._temporary, self._target)
    folders._sync_folder(self._folder)


def _manifest_last_but_one(url, manifest, kept):
    folder = folder_at(url)
    remove_older(folder, kept)
    write_manifest(folder, manifest)


def _manifest_in_place(folder, manifest):
    (folder._path / MANIFEST).write_bytes(manifest.encode())


@pytest.mark.parametrize(
    ("where", "name", "instead"),
    [
        pytest.param(folders._LocalWriter, "sync", _no_sync, id="files are not synced"),
        pytest.param(folders._LocalWriter, "commit", _manifest_before_files, id="the manifest comes before the files"),
        pytest.param(folders, "_sync_folder", lambda path: None, id="folders are not synced"),
        pytest.param(checkpoints, "_complete", _manifest_last_but_one, id="older files are removed first"),
        pytest.param(checkpoints, "write_manifest", _manifest_in_place, id="the manifest is written in place"),
    ],
)
def test_what_is_left_out_is_missed(where, name, instead, tmp_path: Path):
    with mock.patch.object(where, name, instead):
        disk, complete = write_two(tmp_path)
    with pytest.raises(Broken):
        check_all_crashes(disk, complete, tmp_path)
    test_a_power_failure_at_any_moment(tmp_path / "as it is")
