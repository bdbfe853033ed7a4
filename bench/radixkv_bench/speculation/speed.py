"""How fast models decode with drafts, against the same engine without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import radixkv
from radixkv_bench.common import models
from radixkv_bench.common.models import RandomModel

Prompts = list[list[int]]

ALPHABET = 200  # ids of random prompts begin here: lower ones are special in some models


class Case(NamedTuple):
    """A model, a batch size, and whether its answers repeat what is cached."""

    model: str
    batch: int
    repeats: bool


class Row(NamedTuple):
    """What a case gave: medians over rounds of decode steps' time without drafts over that with them."""

    case: Case
    ratio: float
    ratios: list[float]
    off_tokens_s: float
    on_tokens_s: float
    tokens_per_step: float
    drafted_tokens: int
    accepted_tokens: int
    same_tokens: bool

    def as_dict(self) -> dict[str, Any]:
        return {**self.case._asdict(), **{name: value for name, value in self._asdict().items() if name != "case"}}


def load(name: str | RandomModel, context_tokens: int) -> Any:
    """A model, in the dtype that it comes in."""
    return models.load(name) if isinstance(name, str) else models.build_random(name, context_tokens)


def measure(
    name: str,
    model: Any,
    batches: Sequence[int],
    *,
    prompt_tokens: int,
    output_tokens: int,
    rounds: int,
    done: Callable[[], object],
) -> list[Row]:
    """Run all cases of a model, with and without drafts in turn.

    Answers that repeat: the prompts are asked a second time, so the answers stand in the cache, as when an agent asks
    again what it asked before. The best that drafts can do. Answers that do not: random prompts, each asked once, and
    answers that are drawn at temperature 1, with the same seeds in both engines.
    """
    config = radixkv.EngineConfig(kv_cache_tokens=4 * max(batches) * (prompt_tokens + output_tokens + 32))
    engines = {
        speculate: radixkv.Engine(models.twin(model), None, replace_speculate(config, speculate))
        for speculate in ("off", "cache")
    }
    rows = []
    for batch in batches:
        for repeats in (True, False):
            case = Case(name, batch, repeats)
            rows.append(_run(case, engines, model, prompt_tokens, output_tokens, rounds))
            done()
    for engine in engines.values():
        engine.close()
    return rows


def replace_speculate(config: radixkv.EngineConfig, speculate: str) -> radixkv.EngineConfig:
    """`config` with another setting of `speculate`."""
    return radixkv.EngineConfig(kv_cache_tokens=config.kv_cache_tokens, speculate=speculate)  # type: ignore[arg-type]


def _run(
    case: Case, engines: dict[str, radixkv.Engine], model: Any, prompt_tokens: int, output_tokens: int, rounds: int
) -> Row:
    rng = np.random.default_rng(case.batch)
    vocab = model.config.vocab_size
    ratios: list[float] = []
    speeds: dict[str, list[float]] = {"off": [], "cache": []}
    same = True
    counts = Counter[str]()  # of the calls that are timed
    for turn in range(rounds):
        prompts = rng.integers(ALPHABET, vocab, (case.batch, prompt_tokens)).tolist()
        params = _params(case, output_tokens, turn)
        seconds, answers = {}, {}
        for speculate in ("off", "cache") if turn % 2 else ("cache", "off"):
            engine = engines[speculate]
            engine.reset_cache()
            if case.repeats:
                engine.generate(prompts, list(params))
            before = _counts(engine)
            outputs = engine.generate(prompts, params)
            if speculate == "cache":
                counts += _counts(engine) - before
            answers[speculate] = [output.token_ids for output in outputs]
            seconds[speculate] = max(o.metrics.total_s for o in outputs) - max(o.metrics.ttft_s for o in outputs)
            speeds[speculate].append(case.batch * (output_tokens - 1) / seconds[speculate])
        same = same and answers["off"] == answers["cache"]
        ratios.append(seconds["off"] / seconds["cache"])
    return Row(
        case,
        median(ratios),
        ratios,
        median(speeds["off"]),
        median(speeds["cache"]),
        counts["generated"] / counts["steps"],
        counts["drafted"],
        counts["accepted"],
        same,
    )


def _counts(engine: radixkv.Engine) -> Counter[str]:
    stats = engine.stats()
    counts = Counter(generated=stats.generated_tokens, steps=stats.sampled_steps)
    if stats.speculation is not None:
        counts.update(drafted=stats.speculation.drafted_tokens, accepted=stats.speculation.accepted_tokens)
    return counts


def _params(case: Case, output_tokens: int, turn: int) -> list[radixkv.SamplingParams]:
    asked: dict[str, Any] = {"max_tokens": output_tokens, "ignore_eos": True}
    if case.repeats:
        return [radixkv.SamplingParams(**asked)] * case.batch
    return [radixkv.SamplingParams(**asked, temperature=1.0, seed=turn * 1000 + row) for row in range(case.batch)]
