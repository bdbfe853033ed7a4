"""`radixkv chat`: a conversation in the terminal, with branches that share their past."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from radixkv.cli.common import EngineOptions, SamplingOptions
from radixkv.cli.display import cut_off, excerpt, note, percent, summary
from radixkv.cli.prompts import checked_text, describe
from radixkv.cli.setting_options import setting_option, with_option_groups
from radixkv.cli.size_report import readable_bytes
from radixkv.cli.standard_streams import OUTPUT_ERRNOS
from radixkv.config import SamplingParams
from radixkv.engine.interrupts import DeferredInterrupt
from radixkv.errors import InvalidRequestError, MissingChatTemplateError, MissingTokenizerError, RadixKVError

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine
    from radixkv.engine.session import Session

MAX_DIGITS = 9  # of the number of a branch

CHAT_EPILOG = """
**Examples**

Talk: `radixkv chat --system "You are a citizen of Rome." --temperature 0.8`

Ask in two ways from the same past: type a line, then `/fork`, another line, `/switch 1`, another line, `/stats`

From a script: `printf 'Who are you?\\n/stats\\n' | radixkv chat`

Go on another day, without computing the past again: `radixkv chat --session rome.json --disk-cache kv`
"""


@with_option_groups
def chat(
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="What the model is told before the first turn.")
    ] = None,
    max_tokens: Annotated[int, setting_option(SamplingParams, "max_tokens", "--max-tokens", "-n", minimum=1)] = 256,
    saved_as: Annotated[
        Path | None,
        typer.Option(
            "--session",
            help="Go on with the conversation in this file, if there is one, and save the current branch there after "
            "each turn.",
            show_default=False,
        ),
    ] = None,
    *,
    engine_options: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Chat with a model; answers appear as they are written. Each turn computes only what is new in it.

    Lines that begin with / are commands, and /help lists them: conversations can be forked, and branches share the
    KV of their past. Ctrl-C stops an answer, Ctrl-D ends the chat. Lines may also come through a pipe.
    """
    params = sampling.params(max_tokens)
    system = None if system is None else checked_text(system, "--system")
    if saved_as is not None:
        _check_place(saved_as, system)
    engine = engine_options.load()
    _check_that_it_chats(engine, engine_options.model)
    conversation = Chat(engine, params, system, saved_as)
    if sys.stdin.isatty():
        note(
            f"{engine_options.model}, {engine.max_context_tokens:,} tokens of context. "
            "/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat."
        )
        talk(conversation, typed_lines())
    else:
        follow_script(conversation, _piped_lines())


def _check_place(saved_as: Path, system: str | None) -> None:
    """Raises: InvalidRequestError if there can be no such file, or `system` is given for one that is there."""
    try:
        is_there, has_folder = saved_as.exists(), saved_as.absolute().parent.is_dir()
    except OSError as error:
        raise InvalidRequestError(f"--session {saved_as}: {error.strerror}") from error
    if not has_folder:
        raise InvalidRequestError(f"--session: there is no folder {saved_as.absolute().parent}")
    if system is not None and is_there:
        raise InvalidRequestError(
            f"--session: the conversation in {saved_as} has its own beginning; leave --system out, or give another file"
        )


def _check_that_it_chats(engine: Engine, model: str) -> None:
    if engine.tokenizer is None:
        raise MissingTokenizerError(
            f"{model!r} has no tokenizer, so it cannot chat; give token ids to `radixkv generate --file prompts.jsonl`"
        )
    if not getattr(engine.tokenizer, "chat_template", None):
        raise MissingChatTemplateError(
            f"the tokenizer of {model!r} has no chat template, so it cannot chat; use `radixkv generate`"
        )


def talk(conversation: Chat, lines: Iterator[str]) -> None:
    """Follow a user's lines. Whatever goes wrong with one is told, and the next is asked for."""
    for line in lines:
        try:
            conversation.take(line)
        except KeyboardInterrupt:
            note("stopped: this turn is not part of the conversation")
        except RadixKVError as error:
            note(f"error: {' '.join(str(error).split())}")
        if conversation.is_over:
            return


