"""Where ranks are, and which links a message between two of them crosses.

A message leaves by the link of its device and arrives by the link of the other. In between, on one host, it crosses what is
inside the host; between hosts it crosses the NIC of either and the core switch. Between ranks of one process, where the
receiver reads the sender's memory, it crosses only what is inside the host. Links are full duplex, and all messages that
cross one in the same direction share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a link.

    Attributes:
        latency_s: from the last byte in to the last byte out of an idle link, less the time that the bytes take.
        bytes_per_s: infinity where it is not limited.
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s < math.inf:
            raise ValueError(f"a latency must be a number of seconds from 0 up, not {self.latency_s!r}")
        if not self.bytes_per_s > 0:
            raise ValueError(f"a bandwidth must be above 0 bytes a second, not {self.bytes_per_s!r}")

    @property
    def byte_s(self) -> float:
        """Time that a byte takes."""
        return 1 / self.bytes_per_s


@dataclass(frozen=True)
class Topology:
    """Ranks on hosts, and the links between them. Links have numbers, which `link_name` gives names to.

    Attributes:
        host_of: the host of each rank, as numbers from 0.
        process_of: the process of each rank; ranks of one process share its thread and read each other's memory (p2p), all
            others use gRPC. Empty: a process each.
        cores: of each host, how many threads can run at a time; 0: as many as there are. Empty: 0 for all.
        devices: each rank's own link, which `dsml-gpu device` emulates with ``--link-latency`` and ``--link-bandwidth``. A
            message takes the latency of its sender. Empty: neither latency nor limit.
        inside: what is inside a host, shared by all messages between its devices.
        nic: of each host, shared by all messages from its devices to other hosts, and by those to them.
        oversubscription: of the core switch, which all messages between hosts share: all NICs together can send so many
            times as much as it passes on. 1 or less: it is no bottleneck.

    Raises:
        ValueError: on construction, where lengths or numbers do not fit.
    """

    host_of: tuple[int, ...]
    process_of: tuple[int, ...] = ()
    cores: tuple[int, ...] = ()
    devices: tuple[Link, ...] = ()
    inside: Link = field(default_factory=Link)
    nic: Link = field(default_factory=Link)
    oversubscription: float = 1.0

    def __post_init__(self) -> None:
        if not self.host_of or min(self.host_of) < 0:
            raise ValueError("a topology needs the host of at least one rank, as numbers from 0")
        for name, values, expected in (
            ("process_of", self.process_of, self.nranks),
            ("devices", self.devices, self.nranks),
            ("cores", self.cores, self.nhosts),
        ):
            if values and len(values) != expected:
                raise ValueError(f"{name} has {len(values)} values, expected {expected} or none")
        if any(cores < 0 for cores in self.cores):
            raise ValueError(f"a host cannot have {min(self.cores)} cores")
        if not 0 < self.oversubscription < math.inf:
            raise ValueError(f"the oversubscription must be a number above 0, not {self.oversubscription!r}")
        host_of_process: dict[int, int] = {}
        for process, host in zip(self.process_of, self.host_of, strict=False):
            if host_of_process.setdefault(process, host) != host:
                raise ValueError(f"process {process} is on host {host_of_process[process]} and on host {host}")

    @property
    def nranks(self) -> int:
        return len(self.host_of)

    @cached_property
    def nhosts(self) -> int:
        return max(self.host_of) + 1

    @property
    def nlinks(self) -> int:
        """Links are numbered so: out of each device, into each, inside each host, out of each NIC, into each, the core."""
        return 2 * self.nranks + 3 * self.nhosts + 1

    @cached_property
    def hosts(self) -> Ints:
        """`host_of` as an array."""
        return np.array(self.host_of)

    @cached_property
    def processes(self) -> Ints:
        """The process of each rank, as an array."""
        return np.array(self.process_of) if self.process_of else np.arange(self.nranks)

    @cached_property
    def latencies_s(self) -> Floats:
        """Of each link, by number; what leads into a host or a device has none: the way out of the other one has had it."""
        devices = [link.latency_s for link in self.devices] or [0.0] * self.nranks
        return self._by_number(devices, [0.0] * self.nranks, self.inside.latency_s, self.nic.latency_s, 0.0, 0.0)

    @cached_property
    def byte_times_s(self) -> Floats:
        """Time that a byte takes on each link, by number; 0 where it is not limited."""
        devices = [link.byte_s for link in self.devices] or [0.0] * self.nranks
        nic_s = self.nic.byte_s
        core_s = nic_s * self.oversubscription / self.nhosts if self.oversubscription > 1 else 0.0
        return self._by_number(devices, devices, self.inside.byte_s, nic_s, nic_s, core_s)

    def _by_number(
        self, out: list[float], into: list[float], inside: float, nic_out: float, nic_in: float, core: float
    ) -> Floats:
        of_hosts = [np.full(self.nhosts, value) for value in (inside, nic_out, nic_in)]
        return np.concatenate([np.array(out), np.array(into), *of_hosts, np.array([core])])

    def first_links(self) -> tuple[int, int, int, int]:
        """The first link inside hosts, out of NICs, and into NICs, and the core switch."""
        inside = 2 * self.nranks
        return inside, inside + self.nhosts, inside + 2 * self.nhosts, inside + 3 * self.nhosts

    def paths(self, src: Ints, dst: Ints) -> tuple[Ints, Ints]:
        """The links that messages cross between pairs of ranks.

        Returns:
            Links in the order in which they are crossed, one row for each of 5 places and one column for each pair; and a
            mask of the same shape, False where a message crosses no link in that place.
        """
        src_host, dst_host = self.hosts[src], self.hosts[dst]
        same = src_host == dst_host
        by_device = self.processes[src] != self.processes[dst]
        inside, nic_out, nic_in, core = self.first_links()
        links = np.stack(
            [
                src,
                np.where(same, inside + src_host, nic_out + src_host),
                np.full_like(src, core),
                nic_in + dst_host,
                self.nranks + dst,
            ]
        )
        crossed = np.stack([by_device, np.ones_like(same), ~same, ~same, by_device])
        return links, crossed

    def link_name(self, number: int) -> str:
        """For people."""
        nranks, nhosts = self.nranks, self.nhosts
        if number < 2 * nranks:
            return f"{'out of' if number < nranks else 'into'} device {number % nranks}"
        kind, host = divmod(number - 2 * nranks, nhosts)
        names = (f"inside host {host}", f"out of host {host}", f"into host {host}", "core switch")
        return names[kind]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal hosts with equal devices: a topology for any number of ranks, which fill one host after the other.

    Attributes:
        ranks_per_host: devices, and ranks, of each host.
        hosts: how many there are; None: as many as are needed.
        cores: of each host; 0: as many as there are threads.
        ranks_per_process: devices of one server process.
        device, inside, nic, oversubscription: see `Topology`.
    """

    ranks_per_host: int = 1
    hosts: int | None = None
    cores: int = 0
    ranks_per_process: int = 1
    device: Link = field(default_factory=Link)
    inside: Link = field(default_factory=Link)
    nic: Link = field(default_factory=Link)
    oversubscription: float = 1.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("ranks_per_host", self.ranks_per_host, 1),
            ("hosts", 1 if self.hosts is None else self.hosts, 1),
            ("cores", self.cores, 0),
            ("ranks_per_process", self.ranks_per_process, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be {least} or more, not {value}")
        if self.ranks_per_host % self.ranks_per_process:
            raise ValueError(f"{self.ranks_per_host} ranks of a host cannot be {self.ranks_per_process} to a process")

    def topology(self, nranks: int) -> Topology:
        """The topology of so many ranks.

        Raises:
            ValueError: the hosts do not have so many devices.
        """
        if self.hosts is not None and nranks > self.hosts * self.ranks_per_host:
            raise ValueError(
                f"{nranks} ranks do not fit: {self.hosts} hosts with {self.ranks_per_host} devices each have "
                f"{self.hosts * self.ranks_per_host}"
            )
        ranks = range(nranks)
        nhosts = -(-nranks // self.ranks_per_host)
        return Topology(
            host_of=tuple(rank // self.ranks_per_host for rank in ranks),
            process_of=tuple(rank // self.ranks_per_process for rank in ranks),
            cores=(self.cores,) * nhosts,
            devices=(self.device,) * nranks,
            inside=self.inside,
            nic=self.nic,
            oversubscription=self.oversubscription,
        )


#: One GPU to a host, 100 Gbit/s and 5 us between hosts.
DEFAULT_CLUSTER = Cluster(nic=Link(5e-6, 100e9 / 8))
