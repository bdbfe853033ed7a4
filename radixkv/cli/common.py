"""What the commands that run a model share: groups of options, and the engine and the sampling they stand for."""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from radixkv.cache.eviction.policies import POLICIES
from radixkv.config import KV_CACHE_DTYPES, EngineConfig
from radixkv.errors import ConfigError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine
    from radixkv.engine.sampling import SamplingParams

DEFAULTS = EngineConfig()
_EngineOption = partial(typer.Option, rich_help_panel="Model and cache")
_SamplingOption = partial(typer.Option, rich_help_panel="Sampling")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Which model to run, and how: the options that `EngineConfig` explains."""

    model: Annotated[
        str,
        _EngineOption("--model", "-m", help='"demo", a model directory, or a hub id such as "Qwen/Qwen3-0.6B".'),
    ] = "demo"
    dtype: Annotated[
        str, _EngineOption(help="Of weights and KV: auto (the checkpoint's own), float32, bfloat16 or float16.")
    ] = DEFAULTS.dtype
    device: Annotated[str, _EngineOption(help="auto (CUDA if there is one), cpu, cuda, cuda:1, …")] = DEFAULTS.device
    kv_cache_tokens: Annotated[
        int | None, _EngineOption(help="Size of the KV pool in tokens.  [default: by --mem-fraction]")
    ] = None
    mem_fraction: Annotated[
        float | None,
        _EngineOption(
            help="Share of the free memory that the KV pool takes.  [default: 0.85 on a GPU, 0.4 on the CPU]"
        ),
    ] = None
    window_cache_tokens: Annotated[
        int | None,
        _EngineOption(
            help="Tokens of which layers that see a window keep KV.  [default: half of --kv-cache-tokens, or all of it "
            "if no layer sees everything]"
        ),
    ] = None
    window: Annotated[
        int | None,
        _EngineOption(
            help="StreamingLLM: layers see that many last tokens, and output goes on beyond the model's context in "
            "constant memory."
        ),
    ] = None
    sinks: Annotated[
        int, _EngineOption(help="First tokens that stay in sight beside --window; 4 serve most models.")
    ] = 0
    kv_cache_dtype: Annotated[
        str, _EngineOption(help=f"What the KV pool keeps: {', '.join(KV_CACHE_DTYPES)} (auto is --dtype).")
    ] = DEFAULTS.kv_cache_dtype
    page_size: Annotated[int, _EngineOption(help="Tokens a page; prefixes are shared to the token at any size.")] = (
        DEFAULTS.page_size
    )
    eviction_policy: Annotated[str, _EngineOption(help=f"Which unused prefixes go first: {', '.join(POLICIES)}.")] = (
        DEFAULTS.eviction_policy
    )
    attention_backend: Annotated[str, _EngineOption(help="auto, or the name of a backend.")] = (
        DEFAULTS.attention_backend
    )
    schedule_policy: Annotated[
        str, _EngineOption(help="Order of waiting prompts: lpm (longest cached prefix first) or fcfs.")
    ] = DEFAULTS.schedule_policy
    max_batch_tokens: Annotated[int, _EngineOption(help="Tokens computed in one step at most.")] = (
        DEFAULTS.max_batch_tokens
    )

    def load(self) -> Engine:
        """The engine. Takes seconds: torch and transformers are imported here.

        Prompts without a seed are sampled differently in each run of the command, as one expects of a command.

        Raises: what `Engine.from_pretrained` does; ConfigError if the memory does not suffice.
        """
        from transformers.utils import logging as hf_logging

        from radixkv.engine.engine import Engine

        hf_logging.set_verbosity_error()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        settings = asdict(self)
        try:
            return Engine.from_pretrained(settings.pop("model"), seed=secrets.randbits(31), **settings)
        except RuntimeError as error:  # torch has no narrower error for the memory of the CPU
            if "memory" not in str(error):
                raise
            raise ConfigError(
                f"the memory does not suffice for {self.model!r} and its KV pool; set a smaller --kv-cache-tokens"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen, and what ends an output: the options that `SamplingParams` explains."""

    temperature: Annotated[float, _SamplingOption(help="0 takes the likeliest token; more is more varied.")] = 0.0
    top_p: Annotated[float, _SamplingOption(help="Draw from the likeliest tokens of this probability together.")] = 1.0
    top_k: Annotated[
        int | None, _SamplingOption(help="Draw from that many of the likeliest tokens.  [default: all]")
    ] = None
    min_p: Annotated[
        float, _SamplingOption(help="Draw from tokens at least this probable relative to the likeliest.")
    ] = 0.0
    seed: Annotated[
        int | None,
        _SamplingOption(help="Makes sampling repeatable; the same for each prompt.  [default: another each time]"),
    ] = None
    stop: Annotated[
        list[str] | None,
        _SamplingOption(
            help="Text that ends an output, which stops before it. May be given several times; "
            "in bash `$'\\n'` is a line break."
        ),
    ] = None

    def params(self, max_tokens: int) -> SamplingParams:
        """The parameters of each request. Raises: InvalidSamplingParamsError."""
        from radixkv.engine.sampling import SamplingParams

        return SamplingParams(max_tokens=max_tokens, **{**asdict(self), "stop": tuple(self.stop or ())})


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options: a parameter typed as a dataclass becomes its fields on the command line.

    The fields say how, as parameters do: `name: Annotated[type, typer.Option(…)] = default`.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}

    @wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    own = inspect.signature(command).parameters.values()
    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
    parameters = [parameter for parameter in parameters if parameter.name not in groups]
    for group in groups.values():
        parameters += _parameters(group)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]
