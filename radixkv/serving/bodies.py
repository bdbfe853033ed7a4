"""What the bodies of requests have in common, and what is done about fields that nobody knows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from radixkv.serving.errors import bad_request

logger = logging.getLogger(__name__)

MAX_LOGGED_FIELDS = 1000
SALT_CHARACTERS = 1024

TokenIdList: TypeAlias = list[int]


class Body(BaseModel):
    """A JSON object. Numbers are not made of texts; fields that it does not name are kept aside."""

    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(Body):
    """What a stream tells besides its text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class PromptCacheOptions(Body):
    """How long what a request leaves in the cache should stay there."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m", "12h"] | None = None
    prewarm: bool | None = None


class GenerationBody(Body):
    """The fields that chats and completions share."""

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=128)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    seed: int | None = None
    speculate: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    regex: str | None = None
    grammar: str | None = None
    priority: int | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=SALT_CHARACTERS)
    prompt_cache_options: PromptCacheOptions | None = None
    user: str | None = None
    radixkv_continue: bool | None = None
    radixkv_output_ids: list[int] | None = None


class UnknownFields:
    """Looks for fields that no request has. They are ignored, and logged once each; or refused, if `strict`."""

    def __init__(self, *, strict: bool) -> None:
        self._strict = strict
        self._logged: set[str] = set()

    def check(self, body: Body) -> None:
        """Log the fields of `body` that nobody knows. Raises: ApiError if `strict`."""
        for name in _unknown(body, ""):
            if self._strict:
                raise bad_request(f"{name[:100]}: unknown field; this server takes none", name[:100], "unknown_field")
            name = _without_indices(name)[:100]
            if name not in self._logged and len(self._logged) < MAX_LOGGED_FIELDS:
                self._logged.add(name)
                logger.warning("the field %r of a request is unknown and ignored", name)


def _unknown(value: BaseModel | list[Any], place: str) -> Iterator[str]:
    if isinstance(value, BaseModel):
        for name in value.model_extra or ():
            yield f"{place}{name}"
        for name in type(value).model_fields:
            if isinstance(field := getattr(value, name), BaseModel | list):
                yield from _unknown(field, f"{place}{name}.")
    else:
        for number, item in enumerate(value):
            if isinstance(item, BaseModel | list):
                yield from _unknown(item, f"{place.removesuffix('.')}[{number}].")


def _without_indices(name: str) -> str:
    head, *parts = name.split("[")
    return head + "".join(f"[]{part.partition(']')[2]}" for part in parts)
