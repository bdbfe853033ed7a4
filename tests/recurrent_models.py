"""Random decoders with recurrent layers, small enough to run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

from transformers import PretrainedConfig, PreTrainedModel

from radixkv_bench.models.small_configs import small_config
from tiny_models import make_model

_TYPES: Mapping[str, str] = {
    **{
        name: name
        for name in (
            "qwen3_next",
            "lfm2",
            "lfm2_moe",
            "lfm3",
            "falcon_h1",
            "nemotron_h",
            "granitemoehybrid",
            "olmo_hybrid",
            "zamba2",  # whose layers share one block of attention
            "kimi_linear",
            "bailing_hybrid",
            "bamba",
            "jamba",  # whose recurrent module starts anew with each chunk
            "zaya",
        )
    },
    "qwen3_5": "qwen3_5_text",
}
RECURRENT_FAMILIES: Mapping[str, Callable[[], PretrainedConfig]] = {
    name: partial(small_config, model_type) for name, model_type in _TYPES.items()
}
MAMBA_ALONE: Callable[[], PretrainedConfig] = partial(small_config, "mamba")
INKLING: Callable[[], PretrainedConfig] = partial(small_config, "inkling_text")
"""Refused by engines, though not by transformers' own `generate` with a cache of ours."""


@cache
def recurrent_model(family: str) -> PreTrainedModel:
    """A random model of `family`, one for all tests of a process that do nothing to it but run it in engines."""
    return make_model(RECURRENT_FAMILIES[family]())
