"""Groups that a client keeps by itself until they are whole, and checks call by call where it cannot judge one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from dsml_gpu.coordinator import plan
from dsml_gpu.coordinator.call import CollectiveCall
from dsml_gpu.coordinator.communicator import Communicator
from dsml_gpu.wire import gpu_sim_pb2 as pb


async def check(comm: Communicator, call: CollectiveCall) -> None:
    """Raises what `Communicator.submit` refuses a call with for its buffers, its algorithm or its schedule."""
    for handle, ranges in zip(comm.handles, call.ranges, strict=True):
        for addr, nbytes in ranges:
            handle.check(addr, nbytes)
    if call.own_schedule:
        hosts = plan.hosts_of([handle.metadata for handle in comm.handles])
        await asyncio.to_thread(plan.plan_of, plan.key_of(call, "", hosts))
    elif call.algorithm:
        plan.require_known(call.name, call.algorithm)


async def run_group(comm: Communicator, calls: Sequence[CollectiveCall], wait: bool) -> pb.CollectiveResult | None:
    """Runs calls as one group, or none of them where one is refused. See `Communicator.group_end`."""
    comm.group_start()
    try:
        for call in calls:
            await comm.submit(call)
    except BaseException:
        comm.group_discard()
        raise
    return await comm.group_end(wait)
