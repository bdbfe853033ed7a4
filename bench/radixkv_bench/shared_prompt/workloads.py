"""Workloads that share prompts: each is a forest of requests.

A root's prompt is its own tokens; a child's prompt is its parent's prompt, then what the parent answered, then its own
tokens. So few-shot prompts are a row of roots, conversations are chains and a tree of thoughts is a tree. All requests
of one depth are served together as one wave; their answers feed the next wave.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from radixkv_bench.common import corpus
from radixkv_bench.common.corpus import Encode
from radixkv_bench.common.errors import BenchError


class Request(NamedTuple):
    """One request: `tokens` of its own, after prompt and answer of the request number `parent` (None: a root)."""

    parent: int | None
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """Requests, parents before their children, that are each answered with `output_tokens` tokens."""

    name: str
    requests: tuple[Request, ...]
    output_tokens: int

    @cached_property
    def depths(self) -> list[int]:
        """How many ancestors each request has."""
        depths: list[int] = []
        for request in self.requests:
            depths.append(0 if request.parent is None else depths[request.parent] + 1)
        return depths

    @cached_property
    def waves(self) -> list[list[int]]:
        """Numbers of the requests by depth: each wave can be served when the one before it has been answered."""
        waves: list[list[int]] = [[] for _ in range(max(self.depths, default=-1) + 1)]
        for number, depth in enumerate(self.depths):
            waves[depth].append(number)
        return waves

    def prompt(self, number: int, outputs: dict[int, list[int]]) -> list[int]:
        """The whole prompt of request `number`, given the answers of its ancestors."""
        parts: list[Sequence[int]] = []
        current: int | None = number
        while current is not None:
            parent, tokens = self.requests[current]
            parts.append(tokens)
            if parent is not None:
                parts.append(outputs[parent])
            current = parent
        return list(chain.from_iterable(reversed(parts)))

    @cached_property
    def sequence_tokens(self) -> list[int]:
        """Length of each request when it is finished: prompt and answer, in tokens."""
        lengths: list[int] = []
        for request in self.requests:
            before = 0 if request.parent is None else lengths[request.parent]
            lengths.append(before + len(request.tokens) + self.output_tokens)
        return lengths

    @property
    def prompt_tokens(self) -> int:
        """All prompts together, in tokens."""
        return sum(self.sequence_tokens) - len(self.requests) * self.output_tokens

    @property
    def longest_tokens(self) -> int:
        """The longest prompt with its answer, in tokens."""
        return max(self.sequence_tokens, default=0)

    @cached_property
    def unshared_tokens(self) -> int:
        """Tokens of all finished sequences side by side, a child's with its parent's in it: such a pool never fills."""
        parents = {request.parent for request in self.requests}
        return sum(tokens for number, tokens in enumerate(self.sequence_tokens) if number not in parents)


@dataclass(frozen=True)
class Shape:
    """Sizes of a workload; which of them count depends on its kind."""

    requests: int = 16
    prefix_tokens: int = 1024
    suffix_tokens: int = 64
    output_tokens: int = 16
    sessions: int = 8
    turns: int = 6
    branching: int = 3
    depth: int = 3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 0 if name == "prefix_tokens" else 1
            if value < least:
                raise BenchError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


SHAPES = {
    "few-shot": Shape(),
    "multi-turn": Shape(prefix_tokens=512, output_tokens=32),
    "tree": Shape(prefix_tokens=512, suffix_tokens=48),
    "document": Shape(prefix_tokens=2048),
    "none": Shape(suffix_tokens=512),
}
"""The sizes of each kind where the command gives none."""

SIZES = {
    "few-shot": ("requests", "prefix_tokens", "suffix_tokens", "output_tokens"),
    "multi-turn": ("sessions", "turns", "prefix_tokens", "suffix_tokens", "output_tokens"),
    "tree": ("depth", "branching", "prefix_tokens", "suffix_tokens", "output_tokens"),
    "document": ("requests", "prefix_tokens", "suffix_tokens", "output_tokens"),
    "none": ("requests", "suffix_tokens", "output_tokens"),
}
"""The sizes that count for each kind."""


def sizes(name: str, given: dict[str, int]) -> dict[str, int]:
    """All sizes of the workload `name`: those `given`, else its own.

    Raises: BenchError for an unknown workload, and for a size that has no meaning for it.
    """
    if name not in SIZES:
        raise BenchError(f"unknown workload {name!r}; the workloads are {', '.join(SIZES)}")
    check_known(f"the workload {name}", given, SIZES[name])
    shape = replace(SHAPES[name], **given)
    return {size: getattr(shape, size) for size in SIZES[name]}


def check_known(whose: str, given: Iterable[str], known: Sequence[str]) -> None:
    """BenchError if `given` holds a size that is not among the `known` ones."""
    for size in given:
        if size not in known:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in known)
            raise BenchError(f"--{size.replace('_', '-')} means nothing for {whose}, whose sizes are {options}")


def build(name: str, sizes: dict[str, int], encode: Encode) -> Workload:
    """The workload `name` in these `sizes`, from real text. O(tokens)."""
    shape = Shape(**sizes)
    builders = {
        "few-shot": _few_shot,
        "multi-turn": _multi_turn,
        "tree": _tree,
        "document": _document,
        "none": _nothing_shared,
    }
    return Workload(name, tuple(builders[name](shape, encode)), shape.output_tokens)


def _asked(prefix: list[int], shape: Shape, encode: Encode) -> Iterator[Request]:
    """`shape.requests` roots: the common prefix, then a question each."""
    ask = _questions(shape, encode)
    for _ in range(shape.requests):
        yield Request(None, tuple(prefix) + next(ask))


def _few_shot(shape: Shape, encode: Encode) -> Iterator[Request]:
    return _asked(corpus.take(corpus.example_tokens(encode), shape.prefix_tokens), shape, encode)


def _document(shape: Shape, encode: Encode) -> Iterator[Request]:
    return _asked(corpus.take(corpus.source_tokens(encode), shape.prefix_tokens), shape, encode)


def _nothing_shared(shape: Shape, encode: Encode) -> Iterator[Request]:
    """Prompts with no common beginning: each is a new stretch of source text."""
    stream = corpus.source_tokens(encode)
    for _ in range(shape.requests):
        yield Request(None, tuple(corpus.take(stream, shape.suffix_tokens)))


def _multi_turn(shape: Shape, encode: Encode) -> Iterator[Request]:
    """Conversations side by side, after one system prompt: turn t of all of them is wave t."""
    system = tuple(corpus.take(corpus.example_tokens(encode), shape.prefix_tokens))
    ask = _questions(shape, encode)
    for turn in range(shape.turns):
        for session in range(shape.sessions):
            parent = (turn - 1) * shape.sessions + session
            yield Request(parent, next(ask)) if turn else Request(None, system + next(ask))


def _tree(shape: Shape, encode: Encode) -> Iterator[Request]:
    """A tree of thoughts: each state of the last level is continued in `branching` ways, `depth` levels deep."""
    problem = tuple(corpus.take(corpus.example_tokens(encode), shape.prefix_tokens))
    ask = _questions(shape, encode)
    level: list[int | None] = [None]
    count = 0
    for _ in range(shape.depth):
        parents = [parent for parent in level for _ in range(shape.branching)]
        for parent in parents:
            thought = next(ask)
            yield Request(parent, problem + thought if parent is None else thought)
        level = list(range(count, count + len(parents)))
        count += len(parents)


def _questions(shape: Shape, encode: Encode) -> Iterator[tuple[int, ...]]:
    """Distinct questions of `suffix_tokens`; a BenchError when the standard library has no more."""
    for question in corpus.questions(encode, shape.suffix_tokens):
        yield tuple(question)
    raise BenchError(
        f"the standard library gives no more distinct questions of {shape.suffix_tokens} tokens; ask for fewer, or "
        "change --suffix-tokens"
    )
