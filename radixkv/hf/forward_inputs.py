"""What a call of `generate` says in its arguments, and what it passes to a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel


def eos_token_ids(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> frozenset[int]:
    """Ids that end an output of this call: the padding after them must not be stored as tokens."""
    config = kwargs.get("generation_config") or model.generation_config
    ids = kwargs.get("eos_token_id", config.eos_token_id)
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list | tuple) else [ids])


def num_logits(kwargs: Mapping[str, Any]) -> int:
    """Number of last columns whose logits are wanted: at least these must be computed."""
    wanted = kwargs.get("logits_to_keep", 0)
    num_columns: int = kwargs["input_ids"].shape[1]
    return wanted if isinstance(wanted, int) and wanted else num_columns


def only_columns(kwargs: Mapping[str, Any], first: int, last: int, past: int) -> dict[str, Any]:
    """The inputs of a forward pass of columns `[first, last)`, of those that begin with column `past`."""
    part = dict(kwargs) | {"logits_to_keep": 1}
    for name in ("input_ids", "position_ids", "cache_position"):
        if part.get(name) is not None:
            part[name] = part[name][..., first - past : last - past]
    if part.get("attention_mask") is not None:
        part["attention_mask"] = part["attention_mask"][:, :last]
    return part


def without_leading_columns(kwargs: Mapping[str, Any], num_columns: int) -> dict[str, Any]:
    """The inputs of a forward pass that begins later. The attention mask covers what is cached, and stays."""
    shorter = dict(kwargs)
    for name in ("input_ids", "position_ids", "cache_position"):
        if shorter.get(name) is not None:
            shorter[name] = shorter[name][..., num_columns:]
    return shorter


def positions_of_row(position_ids: Tensor, row: int, num_rows: int, columns: range) -> Tensor:
    """The positions of some columns of one row, [..., 1, columns], of [..., rows or 1, all columns]."""
    given = position_ids.shape[-2]
    assert given in (1, num_rows), "generate passes the positions of each row, or of all alike"
    own = row if given > 1 else 0
    return position_ids[..., own : own + 1, columns.start : columns.stop]
