"""The best possible hit rate, by the dullest means: a trie of pages, requests served one after another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

Trie: TypeAlias = "dict[tuple[int, ...], Trie]"


class Hits(NamedTuple):
    """Tokens of prompts in total, and how many of them were found in the trie."""

    query_tokens: int
    hit_tokens: int

    @property
    def rate(self) -> float:
        """Share of the prompts' tokens that were found, 0 … 1."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else 0.0


def best_hits(served: Iterable[tuple[Sequence[int], Sequence[int]]], page_size: int) -> Hits:
    """Hits of the (prompt, answer) pairs in the order served, with room for everything and whole pages shared.

    At least one token of each prompt is computed, for its logits. After a request, the KV of its prompt and of its
    answer but for the last token is there (the last one was never fed to the model). O(tokens).
    """
    root: Trie = {}
    query_tokens = hit_tokens = 0
    for prompt, answer in served:
        query_tokens += len(prompt)
        hit_tokens += min(_match(root, prompt, page_size), (len(prompt) - 1) // page_size) * page_size
        _insert(root, [*prompt, *answer[:-1]], page_size)
    return Hits(query_tokens, hit_tokens)


def best_state_hits(served: Iterable[tuple[Sequence[int], Sequence[int]]], interval_tokens: int) -> Hits:
    """The same of a model with recurrent layers, where a hit can end only where a state was kept.

    That is after a prompt; after an answer but for its last token; where a prompt leaves what was computed before, as
    it computes that much again; and at multiples of `interval_tokens` on the way.
    O(requests × tokens).
    """
    computed: list[list[int]] = []
    kept: set[tuple[int, ...]] = {()}
    query_tokens = hit_tokens = 0
    for prompt, answer in served:
        held = max((_common(prompt[:-1], ids) for ids in computed), default=0)
        hit = next(length for length in range(held, -1, -1) if tuple(prompt[:length]) in kept)
        query_tokens += len(prompt)
        hit_tokens += hit
        ids = [*prompt, *answer[:-1]]
        stops = {held, len(prompt), len(ids), *range(interval_tokens, len(prompt), interval_tokens)}
        kept |= {tuple(ids[:stop]) for stop in stops if stop > hit}
        computed.append(ids)
    return Hits(query_tokens, hit_tokens)


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many first ids are the same."""
    return next(
        (place for place, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others))
    )


def distinct_tokens(prompts: Iterable[Sequence[int]], page_size: int) -> int:
    """Tokens to keep for all `prompts` when whole pages are shared and the rest of each prompt takes a page."""
    root: Trie = {}
    rest_pages = 0
    for prompt in prompts:
        _insert(root, prompt, page_size)
        rest_pages += 1 if len(prompt) % page_size else 0
    pages, open_nodes = rest_pages, [root]
    while open_nodes:
        node = open_nodes.pop()
        pages += len(node)
        open_nodes.extend(node.values())
    return pages * page_size


def _pages(ids: Sequence[int], page_size: int) -> Iterable[tuple[int, ...]]:
    """The full pages of `ids`; the rest is left out."""
    return (tuple(ids[start : start + page_size]) for start in range(0, len(ids) - page_size + 1, page_size))


def _match(root: Trie, ids: Sequence[int], page_size: int) -> int:
    """How many leading pages of `ids` the trie holds."""
    node, pages = root, 0
    for page in _pages(ids, page_size):
        if page not in node:
            break
        node, pages = node[page], pages + 1
    return pages


def _insert(root: Trie, ids: Sequence[int], page_size: int) -> None:
    node = root
    for page in _pages(ids, page_size):
        node = node.setdefault(page, {})
