"""Progress bars: one that a thread draws, and one that is drawn between measurements only."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from radixkv_bench.common.device_timing import OnStep

REFRESH_S = 0.2


def counting_bar(console: Console) -> Progress:
    """Bars that show how many of how many steps are done, and the time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def quiet_bar(console: Console) -> Progress:
    """Bars that no thread draws, for timings that a thread would disturb; `add_steps` draws them."""
    return Progress(console=console, transient=True, auto_refresh=False)


def add_steps(progress: Progress, text: str, total: int) -> OnStep:
    """Add a bar to a `quiet_bar`. Returns: what to call with the number of steps that were done."""
    task, drawn_s = progress.add_task(text, total=total), 0.0
    progress.refresh()

    def on_step(steps: int) -> None:
        nonlocal drawn_s
        progress.advance(task, steps)
        done = progress.tasks[progress.task_ids.index(task)].finished
        if done or time.perf_counter() - drawn_s > REFRESH_S:
            progress.refresh()
            drawn_s = time.perf_counter()

    return on_step
