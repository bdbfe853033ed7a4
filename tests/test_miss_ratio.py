"""The estimated hit rates against LRU caches of every size that replay the same traffic."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from radixkv import RadixTree
from radixkv.cache.insight.miss_ratio import MissRatioCurve
from radixkv.cache.insight.prefix_hash import namespace_seed
from radixkv.errors import ConfigError, InvalidRequestError

Tokens = NDArray[np.int32]
SEED = namespace_seed(None, None)


class BlockLRU:
    """The oracle: an LRU cache of whole blocks, each known by all tokens up to its end; a path's first is used last."""

    def __init__(self, capacity_tokens: int, block_tokens: int) -> None:
        self.max_blocks = capacity_tokens // block_tokens
        self.block_tokens = block_tokens
        self.blocks: OrderedDict[tuple[int, bytes], None] = OrderedDict()
        self.hit_tokens = 0

    def _paths(self, tokens: Tokens, seed: int) -> list[tuple[int, bytes]]:
        ends = range(self.block_tokens, len(tokens) + 1, self.block_tokens)
        return [(seed, tokens[:end].tobytes()) for end in ends]

    def record(self, tokens: Tokens, seed: int) -> None:
        path = self._paths(tokens, seed)
        hits = [block in self.blocks for block in path]
        num_hits = hits.index(False) if False in hits else len(hits)
        self.hit_tokens += len(tokens) if hits and num_hits == len(hits) else num_hits * self.block_tokens
        self.insert(tokens, seed)

    def insert(self, tokens: Tokens, seed: int) -> None:
        for block in reversed(self._paths(tokens, seed)):
            self.blocks.pop(block, None)
            self.blocks[block] = None
        while len(self.blocks) > self.max_blocks:
            self.blocks.popitem(last=False)


def letters(word: str, block_tokens: int = 4) -> Tokens:
    """One block for each letter."""
    return np.repeat(np.frombuffer(word.encode(), np.uint8), block_tokens).astype(np.int32)


def small_traffic(seed: int) -> Iterator[tuple[Tokens, int]]:
    """Prompts of few different tokens, so that prefixes are shared all the time, in two namespaces."""
    rng = np.random.default_rng(seed)
    for _ in range(400):
        yield rng.integers(0, 2, rng.integers(0, 40)).astype(np.int32), int(rng.integers(2))


def chats(seed: int, num_requests: int = 1500, num_chats: int = 100) -> Iterator[tuple[Tokens, Tokens]]:
    """Prompts and what is cached after them: `num_chats` conversations at a time, on three system prompts."""
    rng = np.random.default_rng(seed)

    def text(num_tokens: int) -> Tokens:
        return rng.integers(0, 128_000, num_tokens, dtype=np.int32)

    systems = [text(n) for n in (48, 320, 800)]
    open_chats: list[Tokens] = []
    for _ in range(num_requests):
        if len(open_chats) < num_chats:
            open_chats.append(systems[rng.integers(3)])
        chat = int(rng.integers(len(open_chats)))
        prompt = np.concatenate([open_chats[chat], text(int(rng.integers(16, 300)))])
        answered = np.concatenate([prompt, text(int(rng.integers(16, 300)))])
        yield prompt, answered
        open_chats[chat] = answered
        if rng.random() < 0.2:
            del open_chats[chat]


# -- everything sampled: exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_tokens", "seed"),
    [
        pytest.param(block_tokens, seed, marks=[] if seed == number else [pytest.mark.stress])
        for number, block_tokens in enumerate([1, 4, 5])
        for seed in range(3)
    ],
)
def test_without_sampling_it_is_exact_at_every_size(block_tokens: int, seed: int) -> None:
    capacities = list(range(0, 400, 7))
    curve = MissRatioCurve(400, block_tokens=block_tokens, sample_blocks=500)
    caches = [BlockLRU(capacity, block_tokens) for capacity in capacities]
    everyone: list[MissRatioCurve | BlockLRU] = [curve, *caches]
    assert curve.sampling_rate == 1
    for step, (tokens, namespace) in enumerate(small_traffic(seed)):
        for cache in everyone:
            if step % 5 == 4:
                cache.insert(tokens, namespace)
            else:
                cache.record(tokens, namespace)
    assert [curve.hit_tokens(capacity) for capacity in capacities] == [cache.hit_tokens for cache in caches]


