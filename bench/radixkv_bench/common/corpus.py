"""Real text that lies on every machine: the source of Python's standard library, as prose, questions and documents.

Only the text is read (`ast`, never an import of the module), in a fixed order, so that one Python version always
gives the same prompts.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from radixkv_bench.common.errors import BenchError

Encode = Callable[[str], list[int]]

# fmt: off
MODULES = (
    "textwrap", "heapq", "contextlib", "functools", "argparse", "ast", "calendar", "codecs", "collections",
    "configparser", "copy", "csv", "dataclasses", "difflib", "doctest", "enum", "fractions", "ftplib", "gettext",
    "glob", "gzip", "imaplib", "inspect", "ipaddress", "locale", "logging", "mailbox", "optparse", "os",
    "pathlib", "pdb", "pickle", "pickletools", "platform", "plistlib", "poplib", "pprint", "queue", "random",
    "sched", "selectors", "shlex", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "threading", "timeit", "tokenize", "trace", "traceback", "turtle",
    "typing", "uuid", "warnings", "weakref", "zipfile",
)
# fmt: on


class Function(NamedTuple):
    """A documented function: `signature` as called, the `summary` line of its docstring, its `source` text."""

    signature: str
    summary: str
    source: str


def module_sources() -> Iterator[tuple[str, str]]:
    """(name, source text) of each module in `MODULES` that this Python ships as source."""
    found = False
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or not (spec.origin or "").endswith(".py"):
            continue
        found = True
        yield name, Path(spec.origin or "").read_text(encoding="utf-8")
    if not found:
        raise BenchError("this Python ships without the source of its standard library; give texts with --prompts")


def functions() -> Iterator[Function]:
    """Every public documented function and method of `module_sources`, in the order of the text."""
    for name, text in module_sources():
        lines = text.splitlines(keepends=True)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node):
                yield _function(name, node, lines)


def _function(module: str, node: ast.FunctionDef, lines: list[str]) -> Function:
    summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
    source = "".join(lines[node.lineno - 1 : node.end_lineno])
    return Function(f"{module}.{node.name}({ast.unparse(node.args)})", summary, source)


def take(stream: Iterator[int], num_tokens: int) -> list[int]:
    """The next `num_tokens` ids of `stream`; BenchError if it ends before."""
    ids = list(islice(stream, num_tokens))
    if len(ids) < num_tokens:
        raise BenchError(
            f"the standard library's text ends before the workload is full ({num_tokens - len(ids)} tokens are "
            "missing); ask for fewer requests or shorter ones, or give texts with --prompts"
        )
    return ids


def source_tokens(encode: Encode) -> Iterator[int]:
    """The modules' source as one stream of ids, encoded module by module as it is read."""
    for _, text in module_sources():
        yield from encode(text)


def example_tokens(encode: Encode) -> Iterator[int]:
    """A few-shot preamble without end: an instruction, then worked questions and answers from docstrings."""
    yield from encode("Answer each question about Python's standard library in one sentence.\n\n")
    for function in functions():
        yield from encode(f"Q: What does {function.signature} do?\nA: {function.summary}\n\n")


def questions(encode: Encode, num_tokens: int) -> Iterator[list[int]]:
    """Distinct questions of `num_tokens` tokens each: the beginning of a function's source, then what is asked of it.

    Source that is too short for the room goes on with that of the next functions; in a short question there is only
    source. Ends when the functions do.
    """
    words = encode("\nQ: What does this function do?\nA:")
    tail = words if 2 * len(words) <= num_tokens else []
    room = num_tokens - len(tail)
    seen: set[tuple[int, ...]] = set()
    body: list[int] = []
    for function in functions():
        body += encode(function.source)
        if len(body) < room:
            continue
        if tuple(body[:room]) not in seen:
            seen.add(tuple(body[:room]))
            yield body[:room] + tail
        body = []
