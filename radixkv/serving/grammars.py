"""Answers of a given form: grammars compiled by llguidance, whose masks are computed while the model runs."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixkv.engine.async_engine import AsyncEngine
from radixkv.engine.token_masks import compile_masks, forbid_tokens
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
        self._group = MaskGroup(engine.vocab_size, has_free_cores=has_free_cores(engine.config.device))

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
            compile_masks()
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
        self.masks: Callable[[], _Masks] | None = None  # waits for those of the step that was started last
        self.place = 0  # in them
        self._num_consumed = 0  # tokens of the output that the matcher knows

    def start(self, token_ids: Sequence[int]) -> None:
        """Begin to compute which tokens may follow `token_ids`."""
        self.group.start([self], [token_ids])

    def consume(self, token_ids: Sequence[int]) -> None:
        """Let the matcher know what it does not know yet of `token_ids`, the output so far."""
        if len(token_ids) > self._num_consumed:
            if not self.matcher.is_stopped():
                self.matcher.consume_tokens(token_ids[self._num_consumed :])
            self._num_consumed = len(token_ids)

    def num_allowed(self, output_ids: Sequence[int], token_ids: Sequence[int]) -> int:
        """How many of the first of `token_ids` the grammar allows one after the other after `output_ids`."""
        self._wait()
        self.consume(output_ids)
        return 0 if self.matcher.is_error() else int(self.matcher.validate_tokens(list(token_ids)))

    def forced(self, token_ids: Sequence[int]) -> Sequence[int]:
        """The tokens that are the only ones that the grammar allows after `token_ids`, one after the other."""
        self._wait()
        self.consume(token_ids)
        ids: list[int] = [] if self.matcher.is_stopped() else self.matcher.compute_ff_tokens()
        return ids[: self.matcher.validate_tokens(ids)] if ids else ()  # some name control tokens that do not fit

    def found_masks(self) -> _Masks:
        """Those of the step that was started last; waits for them."""
        assert self.masks is not None, "apply before start"
        return self.masks()

    def apply(self, logits: Tensor) -> None:
        """Set the logits of all other tokens to minus infinity."""
        for error in self.group.apply([self], logits[None], [0]).values():
            raise error

    def _wait(self) -> None:
        """Wait until the thread that makes masks has done with the matcher."""
        if self.masks is not None:
            self.masks()


class _Masks(NamedTuple):
    """Which tokens may come next in each of some outputs, and which of the grammars failed.

    Attributes:
        words: uint32 [outputs, words], as `forbid_tokens` takes them.
    """

    words: NDArray[np.uint32]
    failed: list[bool]


class MaskGroup:
    """Computes the masks of all outputs of a step with a grammar at once, while the model computes the logits.

    One job a step: starting a job costs as much as some masks, and llguidance's own threads share the outputs out.
    Where the model has all cores, the job is done before it begins: to take one from it costs more than the masks.
    """

    def __init__(self, vocab_size: int, *, has_free_cores: bool) -> None:
        """has_free_cores: whether there are cores that the model does not compute on."""
        self._vocab_size = vocab_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="radixkv-masks") if has_free_cores else None
        self._executor: Any = None  # llguidance's; made when the first grammar comes

    def start(self, transforms: Sequence[GrammarTransform], outputs: Sequence[Sequence[int]]) -> None:
        """Begin to compute which tokens may follow each of `outputs`."""
        masks = self._begin(transforms, outputs)
        for place, transform in enumerate(transforms):
            transform.masks, transform.place = masks, place

    def apply(
        self, transforms: Sequence[GrammarTransform], logits: Tensor, rows: Sequence[int]
    ) -> dict[int, Exception]:
        """Set the logits of forbidden tokens to minus infinity. Returns: the errors of grammars that failed, by row."""
        found = [transform.found_masks() for transform in transforms]
        places = [transform.place for transform in transforms]
        words = found[0].words
        if places != list(range(len(words))) or any(masks is not found[0] for masks in found):
            # a step is repeated for one of its requests, or some have ended
            words = np.stack([masks.words[place] for masks, place in zip(found, places, strict=True)])
        forbid_tokens(logits, rows, words)
        each = zip(rows, found, places, strict=True)
        failed = [row for row, masks, place in each if masks.failed[place]]
        return {row: RuntimeError("the grammar failed on the output") for row in failed}

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    def _begin(self, transforms: Sequence[GrammarTransform], outputs: Sequence[Sequence[int]]) -> Callable[[], _Masks]:
        """What waits for the masks after `outputs`."""
        if self._thread is None:
            masks = self._masks(transforms, outputs, _fill_one_by_one)
            return lambda: masks
        return self._thread.submit(self._masks, transforms, outputs, self._fill_side_by_side).result

    def _masks(
        self, transforms: Sequence[GrammarTransform], outputs: Sequence[Sequence[int]], fill: Callable[..., object]
    ) -> _Masks:
        """The masks after `outputs`."""
        for transform, output in zip(transforms, outputs, strict=True):
            transform.consume(output)
        matchers = [transform.matcher for transform in transforms]
        words = np.zeros((len(matchers), -(-self._vocab_size // 32)), np.int32)
        fill(matchers, words)
        return _Masks(words.view(np.uint32), [matcher.is_error() for matcher in matchers])

    def _fill_side_by_side(self, matchers: Sequence[Any], words: NDArray[np.int32]) -> None:
        """As `_fill_one_by_one`, on llguidance's threads."""
        import llguidance
        from llguidance.numpy import fill_next_token_bitmask_par

        if self._executor is None:
            self._executor = llguidance.LLExecutor()
        live = [(matcher, place) for place, matcher in enumerate(matchers) if not matcher.is_error()]
        if live:
            fill_next_token_bitmask_par(self._executor, live, words)


def _fill_one_by_one(matchers: Sequence[Any], words: NDArray[np.int32]) -> None:
    """Write the masks of matchers that did not fail into `words`."""
    address, row_bytes = words.ctypes.data, words.strides[0]
    for matcher in matchers:
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(address, row_bytes)
        address += row_bytes


def has_free_cores(device: str) -> bool:
    """Whether a model on `device` leaves cores of the CPU free: more than torch has threads."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return not device.startswith("cpu") or available > torch.get_num_threads()


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
