"""What the KV of a model is, besides its tokens: by this, stores below a pool tell whose pages they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from radixkv.errors import ConfigError
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.page_bytes import PageBytes

NOT_OF_KV = {"_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "id2label"}
"""Fields of a model's config that change no KV; all others are part of the fingerprint."""


class KVIdentity(NamedTuple):
    """The fields of a `Fingerprint` that a model and a pool tell; its weights are hashed besides."""

    dtype: str
    kv_dtype: str
    layout: str
    page_size: int
    model: str


def kv_identity(model: PreTrainedModel, pool: KVPool) -> KVIdentity:
    """What the KV of `model` in `pool` is. Raises: ConfigError for a model with adapters."""
    # adapters have numbers that are no tensors, and can be switched: nothing here would tell them apart
    if any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules()):
        raise ConfigError(
            "disk_cache, host_cache_gb and shared_cache are for models without adapters; merge these into the weights"
        )
    config = model.config.get_text_config().to_dict()
    computing = {name: value for name, value in config.items() if name not in NOT_OF_KV}
    return KVIdentity(
        dtype=str(model.dtype).removeprefix("torch."),
        kv_dtype=pool.kv_dtype,
        layout=PageBytes(pool).layout,
        page_size=pool.page_size,
        model=json.dumps(computing, sort_keys=True, default=str),
    )


def weight_tensors(model: PreTrainedModel) -> Iterator[tuple[str, str, Sequence[int], memoryview]]:
    """(name, dtype, shape, bytes) of each tensor of `model`, one at a time in memory.

    Raises: ConfigError if weights were offloaded, so that they are not there to be read.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ConfigError(
                f"disk_cache needs the model's weights in memory, to know them again; {name} is offloaded"
            )
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        yield name, str(tensor.dtype), tuple(tensor.shape), memoryview(content)
