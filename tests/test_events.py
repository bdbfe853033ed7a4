"""Observers: what they are told suffices to know at any time what is cached, and where."""

from __future__ import annotations

import random

import pytest

from event_mirror import EventMirror, held_by
from radixkv import Cleared, Event, Lease, PrefixCache, RadixTree, Removed, Stored, WindowPages, prompt_keys
from radixkv.cache.page_keys import root_key
from strategies import NAMESPACES, PAGE, WordTree, ids, share, spell


def listened(tree: RadixTree) -> EventMirror:
    mirror = EventMirror()
    tree.add_observer(mirror)
    return mirror


def test_stored_and_removed() -> None:
    tree = WordTree(2)
    mirror = listened(tree.tree)
    tree.insert("ab")
    tree.insert("abc")
    tree.insert("ab")
    assert mirror.told == ["stored", "stored"], "nothing new is stored by the third"
    tree.evict(1)
    assert mirror.told[2:] == ["evicted"]
    assert sorted(page for _, page in mirror.held()) == [0, 1]


def test_cuts_merges_uses_and_pins_are_not_told() -> None:
    tree = WordTree(2)
    tree.insert("abcd")
    mirror = listened(tree.tree)
    found = tree.lock("ab")
    tree.match("abcd")
    tree.tree.peek(spell("abcd", 2))
    tree.tree.retain(found.node, priority=3, keep_for_s=9)
    tree.unlock(found)
    tree.match("abc")
    tree.match("x")
    assert mirror.events == []


def test_a_branch_is_told_as_what_is_new_alone() -> None:
    tree = WordTree(2)
    tree.insert("abcd")
    mirror = listened(tree.tree)
    tree.insert("abxy")
    (event,) = mirror.events
    assert isinstance(event, Stored)
    assert (event.run.start, event.run.tokens.tolist(), event.run.pages.tolist()) == (4, spell("xy", 2), [6, 7])
    keys = prompt_keys(spell("abxy", 2), 2)
    assert (event.run.parent_key, event.run.page_keys) == (keys[1], keys[2:])


def test_clearing_is_told_at_once_if_nothing_is_pinned() -> None:
    tree = WordTree(2)
    mirror = listened(tree.tree)
    tree.insert("ab")
    tree.insert("ac", extra_key="x")
    found = tree.lock("a")
    tree.tree.clear()
    assert mirror.told[2:] == ["reset", "reset"]
    assert [page for _, page in mirror.held()] == [0]
    tree.unlock(found)
    tree.tree.clear()
    assert mirror.events[4:] == [Cleared("pool")]
    tree.insert("b")
    assert mirror.told[5:] == ["stored"], "it goes on listening"


def test_whoever_is_removed_hears_nothing_more_and_others_do() -> None:
    tree = WordTree(2)
    first, second = listened(tree.tree), listened(tree.tree)
    tree.insert("a")
    tree.tree.remove_observer(first)
    tree.tree.remove_observer(first)
    tree.insert("b")
    tree.evict(1)
    assert first.told == ["stored"]
    assert second.told == ["stored", "stored", "evicted"]


def test_who_comes_late_begins_with_what_is_cached() -> None:
    tree = WordTree(2)
    for word in ["ab", "abc", "abd", "x"]:
        tree.insert(word, extra_key="t" if word == "x" else None)
    late = EventMirror()
    for run in tree.tree.cached_runs():
        late(Stored(run, "pool"))
    tree.tree.add_observer(late)
    assert late.held() == held_by(tree.tree)
    tree.evict(99)
    assert late.held() == []


def test_an_event_is_a_value_that_outlives_what_it_tells_of() -> None:
    """Keys are computed when they are asked for: after cuts, merges, evictions, and new pages in the same places."""
    tree = WordTree(2)
    events: list[Event] = []
    tree.tree.add_observer(events.append)
    for word in ["abcdef", "abcxyz", "abcx", "ab"]:
        tree.insert(word)
    tree.match("a")
    tree.evict(99)
    tree.insert("zzz")
    told = [(type(event), event.run.start, event.run.page_keys) for event in events if not isinstance(event, Cleared)]
    one, other, third = (prompt_keys(spell(word, 2), 2) for word in ("abcdef", "abcxyz", "zzz"))
    assert told[0] == (Stored, 0, one)
    assert told[1] == (Stored, 6, other[3:])
    assert told[-1] == (Stored, 0, third)
    removed = [key for kind, _, keys in told[2:-1] for key in keys if kind is Removed]
    assert sorted(removed) == sorted({*one, *other})


