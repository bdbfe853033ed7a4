"""`radixkv serve`: an HTTP server for OpenAI's and Anthropic's clients."""

from __future__ import annotations

import gc
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radixkv.cli.setting_options import FromSettings, with_option_groups
from radixkv.config import EngineConfig, ServerConfig
from radixkv.config.checks import checked_text
from radixkv.config.endpoints import is_local_endpoint
from radixkv.config.setting import field_check, setting_fields
from radixkv.config.toml_file import read_toml
from radixkv.errors import ConfigError

if TYPE_CHECKING:
    from radixkv.engine.async_engine import AsyncEngine
    from radixkv.serving.service import Service

SERVE_EPILOG = """
Ctrl-C or SIGTERM lets running requests finish, and refuses new ones; a second one ends the server at once.

**Examples**

Try it: `radixkv serve demo`, and in another terminal the `curl` that it prints

Your model, on every address, with a key: `radixkv serve Qwen/Qwen3-0.6B --host 0.0.0.0 --api-key "$KEY"`

Settings in a file, with flags before them: `radixkv serve --config server.toml --port 9000`

From OpenAI's client: `OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")`
"""

SERVER_SETTINGS = FromSettings(ServerConfig, left_out={}, more={}, panel="Server")
SERVED_ENGINE_SETTINGS = FromSettings(EngineConfig, left_out={}, more={}, panel="Model and cache")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where to listen, and whom to serve: settings of `ServerConfig`."""

    settings: Annotated[dict[str, Any], SERVER_SETTINGS] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEngineOptions:
    """How to run the model: all settings of `EngineConfig`."""

    settings: Annotated[dict[str, Any], SERVED_ENGINE_SETTINGS] = field(default_factory=dict)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file: `model`, and fields of `EngineConfig` and `ServerConfig`. Raises: ConfigError."""
    content = read_toml(path)
    checks = {known.name: field_check(known) for cls in (EngineConfig, ServerConfig) for known in setting_fields(cls)}
    checks["model"] = checked_text
    for name, value in content.items():
        if name not in checks:
            raise ConfigError(f"{path}: unknown setting {name!r}; the settings are {', '.join(checks)}")
        content[name] = checks[name](f"{path}: {name}", value)
    return content


def _use_as_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """Let the settings in a file be the defaults of the options."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), **read_settings(path)}
    return path


@with_option_groups
def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='"demo", a model directory, or a hub id such as "Qwen/Qwen3-0.6B".')
    ] = "demo",
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE.toml",
            help="TOML file with settings, called as the flags, with _ for -; flags go before it.",
            is_eager=True,
            callback=_use_as_defaults,
            show_default=False,
        ),
    ] = None,
    *,
    engine_options: ServedEngineOptions,
    server_options: ServerOptions,
) -> None:
    """Serve a model over HTTP, to OpenAI's and Anthropic's clients and to curl.

    Prompts that share a beginning share its computation, whoever sends them; with --api-keys, tenants share nothing.
    """
    server_config = ServerConfig(**server_options.settings)
    EngineConfig(**engine_options.settings)  # refuses wrong settings before the imports
    from radixkv.serving.requirements import check_installed

    check_installed()
    from radixkv.serving.server import serve as serve_until_signal
    from radixkv.serving.service import Service

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if not server_config.is_local and not server_config.has_keys:
        typer.echo(
            f"radixkv: warning: everybody who reaches {server_config.host} can use this server, and can find out by "
            "timing which prompts others have sent; --api-keys tells clients apart",
            err=True,
        )
    events = engine_options.settings.get("kv_events")
    if events is not None and not is_local_endpoint(events):
        typer.echo(
            f"radixkv: warning: everybody who reaches {events} can read all prompts; bind an address that only your "
            "routers reach",
            err=True,
        )
    engine = _load(model, engine_options.settings, server_config.max_waiting)
    service = Service(engine, model, server_config)
    gc.collect()
    gc.freeze()  # what is loaded now stays: a full collection need not visit it, which would stop all for 200 ms
    finished = serve_until_signal(service, on_start=lambda address: _greet(service, address))
    raise typer.Exit(0 if finished else 130)


def _load(model: str, settings: dict[str, Any], max_waiting: int) -> AsyncEngine:
    """The engine. Takes seconds: torch and transformers are imported here."""
    from transformers.utils import logging as hf_logging

    from radixkv.engine.async_engine import AsyncEngine

    hf_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return AsyncEngine.from_pretrained(model, max_waiting=max_waiting, **settings)
    except RuntimeError as error:  # torch has no narrower error for the memory of the CPU
        if "memory" not in str(error):
            raise
        raise ConfigError(
            f"there is not enough memory for {model!r} and its KV pool; set a smaller --kv-cache-tokens"
        ) from error


def _greet(service: Service, address: str) -> None:
    """Say where the server is, what it serves, and how to try it."""
    config, name = service.engine.config, service.model_name
    typer.echo(f"radixkv serves {name} at {address}")
    typer.echo(f"  model     {config.dtype} on {config.device}, up to {config.max_context_tokens:,} tokens a request")
    typer.echo(f"  KV pool   {config.kv_cache_tokens:,} tokens in pages of {config.page_size}")
    if config.state_slots is not None:
        typer.echo(f"  states    {config.state_slots:,} of recurrent layers")
    if (sources := service.engine.event_sources) is not None:
        typer.echo(f"  events    {sources.endpoint}, replays and snapshots at {sources.replay_endpoint}")
    key = "" if service.keys.is_open else " -H 'Authorization: Bearer KEY'"
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    typer.echo(
        f"Try it:\n  curl {address}{service.config.root_path}/v1/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d {_quoted(body)}"
    )


def _quoted(text: str) -> str:
    """`text` for a shell."""
    return "'" + text.replace("'", "'\\''") + "'"
