"""The options of the commands that run a model: the engine and the sampling that they stand for."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radixkv.cli.setting_options import FromSettings
from radixkv.config import EngineConfig, SamplingParams
from radixkv.errors import ConfigError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine

ENGINE_SETTINGS = FromSettings(
    EngineConfig,
    left_out={
        "max_running_requests": "for servers; a command has one batch of prompts",
        "max_context_tokens": "the commands limit outputs with --max-tokens",
        "max_skips": "for servers; a command's prompts arrive together",
        "cuda_graphs": "for measuring",
        "prefix_cache": "for measuring",
        "seed": "drawn anew in each run; --seed is the one of the sampling",
    },
    more={},
    panel="Model and cache",
)
SAMPLING_SETTINGS = FromSettings(
    SamplingParams,
    left_out={
        "max_tokens": "each command has a default of its own",
        "stop_token_ids": "--stop takes texts",
        "ignore_eos": "for measuring",
        "min_tokens": "for measuring",
        "n": "the commands print one output for each prompt",
        "logit_bias": "a mapping does not fit an option",
        "logits_transform": "a function does not fit an option",
        "logprobs": "no command prints them",
        "prompt_logprobs": "no command prints them",
        "speculate": "--speculate is the engine's",
    },
    more={"stop": "May be given several times; in bash `$'\\n'` is a line break."},
    panel="Sampling",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Which model to run, and how: a model and settings of `EngineConfig`."""

    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help='"demo", a model directory, or a hub id such as "Qwen/Qwen3-0.6B".',
            rich_help_panel=ENGINE_SETTINGS.panel,
        ),
    ] = "demo"
    settings: Annotated[dict[str, Any], ENGINE_SETTINGS] = field(default_factory=dict)

    def load(self) -> Engine:
        """The engine. Takes seconds: torch and transformers are imported here.

        Prompts without a seed are sampled differently in each run of the command, as one expects of a command.

        Raises: what `Engine.from_pretrained` does; ConfigError if the memory does not suffice.
        """
        EngineConfig(**self.settings)  # refuses wrong settings before the imports
        from transformers.utils import logging as hf_logging

        from radixkv.engine.engine import Engine

        hf_logging.set_verbosity_error()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        try:
            return Engine.from_pretrained(self.model, seed=secrets.randbits(31), **self.settings)
        except RuntimeError as error:  # torch has no narrower error for the memory of the CPU
            if "memory" not in str(error):
                raise
            raise ConfigError(
                f"there is not enough memory for {self.model!r} and its KV pool; set a smaller --kv-cache-tokens"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen, and what ends an output: settings of `SamplingParams`."""

    settings: Annotated[dict[str, Any], SAMPLING_SETTINGS] = field(default_factory=dict)

    def params(self, max_tokens: int) -> SamplingParams:
        """The parameters of each request. Raises: InvalidSamplingParamsError."""
        return SamplingParams(max_tokens=max_tokens, **self.settings)
