"""The journal's checksum: XXH64 of XXH64 digests, on every backend, blind to no flip or swap."""

from __future__ import annotations

import functools
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
    """By the published description of XXH64, on Python's integers: the digest of the digests of 1 MiB each."""
    digests = [xxh64(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)]
    return xxh64(struct.pack(f"<{len(digests)}Q", *digests))


PRIMES = (11400714785074694791, 14029467366897019727, 1609587929392839161, 9650029242287828579, 2870177450012600261)


def xxh64(data: bytes) -> int:
    p1, p2, p3, p4, p5 = PRIMES
    full = 2**64

    def rotated(x: int, by: int) -> int:
        return (x << by | x >> (64 - by)) % full

    def one_round(accumulator: int, lane: int) -> int:
        return rotated((accumulator + lane * p2) % full, 31) * p1 % full

    stripes = len(data) // 32
    accumulators = [(p1 + p2) % full, p2, 0, -p1 % full]
    for stripe in struct.iter_unpack("<4Q", data[: stripes * 32]):
        accumulators = [one_round(a, lane) for a, lane in zip(accumulators, stripe, strict=True)]
    digest = p5
    if stripes:
        digest = sum(rotated(a, by) for a, by in zip(accumulators, (1, 7, 12, 18), strict=True)) % full
        for a in accumulators:
            digest = ((digest ^ one_round(0, a)) * p1 + p4) % full
    digest = (digest + len(data)) % full
    rest = data[stripes * 32 :]
    while len(rest) >= 8:
        digest = (rotated(digest ^ one_round(0, int.from_bytes(rest[:8], "little")), 27) * p1 + p4) % full
        rest = rest[8:]
    if len(rest) >= 4:
        digest = (rotated(digest ^ int.from_bytes(rest[:4], "little") * p1 % full, 23) * p2 + p3) % full
        rest = rest[4:]
    for byte in rest:
        digest = rotated(digest ^ byte * p5 % full, 11) * p1 % full
    digest = (digest ^ digest >> 33) * p2 % full
    digest = (digest ^ digest >> 29) * p3 % full
    return digest ^ digest >> 32


@pytest.mark.parametrize(
    "data, digest",
    [(b"", 0xEF46DB3751D8E999), (b"a", 0xD24EC4F1A98C6E5B), (b"abc", 0x44BC2CF5AD770999)],
)
def test_the_reference_gives_the_published_digests(data, digest):
    assert xxh64(data) == digest


@pytest.mark.parametrize("size", SIZES)
def test_the_sums_are_those_of_the_definition(size):
    data = random_bytes(size)
    assert checksum_of(data, offset=size % 5) == checksum_reference(data.tobytes())
    largest = np.full(size, 255, np.uint8)
    assert checksum_of(largest) == checksum_reference(largest.tobytes())


@pytest.mark.parametrize("blocks, rest", [(7, 5), (8, 0), (8, 40), (16, 0), (19, 1)])
def test_blocks_that_are_summed_together_count_each_for_itself(blocks, rest):
    """Of few different blocks, since the reference is slow, in an order without a period."""
    some = random_bytes(4 * BLOCK).reshape(4, BLOCK)
    order = np.random.default_rng(blocks).integers(0, 4, blocks)
    data = np.concatenate([some[order].reshape(-1), random_bytes(rest, 1)])
    digests = [digest_of(int(i)) for i in order] + ([xxh64(random_bytes(rest, 1).tobytes())] if rest else [])
    assert checksum_of(data, offset=3) == xxh64(struct.pack(f"<{len(digests)}Q", *digests))


@functools.cache
def digest_of(block: int) -> int:
    return xxh64(random_bytes(4 * BLOCK).reshape(4, BLOCK)[block].tobytes())


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
