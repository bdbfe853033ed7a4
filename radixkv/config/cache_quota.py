"""What a namespace may call its own of a cache that it shares with others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from radixkv.config.limits import MAX_COUNT
from radixkv.config.setting import Setting, check_settings, described


@described
@dataclass(frozen=True, slots=True, kw_only=True)
class CacheQuota:
    """The guaranteed share of a namespace, checked when it is made. It is no limit: what nobody needs is lent."""

    pool_tokens: Annotated[
        int,
        Setting(
            "Tokens of the KV pool that others cannot take, in whole pages.",
            unit="tokens",
            minimum=0,
            maximum=MAX_COUNT,
        ),
    ] = 0
    disk_bytes: Annotated[
        int,
        Setting(
            "Bytes of an engine's `disk_cache` that others cannot take, in whole pages.",
            unit="bytes",
            minimum=0,
        ),
    ] = 0
    host_bytes: Annotated[
        int,
        Setting(
            "Bytes of an engine's `host_cache_gb` that others cannot take, in whole pages.",
            unit="bytes",
            minimum=0,
        ),
    ] = 0

    def __post_init__(self) -> None:
        check_settings(self)
