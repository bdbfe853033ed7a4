"""Trials in processes of their own, so that one which crashes or hangs ends alone."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

from radixkv_bench.models.finding import Finding, Outcome, in_a_line


def make_context(preloaded: Sequence[str]) -> BaseContext:
    """Processes that start from one which has loaded those modules, and has run nothing of them.

    The first call decides what that one loads. Where the system cannot fork, each process loads its own.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preloaded))
    return context


def run_alone(context: BaseContext, trial: Callable[[str], Finding], model_type: str, limit_s: float) -> Finding:
    """`trial(model_type)` in a process of its own, for `limit_s` seconds at most."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(theirs, trial, model_type), daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit_s):
            return Finding(Outcome.FAILED, f"did not end within {limit_s:g} s")
        finding: Finding = ours.recv()
        return finding
    except EOFError:
        process.join()
        return Finding(Outcome.FAILED, f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        ours.close()


def _report(results: Connection, trial: Callable[[str], Finding], model_type: str) -> None:
    _be_quiet()
    try:
        finding = trial(model_type)
    except Exception as error:  # that an engine lets through
        finding = Finding(Outcome.FAILED, in_a_line(error))
    results.send(finding)


def _be_quiet() -> None:
    """Let nothing that models print or warn of into the table's progress bar."""
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    warnings.simplefilter("ignore")
