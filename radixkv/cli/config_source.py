"""Finding a model's config.json: a file, a directory, the demo model or the Hugging Face hub. Loads no weights."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from radixkv.errors import ModelNotFoundError, UnsupportedModelError
from radixkv.memory.config_fields import decoder_fields
from radixkv.memory.sizing import LayerConfig, layers_from_config
from radixkv.memory.state_sizing import LayerState, states_from_config

DEMO = "demo"
_Read = TypeVar("_Read")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def read_config(source: str) -> dict[str, Any]:
    """The content of the config.json that `source` stands for.

    `source` is "demo", the path of a JSON file, a directory with a config.json, or a hub id such as "Qwen/Qwen3-8B".

    Raises: ModelNotFoundError if there is none, or it is not valid JSON object.
    """
    return _parse(_config_text(source), source)


def layers(content: dict[str, Any]) -> tuple[LayerConfig, ...]:
    """The layers of a config.json; its class in transformers fills in what a nested or old config leaves out.

    Transformers is imported only then, because that takes seconds.

    Raises: UnsupportedModelError.
    """
    return _complete(content, layers_from_config)


def states(content: dict[str, Any]) -> tuple[LayerState, ...]:
    """What the recurrent layers of a config.json keep, with what it leaves out as for `layers`.

    Raises: UnsupportedModelError.
    """
    return _complete(content, states_from_config)


def _complete(content: dict[str, Any], read: Callable[[Any], _Read]) -> _Read:
    if decoder_fields(content) is content:
        try:
            return read(content)
        except UnsupportedModelError:
            return read(_with_defaults(content))
    return read(_with_defaults(content))


def _config_text(source: str) -> str:
    if source == DEMO:
        return _read_file(Path(str(files("radixkv") / "demo_model" / "config.json")))
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_file(path / "config.json")
    if path.is_file():
        return _read_file(path)
    if _HUB_ID.fullmatch(source) and not source.endswith(".json"):
        return _read_file(_download(source))
    raise ModelNotFoundError(
        f"there is no file or directory {source!r}; give a config.json, a model directory, a hub id or {DEMO!r}"
    )


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path.parent} has no {path.name}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelNotFoundError(f"the config of {source!r} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelNotFoundError(f"the config of {source!r} must be a JSON object, not a {type(content).__name__}")
    return content


def _download(repo_id: str) -> Path:
    """The config.json of a hub model, from the local hub cache or the network."""
    from huggingface_hub import hf_hub_download

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return Path(hf_hub_download(repo_id, "config.json"))
    except (OSError, ValueError) as error:  # no network, no such model, no access: all of the client's are one of them
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(
            f"there is no file or directory {repo_id!r}, and the Hugging Face hub gave no config: {reason}"
        ) from error


def _with_defaults(content: dict[str, Any]) -> Any:
    """`content` as its class in transformers loads it; `content` itself if transformers cannot."""
    from transformers import CONFIG_MAPPING

    logging.getLogger("transformers").setLevel(logging.ERROR)
    model_type = content.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return content
    try:
        return CONFIG_MAPPING[model_type].from_dict(content)
    except Exception:  # a config class may raise anything; reading the plain content gives the better message
        return content
