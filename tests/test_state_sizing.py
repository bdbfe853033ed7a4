"""States of recurrent layers by their config alone, against those that the model itself keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers as hf

from prompts import random_ids
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.cli.size_report import STATES_OF_A_STEP, SizeReport
from radixkv.engine.core import EngineCore
from radixkv.engine.outputs import Progress
from radixkv.errors import UnsupportedModelError
from radixkv.memory import kv_pool
from radixkv.memory.sizing import layers_from_config
from radixkv.memory.state_pool import bytes_per_state
from radixkv.memory.state_sizing import states_from_config
from radixkv.models.recurrent.finding import find_recurrent_modules
from recurrent_models import RECURRENT_FAMILIES, recurrent_model
from tiny_models import make_model, with_common

LINEAR = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
# Sizes that a family can tell apart: groups that are not 1, values wider than keys, a kernel of its own, …
OTHERS: Mapping[str, Callable[[], hf.PretrainedConfig]] = {
    "qwen3_5_moe": lambda: hf.Qwen3_5MoeTextConfig(
        **with_common(
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            **LINEAR,
        )
    ),
    "falcon_h1": lambda: hf.FalconH1Config(
        **with_common(
            mamba_d_ssm=96, mamba_n_heads=6, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=2, mamba_d_conv=3
        )
    ),
    "zaya": lambda: hf.ZayaConfig(**with_common(num_key_value_heads=4, head_dim=64, cca_time0=3, cca_time1=2)),
    "zamba": lambda: hf.ZambaConfig(
        **with_common(
            num_hidden_layers=4,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            n_mamba_heads=2,
            mamba_d_state=8,
            mamba_expand=3,
            mamba_d_conv=3,
            attention_head_dim=16,
        )
    ),
    "kimi_linear, as published": lambda: hf.KimiLinearConfig.from_dict(
        {
            **RECURRENT_FAMILIES["kimi_linear"]().to_dict(),
            "layer_types": None,
            "linear_attn_config": {
                "head_dim": 16,
                "num_heads": 2,
                "short_conv_kernel_size": 3,
                "full_attn_layers": [2],
                "kda_layers": [1, 3],
            },
        }
    ),
}
FAMILIES = {**RECURRENT_FAMILIES, **{f"{name}, other sizes": make for name, make in OTHERS.items()}}


def kept_by(model: hf.PreTrainedModel) -> list[Any]:
    """What each recurrent module of the model keeps: its shapes and dtypes."""
    with torch.no_grad():
        modules = find_recurrent_modules(model, torch.arange(2, 9))
    return [module.shapes for module in modules]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_that_the_model_keeps(family: str) -> None:
    config = FAMILIES[family]()
    model = make_model(config)
    for dtype in ("float32", "bfloat16"):
        kept = kept_by(model.to(getattr(torch, dtype)))
        for read in (states_from_config(config), states_from_config(config.to_dict())):
            assert len(read) == len(kept)
            for layer, shapes in zip(read, kept, strict=True):
                assert [layer.conv] == [shape.shape for shape in shapes if shape.kind == "conv"]
                recurrent = [shape.shape for shape in shapes if shape.kind == "recurrent"]
                assert ([layer.recurrent] if layer.recurrent else []) == recurrent
                assert layer.num_bytes(dtype) == bytes_per_state(shapes)


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_by_hand(nested: bool) -> None:
    qwen3_next_80b = {
        "model_type": "qwen3_next",
        "num_hidden_layers": 48,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_value_head_dim": 128,
        "linear_num_value_heads": 32,
    }
    states = states_from_config({"text_config": qwen3_next_80b} if nested else qwen3_next_80b)
    conv = (16 * 128 + 16 * 128 + 32 * 128) * 4 * 2  # queries, keys and values, in bfloat16
    recurrent = 32 * 128 * 128 * 4  # float32
    assert [state.num_bytes("bfloat16") for state in states] == [conv + recurrent] * 36


@pytest.mark.parametrize(("memory_bytes", "running"), [(3 * 2**20, 8), (3 * 2**20, 256), (2**18, 256)])
def test_the_split_is_the_engines(monkeypatch: pytest.MonkeyPatch, memory_bytes: int, running: int) -> None:
    """As many states by running requests, by the share of the memory, and the fewest."""
    model = recurrent_model("qwen3_next")
    monkeypatch.setattr(kv_pool, "available_bytes", lambda device: memory_bytes)
    config = EngineConfig(mem_fraction=0.5, page_size=1, max_running_requests=running, attention_backend="torch")
    with Engine(model, None, config) as engine:
        stats = engine.stats()
    report = SizeReport(
        model="qwen3_next",
        model_type="qwen3_next",
        layers=layers_from_config(model.config),
        states=states_from_config(model.config),
        uncounted_states=None,
        dtype="float32",
        model_dtype="float32",
        running_limit=config.running_limit,
        seq_len=None,
        batch=None,
        memory_bytes=memory_bytes,
        weights_bytes=0,
        reserve=0.5,
        unplaced_window=None,
    )
    assert (report.max_states, report.max_tokens) == (stats.cache.states, stats.cache.num_pages)
    assert (report.max_states_bytes, report.bytes_per_token) == (stats.state_pool_bytes, stats.kv_bytes_per_token)


@pytest.mark.parametrize("num_states", [9, 12])
def test_so_many_requests_run_at_once_as_have_two_states(monkeypatch: pytest.MonkeyPatch, num_states: int) -> None:
    config = EngineConfig(kv_cache_tokens=4096, page_size=4, state_slots=num_states, attention_backend="torch")
    running, step = [], EngineCore.step

    def watched(core: EngineCore) -> list[Progress]:
        progress = step(core)
        running.append(core.stats().running)
        return progress

    monkeypatch.setattr(EngineCore, "step", watched)
    with Engine(recurrent_model("qwen3_next"), None, config) as engine:
        prompts = [random_ids(seed, 10) for seed in range(10)]
        engine.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True))
    assert max(running) == num_states // STATES_OF_A_STEP


def test_a_model_without_recurrent_layers_keeps_no_states() -> None:
    assert states_from_config(hf.LlamaConfig(**with_common())) == ()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "minimax_m1", "attn_type_list": [0, 1]},
            "states of the 1 recurrent layers of model_type 'minimax_m1' are not known here; known are those of qwen3_",
        ),
        ({"layer_types": ["mamba"]}, "of this config are not known here"),
        (
            {"model_type": "lfm2", "layer_types": ["conv"], "hidden_size": 8},
            "model_type 'lfm2' cannot be read: missing",
        ),
        ({"model_type": "kimi_linear", "layer_types": ["linear_attention"], "linear_attn_config": 3}, "is malformed"),
    ],
)
def test_states_that_cannot_be_read_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        states_from_config(config)
