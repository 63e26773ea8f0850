"""Every instantiation that is shipped compiles for the GPUs of today, by the compiler that CuPy uses on them."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from dsml_gpu.reduction import DTYPES, OPERATORS, checked_weight, kernels
from dsml_gpu.reduction.passes import MAX_OPERANDS
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.kernels import nvrtc
from tests.kernels.conftest import all_instantiations

#: Ampere, Hopper, Blackwell.
ARCHITECTURES = (80, 90, 100)
#: Kernels are compiled type by type. The copies are a group of their own.
GROUPS = (*DTYPES, "")
#: What ``--ptxas-options=-v`` adds to the log; everything else in a log is a warning.
STATISTICS = re.compile(r"ptxas (info|  +\.) .*|\s*")
STACK = re.compile(r"Function properties for (\w+)\n.* (\d+) bytes stack frame")
#: For sm_100 NVRTC 13.5 puts a register of one 64-bit product aside. Packs in local memory would be many times that.
REGISTERS_BYTES = 8

Job = tuple[str, int]


def group(dtype_name: str) -> list[str]:
    return sorted({name for (_, of), names in kernels.instantiations().items() for name in names if of == dtype_name})


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[Job, Future[nvrtc.Compiled]]]:
    """All compilations, begun at once: one type takes seconds, and NVRTC lets other threads run."""
    try:
        supported = nvrtc.supported_architectures()
    except nvrtc.NotInstalled as reason:
        pytest.skip(str(reason))

    def compile_group(name: str, architecture: int) -> nvrtc.Compiled:
        options = [*kernels.COMPILE_OPTIONS, f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v"]
        return nvrtc.compile_source(kernels.source(), group(name), options)

    jobs = [(name, architecture) for architecture in ARCHITECTURES if architecture in supported for name in GROUPS]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {job: pool.submit(compile_group, *job) for job in jobs}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", GROUPS, ids=lambda name: name or "copies")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda number: f"sm_{number}")
def test_compiles(compiled: dict[Job, Future[nvrtc.Compiled]], architecture: int, name: str):
    if (name, architecture) not in compiled:
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    result = compiled[name, architecture].result()

    said = [line for line in result.log.splitlines() if not STATISTICS.fullmatch(line)]
    assert not said, result.log

    assert result.code.startswith(b"\x7fELF")
    assert list(result.lowered_names) == group(name)
    assert len(set(result.lowered_names.values())) == len(group(name))
    for lowered in result.lowered_names.values():
        assert lowered
        assert b"\0" + lowered.encode() + b"\0" in result.code

    # An index into registers that is known at run time only would put the packs into local memory, which is memory.
    stack_bytes = {lowered: int(stack) for lowered, stack in STACK.findall(result.log)}
    for expression, lowered in result.lowered_names.items():
        assert stack_bytes[lowered] <= REGISTERS_BYTES * ("long long, Prod" in expression), expression


def test_what_a_launch_can_name_is_what_is_compiled():
    """Of every type, operator, number of operands, divisor and alignment."""
    launched = set()
    for dtype, operator, sources, divisor in itertools.product(DTYPES.values(), OPERATORS, range(1, 9), (1, 2, 8)):
        if divisor == 1 or operator.averages:
            at = [16 * number for number in range(sources)]
            launched.add(kernels.reduce_launch(operator, dtype, at, at[:1], 4096, divisor).kernel)
    for offset, nbytes in itertools.product(range(16), range(4096, 4096 + 16)):
        launched.add(kernels.copy_launch(offset, [offset + 16], nbytes).kernel)
        launched.add(kernels.reduce_launch(OPERATORS[0], DTYPES["FLOAT32"], [offset], [16], nbytes // 4 * 4).kernel)
    for dtype in DTYPES.values():
        launched.add(kernels.weigh_launch(dtype, 0, 16, 4096, checked_weight(2, dtype)).kernel)
    shipped = all_instantiations()
    assert launched == set(shipped)
    assert sorted(launched) == sorted(name for each in GROUPS for name in group(each))
    # Capacities 2, 4 and 8 of each; a weight of each type; copies of 1, 4 and 8 bytes.
    assert len(shipped) == len(pb.DataType.keys()) * (len(pb.ReduceOp.keys()) * 3 + 1) + 3


@pytest.mark.parametrize("architecture", [75, 90], ids=lambda number: f"compute_{number}")
def test_subnormal_numbers_are_kept_whatever_the_options(architecture: int):
    """CuPy adds -ftz=true to all that it compiles: instructions on float would take subnormal numbers for zero."""
    names = [name for dtype_name in ("FLOAT32", "FLOAT16", "BFLOAT16") for name in group(dtype_name)]
    options = [*kernels.COMPILE_OPTIONS, f"--gpu-architecture=compute_{architecture}", "-ftz=true"]
    try:
        ptx = nvrtc.compile_source(kernels.source(), names, options, "PTX").code.decode()
        careless = nvrtc.compile_source("__global__ void f(float* a) { *a += 1; }", ["f"], options, "PTX").code.decode()
    except nvrtc.NotInstalled as reason:
        pytest.skip(str(reason))
    assert "add.rn.f32" in ptx
    assert "mul.rn.f32" in ptx
    assert "div.rn.f32" in ptx
    assert "setp.lt.or.f32" in ptx
    assert ".ftz" not in ptx
    assert ".ftz" in careless


def test_cuda_lays_the_arguments_out_as_python_packs_them():
    checks = [f"sizeof(ReduceArguments) == {kernels.ARGUMENTS.itemsize}"]
    checks += [f"kMaxOperands == {MAX_OPERANDS}", f"kThreads == {kernels.BLOCK_THREADS}"]
    for name, (dtype, offset) in kernels.ARGUMENTS.fields.items():
        checks += [f"__builtin_offsetof(ReduceArguments, {name}) == {offset}"]
        checks += [f"sizeof(ReduceArguments::{name}) == {dtype.itemsize}"]
    asserted = "".join(f'static_assert({check}, "");\n' for check in checks)
    options = [*kernels.COMPILE_OPTIONS, "--gpu-architecture=sm_80"]
    try:
        nvrtc.compile_source(kernels.source() + asserted, [], options)
    except nvrtc.NotInstalled as reason:
        pytest.skip(str(reason))
    with pytest.raises(nvrtc.CompileError, match="static assertion failed"):
        nvrtc.compile_source(kernels.source() + f"static_assert(!({checks[0]}));\n", [], options)


def test_no_header_of_cuda_is_included():
    """Whoever has no toolkit has no headers; NVRTC finds what it needs in itself."""
    assert "#include" not in kernels.source()
