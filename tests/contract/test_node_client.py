"""A client in JavaScript, with the original contract's file and the packages that everybody uses there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsml_gpu.cli.fleet import Fleet, ServerProcess

HERE = Path(__file__).parent
NODE, NPM = shutil.which("node"), shutil.which("npm")


def run(folder: Path, *command: str | Path | None, timeout_s: float = 90) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the client and the packages of its lock file."""
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(HERE / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    run(folder, NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    return folder


@pytest.fixture(params=["coordinator alone", "fleet of 4"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "coordinator alone":
        with ServerProcess("coordinator") as server:
            yield server.address
    else:
        with Fleet(4, ["--memory", "16MiB"]) as fleet:
            yield fleet.address


@pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed")
def test_the_main_job(client: Path, address: str):
    run(client, NODE, "client.js", HERE / "original_gpu_sim.proto", address, timeout_s=30)


def test_the_lock_file_names_no_registry():
    assert '"resolved"' not in (HERE / "node" / "package-lock.json").read_text()
