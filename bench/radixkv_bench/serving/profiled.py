"""Runs the command line of radixkv with a profiler on one of its threads.

python -m radixkv_bench.serving.profiled OUT loop|engine serve demo ...
"""

from __future__ import annotations

import sys
import threading
import time
from cProfile import Profile
from typing import Any

ENGINE_THREAD = "radixkv-engine"


def main(out: str, thread: str) -> None:
    """Run what `sys.argv` says, and write the processor time of the functions in that thread to `out`."""
    from radixkv.cli import main as radixkv

    profile = Profile(time.thread_time)
    if thread == "engine":
        _profile_thread(profile)
    try:
        if thread == "loop":
            profile.runcall(radixkv)
        else:
            radixkv()
    finally:
        profile.dump_stats(out)


def _profile_thread(profile: Profile) -> None:
    """Let the engine's thread run under `profile`, once it starts."""
    run = threading.Thread.run

    def profiled(self: threading.Thread) -> Any:
        return profile.runcall(run, self) if self.name == ENGINE_THREAD else run(self)

    threading.Thread.run = profiled  # type: ignore[method-assign]


if __name__ == "__main__":
    out, thread = sys.argv[1:3]
    sys.argv[1:3] = []
    main(out, thread)
