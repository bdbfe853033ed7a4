"""Looking up the fields of a Hugging Face config under the names that different models give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from radixkv.config.checks import checked_int
from radixkv.errors import UnsupportedModelError

Fields = Mapping[str, Any]

# Names of one thing, the usual one first; GPT-2, Falcon, MPT, DBRX, ChatGLM, OpenELM,
# Zamba, Step and Mistral's params.json have their own.
NAMES: Mapping[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers"),
    "num_attention_heads": (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "num_query_heads",
        "attention_heads",
    ),
    "num_key_value_heads": (
        "num_key_value_heads",
        "num_key_value_heads_per_layer",
        "num_kv_heads",
        "n_kv_heads",
        "n_head_kv",
        "kv_n_heads",
        "num_attention_groups",
    ),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels", "dim_head"),
    "hidden_size": ("hidden_size", "n_embd", "n_embed", "d_model", "model_dim", "dim"),
}
_NESTED = ("text_config", "thinker_config", "llm_config", "language_config")

# Families whose classes set head_dim on their own, so that hidden_size / heads may be another number.
_OWN_HEAD_DIM = frozenset(
    [
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "vaultgemma",
        "qwen3",
        "qwen3_vl_text",
        "qwen3_5_text",
        "glm",
        "glm4",
        "gpt_oss",
        "llama4_text",
        "ministral3",
        "seed_oss",
        "helium",
        "internlm3",
        "nemotron_h",
    ]
)
_ATTENTION_FREE = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"})


def decoder_fields(fields: Fields) -> Fields:
    """The part of a config that describes the text decoder."""
    while inner := next((fields[name] for name in _NESTED if _is_section(fields.get(name))), None):
        fields = inner
    return fields


def _is_section(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value)


def look_up(fields: Fields, name: str) -> Any:
    """The first value that is not None among the names of one thing."""
    return next((fields[n] for n in NAMES.get(name, (name,)) if fields.get(n) is not None), None)


def integer(fields: Fields, name: str, minimum: int = 1) -> int | None:
    """The integer under any name of one thing, or None. Raises: UnsupportedModelError if it is something else."""
    value = look_up(fields, name)
    if value is None:
        return None
    return checked_int(f"{name} of {model_name(fields)}", value, minimum, error=UnsupportedModelError)


def model_name(fields: Fields) -> str:
    """How messages call the model."""
    return f"model_type {fields['model_type']!r}" if fields.get("model_type") else "this config"


@contextmanager
def reading(fields: Fields) -> Iterator[None]:
    """Read foreign data: what is a number where a list belongs, and the like, is an UnsupportedModelError."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise UnsupportedModelError(f"the config of {model_name(fields)} is malformed: {error}") from error


def missing_error(fields: Fields, names: Sequence[str]) -> UnsupportedModelError:
    """The error that says which fields are missing, under which names they are looked for, and the way out."""
    wanted = " and ".join(f"{name} (or {', '.join(NAMES[name][1:])})" if name in NAMES else name for name in names)
    return UnsupportedModelError(
        f"the KV size of {model_name(fields)} cannot be read: missing {wanted}; add it, or load the config with "
        "transformers.AutoConfig, which knows the defaults of the model's class"
    )


def refuse_left_out(fields: Fields) -> None:
    """Refuse a saved nested config whose KV heads may be its class's default rather than its query heads."""
    if "model_type" not in fields or "num_attention_heads" not in fields or "kv_lora_rank" in fields:
        return
    if not any(name in fields for name in (*NAMES["num_key_value_heads"], "multi_query")):
        raise missing_error(fields, ["num_key_value_heads"])


def refuse_uncounted(fields: Fields) -> None:
    """Refuse models that keep something else than keys and values, or more than that."""
    if fields.get("is_encoder_decoder"):
        raise UnsupportedModelError(f"{model_name(fields)} is an encoder-decoder; only decoders are sized")
    if str(fields.get("model_type")) in _ATTENTION_FREE:
        raise UnsupportedModelError(f"{model_name(fields)} has no attention: it keeps one state per sequence and no KV")
    if fields.get("index_head_dim") is not None and not _has_known_indexer(fields):
        raise UnsupportedModelError(
            f"{model_name(fields)} has sparse attention whose indexer (index_head_dim) keeps keys of its own, "
            "in a way that is not known here"
        )


_INDEXER_FIELDS = frozenset(
    ["index_head_dim", "index_n_heads", "index_topk", "index_topk_freq", "index_topk_pattern", "index_skip_topk_offset"]
)


def _has_known_indexer(fields: Fields) -> bool:
    """Whether each layer keeps a latent and one key for its indexer, as DeepSeek-V3.2 and GLM-5 do."""
    own = {name for name in fields if name.startswith("index_") and fields[name] is not None}
    compressed = any("compress" in name for name in fields)
    some_without = bool(set(fields.get("layer_types") or ()) - {"indexed_attention"})
    return fields.get("kv_lora_rank") is not None and own <= _INDEXER_FIELDS and not compressed and not some_without


def sets_own_head_dim(fields: Fields) -> bool:
    """Whether the model's class has a head_dim of its own, so that none may be derived."""
    return str(fields.get("model_type")) in _OWN_HEAD_DIM