@pytest.mark.parametrize("seed", range(3))
def test_what_lies_too_deep_is_forgotten_and_nothing_else(seed: int) -> None:
    """A sample of 20 blocks covers 18 blocks exactly, however long the prompts are."""
    curve = MissRatioCurve(18, block_tokens=1, sample_blocks=20)
    caches = [BlockLRU(capacity, 1) for capacity in range(19)]
    assert curve.sampling_rate == 1
    rng = np.random.default_rng(seed)
    for _ in range(300):
        tokens = rng.integers(0, 2, rng.choice([3, 10, 30, 100])).astype(np.int32)
        curve.record(tokens, 0)
        for cache in caches:
            cache.record(tokens, 0)
    assert [curve.hit_tokens(capacity) for capacity in range(19)] == [cache.hit_tokens for cache in caches]


def test_an_answer_that_was_cached_hits_in_the_next_turn() -> None:
    curve = MissRatioCurve(1000, block_tokens=4)
    curve.record(letters("ab"), SEED)
    curve.insert(letters("abcd"), SEED)
    assert curve.total_tokens == 8
    curve.record(letters("abcde"), SEED)
    assert (curve.total_tokens, curve.hit_tokens(1000)) == (28, 16)


def test_rest_of_a_prompt_hits_with_its_last_block() -> None:
    curve = MissRatioCurve(1000, block_tokens=4)
    for tokens in [letters("ab")[:7], letters("ab")[:7], letters("abc")[:11]]:
        curve.record(tokens, SEED)
    assert curve.hit_tokens(1000) == 4 + 3 + 4
    assert curve.hit_tokens(1000) == MissRatioCurve(1000).hit_tokens(0) + 11


def test_prompts_shorter_than_a_block_miss() -> None:
    curve = MissRatioCurve(1000, block_tokens=4)
    for _ in range(3):
        curve.record(letters("a")[:3], SEED)
        curve.record(letters(""), SEED)
    assert (curve.total_tokens, curve.hit_tokens(1000)) == (9, 0)


def test_hits_that_end_inside_a_block_count_where_a_cache_tells() -> None:
    for known, found, expected in [
        (letters("ab"), 6, [0, 6]),  # the first block and half of the second one
        (letters("ab"), None, [0, 4]),
        (letters("a")[:7], 6, [0, 6]),  # all but its last token, which is in no block
    ]:
        curve = MissRatioCurve(1000, block_tokens=4)
        curve.record(known, SEED, 0)
        asked = known.copy()
        if len(asked) == 8:
            asked[6:] += 1
        curve.record(asked, SEED, found)
        assert [curve.hit_tokens(capacity) for capacity in (0, 1000)] == expected
    curve = MissRatioCurve(1000, block_tokens=4)
    curve.record(letters("a")[:3], SEED, 0)
    curve.record(letters("a")[:3], SEED, 2)
    assert curve.hit_tokens(1000) == 2, "a prompt without blocks"


def test_namespaces_share_room_but_no_tokens() -> None:
    curve = MissRatioCurve(1000, block_tokens=4)
    for namespace in ["one", "two", "one"]:
        curve.record(letters("ab"), namespace_seed(namespace, None))
    assert [curve.hit_tokens(capacity) for capacity in [8, 12, 16]] == [0, 4, 8]


def test_cleared_caches_miss_but_counts_stay() -> None:
    curve = MissRatioCurve(1000, block_tokens=4)
    for _ in range(2):
        curve.record(letters("ab"), SEED)
    curve.clear()
    for _ in range(2):
        curve.record(letters("ab"), SEED)
    assert (curve.total_tokens, curve.hit_tokens(1000)) == (32, 16)


# -- sampled ---------------------------------------------------------------------------------------------------------


def tree_hit_rate(traffic: list[tuple[Tokens, Tokens]], capacity_tokens: int) -> float:
    tree, hit, total = RadixTree(page_size=16), 0, 0
    for prompt, answered in traffic:
        found = tree.match_prefix(prompt)
        hit, total = hit + found.length, total + len(prompt)
        tree.inc_lock_ref(found.node)
        tree.evict(max(tree.total_size + len(answered) - found.length - capacity_tokens, 0))
        tree.insert(answered, np.arange(len(answered) // 16))
        tree.dec_lock_ref(found.node)
    return hit / total


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in (1, 2))])
def test_sampled_curve_is_within_two_points_of_the_tree(seed: int) -> None:
    traffic = list(chats(seed))
    capacities = [40_000, 80_000, 160_000, 320_000]
    curve = MissRatioCurve(320_000)
    for prompt, answered in traffic:
        curve.record(prompt, SEED)
        curve.insert(answered, SEED)
    assert curve.sampling_rate < 0.2
    exact = [tree_hit_rate(traffic, capacity) for capacity in capacities]
    assert exact[-1] - exact[0] > 0.3, "traffic that tells the sizes apart"
    assert curve.curve(capacities) == pytest.approx(exact, abs=0.02)


