"""The conda environments and pyproject.toml ask for the same packages in the same versions."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.packaging.conftest import ROOT, Distribution

#: PyPI's name -> conda-forge's, where they differ in more than dashes.
CONDA_NAMES = {
    "build": "python-build",
    # conda-forge has one cupy, built for each CUDA; `cuda-version` says which (below), pip's extra does.
    "cupy-cuda12x": "cupy",
    "cupy-cuda13x": "cupy",
    # Without Qt, which only interactive windows need, like the wheel.
    "matplotlib": "matplotlib-base",
}
#: What has no counterpart in pyproject.toml: conda's own pieces.
ONLY_IN_CONDA = {"pip", "python", "cuda-version"}
#: What has no line in the environment files: conda-forge's CuPy brings cuda-nvrtc, in the version of the CUDA that conda
#: chose; and where there is no CuPy, there may be no cuda-nvrtc either (macOS), and the tests that compile with it skip.
ONLY_IN_PIP = {"nvidia-cuda-nvrtc"}

FILES = {
    "environment.yml": ("", "demo", "bench", "dev", "cuda12", "cuda13"),
    "environment-cpu.yml": ("", "demo", "bench", "dev"),
}

Ranges = dict[str, SpecifierSet]


def read(file: str) -> tuple[dict[str, Any], Ranges, list[str]]:
    """Return the file, the ranges of its conda packages, and its pip lines."""
    environment = yaml.safe_load((ROOT / file).read_text())
    ranges: Ranges = {}
    pip: list[str] = []
    for entry in environment["dependencies"]:
        if isinstance(entry, dict):
            pip += entry["pip"]
            continue
        name, _, spec = entry.partition(" ")
        assert name not in ranges, f"{file} lists {name} twice"
        ranges[name] = SpecifierSet(spec)
    return environment, ranges, pip


def wanted(distribution: Distribution, extras: tuple[str, ...]) -> Ranges:
    """Return what the extras need together, by conda-forge's names.

    An environment file knows no markers, so it has what the oldest Python needs; the others can do with it.
    """
    (oldest,) = (spec.version for spec in SpecifierSet(distribution.requires_python))
    needed = {r for extra in extras for r in distribution.required_by(extra, python_version=oldest)}
    ranges: Ranges = {}
    for requirement in needed:
        name = canonicalize_name(requirement.name)
        if name in ONLY_IN_PIP:
            continue
        name = canonicalize_name(CONDA_NAMES.get(name, name))
        ranges[name] = ranges.get(name, SpecifierSet()) & requirement.specifier
    return ranges


@pytest.mark.parametrize("file", FILES)
def test_same_packages_same_ranges(distribution, file):
    _, ranges, _ = read(file)
    listed = {canonicalize_name(name): spec for name, spec in ranges.items() if name not in ONLY_IN_CONDA}
    assert listed == wanted(distribution, FILES[file])


@pytest.mark.parametrize("file", FILES)
def test_python_and_project(distribution, file):
    environment, ranges, pip = read(file)
    assert ranges["python"] == SpecifierSet(distribution.requires_python)
    assert "pip" in ranges, "conda warns, and may take another environment's pip, where it is not listed"
    assert pip == ["-e ."], "pip installs the project and nothing else: conda has brought all that it needs"
    # defaults beside conda-forge would mix builds that do not fit each other.
    assert environment["channels"] == ["conda-forge", "nodefaults"]


def test_one_file_has_a_gpu_and_the_other_has_none():
    _, with_gpu, _ = read("environment.yml")
    _, without, _ = read("environment-cpu.yml")
    assert not [name for name in without if re.match("cu(py|da)", name)]
    assert with_gpu.keys() - without.keys() == {"cupy", "cuda-version"}
    assert with_gpu["cuda-version"] == SpecifierSet(">=12,<14"), "one for each of the extras cuda12 and cuda13"
