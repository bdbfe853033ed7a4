"""bench/scheduler.py: the load is what it says, and one small run of everything."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from radixkv_bench.scheduler import command
from radixkv_bench.scheduler.load import Load, LoadedScheduler, Short

SMALL = ["--running", "1,3", "--waiting", "0,5", "--prompt-tokens", "64", "--steps", "3", "--admissions", "2"]


@pytest.mark.parametrize("short", Short)
def test_those_that_wait_lack_what_the_load_says(short: Short) -> None:
    with closing(LoadedScheduler(Load(running=3, waiting=5, prompt_tokens=64, short=short), seed=0)) as loaded:
        for _ in range(3):
            assert [span.last - span.first for span in loaded.step()] == [1, 1, 1]
            loaded.scheduler.check_invariants()
        assert (len(loaded.scheduler.running), len(loaded.scheduler.waiting)) == (3, 5)
        assert (loaded.scheduler.req_to_token.num_free > 0) == (short is Short.PAGES)


def test_an_admission_takes_the_place_of_one_that_ended() -> None:
    with closing(LoadedScheduler(Load(running=2, waiting=4, prompt_tokens=64, short=Short.ROWS), seed=0)) as loaded:
        before = {request.id for request in loaded.scheduler.running}
        assert min(loaded.timed_admission()) > 0
        assert len(before & {request.id for request in loaded.scheduler.running}) == 1
        loaded.settle()
        assert (len(loaded.scheduler.running), len(loaded.scheduler.waiting)) == (2, 4)


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "scheduler.json", tmp_path / "scheduler.png"
    monkeypatch.setattr("sys.argv", ["scheduler", *SMALL, "--json", str(file), "--plot", str(picture)])
    assert command.main() == 0
    loads = json.loads(file.read_text(encoding="utf-8"))["loads"]
    assert [(one["short_of"], one["running"], one["waiting"]) for one in loads] == [
        *(("rows", running, waiting) for running in (1, 3) for waiting in (0, 5)),
        *(("pages", running, 5) for running in (1, 3)),
    ]
    assert [one["admission_us"] is not None for one in loads] == [False, True, False, True, False, False]
    assert "prompts of 64 tokens" in capsys.readouterr().out
    assert picture.stat().st_size > 1000


def test_too_few_requests_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["scheduler", "--running", "0"])
    assert command.main() == 2
    assert "--running must be at least 1" in capsys.readouterr().err
