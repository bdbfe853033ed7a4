"""The adaptive policy: what its table counts, what it remembers, and what it hits beside LRU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radixkv import RadixTree
from radixkv.cache.eviction import adaptive
from radixkv.cache.eviction.adaptive import GHOST_SHARE, AdaptivePolicy, Ghosts, LRUShadow, Record
from radixkv.cache.eviction.reuse_table import EDGES, NUM_BINS, Floats, ReuseTable, Wait, Worth, bin_of, worth_of
from radixkv.replay.simulation import replay_trace
from radixkv.replay.traces import Request
from strategies import WordTree, spell

# -- the table -------------------------------------------------------------------------------------------------------


def test_bins_cover_all_ages_in_order() -> None:
    bins = [bin_of(age) for age in range(5000)]
    assert bins == sorted(bins)
    assert all(EDGES[number] <= age for age, number in enumerate(bins))
    assert bin_of(10**9) == NUM_BINS - 1


lives = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(1, 60), st.booleans()), max_size=20)


@given(lives)
def test_hazards_against_counting_every_tick(drawn: list[tuple[int, int, int, bool]]) -> None:
    """The exposure is the ticks watched in each bin, whenever watching began and whether it is over or not."""
    table = ReuseTable(num_kinds=1)
    now = 131
    ticks, reuses = np.zeros(NUM_BINS), np.zeros(NUM_BINS)
    for last_use, late, watched, reused in drawn:
        wait = Wait(kind=0)
        table.watch(wait, last_use, last_use + late)
        end = last_use + late + watched
        table.end(wait, end, reused=reused)
        for age in range(late, late + watched):
            ticks[bin_of(age)] += 1
        reuses[bin_of(late + watched)] += reused
    assert table.num_reuses == reuses.sum()
    assert table.num_waiting == 0
    assert np.allclose(table.exposure(now)[0], ticks)


def test_what_still_waits_counts() -> None:
    table = ReuseTable(num_kinds=2)
    for kind, last_use in [(0, 0), (1, 10), (1, 20)]:
        table.watch(Wait(kind), last_use, tick=last_use)
    assert table.num_waiting == 3
    exposure = table.exposure(tick=100)
    assert exposure[0].sum() == pytest.approx(100, abs=1)
    assert exposure[1].sum() == pytest.approx(90 + 80, abs=2)


def test_epochs_grow_without_losing_anybody() -> None:
    table = ReuseTable(num_kinds=1)
    waits = [Wait(kind=0) for _ in range(3000)]
    for tick, wait in enumerate(waits):
        table.watch(wait, tick, tick)
    assert table.num_waiting == 3000
    for wait in waits:
        table.end(wait, 3000, reused=False)
    assert table.num_waiting == 0
    assert np.allclose(table.exposure(3000)[0].sum(), sum(range(1, 3001)))


def test_worth_falls_with_the_price_and_rises_with_the_hazard() -> None:
    rng = np.random.default_rng(1)
    hazards = rng.random((3, NUM_BINS)) * 0.1
    cheap, dear = worth_of(hazards, 0.001), worth_of(hazards, 0.05)
    assert (cheap.surplus >= dear.surplus).all()
    assert (cheap.density == dear.density).all()
    assert (worth_of(2 * hazards, 0.01).density >= cheap.density - 1e-12).all()


# -- ghosts and shadow -----------------------------------------------------------------------------------------------


def record(num_tokens: int) -> Record:
    return Record((None, None), num_tokens, turn=1, uses=0, is_rest=False)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_ghosts_are_found_by_where_they_began(page_size: int) -> None:
    ghosts = Ghosts(page_size)
    key = np.array(spell("abcd", page_size), np.int32).tobytes()
    ghost = record(4 * page_size)
    assert ghosts.add(page_size, key, ghost) is None
    longer = np.array(spell("xabcdx", page_size), np.int32).tobytes()
    assert ghosts.pop((None, None), 2 * page_size, longer, 4 * page_size) is None  # elsewhere
    assert ghosts.pop(("a", None), page_size, longer, 4 * page_size) is None
    assert ghosts.num_tokens == 4 * page_size
    assert ghosts.pop((None, None), page_size, longer, 4 * page_size) is ghost
    assert (len(ghosts), ghosts.num_tokens) == (0, 0)


def test_the_shadow_is_an_lru_cache() -> None:
    shadow = LRUShadow()
    first, second, third = record(3), record(4), record(5)
    assert not shadow.use(first)
    assert not shadow.use(second)
    assert shadow.use(first)
    assert not shadow.use(third)
    shadow.shrink(8)
    assert shadow.num_tokens == 8
    assert not shadow.discard(second)
    assert shadow.discard(first)
    assert shadow.num_tokens == 5


# -- what it hits ----------------------------------------------------------------------------------------------------


def loops(rng: np.random.Generator) -> Iterator[list[int]]:
    """Twenty prompts in turn, for which the cache is too small: LRU never hits."""
    prompts = rng.integers(0, 9999, (20, 16)).tolist()
    for number in range(1500):
        yield prompts[number % 20]


def chats(rng: np.random.Generator) -> Iterator[list[int]]:
    """Conversations that go on soon or never, among questions that nobody comes back to."""
    going: list[list[int]] = []
    for _ in range(2000):
        if going and rng.random() < 0.4:
            chat = going.pop(int(rng.integers(len(going))))
            chat = chat + rng.integers(0, 9999, 16).tolist()
        else:
            chat = rng.integers(0, 9999, 16).tolist()
        yield chat
        if rng.random() < (0.8 if len(chat) > 16 else 0.3):
            going.append(chat)


def late_chats(rng: np.random.Generator) -> Iterator[list[int]]:
    """Conversations that come back after 40 to 60 other requests, when a small cache under LRU has let go of them."""
    due: dict[int, list[list[int]]] = {}
    for now in range(4000):
        for chat in due.pop(now, []):
            turns = len(chat) // 16
            yield chat
            if rng.random() < (0.9 if turns < 6 else 0.0):
                due.setdefault(now + int(rng.integers(40, 61)), []).append(chat + rng.integers(0, 9999, 16).tolist())
        if now % 4 == 0:
            question = rng.integers(0, 9999, 16).tolist()
            yield question
            if rng.random() < 0.2:
                due.setdefault(now + int(rng.integers(40, 61)), []).append(question + [7] * 16)


def scans(rng: np.random.Generator) -> Iterator[list[int]]:
    """A few prompts that are asked for again and again, between long runs of what nobody asks for twice."""
    prompts = rng.integers(0, 9999, (4, 16)).tolist()
    for number in range(2500):
        yield prompts[number // 10 % 4] if number % 10 == 0 else rng.integers(0, 9999, 16).tolist()


def recency(rng: np.random.Generator) -> Iterator[list[int]]:
    """What LRU is made for: what was asked for last is asked for again."""
    prompts = rng.integers(0, 9999, (200, 16)).tolist()
    for _ in range(2000):
        place = min(int(rng.exponential(6)), 199)
        prompts.insert(0, prompts.pop(place))
        yield prompts[0]


@pytest.mark.parametrize(
    ("workload", "gain"),
    [(loops, 0.4), (scans, 0.05), (late_chats, 0.03), (chats, -0.005), (recency, -0.005)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("capacity", [160, pytest.param(256, marks=pytest.mark.stress)])
def test_hits_beside_lru(workload: type[Iterator[list[int]]], gain: float, capacity: int) -> None:
    prompts = list(workload(np.random.default_rng(3)))  # type: ignore[call-arg]
    requests = [Request.of_tokens(prompt, [0]) for prompt in prompts]
    rates = {policy: replay_trace(requests, policy, capacity, 1).hit_rate for policy in ("lru", "adaptive")}
    assert rates["adaptive"] - rates["lru"] >= gain


@pytest.mark.parametrize("page_size", [1, 4])
def test_it_keeps_its_books(page_size: int) -> None:
    """Records belong to the nodes, ghosts are bounded, and what is watched are leaves and ghosts."""
    rng = np.random.default_rng(5)
    policy = AdaptivePolicy()
    tree = RadixTree(page_size, policy)
    pages = np.arange(10**6, dtype=np.int32)
    used = 0
    for number in range(600):
        word = "".join(rng.choice(list("abc"), int(rng.integers(1, 9))))
        tokens = spell(word, page_size)
        found = tree.match_prefix(tokens)
        tree.inc_lock_ref(found.node)
        tree.evict(tree.total_size + len(tokens) - found.length - 60 * page_size)
        tree.insert(tokens, pages[used : used + len(word)])
        used += len(word)
        tree.dec_lock_ref(found.node)
        if number % 10 == 0:
            tree.check_invariants()
        nodes = [node for _, node in tree.nodes() if not node.is_root]
        assert all(node.state.num_tokens == node.num_tokens for node in nodes)
        assert policy.ghosts.num_tokens <= GHOST_SHARE * max(tree.total_size, 60 * page_size)
        assert policy.table.num_waiting <= len(nodes) + len(policy.ghosts)
    assert policy.table.num_reuses > 0
    assert abs(policy.lead) < 1


def test_the_same_requests_always_have_the_same_hits() -> None:
    requests = [Request.of_tokens(prompt, [0]) for prompt in late_chats(np.random.default_rng(8))]
    assert len({replay_trace(requests, "adaptive", 200, 1).hit_tokens for _ in range(2)}) == 1


# -- the duel --------------------------------------------------------------------------------------------------------


def the_opposite(hazards: Floats, price: float) -> Worth:
    """What to keep if all that was learned were wrong."""
    worth = worth_of(hazards, price)
    return Worth(worth.density, -worth.surplus)


def test_wrong_lessons_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "worth_of", the_opposite)
    requests = [Request.of_tokens(prompt, [0]) for prompt in recency(np.random.default_rng(3))]
    lru, with_duel = (replay_trace(requests, policy, 160, 1).hit_rate for policy in ("lru", "adaptive"))
    monkeypatch.setattr(adaptive, "DUEL_LOST", 1.0)
    without = replay_trace(requests, "adaptive", 160, 1).hit_rate
    assert with_duel > lru - 0.02
    assert without < lru - 0.1


def test_it_is_lru_until_it_has_seen_reuse() -> None:
    rng = np.random.default_rng(4)
    requests = [Request.of_tokens(rng.integers(0, 9999, 16), [0]) for _ in range(200)]
    policy = AdaptivePolicy()
    assert replay_trace(requests, policy, 256, 1).hit_tokens == replay_trace(requests, "lru", 256, 1).hit_tokens
    assert policy.follows_lru
    assert policy.lead == 0


# -- what it knows of a node -----------------------------------------------------------------------------------------


def known(tree: WordTree) -> dict[str, tuple[int, int, bool]]:
    """(turn, uses, is_rest) of the nodes, by the words that end in them."""
    nodes = [node for _, node in tree.tree.nodes() if not node.is_root]
    names = [tree.names([int(node.page_ids[-1])])[0] for node in nodes]
    return {
        name: (node.state.turn, node.state.uses, node.state.is_rest) for name, node in zip(names, nodes, strict=True)
    }


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_turns_and_uses(page_size: int) -> None:
    tree = WordTree(page_size, AdaptivePolicy())
    tree.insert("sa")
    tree.insert("sab")  # what the same request computed later
    assert known(tree) == {"sa": (1, 0, False), "sab": (1, 0, False)}
    found = tree.lock("sabx")
    tree.insert("sabx")
    tree.unlock(found)
    assert known(tree) == {"sa": (1, 1, False), "sab": (1, 1, False), "sabx": (2, 0, False)}
    found = tree.lock("sabz")
    tree.unlock(found)
    assert known(tree)["sabx"] == (2, 0, False), "no match came through"


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_what_a_match_leaves_behind(page_size: int) -> None:
    tree = WordTree(page_size, AdaptivePolicy())
    tree.insert("abc")
    found = tree.lock("abx")
    assert known(tree) == {"ab": (1, 1, False), "abc": (1, 1, True)}
    tree.insert("abx")
    tree.unlock(found)
    assert known(tree) == {"ab": (1, 1, False), "abc": (1, 1, True), "abx": (2, 0, False)}
    tree.match("abc")
    assert known(tree)["abc"] == (1, 2, False), "it was not for good"


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_an_unclaimed_cut_changes_nothing(page_size: int) -> None:
    tree = WordTree(page_size, AdaptivePolicy())
    tree.insert("abc")
    tree.match("ab")
    tree.match("d")
    assert known(tree) == {"abc": (1, 1, False)}


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_what_comes_back_is_known(page_size: int) -> None:
    tree = WordTree(page_size, AdaptivePolicy())
    for word in ["abcd", "other", "words", "fill"]:
        tree.insert(word)
    assert tree.evict(1) == ["a", "ab", "abc", "abcd"]
    tree.insert("abcdef")
    assert known(tree)["abcdef"] == (2, 1, False), "matched once, had it stayed, and then gone on with"


def test_after_a_reset_nothing_is_left() -> None:
    policy = AdaptivePolicy()
    tree = WordTree(4, policy)
    for word in ["abc", "abd", "x"]:
        tree.match(word)
        tree.insert(word)
    tree.tree.clear()
    tree.insert("y")
    assert policy.shadow.num_tokens == 4
    assert policy.table.num_waiting == 1 + len(policy.ghosts)
