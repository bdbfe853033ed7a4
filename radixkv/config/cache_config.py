"""The settings of a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from radixkv.config.limits import MAX_COUNT
from radixkv.config.setting import Setting, check_settings, described
from radixkv.errors import ConfigError


@described
@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings of a `PrefixCache`, checked when they are made."""

    num_pages: Annotated[int, Setting("Pages in the pool.", unit="pages", minimum=1)]
    page_size: Annotated[int, Setting("Tokens in a page.", unit="tokens", minimum=1)] = 16
    policy: Annotated[str, Setting("Name of the eviction policy: which unused prefixes go first.")] = "lru"

    def __post_init__(self) -> None:
        check_settings(self)
        if self.num_pages * self.page_size > MAX_COUNT:
            raise ConfigError(
                f"{self.num_pages} pages of {self.page_size} tokens are more slots than int32 can count (2**31 - 1); "
                "make the pool smaller"
            )
