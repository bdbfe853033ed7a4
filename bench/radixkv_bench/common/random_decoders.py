"""Decoders with random weights in 16 bit, in the sizes that bench/decode_step.py runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from radixkv_bench.common.models import RandomModel

CONFIGS: Mapping[str, type[PretrainedConfig]] = {"qwen2": Qwen2Config, "llama": LlamaConfig}


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model of a family of transformers; where embeddings are tied, the logits are computed with them."""

    family: str
    sizes: RandomModel
    tied: bool

    def __str__(self) -> str:
        return f"{self.family} {self.sizes}"


SMALL = Decoder(
    "qwen2",
    RandomModel(hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864, vocab=32000, head_dim=64),
    tied=True,
)
"""387 million weights."""

LARGE = Decoder(
    "llama",
    RandomModel(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocab=128256, head_dim=128),
    tied=False,
)
"""The shape of Llama 3.1 8B."""

DEFAULTS: Mapping[str, Decoder] = {"cpu": SMALL, "cuda": LARGE}
"""By type of device."""


def build(decoder: Decoder, context_tokens: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The model, on the device, for sequences of `context_tokens`; greedy, and no token ends an answer early."""
    fields = decoder.sizes.config_fields(context_tokens)
    config = CONFIGS[decoder.family](**fields, tie_word_embeddings=decoder.tied)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model


def bytes_a_step(model: Any) -> int:
    """Bytes of the weights that a decode step reads: all but the table of embeddings, of which it reads some rows,
    unless the logits are computed with it.
    """
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in model.parameters()}
    embeddings, logits = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embeddings.data_ptr() != logits.data_ptr():
        del weights[embeddings.data_ptr()]
    return sum(weights.values())
