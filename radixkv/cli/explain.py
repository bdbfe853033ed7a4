"""`radixkv explain`: why prompts miss a cache that has seen other prompts."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_args

import numpy as np
import typer
from numpy.typing import NDArray

from radixkv.cache.insight.explanation import CONTEXT_TOKENS, Explanation, MissReason, NearMiss
from radixkv.cache.insight.history import Eviction
from radixkv.cache.prefix_cache import PrefixCache
from radixkv.cache.token_ids import token_array
from radixkv.cli.difference import Difference, difference
from radixkv.cli.display import percent
from radixkv.cli.finding import Finding, Likest, Loss, as_json, as_lines
from radixkv.cli.prompts import FILE_HELP, Prompt, describe, from_file
from radixkv.cli.setting_options import setting_option
from radixkv.cli.trace_source import pretrained_tokenizer, progress_on_stderr
from radixkv.config import CacheConfig, EngineConfig
from radixkv.errors import (
    InvalidRequestError,
    MissingTokenizerError,
    OutOfPagesError,
    PromptTooLongError,
    RadixKVError,
)

if TYPE_CHECKING:
    from rich.progress import Progress

EXPLAIN_EPILOG = """
No model runs, and there are no outputs: what a prompt of the first file leaves in the cache is the prompt itself.

**Reasons**

- *hit*: all of the prompt is cached.

- *never seen*: no prompt before went on like this. Shown is the one that is the same for the longest, and how both go
  on; with token ids where the texts look alike, but are not the same tokens.

- *evicted*: it was cached, and had to make room for others (with --kv-cache-tokens).

- *other namespace*: it is cached for requests with another extra_key (with --extra-key-first).

- *page*: more is the same, but it fills no page (with --whole-pages).

An engine has two more, which depend on its model and do not occur here: *window* (more is cached, but no longer in the
layers that see a window) and *state* (more is cached, but recurrent layers kept no state to go on from). Ask it by
`PrefixCache.explain`, or a server at /v1/cache/explain.

**Examples**

Why does the new version of a prompt miss? `radixkv explain old.txt new.txt`

Prompts of several lines, and your model's tokenizer: `radixkv explain old.jsonl new.jsonl --model Qwen/Qwen3-8B`

What does a small pool forget? `radixkv explain prompts.txt prompts.txt --kv-cache-tokens 512 --policy slru`

