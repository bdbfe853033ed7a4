"""How KV can lie in memory: what each layout allocates for so many tokens, and how many requests fit side by side."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from radixkv.hf.chunk_buffer import round_up
from radixkv_bench.layouts.arena import Arena, Block
from radixkv_bench.layouts.traffic import Traffic

CONTIGUOUS, STATIC, CHUNKED, PAGED, RADIX = "contiguous", "static", "chunked", "paged", "radix"
LAYOUTS = (CONTIGUOUS, STATIC, CHUNKED, PAGED, RADIX)


@dataclass(frozen=True)
class Growth:
    """How the tensors of one request grow in a contiguous layout: K and V of each layer, `[heads, columns, dim]`.

    Attributes:
        capacity: columns that are allocated for so many tokens.
        moved_at_once: tensors whose old and new memory are held together while they move: 1, or 2 for K with V.
    """

    capacity: Callable[[int], int]
    moved_at_once: int


def growths(static_tokens: int, chunk_tokens: int) -> dict[str, Growth]:
    """The contiguous layouts."""
    return {
        CONTIGUOUS: Growth(lambda tokens: tokens, moved_at_once=1),
        STATIC: Growth(lambda tokens: static_tokens, moved_at_once=2),
        CHUNKED: Growth(lambda tokens: round_up(tokens, chunk_tokens), moved_at_once=2),
    }


class Tensors:
    """The memory of one request: a block for each of its tensors."""

    def __init__(self, arena: Arena, moved_at_once: int) -> None:
        self._arena, self._moved_at_once = arena, moved_at_once
        self._blocks: list[Block] = []

    def resize(self, sizes: Sequence[int]) -> bool:
        """Let the tensors have so many bytes: each that had others moves to a new block. O(tensors · log holes).

        Returns: whether there was room; if not, it is half done.
        """
        for first in range(0, len(sizes), self._moved_at_once):
            wanted = list(sizes[first : first + self._moved_at_once])
            old = self._blocks[first : first + self._moved_at_once]
            if [block.num_bytes for block in old] == wanted:
                continue
            new: list[Block] = []
            for num_bytes in wanted:
                if not self._arena.fits(num_bytes):
                    return False
                new.append(self._arena.alloc(num_bytes))
            self._blocks[first : first + self._moved_at_once] = new
            for block in old:
                self._arena.free(block)
        return True

    def free(self) -> None:
        """Give everything back."""
        for block in self._blocks:
            self._arena.free(block)
        self._blocks = []


# -- how many requests fit in a memory --------------------------------------------------------------------------------


class Asked(NamedTuple):
    """Tokens of a request: of its prompt, and those whose KV is there at its end (all but the last of its answer)."""

    prompt: int
    full: int


def endless_requests(traffic: Traffic) -> Iterator[Asked]:
    """Requests with the lengths of those in `traffic`, over and over, each of a session of its own."""
    for number in count():
        turns = traffic.lengths[number % len(traffic.lengths)]
        current = number % len(turns)
        prompt = len(traffic.system) + sum(map(sum, turns[:current])) + turns[current].asked
        yield Asked(prompt, prompt + turns[current].answered - 1)


def contiguous_fit(growth: Growth, requests: Iterator[Asked], column_bytes: Sequence[int], memory_bytes: int) -> int:
    """How many of the first `requests` run side by side to their ends: `column_bytes` tells what a token costs in each
    of their tensors. Their prompts come first, one after another; then all grow token by token, in step.
    """
    candidates = list(_until_full(requests, lambda r: growth.capacity(r.full) * sum(column_bytes), memory_bytes))
    return bisect_left(
        range(1, len(candidates) + 1),
        True,
        key=lambda number: not _run_side_by_side(growth, candidates[:number], column_bytes, memory_bytes),
    )


def _run_side_by_side(
    growth: Growth, requests: Sequence[Asked], column_bytes: Sequence[int], memory_bytes: int
) -> bool:
    """Whether there is room at each step."""
    arena = Arena(memory_bytes)
    tensors = [Tensors(arena, growth.moved_at_once) for _ in requests]
    for step in range(max(request.full - request.prompt for request in requests) + 1):
        for own, request in zip(tensors, requests, strict=True):
            columns = growth.capacity(request.prompt + step)
            if request.prompt + step <= request.full and not own.resize([columns * size for size in column_bytes]):
                return False
    return True


def paged_fit(requests: Iterator[Asked], page_size: int, token_bytes: int, memory_bytes: int) -> int:
    """As `contiguous_fit`, in pages: any free page serves any request."""
    return radix_fit(requests, 0, page_size, token_bytes, memory_bytes)


def radix_fit(
    requests: Iterator[Asked], system_tokens: int, page_size: int, token_bytes: int, memory_bytes: int
) -> int:
    """As `paged_fit`; the whole pages of the system prompt are there once, the rest of it is copied for each."""
    pages, shared = memory_bytes // (page_size * token_bytes), system_tokens // page_size
    own = _until_full(requests, lambda r: -(-r.full // page_size) - shared, pages - shared)
    return sum(1 for _ in own)


def _until_full(requests: Iterator[Asked], needs: Callable[[Asked], int], room: int) -> Iterator[Asked]:
    """The first requests whose needs have room together."""
    used = 0
    for request in requests:
        used += needs(request)
        if used > room:
            return
        yield request
