"""The journal's checksum: the sums that its header promises, on every backend, blind to no single flip or swap."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from backends import BACKENDS, buffer_of, running_on
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 1 << 20
SIZES = [*range(10), 63, 64, 65, 127, 128, 1000, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK + 64, 2 * BLOCK, 3 * BLOCK + 5]


def random_bytes(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def checksum_of(data: np.ndarray, *, offset: int = 0) -> int:
    """The same from every backend, on one thread and on three."""
    buffer = buffer_of(data, "U8", offset)
    found = set()
    for name in BACKENDS:
        with running_on(name) as module:
            found |= {module.checksum(buffer.address, buffer.size, threads) for threads in (1, 3)}
    assert len(found) == 1, found
    return found.pop()


def checksum_reference(data: bytes) -> int:
    """Per 1 MiB: in 8 lanes, the sum of the 64-bit words and the sum of the running sums, then all mixed in order."""
    state = len(data)
    for start in range(0, len(data), BLOCK):
        block = data[start : start + BLOCK]
        rows = struct.iter_unpack("<8Q", block + bytes((len(block) // 64 + 1) * 64 - len(block)))
        sums, sums_of_sums = [0] * 8, [0] * 8
        for row in rows:
            sums = [a + b for a, b in zip(sums, row, strict=True)]
            sums_of_sums = [a + b for a, b in zip(sums_of_sums, sums, strict=True)]
        part = len(block)
        for pair in zip(sums, sums_of_sums, strict=True):
            for value in pair:
                part = mix(part, value % 2**64)
        state = mix(state, part)
    return state


def mix(state: int, value: int) -> int:
    state = (state ^ value) * 0x9E3779B97F4A7C15 % 2**64
    return state ^ state >> 32


@pytest.mark.parametrize("size", SIZES)
def test_the_sums_are_those_of_the_definition(size):
    data = random_bytes(size)
    assert checksum_of(data, offset=size % 5) == checksum_reference(data.tobytes())
    largest = np.full(size, 255, np.uint8)
    assert checksum_of(largest) == checksum_reference(largest.tobytes())


@pytest.mark.parametrize("size", [1, 64, 200, 333])
def test_every_flip_of_one_bit_is_seen(size):
    data = random_bytes(size)
    before = checksum_of(data)
    for byte in range(size):
        for bit in range(8):
            data[byte] ^= 1 << bit
            assert checksum_of(data) != before, (byte, bit)
            data[byte] ^= 1 << bit


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 2 * BLOCK // 4 + 99), st.data())
def test_a_changed_byte_or_two_swapped_words_are_seen(words, data):
    values = random_bytes(words * 4, words)
    before = checksum_of(values)
    flipped = values.copy()
    flipped[data.draw(st.integers(0, values.size - 1))] ^= data.draw(st.integers(1, 255))
    assert checksum_of(flipped) != before
    a, b = data.draw(st.integers(0, words - 1)), data.draw(st.integers(0, words - 1))
    swapped = values.view(np.uint32).copy()
    swapped[[a, b]] = swapped[[b, a]]
    same = values.view(np.uint32)[a] == values.view(np.uint32)[b]
    assert (checksum_of(swapped.view(np.uint8)) == before) == same


@pytest.mark.parametrize("what", ["two signs flipped", "two exponents swapped"])
def test_changes_to_leading_bits_alone_are_seen(what):
    """Of every fourth bf16 element, in rows where sums of 64 bits are prone to wrap around to what they were."""
    values = random_bytes(BLOCK).view(np.uint64)
    changed = values.copy()
    if what == "two signs flipped":
        changed[[8, 24]] ^= np.uint64(1 << 63)
    else:
        one, two = np.array([0x3F80, 0x4000], np.uint64) << np.uint64(48)
        values[[8, 8 + 8 * 512]] = one, two
        changed[[8, 8 + 8 * 512]] = two, one
    assert checksum_of(changed.view(np.uint8)) != checksum_of(values.view(np.uint8))


def test_words_swapped_within_a_lane_and_blocks_swapped_with_each_other_are_seen():
    values = random_bytes(3 * BLOCK)
    lane = values.view(np.uint64).copy()
    lane[[16, 48]] = lane[[48, 16]]
    blocks = values.reshape(3, BLOCK)[[1, 0, 2]].reshape(-1)
    assert len({checksum_of(x) for x in (values, lane.view(np.uint8), blocks)}) == 3


def test_lengths_of_zeros_are_told_apart():
    """A torn write leaves zeros, a truncated one too few of them."""
    assert len({checksum_of(np.zeros(size, np.uint8)) for size in SIZES}) == len(SIZES)
    data = random_bytes(BLOCK + 4096)
    torn = data.copy()
    torn[-4096:] = 0
    assert len({checksum_of(x) for x in (data, torn, data[:-4096])}) == 3
