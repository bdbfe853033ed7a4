"""What a replica says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from radixkv.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """Of `GET /server_info`: what a router needs of it, and `whole`, all of it.

    Attributes:
        model: as it was given to the server, from which its tokenizer can be loaded.
        events: where its KV events come from; None if it sends none.
    """

    model: str
    page_size: int
    vocab_size: int
    has_tenants: bool
    started_at: int
    events: Mapping[str, Any] | None
    whole: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, answer: Mapping[str, Any]) -> ReplicaInfo:
        """What replica `name` answered. Raises: ConfigError if it is no answer of a radixkv server."""
        try:
            facts = {key: answer[key] for key in ("page_size", "vocab_size", "has_tenants", "started_at")}
            model, events = answer["model_path"], answer["kv_events"]
        except KeyError as error:
            raise ConfigError(
                f"{name} does not say its {error.args[0]} in /server_info; is it a radixkv server?"
            ) from error
        return cls(
            **facts, model=model, events=events, whole={key: value for key, value in answer.items() if key != "caller"}
        )

    def check_same(self, name: str, other: ReplicaInfo) -> None:
        """Raises: ConfigError unless replica `name`, whose info this is, serves what `other` serves."""
        for what in ("model", "page_size", "vocab_size"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise ConfigError(
                    f"all replicas must have the same {what}; {name} has {mine!r}, and others have {theirs!r}"
                )
