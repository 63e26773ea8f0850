"""The wheel, built once, and environments to install it in.

Nothing here runs from the checkout: programs run in the test's own folder with the environment's own Python, so that
what they import is what was installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def clean_variables() -> dict[str, str]:
    """Environment variables for a program: these, without those that would bring the checkout's modules in."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    variables["PYTHONIOENCODING"] = "utf-8"  # whatever the locale is here
    return variables


def run(command: Sequence[str | Path], cwd: Path, timeout_s: float = 100) -> str:
    """Run a program and return its standard output; fail the test with all it said when it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean_variables(),
        capture_output=True,
        encoding="utf-8",
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        words = " ".join(map(str, command))
        pytest.fail(f"{words}\nexited {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


@dataclass(frozen=True)
class Distribution:
    """What ``python -m build`` made."""

    wheel: Path
    sdist: Path
    requires_python: str
    requirements: tuple[Requirement, ...]

    def required_by(self, extra: str, **environment: str) -> tuple[Requirement, ...]:
        """Requirements that only an extra has; ``""`` for those of the bare package.

        Keywords replace what markers ask of this Python, for example ``python_version="3.10"``.
        """

        def holds(requirement: Requirement, wanted: str) -> bool:
            return requirement.marker is None or requirement.marker.evaluate({"extra": wanted, **environment})

        return tuple(r for r in self.requirements if holds(r, extra) and not (extra and holds(r, "")))


@pytest.fixture(scope="session")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """The sdist made from the checkout and the wheel made from that sdist, so the sdist is complete if the wheel is."""
    out = tmp_path_factory.mktemp("dist")
    # --no-isolation: with the hatchling of the `dev` extra, which saves a download.
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], cwd=out)
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    requirements = tuple(map(Requirement, metadata.get_all("Requires-Dist", [])))
    return Distribution(wheel, sdist, metadata["Requires-Python"], requirements)


def make_environment(at: Path, requirements: Sequence[str | Path]) -> Path:
    """Make a virtual environment that holds just these and what they need; return the folder of its programs.

    The running Python's pip installs into it from outside, which spares it a pip of its own.
    """
    run([sys.executable, "-m", "venv", "--without-pip", at], cwd=at.parent)
    python = at / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    # --no-compile: most of what is installed here is never imported, and compiling it takes longer than the rest.
    run([*pip, "install", "--no-compile", "--only-binary", ":all:", *requirements], cwd=at.parent, timeout_s=240)
    return python.parent
