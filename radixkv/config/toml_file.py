"""Settings in TOML files."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from radixkv.errors import ConfigError


def read_toml(path: Path) -> dict[str, Any]:
    """What a file holds. Raises: ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of TOML, or of UTF-8
        raise ConfigError(f"{path} must be TOML: {error}") from error
