"""Runs the command line of radixkv with a profiler on one of the server's threads.

python -m radixkv_bench.serving.profiled OUT loop|engine serve demo ...
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from cProfile import Profile
from typing import Any

import uvicorn

from radixkv.cli import main as radixkv

ENGINE_THREAD = "radixkv-engine"


def main(out: str, thread: str) -> None:
    """Run what `sys.argv` says, and write the processor time of the functions in that thread to `out`."""
    profile = Profile(time.thread_time)
    if thread == "loop":
        _profile_run(profile, uvicorn.Server, lambda server: True)
    else:
        _profile_run(profile, threading.Thread, lambda thread: thread.name == ENGINE_THREAD)
    try:
        radixkv()
    finally:
        profile.dump_stats(out)


def _profile_run(profile: Profile, kind: type[Any], is_meant: Callable[[Any], bool]) -> None:
    """Let the method `run` of objects of a class go under `profile`."""
    run = kind.run

    def profiled(self: Any, *arguments: Any) -> Any:
        return profile.runcall(run, self, *arguments) if is_meant(self) else run(self, *arguments)

    kind.run = profiled


if __name__ == "__main__":
    out, thread = sys.argv[1:3]
    sys.argv[1:3] = []
    main(out, thread)
