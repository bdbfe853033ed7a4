"""Tables of figures that fit 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.table import Table


def number_table(names: Iterable[str], numbers: Iterable[str], *, name_style: str = "", **settings: Any) -> Table:
    """A table whose columns `names` hold text, on the left, and `numbers` hold figures, on the right."""
    table = Table(**{"box": box.SIMPLE_HEAD, "padding": 0, "pad_edge": False, **settings})
    for heading in names:
        table.add_column(heading, style=name_style, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True, min_width=6)
    return table
