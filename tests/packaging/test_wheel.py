"""What a user gets from ``pip install``."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from dsml_gpu.reduction import kernels as checkout_kernels
from tests.packaging.conftest import ROOT, Distribution, make_environment, run


def test_the_wheel_holds_the_contract_the_stubs_and_the_types(distribution):
    with ZipFile(distribution.wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("dsml_gpu/proto/gpu_sim.proto") == (ROOT / "proto/gpu_sim.proto").read_bytes()
    wire = {"gpu_sim_pb2.py", "gpu_sim_pb2.pyi", "gpu_sim_pb2_grpc.py", "gpu_sim_pb2_grpc.pyi"}
    assert {"dsml_gpu/py.typed", *(f"dsml_gpu/wire/{name}" for name in wire)} <= names
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("dsml_gpu/**/*.py")}
    assert sources <= names
    beside = {name.split("/")[0] for name in names} - {"dsml_gpu"}
    assert all(name.endswith(".dist-info") for name in beside), "a wheel must bring no other top-level package"


def test_the_wheel_holds_the_kernels(distribution: Distribution, tmp_path: Path):
    kernels = {f"dsml_gpu/kernels/{path.name}": path.read_bytes() for path in (ROOT / "kernels").iterdir()}
    with ZipFile(distribution.wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("dsml_gpu/kernels/")}
        assert {name: archive.read(name) for name in held} == kernels
        archive.extractall(tmp_path)
    # The package from the wheel, with what it imports from here.
    code = "from dsml_gpu.reduction import kernels; print(kernels.directory()); print(kernels.source(), end='')"
    directory, source = run([sys.executable, "-c", code], cwd=tmp_path).split("\n", 1)

    assert Path(directory).resolve() == (tmp_path / "dsml_gpu/kernels").resolve()
    assert source == checkout_kernels.source()
    assert "reduce(const ReduceArguments arguments)" in source


def test_the_sdist_holds_what_building_and_testing_need(distribution):
    with tarfile.open(distribution.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    here = {str(path.relative_to(ROOT)) for path in Path(__file__).parent.glob("*.py")}
    here |= {str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/*")}
    here |= {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/kernels/cpu/*")}
    top = {"LICENSE", "README.md", "Makefile", "pyproject.toml", "proto/gpu_sim.proto", "proto/generate.py"}
    assert here | top <= names
    assert not [name for name in names if name.startswith((".venv", "dist/"))]


@pytest.mark.timeout(300)
def test_the_demo_runs_from_an_installed_wheel(distribution: Distribution, tmp_path: Path):
    programs = make_environment(tmp_path / "env", [f"{distribution.wheel}[demo]"])
    origin = run([programs / "python", "-c", "import dsml_gpu; print(dsml_gpu.__file__)"], cwd=tmp_path)
    assert Path(origin.strip()).is_relative_to(tmp_path), "the test must see the installed package"

    printed = run([programs / "dsml-gpu", "demo", "--epochs", "1"], cwd=tmp_path)

    rows = dict(line.strip("│ ").split("│", 1) for line in printed.splitlines() if line.startswith("│"))
    table = {name.strip(): value.strip() for name, value in rows.items()}
    assert table["epochs"] == "1", printed
    # Chance is 10 %; one epoch is enough to tell that it trained.
    assert float(table["accuracy"].split("%")[0]) > 50, printed