def test_samples_err_to_both_sides() -> None:
    """Over many samples of one in 20 blocks, the mean comes close to what all blocks say."""
    traffic = [prompt for prompt, _ in chats(0, num_requests=300, num_chats=30)]
    capacities = [20_000, 80_000]
    exact = MissRatioCurve(80_000, sample_blocks=6000)
    sampled = [MissRatioCurve(80_000, sample_blocks=278) for _ in range(40)]
    for prompt in traffic:
        exact.record(prompt, SEED)
        for i, curve in enumerate(sampled):
            curve.record(prompt, namespace_seed(str(i), None))
    assert exact.sampling_rate == 1
    assert sampled[0].sampling_rate == pytest.approx(0.05, rel=0.01)
    errors = np.array([curve.curve(capacities) for curve in sampled]) - exact.curve(capacities)
    assert np.abs(errors).max() < 0.12
    assert np.abs(errors.mean(0)).max() < 0.012


def test_a_prompt_that_everybody_shares_does_no_harm() -> None:
    """Whether its only block is in the sample or not, its hits are known."""
    prompt = letters("s", 16)
    for seed in range(12):
        curve = MissRatioCurve(64_000, sample_blocks=1024)
        for _ in range(500):
            curve.record(prompt, namespace_seed(str(seed), None))
        assert curve.hit_rate(64_000) >= 0.99


def test_memory_is_bounded_under_endless_new_prompts() -> None:
    curve = MissRatioCurve(10_000, block_tokens=4, sample_blocks=64)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        curve.record(rng.integers(0, 1000, 200).astype(np.int32), SEED)
        assert curve.num_sampled_blocks <= 128
        curve.check_invariants()
    assert curve.hit_rate(10_000) < 0.01


def test_larger_caches_hit_no_less_and_rates_stay_in_range() -> None:
    curve = MissRatioCurve(50_000, sample_blocks=32)
    assert curve.hit_rate(50_000) == 0, "before the first request"
    for prompt, _ in chats(1, num_requests=200):
        curve.record(prompt, SEED)
        rates = curve.curve(range(0, 50_001, 2500))
        assert rates == sorted(rates)
        assert 0 <= rates[0] <= rates[-1] <= 1


def test_two_readings_tell_the_rate_between_them() -> None:
    curve = MissRatioCurve(1000, block_tokens=4)
    curve.record(letters("abcdefgh"), SEED)
    total, hit = curve.total_tokens, curve.hit_tokens(500)
    curve.record(letters("abcdefgh"), SEED)
    assert (curve.hit_tokens(500) - hit) / (curve.total_tokens - total) == 1


def test_default_sample_grows_with_the_largest_cache() -> None:
    assert MissRatioCurve(1000).sampling_rate == 1
    assert [MissRatioCurve(2**n).sample_blocks for n in (20, 24, 26)] == [4096, 4096, 16384]
    assert MissRatioCurve(2**24).sampling_rate == MissRatioCurve(2**26).sampling_rate == 0.9 / 256


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [-1, 1001])
def test_sizes_out_of_range_are_refused(capacity: int) -> None:
    curve = MissRatioCurve(1000)
    for ask in [curve.hit_tokens, curve.hit_rate]:
        with pytest.raises(InvalidRequestError, match=rf"a capacity of {capacity} tokens lies outside \[0, 1000\]"):
            ask(capacity)
    with pytest.raises(InvalidRequestError, match="make the curve's max_tokens larger"):
        curve.curve([10, capacity])


@pytest.mark.parametrize("sizes", [(0, 16, 10), (10, 0, 10), (10, 16, 0)])
def test_sizes_below_one_are_refused(sizes: tuple[int, int, int]) -> None:
    max_tokens, block_tokens, sample_blocks = sizes
    with pytest.raises(ConfigError, match=f"must be an integer of at least 1, not {min(sizes)}"):
        MissRatioCurve(max_tokens, block_tokens=block_tokens, sample_blocks=sample_blocks)
