"""The optional packages that tiers need."""

from __future__ import annotations

from radixkv.config.optional_packages import OptionalPackages

PACKAGES = OptionalPackages("this", "tiers", {"msgpack": "msgpack", "redis": "redis"})