For a script: `radixkv explain old.jsonl new.jsonl --json | jq -c '[.place, .cached_tokens, .reason]'`
"""

Tokens: TypeAlias = "NDArray[np.int32]"
SAME_TOKENS = 32  # of those before a difference that are decoded


def explain(
    first_file: Annotated[
        Path, typer.Argument(metavar="FIRST_FILE", help=f"What was cached. {FILE_HELP}", show_default=False)
    ],
    second_file: Annotated[
        Path, typer.Argument(metavar="SECOND_FILE", help="What is asked for, in the same format.", show_default=False)
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help='Whose tokenizer to take: "demo", a directory or a hub id.')
    ] = "demo",
    page_size: Annotated[int, setting_option(CacheConfig, "page_size")] = 16,
    kv_cache_tokens: Annotated[
        int | None, setting_option(EngineConfig, "kv_cache_tokens", unset="enough for all")
    ] = None,
    policy: Annotated[str, setting_option(CacheConfig, "policy")] = "lru",
    whole_pages: Annotated[
        bool, typer.Option("--whole-pages", help="Share whole pages alone, instead of every token.")
    ] = False,
    extra_key_first: Annotated[
        str | None,
        typer.Option(help="Cache the first file under this extra_key; the second has none.", show_default=False),
    ] = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt, each on a line.")] = False,
) -> None:
    """Cache the prompts of one file; then explain how far each of another is found, and why not further.

    Shown is the text around the first difference. Each prompt of the second file is looked up in what the first file
    has left; looking changes nothing.
    """
    first, second = from_file(first_file), from_file(second_file)
    tokenizer = pretrained_tokenizer(model)
    with progress_on_stderr() as progress:
        sequences = _encode_all(first, tokenizer, model, progress)
        asked = _encode_all(second, tokenizer, model, progress)
        num_pages = sum(-(-len(tokens) // page_size) for tokens in sequences)
        cache = PrefixCache(
            num_pages if kv_cache_tokens is None else -(-kv_cache_tokens // page_size),
            page_size,
            policy,
            copy_page=None if whole_pages else _copy_nothing,
        )
        past = Past(cache, first, sequences, tokenizer)
        past.cache_all(extra_key_first, progress)
        numbered = enumerate(zip(progress.track(second, description="explaining"), asked, strict=True), start=1)
        findings = [past.explain(number, prompt.place, tokens) for number, (prompt, tokens) in numbered]
    if json_lines:
        for finding in findings:
            typer.echo(as_json(finding))
    else:
        _print(findings, page_size)


def _copy_nothing(source: int, target: int, num_tokens: int) -> None:
    """There is no KV to copy."""


# ---------------------------------------------------------------------------------------------------------------- work


def _encode_all(prompts: Sequence[Prompt], tokenizer: Any, model: str, progress: Progress) -> list[Tokens]:
    """The token ids of each prompt, as an engine makes them. Raises: MissingTokenizerError, RadixKVError."""
    return [_encode(prompt, tokenizer, model) for prompt in progress.track(prompts, description="making tokens")]


def _encode(prompt: Prompt, tokenizer: Any, model: str) -> Tokens:
    if not isinstance(prompt.content, str):
        return token_array(prompt.content)
    if tokenizer is None:
        raise MissingTokenizerError(f"{prompt.place}: {model!r} has no tokenizer; give token_ids")
    try:
        tokens = token_array(tokenizer(prompt.content).input_ids)
    except Exception as error:  # a tokenizer may raise anything
        raise RadixKVError(f"{prompt.place}: the tokenizer failed: {describe(error)}") from error
    if not len(tokens):
        raise InvalidRequestError(f"{prompt.place}: the tokenizer makes no tokens of this")
    return tokens


class Past:
    """The prompts that were cached before, and what they explain. `tokenizer` may be None: there are no texts then."""

    def __init__(
        self, cache: PrefixCache, prompts: Sequence[Prompt], sequences: Sequence[Tokens], tokenizer: Any
    ) -> None:
        self._cache, self._tokenizer = cache, tokenizer
        self._prompts, self._sequences = prompts, sequences
        self._ticks: list[int] = []  # of the cache, before each prompt
        self._sorted = sorted((tokens.tobytes(), index) for index, tokens in enumerate(sequences))

    def cache_all(self, extra_key: str | None, progress: Progress) -> None:
        """Cache the prompts, one after the other. Raises: PromptTooLongError if one of them exceeds the pool."""
        cache = self._cache
        for prompt, tokens in zip(progress.track(self._prompts, description="caching"), self._sequences, strict=True):
            self._ticks.append(cache.tick)
            try:
                with cache.acquire(tokens, extra_key=extra_key) as lease:
                    lease.commit(tokens)
            except OutOfPagesError as error:
                raise PromptTooLongError(
                    f"{prompt.place}: the prompt has {len(tokens)} tokens, and the pool has room for "
                    f"{cache.num_pages * cache.page_size}; make --kv-cache-tokens larger"
                ) from error

    def explain(self, number: int, place: str, tokens: Tokens) -> Finding:
        """How far a prompt is cached now, why not further, and which of the prompts before have to do with it."""
        explanation = self._cache.explain_as_admin(tokens)
        near_miss, eviction = explanation.near_miss, explanation.eviction
        return Finding(
            number,
            place,
            explanation,
            likest=None if near_miss is None else self._likest(tokens, near_miss),
            loss=None if eviction is None else self._loss(tokens, explanation, eviction),
        )

    def _likest(self, tokens: Tokens, near_miss: NearMiss) -> Likest:
        position, cached_ids, asked_ids = near_miss
        source = self._index_of(np.concatenate([tokens[:position], np.array(cached_ids, np.int32)]))
        return Likest(
            self._difference(tokens, position, cached_ids, asked_ids),
            self._prompts[source].place,
            ends_there=len(self._sequences[source]) == position + len(cached_ids),
        )

    def _loss(self, tokens: Tokens, explanation: Explanation, eviction: Eviction) -> Loss:
        position = explanation.cached_tokens
        gone_ids = tokens[position : position + min(explanation.evicted_tokens, CONTEXT_TOKENS)].tolist()
        evicted_for, last_user = self._index_at(eviction.evicted_tick), self._index_at(eviction.last_use_tick)
        return Loss(
            self._difference(tokens, position, [], gone_ids),
            evicted_for=self._prompts[evicted_for].place,
            last_used_by=self._prompts[last_user].place,
            unused_prompts=evicted_for - last_user,
        )

    def _difference(self, tokens: Tokens, position: int, cached_ids: list[int], asked_ids: list[int]) -> Difference:
        same_ids = tokens[max(0, position - SAME_TOKENS) : position].tolist()
        return difference(self._tokenizer, position, same_ids, cached_ids, asked_ids)

    def _index_at(self, tick: int) -> int:
        """Which prompt was being cached at that tick of the cache."""
        return bisect_left(self._ticks, tick) - 1

    def _index_of(self, beginning: Tokens) -> int:
        """The shortest of the prompts that begin like this, which is in the cache. O(log prompts) comparisons."""
        _, index = self._sorted[bisect_left(self._sorted, (beginning.tobytes(), 0))]
        return index


# -------------------------------------------------------------------------------------------------------------- output


def _print(findings: Sequence[Finding], page_size: int) -> None:
    from rich.console import Console

    console = Console()
    for finding in findings:
        lines = list(as_lines(finding, page_size))
        for line in lines:
            console.print(line, soft_wrap=True)
        if len(lines) > 1:
            console.print()
    typer.echo(_summary([finding.explanation for finding in findings]))


def _summary(explanations: Sequence[Explanation]) -> str:
    num_tokens = sum(explanation.num_tokens for explanation in explanations)
    cached_tokens = sum(explanation.cached_tokens for explanation in explanations)
    counts = Counter(explanation.reason for explanation in explanations)
    reasons = ", ".join(f"{counts[reason]:,} {reason}" for reason in get_args(MissReason) if counts[reason])
    return (
        f"{len(explanations):,} prompt{'' if len(explanations) == 1 else 's'} of {num_tokens:,} tokens: "
        f"{cached_tokens:,} cached ({percent(cached_tokens / num_tokens)}) · {reasons}"
    )
