"""Loads a model, its tokenizer and what ends its outputs, from the package, a directory or a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from radixkv import demo_model
from radixkv.errors import ConfigError, ModelNotFoundError
from radixkv.memory.rope import length_dependent_limit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


class LoadedModel(NamedTuple):
    """A model ready to run; `tokenizer` is None where none lies beside it."""

    model: PreTrainedModel
    tokenizer: Any | None


def load(name_or_path: str | Path, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load "demo" (the model in the package), a local directory or a hub id; directories need safetensors.

    Raises: ModelNotFoundError if there is no model; ConfigError for a dtype or device that is not known here.
    """
    if not isinstance(name_or_path, str | Path) or not str(name_or_path):
        raise ConfigError(f'a model is "demo", a directory or a hub id, not {name_or_path!r}')
    place = demo_model.path() if str(name_or_path) == "demo" else name_or_path
    torch_device = resolve_device(device)
    hf_dtype = _resolve_dtype(dtype)
    try:
        config = AutoConfig.from_pretrained(place)
        with _Quietly():
            model = AutoModelForCausalLM.from_pretrained(place, config=config, dtype=hf_dtype)
    except (OSError, ValueError) as error:
        if _is_path(name_or_path):
            raise ModelNotFoundError(f"there is no model directory {str(name_or_path)!r}") from error
        where = "" if Path(name_or_path).exists() else ", which is no directory here, nor from the Hugging Face hub"
        raise ModelNotFoundError(
            f"no model can be loaded from {str(name_or_path)!r}{where}: {_first_line(error)}"
        ) from error
    return LoadedModel(model.eval().to(torch_device), _load_tokenizer(place))


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The ids that end an output: those of the generation config, else of the model's config."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()


def max_context_tokens(config: PretrainedConfig) -> int | None:
    """The longest context that the model computes right in pages; None if its config states none.

    Rotary embeddings that change with the length of the context (dynamic NTK, LongRoPE) would give cached keys other
    angles than new ones, so such models are served up to the length they were first trained on.
    """
    text_config = config.get_text_config()
    limits = (getattr(text_config, "max_position_embeddings", None), length_dependent_limit(text_config))
    return min((limit for limit in limits if limit is not None), default=None)


def resolve_device(device: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. Raises: ConfigError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is none that torch knows: {_first_line(error)}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'device {device!r} asks for CUDA, which torch does not find here; take "cpu" or "auto"')
    return resolved


def _resolve_dtype(dtype: str) -> torch.dtype | str:
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}")
    return DTYPES.get(dtype, "auto")


def _load_tokenizer(place: str | Path) -> Any | None:
    if Path(place).is_dir() and not any((Path(place) / name).exists() for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(place)


class _Quietly:
    """transformers' own progress bars and hints, silenced while a model loads."""

    def __enter__(self) -> None:
        self._bars = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        if self._bars:
            hf_logging.enable_progress_bar()


def _is_path(name: str | Path) -> bool:
    """Whether a name that is no directory was meant as one: hub ids have at most one slash, inside."""
    text = str(name)
    return not Path(name).exists() and (isinstance(name, Path) or text[:1] in "./~" or text.count("/") > 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
