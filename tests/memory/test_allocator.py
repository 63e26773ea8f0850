"""Allocation inside an address range."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsml_gpu.errors import AddressOutOfRange, AllocationNotFound, InvalidValue, OutOfMemory
from dsml_gpu.memory.allocator import ALIGNMENT, Allocator


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3000)), max_size=60), st.integers(0, 1000))
def test_blocks_never_overlap_and_stay_inside(actions: list[tuple[bool, int]], min_addr: int) -> None:
    allocator = Allocator(min_addr, min_addr + 16384)
    live: dict[int, int] = {}
    for is_malloc, number in actions:
        if is_malloc:
            try:
                addr = allocator.malloc(number)
            except OutOfMemory:
                continue
            assert addr % ALIGNMENT == 0
            assert min_addr <= addr
            assert addr + number <= min_addr + 16384
            assert all(addr + number <= other or other + size <= addr for other, size in live.items())
            live[addr] = number
        elif live:
            addr = sorted(live)[number % len(live)]
            allocator.free(addr)
            del live[addr]
        assert allocator.allocated == sum(live.values())


def test_full_memory_can_be_had_again_after_it_was_freed() -> None:
    allocator = Allocator(0, 1024)
    addr = allocator.malloc(1024)
    with pytest.raises(OutOfMemory, match="no gap of 1 bytes in device memory of 1024 bytes, of which 1024 are allocated"):
        allocator.malloc(1)
    allocator.free(addr)
    assert allocator.malloc(1024) == addr


def test_a_gap_is_used() -> None:
    allocator = Allocator(0, 4096)
    first, second, third = (allocator.malloc(256) for _ in range(3))
    allocator.free(second)
    assert allocator.malloc(256) == second
    assert first < second < third


def test_an_owner_ends_with_all_its_blocks_and_no_others() -> None:
    allocator = Allocator(0, 4096)
    mine = [allocator.malloc(256, owner=7) for _ in range(2)]
    others = allocator.malloc(256, owner=8)
    allocator.free_all(7)
    with pytest.raises(AllocationNotFound):
        allocator.free(mine[0], owner=7)
    with pytest.raises(AllocationNotFound, match="no allocation of owner 7 starts"):
        allocator.free(others, owner=7)
    allocator.free(others, owner=8)


def test_bad_requests() -> None:
    allocator = Allocator(0, 4096)
    with pytest.raises(InvalidValue, match="at least 1 byte, not 0"):
        allocator.malloc(0)
    with pytest.raises(AllocationNotFound, match="no allocation of owner 0 starts at address 0x8"):
        allocator.free(8)
    addr = allocator.malloc(10)
    allocator.free(addr)
    with pytest.raises(AllocationNotFound):
        allocator.free(addr)


def test_an_allocation_at_an_address_is_there_or_refused() -> None:
    allocator = Allocator(64, 4096)
    assert allocator.malloc_at(1000, 24) == 1000
    for addr, nbytes in ((1000, 24), (1023, 1), (900, 101), (0x50, 4000)):
        with pytest.raises(OutOfMemory, match=r"are not free: 0x3e8 to 0x400 is allocated"):
            allocator.malloc_at(addr, nbytes)
    assert allocator.malloc_at(1024, 8) == 1024
    assert allocator.malloc_at(900, 100, owner=7) == 900
    assert allocator.malloc(700) == 0x500, "between 256 and 900 there is not enough"
    for addr, nbytes in ((63, 8), (4090, 7), (2**64 - 1, 8)):
        with pytest.raises(AddressOutOfRange):
            allocator.malloc_at(addr, nbytes)
    with pytest.raises(InvalidValue, match="at least 1 byte, not 0"):
        allocator.malloc_at(2048, 0)
    allocator.free_all(7)
    assert allocator.malloc_at(900, 100) == 900
