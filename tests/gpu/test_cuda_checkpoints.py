"""Checkpoints of memory on a GPU: copied in order with what is queued, and written back."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsml_gpu.device.device import Device
from dsml_gpu.device.shards import load_shard, save_shard
from dsml_gpu.errors import CheckpointDamaged
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.backend import select_backends
from dsml_gpu.wire import gpu_sim_pb2 as pb

COUNT = (5 << 18) + 3
ADDR = 4099


def device_on_gpu() -> Device:
    (backend,), _ = select_backends("cupy", [0])
    return Device(1, Arena(32 << 20, backend))


async def contents(device: Device) -> np.ndarray:
    download = device.arena.begin_read(ADDR, 4 * COUNT)
    data = (await download.wait()).copy()
    download.release()
    return data.view("<f4")


def damage_the_end(path: Path) -> int:
    """Returns the size."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    return len(raw)


def test_memory_goes_to_a_file_and_back(gpu: Any, tmp_path: Path) -> None:
    url = f"{tmp_path}/a.safetensors"
    values = np.arange(COUNT, dtype="<f4")

    async def scenario() -> None:
        device = device_on_gpu()
        await device.arena.write(ADDR, values)  # queued; nobody waits for it
        request = pb.SaveShardRequest(
            url=url, arrays=[pb.ArrayRange(name="a", dtype="FLOAT32", shape=[COUNT], memAddr=ADDR)]
        )
        answers = []
        async with aclosing(save_shard(device, request)) as saving:
            async for answer in saving:
                if not answers:  # it was copied: the memory may change
                    await device.arena.write(ADDR, np.full(COUNT, -1, "<f4"))
                answers.append(answer)
        np.testing.assert_array_equal(await contents(device), np.full(COUNT, -1, "<f4"))

        part = pb.LoadedPart(url=url, json=answers[-1].json, name="a", numBytes=4 * COUNT)
        loading = pb.LoadShardRequest(arrays=[pb.LoadedArray(memAddr=ADDR, parts=[part])])
        assert (await load_shard(device, loading)).numBytes == 4 * COUNT
        np.testing.assert_array_equal(await contents(device), values)

        size = damage_the_end(Path(url))
        await device.arena.write(ADDR, np.full(COUNT, -2, "<f4"))
        with pytest.raises(CheckpointDamaged, match=rf"bytes \d+\.\.{size} are not what was written"):
            await load_shard(device, loading)
        np.testing.assert_array_equal(await contents(device), np.full(COUNT, -2, "<f4"))

    asyncio.run(scenario())
