"""Topologies as files: TOML that says what the hosts of a cluster are and what connects them.

    [hosts]
    ranks = 8                  # devices of a host, with a rank each; default 1
    count = 64                 # hosts; default: as many as the ranks need
    cores = 96                 # threads that run at a time; default: all that have work
    ranks_per_process = 1      # devices of a server process, which read each other's memory

    [device]                   # each device's own link, full duplex
    latency = "1us"
    bandwidth = "300GB/s"

    [inside]                   # what is inside a host, shared by all messages between its devices
    latency = "1us"
    bandwidth = "2TB/s"

    [nic]                      # of a host, full duplex, shared by its devices
    latency = "5us"
    bandwidth = "400Gbit/s"

    [core]                     # what is between the hosts
    oversubscription = 2.0     # all NICs together send so many times what it passes on; default 1: it is no limit

Everything may be left out: a latency is then 0, and a bandwidth has no limit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsml_gpu.cli.units import parse_bandwidth, parse_duration
from dsml_gpu.schedules.topology import Cluster, Link

_LINKS = ("device", "inside", "nic")


def load_cluster(path: Path) -> Cluster:
    """The cluster that a file describes.

    Raises:
        ValueError: it cannot be read, or is no topology; the message names the file and the key.
    """
    try:
        return parse_cluster(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_cluster(text: str) -> Cluster:
    """The cluster that TOML describes. Raises ValueError as `load_cluster`, without the file."""
    content = _parse_toml(text)
    _require_keys("a topology", content, ("hosts", *_LINKS, "core"))
    tables = {name: _table(content, name) for name in ("hosts", *_LINKS, "core")}
    hosts, core = tables["hosts"], tables["core"]
    _require_keys("[hosts]", hosts, ("ranks", "count", "cores", "ranks_per_process"))
    _require_keys("[core]", core, ("oversubscription",))
    device, inside, nic = (_link(name, tables[name]) for name in _LINKS)
    return Cluster(
        ranks_per_host=_whole(hosts, "ranks", 1),
        hosts=_whole(hosts, "count", 1) if "count" in hosts else None,
        cores=_whole(hosts, "cores", 0),
        ranks_per_process=_whole(hosts, "ranks_per_process", 1),
        device=device,
        inside=inside,
        nic=nic,
        oversubscription=_number(core, "oversubscription", 1.0),
    )


def _parse_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    content: dict[str, Any] = tomllib.loads(text)
    return content


def _table(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise ValueError(f"{name} must be a table, not {table!r}")
    return table


def _require_keys(what: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ValueError(f"{what} has unknown {', '.join(unknown)}; known: {', '.join(known)}")


def _link(name: str, table: Mapping[str, Any]) -> Link:
    _require_keys(f"[{name}]", table, ("latency", "bandwidth"))
    values: dict[str, float] = {}
    for key, field, parse in (("latency", "latency_s", parse_duration), ("bandwidth", "bytes_per_s", parse_bandwidth)):
        if key not in table:
            continue
        try:
            values[field] = parse(table[key])
        except ValueError as error:
            raise ValueError(f"[{name}] {key}: {error}") from None
    try:
        return Link(**values)
    except ValueError as error:
        raise ValueError(f"[{name}]: {error}") from None


def _whole(table: Mapping[str, Any], key: str, default: int) -> int:
    value = table.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"[hosts] {key} must be a whole number, not {value!r}")
    return value


def _number(table: Mapping[str, Any], key: str, default: float) -> float:
    value = table.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"[core] {key} must be a number, not {value!r}")
    return float(value)
