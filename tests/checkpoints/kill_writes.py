"""Kills processes that write checkpoints, at random instants, and looks whether the last complete one is there each time.

    python -m tests.checkpoints.kill_writes --n 1000 --seed 1

Each writer is a process of its own with four devices, which writes one checkpoint after the other into the folder that the
one before it was killed over, and says when one is complete. After the kill the folder must have, bit for bit, the last one
that was said to be complete, or the one behind it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from dsml_gpu.checkpoints.folders import TEMPORARY, folder_at
from dsml_gpu.checkpoints.manifest import MANIFEST, read_manifest
from tests.checkpoints.rig import Rig, number_of

#: A writer that says nothing for so long hangs.
_HANGS_S = 60.0
#: Kills come so many checkpoints after the first sign of a writer, at most.
_CHECKPOINTS = 2.0


def write_for_ever(url: str, number: int, said: int) -> None:
    """Checkpoint `number` and all behind it; tells of each on the file `said`."""

    async def write() -> None:
        rig = Rig()
        for one in range(number, 1 << 31):
            await rig.write(one)
            os.write(said, b"begin %d\n" % one)
            await rig.checkpoint(url)
            os.write(said, b"done %d\n" % one)

    asyncio.run(write())


class Writer:
    """A process that writes checkpoints."""

    def __init__(self, url: str, number: int) -> None:
        self._lines, said = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._lines)
                write_for_ever(url, number, said)
            finally:
                os._exit(1)
        os.close(said)
        self._text = b""

    def wait_for(self, beginning: bytes) -> None:
        """Returns when it has said such a line."""
        while beginning not in self._text:
            assert select.select([self._lines], [], [], _HANGS_S)[0], f"the writer hangs; it has said {self._text!r}"
            more = os.read(self._lines, 1 << 16)
            assert more, f"the writer has ended by itself; it has said {self._text!r}"
            self._text += more

    def kill(self) -> dict[str, int]:
        """As kill -9; returns the number of the last checkpoint that was begun, and of the last that was done."""
        os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        assert os.WIFSIGNALED(status), f"the writer ended by itself with status {status}"
        while more := os.read(self._lines, 1 << 16):
            self._text += more
        os.close(self._lines)
        return {word: int(number) for word, number in re.findall(r"(begin|done) (\d+)\n", self._text.decode())}


def left_by(folder: Path) -> str:
    """Where in a checkpoint a writer was killed, by what it has left."""
    names = os.listdir(folder)
    known = {MANIFEST, *(file.name for file in read_manifest(folder_at(str(folder))).files)}
    more = [name for name in names if name not in known]
    if any(name.startswith(MANIFEST) for name in more):
        return "in the manifest"
    if any(re.search(TEMPORARY, name) for name in more):
        return "in the files"
    return "behind whole files" if more else "between checkpoints"


def run(n: int, seed: int) -> dict[str, object]:
    """Kills `n` writers. Raises AssertionError, CheckpointDamaged or CheckpointNotFound where a checkpoint was lost."""
    rng = random.Random(seed)
    places: Counter[str] = Counter()
    complete = 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "checkpoint"
        duration_s = 0.1
        for kill in range(n):
            writer = Writer(str(folder), complete + 1)
            begun = time.monotonic()
            writer.wait_for(b"begin %d\n" % (complete + 1))
            if kill % 20 == 0:
                begun = time.monotonic()
                writer.wait_for(b"done %d\n" % (complete + 1))
                duration_s = time.monotonic() - begun
            time.sleep(rng.uniform(0, _CHECKPOINTS * duration_s))
            last = writer.kill()
            done = last.get("done", complete)
            found = number_of(str(folder), [done, done + 1]) if done or (folder / MANIFEST).exists() else 0
            assert found >= done, f"kill {kill} (seed {seed}): {done} was complete, {found} is there"
            assert found <= last.get("begin", complete), f"kill {kill} (seed {seed}): {found} was not begun"
            complete = found
            if found:
                places[left_by(folder)] += 1
    return {
        "seed": seed,
        "kills": n,
        "restored": n,
        "checkpoints": complete,
        "killed": dict(places),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", file=sys.stderr, flush=True)
    print(json.dumps(run(arguments.n, arguments.seed)))


if __name__ == "__main__":
    main()
