"""Tries a family: an engine's tokens and logits against those of the unmodified model, in float32."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.errors import RadixKVError, UnsupportedBackendError
from radixkv_bench.common.models import quiet_transformers
from radixkv_bench.models.finding import Finding, Outcome, in_a_line
from radixkv_bench.models.small_configs import sharpen, small_config

MAX_PARAMETERS = 8_000_000  # a larger model lacks a recipe
PAGE_SIZE = 4
SHARED_TOKENS = 24  # a prefix of all prompts, in whole pages and longer than the windows of small configs
PROMPT_TOKENS = (37, 29, 43, 26)
NEW_TOKENS = 5
CHUNK_TOKENS = 10
MAX_DIFFERENCE = 2e-3  # of log probabilities, relative to the largest
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
READING = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=0)
OPTIONS: Mapping[str, Mapping[str, Any]] = {  # that not every model can have
    "quantised KV": {"kv_cache_dtype": "int8", "page_size": 16},
    "`window`": {"window": 16, "sinks": 4},
}

Prompts = Sequence[Sequence[int]]


def try_quietly(model_type: str) -> Finding:
    """`try_family`, in a process that is there for nothing else: on one thread, and without transformers' warnings."""
    quiet_transformers()
    torch.set_num_threads(1)
    return try_family(model_type)


def try_family(model_type: str) -> Finding:
    """What an engine makes of a small random model of that type."""
    try:
        config = small_config(model_type)
        reference = sharpen(_build(config))
    except Exception as error:  # whatever a config or model class makes of the sizes
        return Finding(Outcome.UNTRIED, in_a_line(error))
    return examine(copy.deepcopy(reference), reference)


def examine(model: PreTrainedModel, reference: PreTrainedModel) -> Finding:
    """What an engine makes of `model`, compared with `reference`, which no engine gets to see."""
    found = partial(Finding, layers=kinds_of_layers(reference.config))
    try:
        prompts = make_prompts(reference.config.get_text_config().vocab_size)
        _log_probabilities(reference, prompts[0])
    except Exception as error:  # a model that wants more than tokens
        return found(Outcome.UNTRIED, f"the model alone fails ({in_a_line(error)})")
    try:
        engine = _engine(model)
    except RadixKVError as error:
        return found(Outcome.REFUSED, in_a_line(error))
    backend = engine.config.attention_backend
    found = partial(found, backend=backend)
    if (wrong := next(_differences(model, reference, prompts), None)) is not None:
        return found(Outcome.WRONG, wrong)
    limits = (*_cache_limits(engine, prompts), *_option_limits(model))
    return found(Outcome.LIMITED if limits else Outcome.SERVED, limits=limits)


def make_prompts(vocab_size: int) -> Prompts:
    """Prompts of different lengths with a prefix in common, the same in every run."""
    draw = random.Random(7)
    ids = [draw.randrange(3, vocab_size) for _ in range(SHARED_TOKENS + sum(PROMPT_TOKENS))]
    rest = iter(ids[SHARED_TOKENS:])
    return [ids[:SHARED_TOKENS] + list(itertools.islice(rest, size - SHARED_TOKENS)) for size in PROMPT_TOKENS]


def kinds_of_layers(config: PretrainedConfig) -> str:
    """The kinds of layers that a config names, each once, as words; empty where it names none."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []
    return ", ".join(kind.removesuffix("_attention") for kind in dict.fromkeys(kinds))


def _build(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(weights.numel() for weights in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters are too many to try; the family lacks a recipe")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _engine(model: PreTrainedModel, **settings: Any) -> Engine:
    defaults = {"page_size": PAGE_SIZE, "kv_cache_tokens": 512, "max_batch_tokens": 256}
    return Engine(model, config=EngineConfig(**{**defaults, **settings}))


def _differences(model: PreTrainedModel, reference: PreTrainedModel, prompts: Prompts) -> Iterator[str]:
    """Each way of running the prompts that brought other answers than the model alone."""
    expected = [_continuation(reference, prompt) for prompt in prompts]
    engine = _engine(model)
    for name in ("cold", "warm"):  # the later prompts find a prefix the first time, too
        yield from _other_tokens(name, [engine.generate(prompt, GREEDY)[0] for prompt in prompts], expected)
    engine.reset_cache()
    yield from _other_tokens("batched", engine.generate(prompts, GREEDY), expected)
    chunked = _engine(model, max_batch_tokens=CHUNK_TOKENS)
    yield from _other_tokens("in chunks", chunked.generate(prompts, GREEDY), expected)
    for name, reading in (("batched", engine), ("in chunks", chunked)):
        yield from _other_logits(name, reading.generate(prompts, READING), reference, prompts)
    for each in (engine, chunked):
        each.check_invariants()


def _other_tokens(name: str, outputs: Sequence[Any], expected: Prompts) -> Iterator[str]:
    for number, (output, tokens) in enumerate(zip(outputs, expected, strict=True)):
        if output.error is not None:
            yield f"{name}, prompt {number}: {in_a_line(output.error)}"
        elif output.token_ids != tokens:
            yield f"{name}, prompt {number}: tokens {output.token_ids}, not {tokens}"


def _other_logits(name: str, outputs: Sequence[Any], reference: PreTrainedModel, prompts: Prompts) -> Iterator[str]:
    for number, (output, prompt) in enumerate(zip(outputs, prompts, strict=True)):
        if output.error is not None:
            yield f"{name}, prompt {number}: {in_a_line(output.error)}"
            continue
        exact = _log_probabilities(reference, prompt)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        found = torch.tensor([place.logprob for place in output.prompt_logprobs[1:]])
        difference = float((found - exact).abs().max() / exact.abs().max())
        if not difference <= MAX_DIFFERENCE:
            yield f"{name}, prompt {number}: log probabilities differ by {difference:.1e} of the largest"


@torch.inference_mode()
def _log_probabilities(reference: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """After each token of `ids`, [tokens, vocab_size]."""
    logits = reference(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    if not bool(logits.isfinite().all()):
        raise ValueError("its logits are not finite")
    log_probabilities: torch.Tensor = logits.float().log_softmax(-1)
    return log_probabilities


def _continuation(reference: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """The likeliest tokens after a prompt, each computed anew from the whole."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(_log_probabilities(reference, ids)[-1].argmax()))
    return ids[len(prompt) :]


def _cache_limits(engine: Engine, prompts: Prompts) -> Iterator[str]:
    engine.reset_cache()
    engine.generate(prompts[0], GREEDY)
    cached, later = (engine.generate(prompt, GREEDY)[0].cached_tokens for prompt in prompts[1:3])
    if cached < SHARED_TOKENS <= later:
        yield "finds what two prompts share when a third one asks for it"
    elif cached < SHARED_TOKENS:
        yield f"finds {cached} of the {SHARED_TOKENS} tokens that a prompt shares with one before it"


def _option_limits(model: PreTrainedModel) -> Iterator[str]:
    for name, settings in OPTIONS.items():
        try:
            _engine(model, **settings).generate([5, 6, 7], GREEDY)
        except RadixKVError as error:
            yield f"no {name}: {_the_reason(error)}"


def _the_reason(error: RadixKVError) -> str:
    """What an error says, without the name of the model, the reasons of single backends, and the advice."""
    words = in_a_line(error)
    before, _, after = words.partition(": ")
    return before if isinstance(error, UnsupportedBackendError) else (after or words).partition("; ")[0]
