"""The thread that writes below the pool gives way to others."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from radixkv.tiers.worker import NICENESS, give_way_to_others


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_one_thread_gives_way_and_the_others_do_not() -> None:
    seen: list[int] = []

    def work() -> None:
        give_way_to_others()
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [max(before, NICENESS)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_a_system_that_forbids_it_is_put_up_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def forbidden(which: int, who: int, niceness: int) -> None:
        asked.append(niceness)
        raise PermissionError(which, who, niceness)

    before = os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.setattr(os, "setpriority", forbidden)
    give_way_to_others()
    assert asked == [max(before, NICENESS)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
