"""Plants bugs in the code that recovers, one at a time, and looks whether the tests see them.

    python -m tests.recovery.planted_bugs            # all of them
    python -m tests.recovery.planted_bugs rollback   # those whose names begin so

Each bug is planted into a copy of the sources, where the tests that are to see it run: first without the bug, when they must
pass, then with it, when one of them must fail. A bug that goes unseen makes the command fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_COPIED = ("dsml_gpu", "proto", "kernels", "tests", "pyproject.toml")
#: pytest's exit status where tests have failed; others mean that they could not be run.
_TESTS_FAILED = 1
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Bug:
    """One bug.

    Attributes:
        name: what is left out or wrong.
        file: below `dsml_gpu`.
        code: that stands there once.
        planted: what stands there instead.
        tests: what is to see it, as pytest takes it.
    """

    name: str
    file: str
    code: str
    planted: str
    tests: tuple[str, ...]


BUGS = (
    Bug(
        "rollback is left out",
        "device/undo.py",
        "            self._spare.memory.copy(kept.place, kept.content)\n",
        "            pass\n",
        ("tests/servers/test_atomic.py", "-k", "dies_in_each_phase"),
    ),
    Bug(
        "fence of a frozen rank is left out",
        "coordinator/memory_access.py",
        "        lost = [rank for rank, has in zip(ranks, stopped, strict=True) if not has]\n",
        "        lost: list[int] = []\n",
        ("tests/servers/test_shared_memory.py", "-k", "freezes_in_the_middle"),
    ),
    Bug(
        "fsync of a checkpoint's file is left out",
        "checkpoints/folders.py",
        "            os.fsync(self._file.fileno())\n",
        "            pass\n",
        ("tests/checkpoints/test_durability.py",),
    ),
    Bug(
        "fsync of a checkpoint's folder is left out",
        "checkpoints/folders.py",
        "    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)\n    try:\n        os.fsync(number)\n",
        "    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)\n    try:\n        pass\n",
        ("tests/checkpoints/test_durability.py",),
    ),
    Bug(
        "epoch of work is not looked at by the device",
        "device/device.py",
        "        if epoch not in (0, membership.epoch):\n",
        "        if False:\n",
        ("tests/contract/test_refusals.py", "-k", "epoch"),
    ),
    Bug(
        "group begins anew although some of it has ended well",
        "coordinator/communicator.py",
        "                    del remaining[: sum(len(one.parts) for one in some)]\n",
        "                    if len(done) > 1:\n                        remaining.clear()\n",
        ("tests/servers/test_restart.py", "-k", "each_operation_of_a_group"),
    ),
    Bug(
        "lost rank's weight or block is taken for another one's",
        "coordinator/shrink.py",
        "        places=tuple(_places(call, rank, blocks) for rank in kept),\n",
        "        places=tuple(_places(call, rank, blocks) for rank in range(len(kept))),\n",
        ("tests/coordinator/test_shrink.py",),
    ),
    Bug(
        "spare's memory is not loaded",
        "coordinator/replacement.py",
        "            nbytes = await restore_rank(checkpoint.url, spare, rank)\n",
        "            nbytes = 0\n",
        ("tests/servers/test_restore.py", "-k", "sum_has_what_all"),
    ),
    Bug(
        "device that was left behind is not told",
        "coordinator/device_handle.py",
        "        for comm_id in sorted(self._unheard_leaves):\n",
        "        for comm_id in ():\n",
        ("tests/servers/test_restart.py", "-k", "frozen"),
    ),
    Bug(
        "loss of a rank does not end the operation",
        "coordinator/control_round.py",
        "    loss.add_done_callback(lambda ended: ended.cancelled() or task.cancel())\n",
        "",
        ("tests/servers/test_restart.py", "-k", "frozen"),
    ),
    Bug(
        "outcome of an operation is not remembered",
        "coordinator/outcomes.py",
        "        known = self._known.get(operation.key)\n",
        "        known = None\n",
        ("tests/coordinator/test_outcomes.py",),
    ),
    Bug(
        "what a lost rank has begun to write is not gone on with",
        "coordinator/pass_rounds.py",
        "        if errors:\n            moved += await self._roll_forward(",
        "        if errors and moved < 0:\n            moved += await self._roll_forward(",
        ("tests/servers/test_atomic_passes.py", "-m", "not slow"),
    ),
    Bug(
        "rollback by the next coordinator is left out",
        "coordinator/resume.py",
        '            await handle.call("Quiesce", request, _SETTLE_TIMEOUT_S)\n            log.info',
        "            log.info",
        ("tests/servers/test_resume.py", "-k", "happens_once and round.done", "-m", "not slow"),
    ),
    Bug(
        "rounds that are recorded are undone by the next coordinator",
        "coordinator/resume.py",
        "keep = request.round in committed",
        "keep = False",
        ("tests/servers/test_resume.py", "-k", "happens_once and round.recorded", "-m", "not slow"),
    ),
    Bug(
        "calls of a group that are done are run again by the next coordinator",
        "coordinator/communicator.py",
        "asked[progress.calls :]",
        "asked[0:]",
        ("tests/servers/test_resume.py", "-k", "group_is_not or round.recorded", "-m", "not slow"),
    ),
    Bug(
        "silence of a busy process counts as its death",
        "coordinator/heartbeats.py",
        "        return state is None or not state.computes_since(self._before)\n",
        "        return True\n",
        ("tests/coordinator/test_heartbeats.py",),
    ),
)


def copy_sources(folder: Path) -> None:
    """Copies what the tests need."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def plant(bug: Bug, folder: Path) -> None:
    """Puts a bug into a copy of the sources. Raises ValueError where its place is not there once."""
    path = folder / "dsml_gpu" / bug.file
    text = path.read_text(encoding="utf-8")
    if text.count(bug.code) != 1:
        raise ValueError(f"{bug.file} has the place of {bug.name!r} {text.count(bug.code)} times, expected once")
    path.write_text(text.replace(bug.code, bug.planted), encoding="utf-8")


def is_seen(bug: Bug) -> bool:
    """Whether a test that passes without the bug fails with it. Raises RuntimeError where they do not pass without it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sources(folder)
        before = _run(bug.tests, folder)
        plant(bug, folder)
        after = _run(bug.tests, folder)
    for ran, allowed in ((before, (0,)), (after, (0, _TESTS_FAILED))):
        if ran.returncode not in allowed:
            output = f"{ran.stdout[-2000:]}{ran.stderr[-2000:]}"
            raise RuntimeError(f"{bug.name}: pytest ended with {ran.returncode}, expected one of {allowed}:\n{output}")
    return after.returncode == _TESTS_FAILED


def _run(tests: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


def main(prefix: str = "") -> int:
    """Plants all bugs whose names begin with `prefix`; returns the exit status."""
    chosen = [bug for bug in BUGS if bug.name.startswith(prefix)]
    unseen = 0
    for bug in chosen:
        seen = is_seen(bug)
        unseen += not seen
        print(f"{'seen    ' if seen else 'NOT SEEN'}  {bug.name} ({bug.file})", flush=True)
    print(f"{len(chosen) - unseen} of {len(chosen)} bugs seen")
    return 1 if unseen or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
