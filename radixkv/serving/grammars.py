"""Answers of a given form: grammars compiled by llguidance, whose masks are computed while the model runs."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.engine.async_engine import AsyncEngine
from radixkv.serving.errors import bad_request

MAX_COMPILED = 128
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
WHITESPACE = r"[ \n]{0,2}"  # between the parts of JSON; without a bound, some models write nothing else


class Grammar(NamedTuple):
    """A grammar as llguidance takes it, and the field of the request that asked for it."""

    source: str
    param: str


class Grammars:
    """Compiles grammars for an engine's model, and remembers those that were used last. Thread-safe."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._tokenizer: Any = None  # llguidance's; made when the first grammar comes, since it takes a second
        self._compiled: OrderedDict[bytes, Any] = OrderedDict()
        self._lock = Lock()
        self._group = MaskGroup(engine.vocab_size)

    @property
    def num_compiled(self) -> int:
        """Grammars that are remembered."""
        return len(self._compiled)

    def transform(self, grammar: Grammar) -> Callable[[], GrammarTransform]:
        """What makes a transform of logits for each output that is to fit `grammar`. Compiles it, if that is needed.

        Raises: ApiError if it is not valid, or the tokenizer cannot be used with grammars.
        """
        matcher = self._matcher(grammar)
        return lambda: GrammarTransform(matcher.deep_copy(), self._group)

    def close(self) -> None:
        """End the thread."""
        self._group.close()

    def _matcher(self, grammar: Grammar) -> Any:
        key = sha256(grammar.source.encode()).digest()
        with self._lock:
            if (known := self._compiled.get(key)) is not None:
                self._compiled.move_to_end(key)
                return known
            matcher = self._compile(grammar)
            self._compiled[key] = matcher
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return matcher

    def _compile(self, grammar: Grammar) -> Any:
        import llguidance
        from llguidance.hf import from_tokenizer

        if self._tokenizer is None:
            tokenizer = self._engine.require_tokenizer("a grammar")
            ends = sorted(self._engine.eos_ids) or None
            try:
                self._tokenizer = from_tokenizer(tokenizer, n_vocab=self._engine.vocab_size, eos_token=ends)
            except Exception as error:  # of tokenizers that are not fast, or have no end
                raise bad_request(f"this model's tokenizer takes no grammars: {error}", grammar.param) from error
        matcher = llguidance.LLMatcher(self._tokenizer, grammar.source, log_level=0)
        if matcher.is_error():
            first_line = matcher.get_error().strip().splitlines()[0]
            raise bad_request(f"{grammar.param} cannot be used as a grammar: {first_line[:300]}", grammar.param)
        return matcher


