"""Flips bits in the files of a checkpoint, one at a time, and looks whether restoring refuses each with its file and place.

    python -m tests.checkpoints.flipped_bits --n 1000 --seed 1

The bits are of all files, the manifest and the headers of the others included. No array may change by a restore that is
refused, and the checkpoint as it was must restore in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from dsml_gpu.checkpoints.folders import folder_at
from dsml_gpu.checkpoints.manifest import MANIFEST, PIECE_BYTES, read_manifest
from dsml_gpu.errors import CheckpointDamaged
from tests.checkpoints.rig import NRANKS, Rig, contents


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def is_unchanged(rig: Rig, number: int) -> bool:
    return all(
        np.array_equal(data.view(np.uint32), contents(number, rank)[name].view(np.uint32))
        for rank in range(NRANKS)
        for name, data in rig.memory(rank).items()
    )


async def refusal_of(rig: Rig, url: str) -> str:
    """What a restore is refused with; "restored" where it is not."""
    try:
        await rig.restore(url)
    except CheckpointDamaged as refusal:
        return str(refusal)
    return "restored"


async def run(n: int, seed: int) -> dict[str, object]:
    """Flips `n` bits. Raises AssertionError where one is not refused, or not with its place."""
    rng = random.Random(seed)
    parts: Counter[str] = Counter()
    widest = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as parent:
        url = f"{parent}/checkpoint"
        rig = Rig()
        await rig.write(1)
        await rig.checkpoint(url)
        await rig.write(2)
        headers = {file.name: file.header_nbytes for file in read_manifest(folder_at(url)).files} | {MANIFEST: 0}
        for number in range(n):
            path = Path(url) / rng.choice(sorted(headers))
            # Most of a file is arrays; of the rest there are to be some as well.
            in_header = headers[path.name] and rng.random() < 0.2
            place, bit = rng.randrange(headers[path.name] if in_header else path.stat().st_size), rng.randrange(8)
            what = f"flip {number} (seed {seed}): bit {bit} of byte {place} of {path.name}"
            flip(path, place, bit)
            refusal = await refusal_of(rig, url)
            said = re.fullmatch(r"(.*/)?([^/]+): bytes (\d+)\.\.(\d+) .*", refusal)
            assert said, f"{what}: {refusal}"
            start, stop = int(said[3]), int(said[4])
            assert said[2] == path.name, f"{what}: {refusal}"
            assert start <= place < stop <= start + PIECE_BYTES, f"{what}: {refusal}"
            widest = max(widest, stop - start)
            assert is_unchanged(rig, 2), f"{what}: arrays have changed"
            flip(path, place, bit)
            kind = "header" if place < headers[path.name] else "arrays"
            parts["manifest" if path.name == MANIFEST else kind] += 1
        await rig.restore(url)
        assert is_unchanged(rig, 1), "the checkpoint as it was is not restored"
        await rig.close()
    return {
        "seed": seed,
        "flips": n,
        "refused": n,
        "in": dict(parts),
        "widest_range": widest,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", file=sys.stderr, flush=True)
    print(json.dumps(asyncio.run(run(arguments.n, arguments.seed))))


if __name__ == "__main__":
    main()
