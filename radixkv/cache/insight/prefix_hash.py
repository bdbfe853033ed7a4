"""One 64-bit hash for each prefix of a prompt, all prefixes in one pass."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
from numpy.typing import NDArray

# splitmix64: the step (2**64 / golden ratio, made odd) and the constants of the finaliser
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def prefix_hashes(tokens: NDArray[np.int32], unit: int, seed: int, first_unit: int = 0) -> NDArray[np.uint64]:
    """For each whole unit of `unit` tokens, a hash of all tokens up to its end. O(tokens).

    `seed` is the hash of what comes before: `namespace_seed` for the first token of a prompt, or the hash of the
    first `first_unit` units, from which the hashes of what follows them are continued. Tokens that fill no unit are
    left out.

    Within a unit, the sum of its words times odd 64-bit weights (multilinear hashing: Lemire, Kaser, "Strongly
    universal string hashing is fast", The Computer Journal 57(11), 2014), a word being two tokens if `unit` is
    even, plus the unit's place in the prompt goes through the finaliser of splitmix64 (Steele, Lea, Flood, "Fast
    splittable pseudorandom number generators", OOPSLA 2014). A prefix's hash is the sum of its units'
    (Bellare, Micciancio, "A new paradigm for collision-free hashing", EUROCRYPT 1997: AdHash), so one cumulative sum
    gives all of them.

    Units that differ in one token never have the same hash. Any two prefixes that were not made for it do with a
    probability of about 2**-64 (2**-32 if they differ in the second tokens of several words of a unit, and nowhere
    else), so two of a million do with about 3e-8. Whoever knows the weights can make prefixes that collide: good for
    statistics and explanations, never for deciding whose KV is read.

    Returns: uint64, shape (len(tokens) // unit,).

    >>> tokens = np.arange(12, dtype=np.int32)
    >>> hashes = prefix_hashes(tokens, 4, namespace_seed(None, None))
    >>> rest = prefix_hashes(tokens[8:], 4, int(hashes[1]), first_unit=2)
    >>> bool(rest[0] == hashes[2])
    True
    """
    num_units = len(tokens) // unit
    whole = tokens[: num_units * unit]
    words = whole.view(np.uint64) if unit % 2 == 0 else whole.astype(np.uint64)
    weights = _weights(unit // 2 if unit % 2 == 0 else unit)
    hashes: NDArray[np.uint64] = np.vecdot(words.reshape(num_units, len(weights)), weights)
    last_unit = first_unit + num_units
    hashes += _places(last_unit.bit_length())[first_unit:last_unit]
    _mix(hashes)
    hashes[:1] += np.uint64(seed)
    return hashes.cumsum(out=hashes)


def namespace_seed(extra_key: str | None, cache_salt: str | None) -> int:
    """Where the hashes of a namespace start: 64 bits, the same in every process."""
    name = repr((extra_key, cache_salt)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


@cache
def _weights(num_words: int) -> NDArray[np.uint64]:
    """The odd multiplier of each word of a unit, drawn from splitmix64. Shape (num_words,), read-only."""
    weights = np.arange(1, num_words + 1, dtype=np.uint64) * _GOLDEN
    _mix(weights)
    weights |= np.uint64(1)
    weights.flags.writeable = False
    return weights


@cache
def _places(bit_length: int) -> NDArray[np.uint64]:
    """What stands for each place a unit can have in a prompt, for the first 2**bit_length places. Read-only."""
    places = np.arange(1, 2**bit_length + 1, dtype=np.uint64) * _GOLDEN
    places.flags.writeable = False
    return places


def _mix(values: NDArray[np.uint64]) -> None:
    """Spread every bit of each value over all 64, in place; a bijection."""
    values ^= values >> _SHIFTS[0]
    values *= _FACTORS[0]
    values ^= values >> _SHIFTS[1]
    values *= _FACTORS[1]
    values ^= values >> _SHIFTS[2]
