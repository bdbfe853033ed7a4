"""Which layers of a model see only the last tokens, and how many, read off its Hugging Face config."""

from __future__ import annotations

from radixkv.memory.config_fields import Fields

_WINDOW_NAMES = ("sliding_window", "sliding_window_size")

# Where configs do not say it layer by layer: every n-th layer sees all tokens, or none does.
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}
_ALL_LAYERS_SLIDE = frozenset({"mistral", "mixtral", "phi3", "phimoe", "starcoder2"})


def window_of_layer(fields: Fields, index: int, layer_type: str) -> int | None:
    """How many tokens the layer sees, itself included; None if all, or if the config does not tell.

    With chunked attention it sees its chunk up to itself: `attention_chunk_size` tokens at most.
    """
    if layer_type == "chunked_attention":
        return _positive(fields, "attention_chunk_size")
    if _is_local(fields, index):
        return _positive(fields, "window_size")
    if "sliding" in layer_type or (layer_type == "attention" and _slides_by_rule(fields, index)):
        return _window(fields)
    return None


def unplaced_window(fields: Fields) -> int | None:
    """The window of a config that does not tell which layers have it; None if there is none, or it tells."""
    has_types = any(fields.get(name) for name in ("layer_types", "hybrid_layer_pattern", "layers_block_type"))
    return None if has_types or _slides_by_rule(fields, index=0) is not None else _window(fields)


def _slides_by_rule(fields: Fields, index: int) -> bool | None:
    """Whether the layer slides, by what is said of all layers; None if nothing is."""
    first_sliding = fields.get("max_window_layers")  # Qwen, whose window is off unless it is switched on
    is_on = fields.get("use_sliding_window", None if first_sliding is None else False)
    if _window(fields) is None or is_on is False:
        return False
    if isinstance(first_sliding, int):
        return index >= first_sliding
    model_type = str(fields.get("model_type"))
    full_every = fields.get("sliding_window_pattern", _FULL_EVERY.get(model_type))
    if isinstance(full_every, int) and full_every > 0:
        return (index + 1) % full_every != 0
    return True if model_type in _ALL_LAYERS_SLIDE else None


def _is_local(fields: Fields, index: int) -> bool:
    """Whether GPT-Neo's config names the layer among the local ones."""
    kinds = fields.get("attention_layers")
    return isinstance(kinds, (list, tuple)) and index < len(kinds) and kinds[index] == "local"


def _window(fields: Fields) -> int | None:
    return next((window for name in _WINDOW_NAMES if (window := _positive(fields, name)) is not None), None)


def _positive(fields: Fields, name: str) -> int | None:
    value = fields.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