def follow_script(conversation: Chat, lines: Iterator[str]) -> None:
    """Follow the lines of a script; whatever goes wrong ends it."""
    for line in lines:
        conversation.take(line)
        if conversation.is_over:
            return


class Chat:
    """The branches of a conversation, numbered from 1; one of them is the current one.

    Attributes:
        is_over: whether the user asked to quit.
    """

    def __init__(
        self, engine: Engine, params: SamplingParams, system: str | None = None, saved_as: Path | None = None
    ) -> None:
        """Begin a conversation, or go on with the one that is `saved_as`. Raises: SessionFileError."""
        self._engine = engine
        self._params = params
        self._system = system
        self._saved_as = saved_as
        if saved_as is not None and saved_as.exists():
            session = _loaded(engine, saved_as)
            self._system = next((turn["content"] for turn in session.messages if turn["role"] == "system"), None)
        else:
            session = engine.session(system=system)
        self._branches = {1: session}
        self._current = 1
        self.is_over = False

    @property
    def session(self) -> Session:
        """The current branch."""
        return self._branches[self._current]

    def take(self, line: str) -> None:
        """Do what `line` says: a command, or a turn that the model answers on stdout.

        Raises: KeyboardInterrupt if the answer was stopped; RadixKVError if it failed. The turn does not count then.
        """
        name, _, argument = line.strip().partition(" ")
        if name in COMMANDS:
            COMMANDS[name].run(self, argument.strip())
        elif name.startswith("/"):
            note(f"unknown command {name}; /help lists the commands")
        elif name:
            self._answer(line)
            if self._saved_as is not None:
                with DeferredInterrupt() as interrupt:
                    self.session.save(self._saved_as)
                    interrupt.pressed = False  # too late: the turn counts, and nothing is left to stop

    # -- commands ----------------------------------------------------------------------------------------------------

    def help(self, _: str) -> None:
        """List the commands."""
        width = max(len(command.usage) for command in COMMANDS.values())
        typer.echo("\n".join(f"{command.usage:{width}}  {command.purpose}" for command in COMMANDS.values()))

    def fork(self, _: str) -> None:
        """Go on in a new branch, and keep this one as it is."""
        origin, number = self._current, len(self._branches) + 1
        self._branches[number] = self.session.fork()
        self._current = number
        typer.echo(
            f"this is branch {number} now, with the past of branch {origin}; "
            f"/switch {origin} goes back, /branches lists all"
        )

    def branches(self, _: str) -> None:
        """List the branches."""
        for number in self._branches:
            typer.echo(f"{'*' if number == self._current else ' '} {self._describe(number)}")

    def switch(self, number: str) -> None:
        """Go to branch N."""
        is_number = number.isdecimal() and len(number) <= MAX_DIGITS
        if not is_number or int(number) not in self._branches:
            note(f"/switch needs the number of a branch: {', '.join(map(str, self._branches))}")
            return
        self._current = int(number)
        typer.echo(self._describe(self._current))

    def save(self, file: str) -> None:
        """Save this branch; --session FILE opens it again."""
        if not file:
            note("/save needs the name of a file")
            return
        self.session.save(os.path.expanduser(file))  # unlike Path, it leaves the ~ of no user as it is
        typer.echo(f"saved {self._describe(self._current)}")

    def reset(self, _: str) -> None:
        """Begin this branch anew."""
        self.session.close()
        self._branches[self._current] = self._engine.session(system=self._system)
        typer.echo(f"branch {self._current} starts over")

    def stats(self, _: str) -> None:
        """Show what this context holds in the KV pool, and the hit rate and pages of the cache."""
        usage, stats = self.session.kv_usage(), self._engine.stats()
        typer.echo(
            f"context  {usage.context_tokens:,} tokens; the pool holds the KV of {usage.tokens:,} in {usage.pages:,} "
            f"pages, {readable_bytes(usage.num_bytes)}: {usage.shared_tokens:,} shared, {usage.own_tokens:,} own"
        )
        typer.echo(
            f"cache    hit rate {percent(stats.hit_rate)} of {stats.cache.query_tokens:,} prompt tokens; pages: "
            f"{stats.free_pages:,} free, {stats.evictable_pages:,} evictable, {stats.protected_pages:,} protected"
        )
        if held := stats.cache.states:
            typer.echo(
                f"states   {held:,} of recurrent layers, {readable_bytes(stats.bytes_per_state)} each: "
                f"{stats.cache.free_states:,} free, {stats.cache.evictable_states:,} evictable"
            )

    def quit(self, _: str) -> None:
        """End the chat, as Ctrl-D does."""
        self.is_over = True

    # -- inside ------------------------------------------------------------------------------------------------------

    def _describe(self, number: int) -> str:
        session = self._branches[number]
        asked = [message["content"] for message in session.messages if message["role"] == "user"]
        turns = f"{len(asked)} turn{'' if len(asked) == 1 else 's'}, {len(session.token_ids):,} tokens"
        return f"branch {number}: {turns}" + (f', last "{excerpt(asked[-1], 40)}"' if asked else "")

    def _answer(self, text: str) -> None:
        text = checked_text(text, "the turn")
        with DeferredInterrupt() as interrupt:
            try:
                self._print_answer(text, interrupt)
            except KeyboardInterrupt:
                typer.echo()
                raise
            except Exception as error:  # of this request, whatever the model, the tokenizer or its template raised
                if isinstance(error, OSError) and error.errno in {errno.EPIPE, *OUTPUT_ERRNOS}:
                    raise  # stdout cannot be written; the turn itself did not fail
                raise RadixKVError(f"this turn failed, so it does not count: {describe(error)}") from error

    def _print_answer(self, text: str, interrupt: DeferredInterrupt) -> None:
        """Print the answer to a turn. Raises: KeyboardInterrupt, between two pieces, after a Ctrl-C."""
        chunks = self.session.stream(text, self._params)
        for chunk in chunks:
            typer.echo(chunk.text, nl=False)  # which flushes
            if chunk.output is not None:
                typer.echo()
                cut = " · cut off at --max-tokens" if len(chunk.output.token_ids) == self._params.max_tokens else ""
                cut += cut_off([chunk.output], self._params.max_tokens)
                note(summary([chunk.output], chunk.output.metrics.total_s) + cut)
                interrupt.pressed = False  # too late: the turn counts
            elif interrupt.pressed:
                chunks.close()
                raise KeyboardInterrupt


