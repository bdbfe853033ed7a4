"""Rotary embeddings whose angles change with the length of the context (dynamic NTK, LongRoPE), by a model's config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def length_dependent_types(text_config: Any) -> list[str]:
    """The types among them that a config of transformers has, for all layers or for some."""
    return [section["rope_type"] for section in _length_dependent(text_config)]


def length_dependent_limit(text_config: Any) -> int | None:
    """How long a context may get before all its keys would turn by other angles; None if they never do."""
    limits = []
    for section in _length_dependent(text_config):
        original = section.get("original_max_position_embeddings") or getattr(
            text_config, "original_max_position_embeddings", None
        )
        limits.append(int(original or text_config.max_position_embeddings))
    return min(limits, default=None)


def _length_dependent(text_config: Any) -> Iterator[Mapping[str, Any]]:
    rope: Mapping[str, Any] = getattr(text_config, "rope_parameters", None) or {}
    for section in (rope, *(section for section in rope.values() if isinstance(section, Mapping))):
        if section.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            yield section
