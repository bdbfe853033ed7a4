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
MASK_THREADS = 2
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
        self._threads = ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="radixkv-masks")

    @property
    def num_compiled(self) -> int:
        """Grammars that are remembered."""
        return len(self._compiled)

    def transform(self, grammar: Grammar) -> Callable[[], GrammarTransform]:
        """What makes a transform of logits for each output that is to fit `grammar`. Compiles it, if that is needed.

        Raises: ApiError if it is not valid, or the tokenizer cannot be used with grammars.
        """
        matcher = self._matcher(grammar)
        vocab_size, threads = self._engine.vocab_size, self._threads
        return lambda: GrammarTransform(matcher.deep_copy(), vocab_size, threads)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False)

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
    """Forbids every token that the grammar does not allow next; a `LogitsTransform`.

    `start` lets a thread compute the mask while the model computes the logits; `apply` waits for it.
    """

    def __init__(self, matcher: Any, vocab_size: int, threads: ThreadPoolExecutor) -> None:
        self._matcher = matcher
        self._threads = threads
        self._mask = np.zeros(-(-vocab_size // 32), np.int32)
        self._computed: Future[NDArray[np.bool_]] | None = None

    def start(self, token_ids: Sequence[int]) -> None:
        """Begin to compute which tokens may follow `token_ids`."""
        self._computed = self._threads.submit(self._compute, token_ids[-1] if token_ids else None)

    def apply(self, logits: Tensor) -> None:
        """Set the logits of all other tokens to minus infinity."""
        assert self._computed is not None, "apply before start"
        forbidden = torch.from_numpy(self._computed.result()[: len(logits)]).to(logits.device)
        logits[: len(forbidden)].masked_fill_(forbidden, -torch.inf)
        logits[len(forbidden) :] = -torch.inf

    def _compute(self, token_id: int | None) -> NDArray[np.bool_]:
        """Which tokens are forbidden after `token_id`, the newest one."""
        matcher = self._matcher
        if token_id is not None and not matcher.is_stopped():
            matcher.consume_token(token_id)
        if matcher.is_error():
            raise RuntimeError("the grammar failed on the output")
        matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        forbidden: NDArray[np.bool_] = np.unpackbits(self._mask.view(np.uint8), bitorder="little") == 0
        return forbidden


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
