"""Checks that a checkpoint is whole: its files can be read, and hold every tensor of the model, in its shape."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from radixkv.errors import ModelLoadError

CONFIG_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "tokenizer.json")
MOST_NAMED = 4
MOST_CHARACTERS = 240
_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


def check_json_files(place: str | Path, names: Iterable[str]) -> None:
    """Raise ModelLoadError, with the file's name, if one of these files is in the directory and no JSON object."""
    for path in (Path(place) / name for name in names):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # bytes that are not UTF-8 too
            raise ModelLoadError(f"{path} is not valid JSON: {one_line(error)}") from error
        if not isinstance(content, dict):
            raise ModelLoadError(f"{path} must hold a JSON object; it holds a {type(content).__name__}")


def check_safetensors(place: str | Path) -> None:
    """Raise ModelLoadError, with the file's name, if the header of a safetensors file does not fit the file.

    Reads headers only. O(tensors).
    """
    for path in sorted(Path(place).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{path} is damaged or incomplete: {one_line(error)}; copy it again") from error


def check_tensors(place: str | Path, model: PreTrainedModel, loading_info: Mapping[str, Any]) -> None:
    """Raise ModelLoadError, with the tensors' names, if the checkpoint does not hold the model that its config tells.

    `loading_info` is what `from_pretrained(output_loading_info=True)` gives. Tensors that no part of the model would
    use (another task's head, vision, extra prediction layers) may be there; tied weights may be absent.
    """
    where = f"the checkpoint in {str(place)!r}"
    if missing := sorted(loading_info.get("missing_keys") or ()):
        raise ModelLoadError(f"{where} lacks {_named(missing)}, which {type(model).__name__} needs")
    if mismatched := sorted(tuple(entry) for entry in loading_info.get("mismatched_keys") or ()):
        shapes = [f"{name} ({_shape(stored)}, not {_shape(needed)})" for name, stored, needed in mismatched]
        raise ModelLoadError(f"{where} does not fit its config.json: other shapes in {_named(shapes)}")
    if unused := _wrongly_unused(model, loading_info.get("unexpected_keys") or ()):
        raise ModelLoadError(
            f"{where} does not fit its config.json: {type(model).__name__} would leave out {_named(unused)}"
        )
    if errors := [*(loading_info.get("error_msgs") or ()), *(loading_info.get("conversion_errors") or ())]:
        raise ModelLoadError(f"{where} cannot be loaded: {one_line(errors[0])}")


def one_line(error: object) -> str:
    """What an error or a message says, on one line of limited length."""
    text = " ".join(str(error).split())
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} …"


def _wrongly_unused(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Unexpected tensors that change what the model computes.

    They belong to a module that computes with tensors of its own (the bias of a layer that was made without), or
    make up a layer like the model's, beyond the last.
    """
    layers: dict[tuple[str, int], list[str]] = defaultdict(list)
    found = []
    computing = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    for name in names:
        if name.rpartition(".")[0] in computing:
            found.append(name)
        elif number := _LAYER_NUMBER.search(name):
            layers[name[: number.start()], int(number[1])].append(name)
    in_layers = {_without_number(name) for name in model.state_dict()}
    for members in layers.values():
        if in_layers.issuperset(map(_without_number, members)):
            found += members
    return sorted(found)


def _without_number(name: str) -> str:
    return _LAYER_NUMBER.sub(".#.", name, count=1)


def _named(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:MOST_NAMED])
    more = len(names) - MOST_NAMED
    return f"{shown} and {more} more tensors" if more > 0 else shown


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a single number"
