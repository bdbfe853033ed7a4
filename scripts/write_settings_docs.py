#!/usr/bin/env python3
"""Write the tables of settings in docs/api.md anew, from the descriptions in radixkv/config.

A table stands between `<!-- settings of NAME -->` and `<!-- end of settings -->`. Run it after changing a setting:

    python scripts/write_settings_docs.py
"""

from __future__ import annotations

import re
from pathlib import Path

from radixkv.config import CacheConfig, CacheQuota, EngineConfig, SamplingParams
from radixkv.config.setting import SettingField, setting_fields

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
CLASSES = {settings.__name__: settings for settings in (CacheConfig, CacheQuota, EngineConfig, SamplingParams)}
TABLE = re.compile(r"(<!-- settings of (\w+) -->\n).*?(<!-- end of settings -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """`page` with each of its tables as the descriptions are now."""
    return TABLE.sub(lambda match: match[1] + "\n".join(table(CLASSES[match[2]])) + "\n" + match[3], page)


def table(settings: type) -> list[str]:
    """The lines of the table of one class of settings."""
    rows = [_row(field) for field in setting_fields(settings)]
    return ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |", *rows]


def _row(field: SettingField) -> str:
    setting = field.setting
    default = "must be given" if field.is_required else f"`{field.default!r}`"
    if setting.unset:
        default += f": {setting.unset}"
    unit = f" ({setting.unit})" if setting.unit else ""
    return f"| `{field.name}` | {default} | {field.allowed}{unit} | {setting.help} |"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
