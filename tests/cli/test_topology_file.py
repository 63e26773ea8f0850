"""Topology files."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsml_gpu.cli.topology_file import load_cluster, parse_cluster
from dsml_gpu.schedules.topology import Cluster, Link

EXAMPLES = sorted((Path(__file__).parents[2] / "benchmarks" / "topologies").glob("*.toml"))

EVERYTHING = """
[hosts]
ranks = 8
count = 64
cores = 96
ranks_per_process = 2

[device]
latency = "1us"
bandwidth = "300GB/s"

[inside]
latency = "2us"
bandwidth = "2TB/s"

[nic]
latency = "4us"
bandwidth = "400Gbit/s"

[core]
oversubscription = 2.5
"""


def test_everything_in_a_file() -> None:
    assert parse_cluster(EVERYTHING) == Cluster(
        ranks_per_host=8,
        hosts=64,
        cores=96,
        ranks_per_process=2,
        device=Link(1e-6, 300e9),
        inside=Link(2e-6, 2e12),
        nic=Link(4e-6, 50e9),
        oversubscription=2.5,
    )


def test_what_is_left_out_is_no_limit() -> None:
    assert parse_cluster("") == Cluster()
    assert parse_cluster('[nic]\nbandwidth = "1Gbit/s"') == Cluster(nic=Link(0.0, 125e6))
    assert parse_cluster("[core]\noversubscription = 4") == Cluster(oversubscription=4.0)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_topologies(path: Path) -> None:
    assert load_cluster(path).topology(16).nranks == 16


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[hosts", "at the end of a table declaration"),
        ("[switch]\nports = 3", "a topology has unknown switch; known: hosts, device, inside, nic, core"),
        ("nic = 3", "nic must be a table, not 3"),
        ("[hosts]\ngpus = 8", r"\[hosts\] has unknown gpus; known: ranks, count, cores, ranks_per_process"),
        ("[nic]\nspeed = 1", r"\[nic\] has unknown speed; known: latency, bandwidth"),
        ("[core]\nlatency = 1", r"\[core\] has unknown latency; known: oversubscription"),
        ("[hosts]\nranks = 2.5", r"\[hosts\] ranks must be a whole number, not 2.5"),
        ("[hosts]\nranks = true", r"\[hosts\] ranks must be a whole number, not True"),
        ("[hosts]\nranks = 0", "ranks_per_host must be 1 or more, not 0"),
        ('[core]\noversubscription = "2"', r"\[core\] oversubscription must be a number, not '2'"),
        ('[device]\nlatency = "soon"', r"\[device\] latency: 'soon' is not a duration"),
        ("[device]\nlatency = 5", r"\[device\] latency: 5 is not a duration|\[device\] latency: '5' is not a duration"),
        ('[nic]\nbandwidth = "fast"', r"\[nic\] bandwidth: 'fast' is not a bandwidth"),
        ('[nic]\nbandwidth = "0Gbit/s"', r"\[nic\]: a bandwidth must be above 0 bytes a second"),
    ],
)
def test_what_is_no_topology_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as refusal:
        load_cluster(path)
    assert str(refusal.value).startswith(f"{path}: ")
