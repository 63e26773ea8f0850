"""What an execution waits for, told from the slices that it expects, sends and gets rid of."""

from __future__ import annotations

from dsml_gpu.device.dataflow import dataflow_of
from dsml_gpu.device.waits import Wait, Waits
from dsml_gpu.schedules import find_algorithm, programs_of
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: Of rank 1 of four: from rank 0 come chunks 3, 2, 1 and then 0, 3, 2, in six steps.
FLOW = dataflow_of(programs_of(find_algorithm("all_reduce", "ring").schedule(4, root=0, pairs=(), hosts=(0,) * 4))[1])


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_wait_counts_from_the_last_slice_and_only_when_it_lasts() -> None:
    clock = Clock()
    waits = Waits(clock)
    waits.begin(2, FLOW)
    access = FLOW.receives[0][1]
    waits.expect(0, access)
    clock.now_s = 0.05
    assert waits.present() == ()
    clock.now_s = 5.0
    assert waits.present() == (Wait(0, 2, 5.0, chunk=access.move.chunk, step=1, steps=6),)
    waits.came(0)
    assert waits.present() == ()
    waits.expect(0, access)
    clock.now_s = 5.5
    (wait,) = waits.present()
    assert wait.waited_s == 0.5
    assert str(wait) == f"chunk {access.move.chunk} of step 2/6 from rank 0"
    assert wait.to_wire() == pb.Wait(rank=0, chunk=access.move.chunk, step=1, steps=6, waitedMs=500, operation=2)


def test_what_a_peer_does_not_take() -> None:
    clock = Clock()
    waits = Waits(clock)
    waits.begin(0, FLOW)
    waits.send(2)
    waits.send(2)
    clock.now_s = 1.0
    assert waits.present() == (Wait(2, 0, 1.0, sends=True),)
    waits.taken(2)
    clock.now_s = 1.5
    assert waits.present() == (Wait(2, 0, 0.5, sends=True),), "since it took the last one"
    waits.taken(2)
    clock.now_s = 9.0
    assert waits.present() == ()
    waits.send(2)
    clock.now_s = 9.5
    (wait,) = waits.present()
    assert wait.waited_s == 0.5, "since the next one is under way"
    assert str(wait) == "rank 2 to take what was sent"


def test_after_the_last_operation_the_ends_are_waited_for() -> None:
    clock = Clock()
    waits = Waits(clock)
    waits.begin(0, FLOW)
    waits.end(1)
    waits.expect(0, None)
    waits.send(2)
    clock.now_s = 1.0
    assert waits.present() == (Wait(0, 1, 1.0), Wait(2, 1, 1.0, sends=True))
    assert str(waits.present()[0]) == "the end of what rank 0 sends"


def test_an_execution_that_was_given_up_keeps_its_waits() -> None:
    clock = Clock()
    waits = Waits(clock)
    waits.begin(0, FLOW)
    waits.expect(0, FLOW.receives[0][0])
    clock.now_s = 1.0
    waits.keep()
    kept = waits.present()
    clock.now_s = 7.0
    waits.keep()
    assert waits.present() == kept
    assert [wait.waited_s for wait in kept] == [1.0]