def _loaded(engine: Engine, path: Path) -> Session:
    from radixkv.engine.session import Session

    session = Session.load(engine, path)
    turns = sum(message["role"] == "user" for message in session.messages)
    note(f"{path}: {turns} turn{'' if turns == 1 else 's'}, {len(session.token_ids):,} tokens")
    return session


class Command(NamedTuple):
    """A line that begins with a slash: how it is written, and what it does with its argument."""

    usage: str
    run: Callable[[Chat, str], None]

    @property
    def purpose(self) -> str:
        """What the command is for: the docstring of its method."""
        return (self.run.__doc__ or "").rstrip(".")


COMMANDS = {
    command.usage.split()[0]: command
    for command in (
        Command("/help", Chat.help),
        Command("/fork", Chat.fork),
        Command("/branches", Chat.branches),
        Command("/switch N", Chat.switch),
        Command("/save FILE", Chat.save),
        Command("/reset", Chat.reset),
        Command("/stats", Chat.stats),
        Command("/quit", Chat.quit),
    )
}


# --------------------------------------------------------------------------------------------------------------- input


def typed_lines() -> Iterator[str]:
    """Lines from the terminal until Ctrl-D. Ctrl-C drops the line that was begun."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() has a history then, where the platform can
    while True:
        try:
            line = input("you> ")
        except KeyboardInterrupt:
            note("\nCtrl-D or /quit ends the chat")
        except UnicodeDecodeError:
            note("this line is not valid UTF-8; it is skipped")
        except EOFError:
            typer.echo()
            return
        else:
            yield line


def _piped_lines() -> Iterator[str]:
    """Lines of stdin. One that is not valid UTF-8 is reported and skipped."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            note(f"line {number} is not valid UTF-8 ({error.reason}, byte {error.start}); it is skipped")
        else:
            yield text.removesuffix("\n").removesuffix("\r")
