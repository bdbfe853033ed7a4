"""What a trial of a family can come to, in a process that needs to load next to nothing for it."""

from __future__ import annotations

import os
import signal
import time

from radixkv_bench.models.finding import Finding, Outcome


def refuses(model_type: str) -> Finding:
    return Finding(Outcome.REFUSED, f"no {model_type} is served")


def ends_by_a_signal(model_type: str) -> Finding:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hangs(model_type: str) -> Finding:
    time.sleep(600)
    raise AssertionError


def raises(model_type: str) -> Finding:
    raise KeyError("a bug")