class GrammarTransform:
    """Forbids every token that the grammar does not allow next; a `LogitsTransform` that works in a group."""

    def __init__(self, matcher: Any, group: MaskGroup) -> None:
        self.matcher = matcher
        self.group = group
        self.masks: Future[_Masks] | None = None  # of the step that was started last
        self.place = 0  # in them

    def start(self, token_ids: Sequence[int]) -> None:
        """Begin to compute which tokens may follow `token_ids`."""
        self.group.start([self], [token_ids])

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of the first of `token_ids` the grammar allows one after the other."""
        if self.masks is not None:
            self.masks.result()  # its thread has done with the matcher
        return 0 if self.matcher.is_error() else int(self.matcher.validate_tokens(list(token_ids)))

    def apply(self, logits: Tensor) -> None:
        """Set the logits of all other tokens to minus infinity."""
        for error in self.group.apply([self], logits[None], [0]).values():
            raise error


class _Masks(NamedTuple):
    """Which tokens are forbidden next in each of some outputs, [outputs, tokens], and which of the grammars failed."""

    forbidden: NDArray[np.bool_]
    failed: list[bool]


class MaskGroup:
    """Computes the masks of all outputs of a step with a grammar at once, while the model computes the logits.

    One job a step: starting a job costs as much as some masks, and its own threads share the outputs out.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="radixkv-masks")
        self._executor: Any = None  # llguidance's; made when the first grammar comes

    def start(self, transforms: Sequence[GrammarTransform], outputs: Sequence[Sequence[int]]) -> None:
        """Begin to compute which tokens may follow each of `outputs`."""
        matchers = [transform.matcher for transform in transforms]
        masks = self._thread.submit(self._compute, matchers, [ids[-1] if ids else None for ids in outputs])
        for place, transform in enumerate(transforms):
            transform.masks, transform.place = masks, place

    def apply(
        self, transforms: Sequence[GrammarTransform], logits: Tensor, rows: Sequence[int]
    ) -> dict[int, Exception]:
        """Set the logits of forbidden tokens to minus infinity. Returns: the errors of grammars that failed, by row."""
        found = [(_masks_of(transform), transform.place) for transform in transforms]
        first = found[0][0]
        is_in_order = all(masks is first and place == i for i, (masks, place) in enumerate(found))
        if is_in_order and len(found) == len(first.forbidden):
            chosen = first.forbidden
        else:  # a step is repeated for one of its requests, or some have ended
            chosen = np.stack([masks.forbidden[place] for masks, place in found])
        forbidden = torch.from_numpy(chosen).to(logits.device)
        if len(rows) == len(logits):
            logits.masked_fill_(forbidden, -torch.inf)
        else:
            index = torch.tensor(rows, dtype=torch.int64, device=logits.device)
            logits[index] = logits[index].masked_fill_(forbidden, -torch.inf)
        failed = [row for row, (masks, place) in zip(rows, found, strict=True) if masks.failed[place]]
        return {row: RuntimeError("the grammar failed on the output") for row in failed}

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    def _compute(self, matchers: list[Any], token_ids: list[int | None]) -> _Masks:
        """The masks after `token_ids`, the newest of each output."""
        import llguidance
        from llguidance.numpy import consume_token_par, fill_next_token_bitmask_par

        if self._executor is None:
            self._executor = llguidance.LLExecutor()
        newest = zip(matchers, token_ids, strict=True)
        consumed = [(matcher, i) for matcher, i in newest if i is not None and not matcher.is_stopped()]
        if consumed:
            consume_token_par(self._executor, consumed)
        words = np.zeros((len(matchers), -(-self._vocab_size // 32)), np.int32)
        live = [(matcher, place) for place, matcher in enumerate(matchers) if not matcher.is_error()]
        if live:
            fill_next_token_bitmask_par(self._executor, live, words)
        failed = [matcher.is_error() for matcher in matchers]
        bits = np.unpackbits(words.view(np.uint8), axis=1, count=self._vocab_size, bitorder="little")
        return _Masks(np.logical_not(bits), failed)


def _masks_of(transform: GrammarTransform) -> _Masks:
    assert transform.masks is not None, "apply before start"
    return transform.masks.result()


def of_json_schema(schema: dict[str, Any], param: str) -> Grammar:
    """JSON that fits `schema`. Raises: ApiError."""
    import llguidance

    options: Any = {"whitespace_pattern": WHITESPACE}
    try:
        return Grammar(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=options), param)
    except ValueError as error:
        raise bad_request(f"{param} must be a JSON schema: {str(error)[:300]}", param) from error


def of_json_object(param: str) -> Grammar:
    """Any JSON object."""
    return of_json_schema({"type": "object"}, param)


def of_regex(regex: str, param: str) -> Grammar:
    """Text that matches `regex` as a whole."""
    import llguidance

    return Grammar(llguidance.LLMatcher.grammar_from_regex(regex), param)


def of_lark(lark: str, param: str) -> Grammar:
    """Text that a grammar in Lark's notation derives."""
    import llguidance

    return Grammar(llguidance.LLMatcher.grammar_from_lark(lark), param)


def of_tools(tools: Sequence[tuple[str, dict[str, Any]]], param: str) -> Grammar:
    """A call of one of `tools`, each a name and the schema of its arguments; an empty one is for none."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema or NO_ARGUMENTS},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in tools
    ]
    return of_json_schema(calls[0] if len(calls) == 1 else {"anyOf": calls}, param)
