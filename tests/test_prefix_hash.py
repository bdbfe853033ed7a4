"""Prefix hashes against a loop over Python integers, and what they must tell apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from radixkv.cache.insight.prefix_hash import namespace_seed, prefix_hashes

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
UNITS = [1, 2, 3, 4, 7, 16, 64]


def mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def slow_hashes(tokens: list[int], unit: int, seed: int) -> list[int]:
    """The definition, one unit at a time."""
    hashes, state = [], seed
    for place, start in enumerate(range(0, len(tokens) - unit + 1, unit), start=1):
        words = tokens[start : start + unit]
        if unit % 2 == 0:
            words = [low + (high << 32) for low, high in zip(words[::2], words[1::2], strict=True)]
        inner = sum(word * (mix(j * GOLDEN & MASK) | 1) for j, word in enumerate(words, start=1))
        state = (state + mix((inner + place * GOLDEN) & MASK)) & MASK
        hashes.append(state)
    return hashes


def random_tokens(num_tokens: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 2**31, num_tokens).astype(np.int32)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 1000])
def test_is_the_definition(unit: int, num_tokens: int) -> None:
    tokens = random_tokens(num_tokens)
    hashes = prefix_hashes(tokens, unit, MASK - 5)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == slow_hashes(tokens.tolist(), unit, MASK - 5)


@pytest.mark.parametrize("unit", UNITS)
def test_continues_from_any_unit(unit: int) -> None:
    tokens, seed = random_tokens(9 * unit + unit // 2), namespace_seed("tenant", None)
    whole = prefix_hashes(tokens, unit, seed)
    for first_unit in range(1, 9):
        rest = prefix_hashes(tokens[first_unit * unit :], unit, int(whole[first_unit - 1]), first_unit)
        assert rest.tolist() == whole[first_unit:].tolist()


@pytest.mark.parametrize("unit", UNITS)
def test_read_only_and_unaligned_tokens(unit: int) -> None:
    data = random_tokens(200).tobytes()
    tokens = np.frombuffer(data, np.int32)
    for start in range(3):
        assert prefix_hashes(tokens[start:], unit, 7).tolist() == slow_hashes(tokens[start:].tolist(), unit, 7)
    assert tokens.tobytes() == data


@pytest.mark.parametrize("unit", [1, 2, 3, 4])
def test_different_prefixes_have_different_hashes(unit: int) -> None:
    length = 8 // unit * unit
    prefixes: dict[int, bytes] = {}
    for letters in itertools.product(range(3), repeat=length):
        tokens = np.array(letters, np.int32)
        for end, value in enumerate(prefix_hashes(tokens, unit, 0).tolist(), start=1):
            prefix = tokens[: end * unit].tobytes()
            assert prefixes.setdefault(value, prefix) == prefix
    assert len(prefixes) == sum(3**end for end in range(unit, length + 1, unit))


def test_one_token_changes_its_unit_and_all_later_ones() -> None:
    tokens = random_tokens(64)
    before = prefix_hashes(tokens, 16, 0)
    for position in range(64):
        changed = tokens.copy()
        changed[position] ^= 1
        same = prefix_hashes(changed, 16, 0) == before
        assert same.tolist() == [unit < position // 16 for unit in range(4)]


def test_namespaces_differ_and_are_the_same_in_every_process() -> None:
    names = [(None, None), ("a", None), (None, "a"), ("a", "a"), ("None", None), ("", None), ("\ud800", "ü")]
    assert len({namespace_seed(*name) for name in names}) == len(names)
    assert namespace_seed(None, None) == 0x2F733B6AC86A71BC
    assert namespace_seed("tenant-a", "salt") == 0x2C9D793FB5A64A07


@pytest.mark.parametrize("unit", [1, 2, 16])
@pytest.mark.parametrize("step", [0, 1, 1024])
def test_hashes_spread_evenly(unit: int, step: int) -> None:
    """Chi-square over the top 4 bits, by which blocks are sampled, and over the lowest 4."""
    num_units = 16_000
    tokens = (np.arange(num_units * unit) * step % 128_000).astype(np.int32)
    hashes = prefix_hashes(tokens, unit, namespace_seed(None, None))
    for bits in (hashes >> np.uint64(60), hashes & np.uint64(15)):
        counts = np.bincount(bits.astype(np.int64), minlength=16)
        assert ((counts - 1000) ** 2 / 1000).sum() < 45  # 15 degrees of freedom: exceeded once in 10,000
