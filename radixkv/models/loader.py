"""Loads a model, its tokenizer and what ends its outputs, from the package, a directory or a hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from radixkv import demo_model
from radixkv.errors import ConfigError, ModelLoadError, ModelNotFoundError
from radixkv.memory.rope import length_dependent_limit
from radixkv.models.checkpoint import (
    CONFIG_FILES,
    TOKENIZER_FILES,
    check_json_files,
    check_safetensors,
    check_tensors,
    one_line,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIGNS_OF_A_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


class LoadedModel(NamedTuple):
    """A model ready to run; `tokenizer` is None where none lies beside it."""

    model: PreTrainedModel
    tokenizer: Any | None


def load(name_or_path: str | Path, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load "demo" (the model in the package), a local directory or a hub id; directories need safetensors.

    Raises: ModelNotFoundError if there is no model; ModelLoadError if its files are damaged, or lack a tensor;
        ConfigError for an unknown dtype or device.
    """
    if not isinstance(name_or_path, str | Path) or not str(name_or_path):
        raise ConfigError(f'model must be "demo", a directory or a hub id, not {name_or_path!r}')
    place = demo_model.path() if str(name_or_path) == "demo" else name_or_path
    torch_device = resolve_device(device)
    hf_dtype = _resolve_dtype(dtype)
    check_json_files(place, CONFIG_FILES)
    try:
        model = _load_whole_model(place, hf_dtype)
    except (MemoryError, ModelLoadError):
        raise
    except Exception as error:  # foreign files, and code that fails on them in ways of its own
        raise _why_not_loaded(name_or_path, place, error) from error
    return LoadedModel(model.eval().to(torch_device), _load_tokenizer(place))


def load_tokenizer(name_or_path: str | Path) -> Any | None:
    """The tokenizer that `load` gives, without the model; None if none lies there. Raises: ModelLoadError."""
    return _load_tokenizer(demo_model.path() if str(name_or_path) == "demo" else name_or_path)


def weight_files(name_or_path: str | Path) -> list[Path]:
    """The files with the weights that `load` reads for "demo" or a local directory; none for a hub id."""
    place = demo_model.path() if str(name_or_path) == "demo" else name_or_path
    return sorted(Path(place).glob("*.safetensors"))


def _load_whole_model(place: str | Path, dtype: torch.dtype | str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(place)
    with _Quietly():
        model, info = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named in `info`
        )
    check_tensors(place, model, info)
    loaded: PreTrainedModel = model
    return loaded


def _why_not_loaded(
    name_or_path: str | Path, place: str | Path, error: Exception
) -> ModelLoadError | ModelNotFoundError:
    if _is_path(name_or_path):
        return ModelNotFoundError(f"there is no model directory {str(name_or_path)!r}")
    try:
        check_safetensors(place)
    except ModelLoadError as damaged:
        return damaged
    if isinstance(error, OSError | ValueError):
        where = "" if Path(name_or_path).exists() else ", which is no directory here, nor from the Hugging Face hub"
        return ModelNotFoundError(f"no model can be loaded from {str(name_or_path)!r}{where}: {_first_line(error)}")
    return ModelLoadError(
        f"the files in {str(name_or_path)!r} make no model ({type(error).__name__}: {one_line(error)}); "
        "check its config.json"
    )


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The ids that end an output: those of the generation config, else of the model's config.

    Raises: ModelLoadError if they are not integers.
    """
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            listed = ids if isinstance(ids, list | tuple) else [ids]
            if any(isinstance(token, bool) or not isinstance(token, int) for token in listed):
                raise ModelLoadError(f"eos_token_id of the model's configs must be token ids; got {ids!r}")
            return frozenset(listed)
    return frozenset()


def max_context_tokens(config: PretrainedConfig) -> int | None:
    """The longest context that the model computes right in pages; None if its config states none.

    Rotary embeddings that change with the length of the context (dynamic NTK, LongRoPE) would give cached keys other
    angles than new ones, so such models are served up to the length they were first trained on.
    """
    text_config = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len")  # MPT has the other one
    limits = (*(getattr(text_config, name, None) for name in names), length_dependent_limit(text_config))
    return min((limit for limit in limits if limit is not None), default=None)


def resolve_device(device: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one. Raises: ConfigError."""
    if not isinstance(device, str):
        raise ConfigError(f'device must be a name such as "auto", "cpu" or "cuda:0"; got {device!r}')
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}: {_first_line(error)}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'device {device!r} asks for CUDA, which torch does not find here; take "cpu" or "auto"')
    return resolved


def _resolve_dtype(dtype: str) -> torch.dtype | str:
    if not isinstance(dtype, str) or (dtype != "auto" and dtype not in DTYPES):
        raise ConfigError(f"dtype must be one of auto, {', '.join(DTYPES)}; got {dtype!r}")
    return DTYPES.get(dtype, "auto")


def _load_tokenizer(place: str | Path) -> Any | None:
    """The tokenizer; None if a directory has none. Raises: ModelLoadError."""
    if Path(place).is_dir() and not any((Path(place) / name).exists() for name in SIGNS_OF_A_TOKENIZER):
        return None
    try:
        return AutoTokenizer.from_pretrained(place)
    except MemoryError:
        raise
    except Exception as error:  # foreign files, and code that fails on them in ways of its own
        check_json_files(place, TOKENIZER_FILES)
        raise ModelLoadError(
            f"the tokenizer in {str(place)!r} cannot be loaded ({type(error).__name__}: {one_line(error)}); "
            f"check its {' and '.join(_tokenizer_files(place)) or 'files'}"
        ) from error


def _tokenizer_files(place: str | Path) -> list[str]:
    names = (*SIGNS_OF_A_TOKENIZER, *TOKENIZER_FILES, "chat_template.jinja")
    return list(dict.fromkeys(name for name in names if (Path(place) / name).is_file()))


class _Quietly:
    """Silences transformers' progress bars, hints and table of tensors while a model loads: `check_tensors` speaks."""

    def __enter__(self) -> None:
        self._bars, self._verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
        hf_logging.disable_progress_bar()
        hf_logging.set_verbosity_error()

    def __exit__(self, *exception: object) -> None:
        hf_logging.set_verbosity(self._verbosity)
        if self._bars:
            hf_logging.enable_progress_bar()


def _is_path(name: str | Path) -> bool:
    """Whether a name that is no directory was meant as one: hub ids have at most one slash, inside."""
    text = str(name)
    return not Path(name).exists() and (isinstance(name, Path) or text[:1] in "./~" or text.count("/") > 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
