"""The `radixkv` application: its commands, and how their errors reach the user.

A command is a function in a module of its own, listed here. The module is imported when the command is run or
explained, so that `radixkv --help` answers at once; and it imports nothing heavy at the top: torch and transformers are
imported inside the functions.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from radixkv.cli.standard_streams import OUTPUT_ERRNOS, abandon_stdout, flush_stdout
from radixkv.errors import RadixKVError

COMMANDS = {  # each is a function of the module of its name; what it does is the first paragraph of its docstring
    "generate": "Continue prompts with a model. Several run as one batch, and what they share is computed once.",
    "chat": "Chat with a model; answers appear as they are written. Each turn computes only what is new in it.",
    "serve": "Serve a model over HTTP, to OpenAI's and Anthropic's clients and to curl.",
    "route": "Take requests for several servers, and send each where its prefix is cached and little is queued.",
    "cluster": "Run replicas of a server on Ray Serve, behind one address.",
    "tree": "Run prompts, then draw the radix tree: which beginnings they share, and what is kept of them.",
    "size": "Tell what a model's KV cache costs, per token, sequence and batch, and the largest batch a memory holds.",
    "replay": "Replay a trace of requests through the radix tree, and tell what each policy hits at each size.",
    "cache": "Look after KV on disk: what it holds, whether it is right, what is pruned, exported and imported.",
    "explain": "Cache the prompts of one file; then explain how far each of another is found, and why not further.",
}
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_STYLE: dict[str, Any] = {"rich_markup_mode": "markdown", "add_completion": False, "pretty_exceptions_enable": False}

# What a wrong command line raises; before typer brought its own, it was click's.
_CommandLineError: type[Exception] = (
    getattr(typer, "TyperException", None) or importlib.import_module("click").ClickException
)


class Commands(TyperGroup):
    """The commands, each imported when it is asked for. Errors are one line on stderr and exit code 2, no traceback."""

    _lists = False  # while help lists the commands, what they do is enough

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        if self._lists:
            return TyperCommand(cmd_name, help=COMMANDS[cmd_name])
        module = importlib.import_module(f"radixkv.cli.{cmd_name}")
        group = getattr(module, f"{cmd_name.upper()}_COMMANDS", None)
        if group is not None:
            return typer.main.get_command(group)
        single = typer.Typer(**_STYLE)
        single.command(cmd_name, epilog=getattr(module, f"{cmd_name.upper()}_EPILOG"))(getattr(module, cmd_name))
        return typer.main.get_command(single)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._lists = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._lists = False

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; exit the process unless `standalone_mode` is off, which leaves errors to the caller."""
        extra["windows_expand_args"] = windows_expand_args
        run = partial(super().main, args, prog_name, complete_var, standalone_mode=False, **extra)
        return sys.exit(_exit_code(run)) if standalone_mode else run()


def _exit_code(run: Callable[[], object]) -> int:
    """Run a command; what the process should exit with."""
    try:
        result = run()
        flush_stdout()
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except RadixKVError as error:
        return _report(str(error))
    except _CommandLineError as error:
        return _report(_usage_message(error))
    except OSError as error:
        if error.errno not in OUTPUT_ERRNOS:
            raise
        abandon_stdout()
        return _report(f"the output cannot be written: {error.strerror}")
    return result if isinstance(result, int) else 0  # an int comes from typer.Exit


def _usage_message(error: Exception) -> str:
    """What was wrong with the command line, and whose --help tells more."""
    message: str = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    return message if context is None else f"{message} (see {context.command_path} --help)"


def _report(message: str) -> int:
    with suppress(OSError):  # stderr may lie on the same full disk; the exit code still tells
        typer.echo(f"radixkv: error: {' '.join(message.split())}", err=True)
    return EXIT_ERROR


app = typer.Typer(
    name="radixkv",
    cls=Commands,
    help="Serve language models from a radix-tree KV cache: prompts that share a beginning share its computation.",
    epilog="`radixkv COMMAND --help` explains a command and shows examples.",
    **_STYLE,
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from radixkv import __version__

    typer.echo(f"radixkv {__version__}")
    raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