def test_the_first_page_follows_the_key_of_its_namespace() -> None:
    tree = WordTree(2)
    events: list[Event] = []
    tree.tree.add_observer(events.append)
    tree.tree.insert(spell("ab", 2), [0, 1], extra_key="tenant", cache_salt="salt")
    (event,) = events
    assert isinstance(event, Stored)
    assert event.run.namespace == ("tenant", "salt")
    assert event.run.parent_key == root_key("tenant", "salt")


@pytest.mark.parametrize("verb", ["insert", "evict", "remove", "clear"])
def test_an_observer_that_raises_hears_nothing_more_and_does_no_harm(
    verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    tree = WordTree(2)
    mirror = EventMirror()
    heard: list[Event] = []

    def fails(event: Event) -> None:
        heard.append(event)
        raise ValueError("no room for events")

    if verb != "insert":
        tree.insert("ab")
        mirror(Stored(next(tree.tree.cached_runs()), "pool"))
    tree.tree.add_observer(fails)
    tree.tree.add_observer(mirror)
    if verb == "insert":
        tree.insert("cd")
    elif verb == "evict":
        assert sorted(tree.tree.evict(99).tolist()) == [0, 1]
    elif verb == "remove":
        assert tree.tree.remove(tree.match("ab").node).tolist() == [0, 1]
    else:
        assert sorted(tree.tree.clear().tolist()) == [0, 1]
    tree.tree.check_invariants()
    tree.insert("ef")
    assert len(heard) == 1
    assert mirror.held() == held_by(tree.tree), "others still listen"
    (record,) = caplog.records
    assert "an observer of the cache failed" in record.message
    assert "no room for events" in (record.exc_text or "")


def test_the_books_are_right_when_an_observer_hears_of_a_change() -> None:
    tree = WordTree(2)
    sizes: list[int] = []

    def proves(event: Event) -> None:
        tree.tree.check_invariants()
        sizes.append(tree.tree.total_size)

    tree.tree.add_observer(proves)
    tree.insert("ab")
    tree.insert("ac")
    tree.evict(1)
    tree.tree.clear()
    assert sizes == [4, 6, 4, 0]


def test_a_tail_that_grows_is_never_missing() -> None:
    """The longer copy is stored before the shorter one is removed where it fills its page; at no time in between is
    less cached than what was committed before."""
    cache = PrefixCache(8, PAGE, copy_page=lambda source, target, num_tokens: None)
    mirror = listened(cache.tree)
    with cache.acquire([7, 8, 9, 10, 11]) as lease:
        lease.commit([7, 8])
        mirror.events.clear()
        lease.commit([7, 8, 9, 10])
        assert mirror.told == ["stored", "removed"]
        assert mirror.held() == held_by(cache.tree)


def test_what_a_lease_commits_is_told_once() -> None:
    cache = PrefixCache(8, PAGE)
    mirror = listened(cache.tree)
    share(cache, "ab")
    share(cache, "abc")
    assert mirror.told == ["stored", "stored"]
    with cache.acquire(ids("abc")) as lease:
        lease.commit(ids("abc"))
    cache.reset()
    assert mirror.told == ["stored", "stored", "cleared"]


@pytest.mark.parametrize(
    ("policy", "page_size"),
    [
        ("lru", 1),
        ("lru", 4),
        ("slru", 2),
        *(pytest.param(*case, marks=pytest.mark.stress) for case in (("lru", 2), ("slru", 1), ("slru", 4))),
    ],
)
def test_listening_alone_tells_what_is_cached(page_size: int, policy: str) -> None:
    """A random life of a small cache, tails and namespaces included."""
    rng = random.Random(page_size)
    cache = PrefixCache(24, page_size, policy, copy_page=lambda source, target, num_tokens: None)
    mirror = listened(cache.tree)
    running: list[tuple[Lease, list[int]]] = []
    known: dict[int, int] = {}  # tokens committed by lease

    def random_tokens() -> list[int]:
        word = "".join(rng.choice("aabc") for _ in range(rng.randint(0, 5)))
        return [*spell(word, page_size), *rng.choices([0, 1], k=rng.randint(0, page_size - 1))]

    for _ in range(800):
        verb = rng.choice(["acquire", "acquire", "commit", "commit", "release", "release", "reset"])
        if verb == "acquire" and len(running) < 4:
            extra_key, cache_salt = rng.choice(NAMESPACES)
            tokens = random_tokens()
            running.append((cache.acquire(tokens, extra_key=extra_key, cache_salt=cache_salt), tokens))
        elif verb == "commit" and running:
            lease, tokens = rng.choice(running)
            shortest = max(lease.cached_tokens, known.get(id(lease), 0))
            known[id(lease)] = rng.randint(shortest, len(tokens))
            lease.commit(tokens[: known[id(lease)]])
        elif verb == "release" and running:
            lease, _ = running.pop(rng.randrange(len(running)))
            known.pop(id(lease), None)
            lease.release()
        elif verb == "reset" and rng.random() < 0.1:
            cache.reset()
        assert mirror.held() == held_by(cache.tree)
    for lease, _ in running:
        lease.release()
    cache.check_invariants()
    assert {"stored", "removed", "evicted", "cleared"} - ({"removed"} if page_size == 1 else set()) <= set(mirror.told)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "whole pages"])
