"""The manifest: every flipped bit, and everything else that is not what was written, is refused with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dsml_gpu.checkpoints import manifest
from dsml_gpu.checkpoints.folders import folder_at
from dsml_gpu.checkpoints.manifest import (
    MANIFEST,
    Manifest,
    SavedArray,
    SavedFile,
    read_manifest,
    remove_older,
    shard_name,
    write_manifest,
)
from dsml_gpu.errors import CheckpointDamaged, CheckpointNotFound, InvalidValue


def file_of(rank: int) -> SavedFile:
    arrays = (
        SavedArray("a\n\u00e4", "FLOAT32", (2, 3), 256, 128, ("0" * 32,)),
        SavedArray("b", "INT8", (), 512, 152, ("f" * 32,)),
    )
    return SavedFile(shard_name("ab12", rank, 3), 153, 128, "1" * 32, arrays)


MADE = Manifest("ab12", tuple(map(file_of, range(3))))
RAW = MADE.encode()
LONGEST_LINE = max(map(len, RAW.splitlines(keepends=True)))


def place_in(error: CheckpointDamaged) -> range:
    start, stop = re.search(r"bytes (\d+)\.\.(\d+)", str(error)).groups()
    return range(int(start), int(stop))


def test_it_is_json_and_comes_back():
    _, about = json.loads(RAW)[0]
    assert about["nranks"] == 3
    assert Manifest.decode(RAW, "m") == MADE


def test_every_flipped_bit_is_refused_with_its_place():
    for place in range(len(RAW)):
        for bit in range(8):
            damaged = bytearray(RAW)
            damaged[place] ^= 1 << bit
            with pytest.raises(CheckpointDamaged, match=r"^m: ") as refusal:
                Manifest.decode(bytes(damaged), "m")
            assert place in place_in(refusal.value), (place, bit)
            # A line, or two where their break is gone; not the whole file.
            assert len(place_in(refusal.value)) <= 2 * LONGEST_LINE


def test_every_cut_is_refused():
    for length in range(len(RAW)):
        with pytest.raises(CheckpointDamaged):
            Manifest.decode(RAW[:length], "m")


def test_lines_that_are_missing_or_doubled_are_refused():
    lines = RAW.split(b"\n")
    for doubled in range(1, 5):
        with pytest.raises(CheckpointDamaged):
            Manifest.decode(b"\n".join(lines[:doubled] + lines[doubled - 1 :]), "m")
        with pytest.raises(CheckpointDamaged):
            Manifest.decode(b"\n".join(lines[:doubled] + lines[doubled + 1 :]), "m")


def test_another_version_is_not_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(manifest, "_VERSION", 2)
    newer = MADE.encode()
    monkeypatch.undo()
    with pytest.raises(InvalidValue, match="m has version 2, expected 1"):
        Manifest.decode(newer, "m")


def test_what_older_checkpoints_leave_is_removed_and_nothing_else(tmp_path: Path):
    ours = [shard_name("aa", 0, 1), shard_name("bb", 0, 1), shard_name("aa", 1, 2) + ".0123abcd.tmp"]
    temporary = f"{MANIFEST}.0123abcd.tmp"
    others = ["shard-notes.txt", "model.safetensors", "manifest.json.bak", MANIFEST]
    for name in (*ours, temporary, *others):
        (tmp_path / name).touch()
    remove_older(folder_at(str(tmp_path)), {"bb"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([shard_name("bb", 0, 1), *others])


def test_a_folder_without_a_manifest_has_no_checkpoint(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointNotFound, match="no complete checkpoint in"):
            read_manifest(folder_at(str(folder)))
    write_manifest(folder_at(str(tmp_path)), MADE)
    assert read_manifest(folder_at(str(tmp_path))) == MADE


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": 1}', MADE.files[0].to_json().replace("INT8", "INT9")])
def test_a_description_that_is_none(text: str):
    with pytest.raises(InvalidValue, match="not the description of a file"):
        SavedFile.of_json(text)
