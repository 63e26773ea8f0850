"""Restoring while others write under the same URL."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from dsml_gpu.checkpoints.folders import folder_at
from dsml_gpu.checkpoints.manifest import read_manifest
from dsml_gpu.coordinator import checkpoints
from dsml_gpu.coordinator.checkpoints import LastCheckpoint
from dsml_gpu.errors import CheckpointDamaged
from tests.checkpoints.flipped_bits import is_unchanged
from tests.checkpoints.rig import Rig
from tests.support.in_this_process import in_event_loop


@in_event_loop
async def test_a_checkpoint_that_is_replaced_while_it_is_restored(tmp_path: Path) -> None:
    rig, folder = Rig(), folder_at(str(tmp_path))
    manifests = []
    for number in (1, 2):
        await rig.write(number)
        await rig.checkpoint(str(tmp_path))
        manifests.append(read_manifest(folder))
    await rig.write(3)
    with mock.patch.object(checkpoints, "read_manifest", side_effect=manifests):
        await rig.restore(str(tmp_path))
    assert is_unchanged(rig, 2)
    with (
        mock.patch.object(checkpoints, "read_manifest", side_effect=[manifests[0]] * 2),
        pytest.raises(CheckpointDamaged, match="does not exist, of which the manifest tells"),
    ):
        await rig.restore(str(tmp_path))
    await rig.close()


@in_event_loop
async def test_a_url_has_its_checkpoints_in_order_and_nothing_is_kept_of_those_that_ended(tmp_path: Path) -> None:
    rig = Rig()
    for number in (1, 2):
        await rig.write(number)
        assert (await rig.checkpoint(f"{tmp_path}/"))[-1].complete
    made = rig._checkpoints
    assert made.last(rig.comm_id) == LastCheckpoint(str(tmp_path), rig.epoch.seats)
    assert (made._generations, made._ends) == ({}, {})
    made.forget(rig.comm_id)
    assert made.last(rig.comm_id) is None
    await rig.close()
