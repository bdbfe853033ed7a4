"""The parts of bench/gpu_check.py that no other command covers: the engine on a GPU, and shared prompts there.

python bench/gpu_parts.py engine|shared-prompt FILE.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig

from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.attention.backend import AttentionNeeds, backend_names, why_not
from radixkv.models.probe import plug_in_paged_attention
from radixkv_bench.common import models, random_decoders
from radixkv_bench.common.files import write_json
from radixkv_bench.common.random_decoders import Decoder
from radixkv_bench.common.runners import RadixKVRunner
from radixkv_bench.shared_prompt import workloads
from radixkv_bench.shared_prompt.hf_runners import GenerateBatchRunner
from radixkv_bench.shared_prompt.measure import Round, interleave, speedup, warm_up
from radixkv_bench.shared_prompt.workloads import Workload

PROMPTS, SHARED_TOKENS, OWN_TOKENS, OUTPUT_TOKENS = 6, 40, 17, 16
WORKLOAD = {"requests": 32, "prefix_tokens": 2048, "suffix_tokens": 128, "output_tokens": 64}
ROUNDS = 2


# -- the engine ------------------------------------------------------------------------------------------------------


def check_engine(device: torch.device) -> list[dict[str, Any]]:
    """Greedy tokens of the model that ships with radixkv, on the device, by each backend that can serve it there:
    whether a cold run, a warm one, a batch, and one that checks drafts give what the unmodified model gives alone.
    """
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(models.location("demo"), dtype=dtype).to(device).eval()
        prompts = _prompts(model.config.get_text_config().vocab_size)
        expected = [_alone(models.twin(model), prompt) for prompt in prompts]
        needs = AttentionNeeds(plug_in_paged_attention(models.twin(model)), 16, dtype, device)
        for name in backend_names():
            reason = why_not(name, needs)
            row: dict[str, Any] = {"backend": name, "dtype": str(dtype).removeprefix("torch.")}
            if reason is not None:
                row["left_out"] = reason
            else:
                row |= _compare(Engine(models.twin(model), None, _config(name)), prompts, expected)
                drafting = Engine(models.twin(model), None, replace(_config(name), speculate="cache"))
                row |= _compare_drafted(drafting, prompts, expected)
            found.append(row)
    return found


def _config(backend: str) -> EngineConfig:
    return EngineConfig(attention_backend=backend, kv_cache_tokens=4096)


def _prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(3, vocab, (SHARED_TOKENS,), generator=generator).tolist()
    own = torch.randint(3, vocab, (PROMPTS, OWN_TOKENS), generator=generator).tolist()
    return [shared + tokens for tokens in own]


def _alone(model: Any, prompt: list[int]) -> list[int]:
    """What the unmodified model says."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=OUTPUT_TOKENS)
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def _compare(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> dict[str, float]:
    """Shares of the answers that are as expected."""
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    runs = {
        "cold": [engine.generate(prompt, params)[0].token_ids for prompt in prompts],
        "warm": [engine.generate(prompt, params)[0].token_ids for prompt in prompts],
    }
    engine.reset_cache()
    runs["batched"] = [output.token_ids for output in engine.generate(list(prompts), params)]
    return {name: _share_equal(answers, expected) for name, answers in runs.items()}


def _compare_drafted(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> dict[str, float]:
    """The share as expected of answers that are asked for again, so that they are drafted from the cache."""
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    engine.generate(list(prompts), params)
    outputs = [engine.generate(prompt, params)[0] for prompt in prompts]
    return {
        "drafted": _share_equal([output.token_ids for output in outputs], expected),
        "drafted_tokens": sum(output.drafted_tokens for output in outputs),
    }


def _share_equal(answers: list[list[int]], expected: list[list[int]]) -> float:
    return sum(one == other for one, other in zip(answers, expected, strict=True)) / len(expected)


def engine_is_right(rows: list[dict[str, Any]]) -> bool:
    """Whether all float32 answers were as expected; in 16 bit, rounding may decide between close tokens."""
    return all(
        row.get(run, 1.0) == 1.0
        for row in rows
        if row["dtype"] == "float32"
        for run in ("cold", "warm", "batched", "drafted")
    )


# -- shared prompts --------------------------------------------------------------------------------------------------


class DefaultGenerateBatchRunner(GenerateBatchRunner):
    """With the settings that transformers itself chooses for a GPU, and with blocks shared."""

    def _config(self) -> Any:
        return ContinuousBatchingConfig(allow_block_sharing=True)


class StartedGenerateBatchRunner(DefaultGenerateBatchRunner):
    """The same, once it has served as many prompts of the same shape and other tokens, which is not timed: its pool and
    its graphs are there.
    """

    def __init__(self, name: str, model: Any, workload: Workload) -> None:
        super().__init__(name, model, workload.longest_tokens)
        prompts = [workload.prompt(number, {}) for number in workload.waves[0]]
        self._others = [[token + 1 for token in prompt] for prompt in prompts]
        self._output_tokens = workload.output_tokens

    def reset(self) -> None:
        super().reset()
        self.serve(self._others, self._output_tokens)


def shared_prompt(
    device: torch.device,
    decoder: Decoder = random_decoders.LARGE,
    sizes: Mapping[str, int] = WORKLOAD,
    on_round: Callable[[dict[str, Any]], object] = lambda _: None,
) -> dict[str, Any]:
    """Few-shot prompts on a random model in bfloat16: radixkv and generate_batch in turns, both as they start and
    when they have started; `on_round` hears what is known after each round.
    """
    workload = workloads.build("few-shot", workloads.sizes("few-shot", dict(sizes)), models.load_encode("demo"))
    model = random_decoders.build(decoder, workload.longest_tokens, torch.bfloat16, device)
    config = EngineConfig(
        dtype="bfloat16", device=str(device), kv_cache_tokens=workload.unshared_tokens + 16 * len(workload.requests)
    )
    ours = RadixKVRunner("radixkv", model, config)
    baselines = (
        DefaultGenerateBatchRunner("hf-generate-batch", model, workload.longest_tokens),
        StartedGenerateBatchRunner("hf-generate-batch started", model, workload),
    )
    warm_up(workload, (ours, baselines[0]))
    played: dict[str, list[Round]] = {}
    figures: dict[str, Any] = {"workload": dict(sizes), "model": str(decoder)}
    for _ in range(ROUNDS):
        for name, rounds in interleave(
            workload, (ours, *baselines), 1, on_play=lambda *_: None, on_wave=lambda: None
        ).items():
            played.setdefault(name, []).extend(rounds)
        figures |= {
            "speedup": min(speedup(played[ours.name], played[other.name]) for other in baselines),
            "total_s_by_round": {name: [done.total_s for done in rounds] for name, rounds in played.items()},
        }
        on_round(figures)
    return figures


def main() -> int:
    """Run the part that the command line names and write its figures; 1 if the engine was wrong."""
    models.quiet_transformers()
    part, file = sys.argv[1:]
    device = torch.device("cuda")

    write = partial(write_json, path=Path(file))
    if part == "shared-prompt":
        figures = shared_prompt(device, on_round=write)
        print(f"{figures['speedup']:.2f} times as fast: {figures['total_s_by_round']}")
        return 0
    rows = check_engine(device)
    write(rows)
    print(*rows, sep="\n")
    return 0 if engine_is_right(rows) else 1
