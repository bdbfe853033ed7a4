"""Plain decoders run steps of few tokens as one program, and their own modules where anything differs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from prompts import random_prompts
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.attention.backend import AttentionParams
from radixkv.attention.numba_backend import NumbaPlan
from radixkv.engine import runner
from radixkv.errors import UnsupportedModelError
from radixkv.models.fused_decoder import fuse
from radixkv.models.paged_attention import flattened_forward
from radixkv.models.plain_decoder import FAMILIES, find_plain_decoder
from radixkv.models.probe import difference_on_probe, plug_in_paged_attention
from tiny_models import make_model, tiny_model, with_common

GREEDY = SamplingParams(max_tokens=5, ignore_eos=True)
PROMPTS = random_prompts(1, [37, 41, 33, 50], shared=32)
OTHERS = ["gemma2", "gemma3", "phi3", "mixtral", "gpt_oss", "llama4"]

CONFIGS: dict[str, Callable[..., hf.PretrainedConfig]] = {
    "llama": hf.LlamaConfig,
    "qwen2": hf.Qwen2Config,
    "qwen3": hf.Qwen3Config,
    "mistral": hf.MistralConfig,
}


def wide_model(family: str, dtype: torch.dtype, **fields: Any) -> PreTrainedModel:
    """A decoder whose sizes fit the kernels in 16 bit, too; everything random, biases and norms as well."""
    sizes = with_common(hidden_size=64, intermediate_size=96, head_dim=24, num_attention_heads=4, **fields)
    model = make_model(CONFIGS[family](**sizes))
    for value in model.parameters():
        if value.dim() == 1:
            value.data += 0.2 * torch.randn(value.shape)
    return model.to(dtype)


@pytest.fixture
def by_modules(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens of the steps that ran the model's own modules."""
    seen: list[int] = []
    own = flattened_forward

    def noted(model: PreTrainedModel, input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(len(input_ids))
        return own(model, input_ids, *args)

    monkeypatch.setattr(runner, "flattened_forward", noted)
    return seen


def tokens_of(engine: Engine) -> list[list[int]]:
    return [list(output.token_ids) for output in engine.generate(PROMPTS, GREEDY)]


def expected_of(model: PreTrainedModel, **fields: Any) -> list[list[int]]:
    config = EngineConfig(kv_cache_tokens=512, fused_layers=False, **fields)
    return tokens_of(Engine(copy.deepcopy(model), config=config))


def engine_of(model: PreTrainedModel, **fields: Any) -> Engine:
    return Engine(model, config=EngineConfig(kv_cache_tokens=512, **fields))


# -- the same ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.stress)]
)
def test_the_same_logits_as_its_modules(family: str, dtype: torch.dtype) -> None:
    model = wide_model(family, dtype)
    layers = plug_in_paged_attention(model)
    fused = fuse(model, layers)
    assert fused is not None
    assert difference_on_probe(model, fused.run) <= {torch.float32: 1e-6}.get(dtype, 2e-2)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        pytest.param(family, fields, marks=[] if number in (0, place + 1) else [pytest.mark.stress])
        for place, family in enumerate(FAMILIES)
        for number, fields in enumerate([{"page_size": 16}, {"page_size": 4}, {"attention_backend": "torch"}])
    ],
)
def test_steps_of_few_tokens_run_no_module(family: str, fields: dict[str, Any], by_modules: list[int]) -> None:
    model = tiny_model(family)
    expected = expected_of(model, **fields)
    by_modules.clear()
    engine = engine_of(model, **fields)
    assert tokens_of(engine) == expected
    assert all(count > 64 for count in by_modules)
    engine.reset_cache()
    assert tokens_of(engine) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_part_of_the_program(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_model("qwen2", dtype)
    expected = expected_of(model, dtype=str(dtype).removeprefix("torch."), page_size=16)
    engine = engine_of(model, dtype=str(dtype).removeprefix("torch."), page_size=16)
    seen: list[int] = []
    own = NumbaPlan.attend

    def noted(plan: NumbaPlan, layer: int, q: torch.Tensor, params: AttentionParams) -> torch.Tensor:
        seen.append(len(q))
        return own(plan, layer, q, params)

    monkeypatch.setattr(NumbaPlan, "attend", noted)
    assert tokens_of(engine) == expected
    assert all(count > len(PROMPTS) for count in seen), "prompts may be computed module by module"


@pytest.mark.parametrize(
    "fields", [{"window": 40, "sinks": 4}, {"kv_cache_dtype": "int8", "attention_backend": "torch"}]
)
def test_streaming_and_codes(fields: dict[str, Any], by_modules: list[int]) -> None:
    model = tiny_model("llama")
    expected = expected_of(model, **fields)
    by_modules.clear()
    assert tokens_of(engine_of(model, **fields)) == expected
    assert all(count > 64 for count in by_modules)


@pytest.mark.parametrize("batch", [1, 2, pytest.param(7, marks=pytest.mark.stress), 16])
def test_batches_of_every_size(batch: int) -> None:
    model = wide_model("qwen3", torch.float32)
    prompts = random_prompts(7, [5 + 9 * i for i in range(batch)], shared=0)
    expected = Engine(copy.deepcopy(model), config=EngineConfig(kv_cache_tokens=4096, fused_layers=False))
    found = Engine(model, config=EngineConfig(kv_cache_tokens=4096))
    assert [out.token_ids for out in found.generate(prompts, GREEDY)] == [
        out.token_ids for out in expected.generate(prompts, GREEDY)
    ]


def test_the_model_stays_as_it_was() -> None:
    model = tiny_model("llama")
    plain = engine_of(copy.deepcopy(model), fused_layers=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = engine_of(model)
    tokens_of(engine)
    engine.close()
    tokens_of(plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([PROMPTS[0]])
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5)
    assert generated.shape == (1, len(PROMPTS[0]) + 5)


# -- what is not plain ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_not_taken_for_plain(family: str) -> None:
    model = tiny_model(family)
    plug_in_paged_attention(model)
    assert find_plain_decoder(model) is None


def test_it_can_be_turned_off(by_modules: list[int]) -> None:
    engine = engine_of(tiny_model("llama"), fused_layers=False)
    engine.generate(PROMPTS[0], GREEDY)
    assert by_modules == [37, 1, 1, 1, 1]
    assert engine.config.fused_layers is False


class _Doubled(modeling_llama.LlamaMLP):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        doubled: torch.Tensor = 2 * super().forward(x)
        return doubled


class _Adapted(nn.Module):
    """A linear layer with something beside it, as adapters have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.beside = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base(x) + self.beside(x)
        return found


def hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: 3 * output)


def hook_before(model: PreTrainedModel) -> None:
    model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def own_forward(model: PreTrainedModel) -> None:
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **keywords: 1.5 * forward(*args, **keywords)


def subclass(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.__class__ = _Doubled


def adapter(model: PreTrainedModel) -> None:
    torch.manual_seed(3)
    attention = model.model.layers[0].self_attn
    attention.q_proj = _Adapted(attention.q_proj)


def other_activation(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


def moved_weights(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = 2 * weight.data


CHANGES = [hook, hook_before, own_forward, subclass, adapter, other_activation]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_runs_its_own_modules(change: Callable[[PreTrainedModel], None], by_modules: list[int]) -> None:
    model = tiny_model("llama")
    unchanged = expected_of(model)
    change(model)
    by_modules.clear()
    found = tokens_of(engine_of(model))
    assert 4 in by_modules, "decodes of four requests"
    assert found != unchanged


@pytest.mark.parametrize("change", [*CHANGES, moved_weights])
def test_changes_made_while_an_engine_runs_are_followed(
    change: Callable[[PreTrainedModel], None], by_modules: list[int]
) -> None:
    model = tiny_model("llama")
    engine = engine_of(model)
    tokens_of(engine)
    assert 4 not in by_modules
    change(model)
    engine.reset_cache()
    found = tokens_of(engine)
    assert 4 in by_modules
    slow = engine_of(model, fused_layers=False)
    assert found == tokens_of(slow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_biases_changed_in_place_are_followed(dtype: torch.dtype) -> None:
    model = wide_model("qwen2", dtype)
    fused = fuse(model, plug_in_paged_attention(model))
    assert fused is not None
    difference_on_probe(model, fused.run)
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn(value.shape).to(dtype)
    assert difference_on_probe(model, fused.run) <= {torch.float32: 1e-5}.get(dtype, 5e-2)


def test_a_class_patched_as_a_whole_runs_as_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    engine = engine_of(model)
    own = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda module, x: 2 * own(module, x))
    found = tokens_of(engine)
    assert found == tokens_of(engine_of(model, fused_layers=False))
    assert find_plain_decoder(model) is None


def test_attention_that_was_switched_is_noticed() -> None:
    model = tiny_model("llama")
    engine = engine_of(model)
    engine.generate(PROMPTS[0], GREEDY)
    model.set_attn_implementation("eager")
    output = engine.generate(PROMPTS[1], GREEDY)[0]
    assert isinstance(output.error, UnsupportedModelError)


def test_hooks_for_all_modules_are_seen(by_modules: list[int]) -> None:
    engine = engine_of(tiny_model("llama"))
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        engine.generate(PROMPTS[0], GREEDY)
    finally:
        handle.remove()
    assert by_modules[-1] == 1
    assert seen
