"""The `radixkv` application: its commands, and how their errors reach the user.

A command is a function in a module of its own, registered here. Modules of commands import nothing heavy at the top:
torch and transformers are imported inside the functions, so that `radixkv --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from radixkv.cli.chat import CHAT_EPILOG, chat
from radixkv.cli.explain import EXPLAIN_EPILOG, explain
from radixkv.cli.generate import GENERATE_EPILOG, generate
from radixkv.cli.replay import REPLAY_EPILOG, replay
from radixkv.cli.serve import SERVE_EPILOG, serve
from radixkv.cli.size import SIZE_EPILOG, size
from radixkv.cli.standard_streams import OUTPUT_ERRNOS, abandon_stdout, flush_stdout
from radixkv.cli.tree import TREE_EPILOG, tree
from radixkv.errors import RadixKVError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

# What a wrong command line raises; before typer brought its own, it was click's.
_CommandLineError: type[Exception] = (
    getattr(typer, "TyperException", None) or importlib.import_module("click").ClickException
)


class OneLineErrors(TyperGroup):
    """A group of commands whose errors are one line on stderr and exit code 2, never a traceback."""

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
    cls=OneLineErrors,
    help="Serve language models from a radix-tree KV cache: prompts that share a beginning share its computation.",
    epilog="`radixkv COMMAND --help` explains a command and shows examples.",
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
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


app.command("generate", epilog=GENERATE_EPILOG)(generate)
app.command("chat", epilog=CHAT_EPILOG)(chat)
app.command("serve", epilog=SERVE_EPILOG)(serve)
app.command("tree", epilog=TREE_EPILOG)(tree)
app.command("size", epilog=SIZE_EPILOG)(size)
app.command("replay", epilog=REPLAY_EPILOG)(replay)
app.command("explain", epilog=EXPLAIN_EPILOG)(explain)