def test_listening_alone_tells_which_pages_layers_with_a_window_have(exact: bool) -> None:
    """Window pages that are taken back too, whenever somebody begins to listen."""
    rng = random.Random(7)
    windows = WindowPages(40, num_window_pages=9, page_size=2, window_tokens=4, sink_tokens=1)
    copy_page = (lambda source, target, num_tokens: None) if exact else None
    cache = PrefixCache(40, 2, copy_page=copy_page, residency=windows)
    mirror = EventMirror()
    told: set[str] = set()
    for step in range(170):
        if step == 100:
            for run in cache.tree.cached_runs():
                mirror(Stored(run, "pool"))
                for page in run.each_page():
                    if windows.has(page.pages)[0]:
                        mirror(Stored(page, "window"))
            mirror.events.clear()
            cache.add_observer(mirror)
        if rng.random() < 0.02:
            cache.reset()
        tokens = spell("".join(rng.choice("aabc") for _ in range(rng.randint(1, 7))), 2) + [1] * rng.randint(0, 1)
        with cache.acquire(tokens, max_cached_tokens=len(tokens) - 1) as lease:
            first = lease.cached_tokens
            while first < len(tokens):
                last = min(first + rng.randint(1, 4), len(tokens))
                lease.cover(first, last)
                first = last
                if rng.random() < 0.7 or first == len(tokens):
                    lease.commit(tokens[:first])
                if step >= 100:
                    assert mirror.held() == held_by(cache.tree)
                    assert mirror.held("window") == held_by(cache.tree, windows)
        if step >= 100:
            assert mirror.held("window") == held_by(cache.tree, windows)
            told |= {f"{event.medium} {name}" for event, name in zip(mirror.events, mirror.told, strict=True)}
            mirror.events.clear()
    cache.check_invariants()
    assert {"window stored", "window taken back", "window cleared", "pool stored", "pool cleared"} <= told


def test_a_window_page_that_is_taken_back_is_reported_and_its_page_stays_cached() -> None:
    windows = WindowPages(16, num_window_pages=4, page_size=2, window_tokens=2)
    cache = PrefixCache(16, 2, residency=windows)
    mirror = EventMirror()
    cache.add_observer(mirror)
    for first in (10, 20, 30):
        tokens = list(range(first, first + 4))
        with cache.acquire(tokens) as lease:
            lease.cover(0, 4)
            lease.commit(tokens)
    assert "taken back" in mirror.told
    assert len(mirror.held("pool")) == 6
    assert len(mirror.held("window")) == 4
    assert mirror.held("window") == held_by(cache.tree, windows)
