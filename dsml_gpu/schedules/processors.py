"""Processor time in the simulator: processes with one thread each, on hosts with a number of cores."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any, Generic, TypeVar

from dsml_gpu.schedules.topology import Topology

Owner = TypeVar("Owner")

_NO_LIMIT = 1 << 62


class Processors(Generic[Owner]):
    """A clock with events, and the threads of all processes.

    A thread does its jobs in the order in which they were submitted. Where more threads have jobs than their host has cores,
    cores go round the threads, a job at a time.

    Args:
        topology: the processes, their hosts and the hosts' cores.

    Attributes:
        now_s: what time it is.
    """

    def __init__(self, topology: Topology) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._numbers = count()  # events of the same time happen in the order in which they were announced
        hosts = [_Host(cores or _NO_LIMIT) for cores in topology.cores or (0,) * topology.nhosts]
        self._threads = {
            process: _Thread(hosts[host])
            for process, host in zip(topology.processes.tolist(), topology.host_of, strict=True)
        }

    def at(self, time_s: float, happens: Callable[[Owner], None], owner: Owner) -> None:
        """Announces ``happens(owner)`` for a time that is not over."""
        heappush(self._events, (time_s, next(self._numbers), happens, owner))

    def submit(self, process: int, begin: Callable[[Owner], float], end: Callable[[Owner], None], owner: Owner) -> None:
        """A job for the thread of a process.

        Args:
            begin: called when the job begins; gives the seconds that it takes.
            end: called when it is done.
            owner: what both are called with.
        """
        thread = self._threads[process]
        thread.jobs.append((begin, end, owner))
        if not thread.has_turn:
            thread.has_turn = True
            host = thread.host
            if host.free_cores:
                host.free_cores -= 1
                self._begin(thread)
            else:
                host.waiting.append(thread)

    def run(self) -> None:
        """Lets time pass until nothing is left to happen."""
        events = self._events
        while events:
            self.now_s, _, happens, owner = heappop(events)
            happens(owner)

    def busy_s(self) -> dict[int, float]:
        """Processor time that each process has used."""
        return {process: thread.busy_s for process, thread in self._threads.items()}

    def least_s(self) -> float:
        """What the busiest process, or the busiest host with all its cores, has needed."""
        of_hosts: dict[_Host, float] = defaultdict(float)
        for thread in self._threads.values():
            of_hosts[thread.host] += thread.busy_s / thread.host.cores
        return max(max(of_hosts.values()), max(thread.busy_s for thread in self._threads.values()))

    def _begin(self, thread: _Thread) -> None:
        begin, _, owner = thread.jobs[0]
        seconds = begin(owner)
        thread.busy_s += seconds
        heappush(self._events, (self.now_s + seconds, next(self._numbers), self._on_end, thread))

    def _on_end(self, thread: _Thread) -> None:
        _, end, owner = thread.jobs.popleft()
        end(owner)
        host = thread.host
        if host.waiting:
            if thread.jobs:
                host.waiting.append(thread)
            else:
                thread.has_turn = False
            self._begin(host.waiting.popleft())
        elif thread.jobs:
            self._begin(thread)
        else:
            thread.has_turn = False
            host.free_cores += 1


class _Host:
    """The cores of a host, and the threads that wait for one, in their order."""

    __slots__ = ("cores", "free_cores", "waiting")

    def __init__(self, cores: int) -> None:
        self.cores = self.free_cores = cores
        self.waiting: deque[_Thread] = deque()


class _Thread:
    """A thread's jobs, the first of which it does or waits to do.

    Attributes:
        has_turn: it runs on a core or waits for one; otherwise it has no jobs.
    """

    __slots__ = ("busy_s", "has_turn", "host", "jobs")

    def __init__(self, host: _Host) -> None:
        self.host = host
        self.jobs: deque[tuple[Callable[[Any], float], Callable[[Any], None], Any]] = deque()
        self.has_turn = False
        self.busy_s = 0.0
