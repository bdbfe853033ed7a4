"""What `radixkv cache` prints of stores: namespaces, fingerprints, sizes and ages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from radixkv.cli.size_report import readable_bytes

if TYPE_CHECKING:
    from radixkv.tiers.disk_store import DiskStore
    from radixkv.tiers.page_store import FoundPage

ID_CHARS = 8
DAY_S = 86_400


def namespace_rows(store: DiskStore) -> list[dict[str, Any]]:
    """A row for each namespace of a store, the most pages first. Salts are not told."""
    rows: dict[tuple[str | None, str | None], dict[str, Any]] = {}
    now_s = time.time()
    for page, facts in store.pages():
        row = rows.setdefault(
            facts.namespace,
            {
                "store": store.path.name[:ID_CHARS],
                "namespace": facts.namespace[0],
                "has_salt": facts.namespace[1] is not None,
                "pages": 0,
                "tokens": 0,
                "bytes": 0,
                "kept_pages": 0,
                "last_used_s": 0.0,
            },
        )
        row["pages"] += 1
        row["tokens"] += _num_tokens(page)
        row["bytes"] += store.payload_bytes
        row["kept_pages"] += facts.kept_until_s is not None and facts.kept_until_s > now_s
        row["last_used_s"] = max(row["last_used_s"], facts.used_s)
    return sorted(rows.values(), key=lambda row: -row["pages"])


def _num_tokens(page: FoundPage) -> int:
    """Tokens of which it holds the KV: none if it is a part of a state."""
    from radixkv.tiers.page_store import is_state_part

    return 0 if is_state_part(page.tokens) else page.num_tokens


def store_summary(store: DiskStore) -> dict[str, Any]:
    """What a store is of, and how full it is."""
    used = [facts.used_s for _, facts in store.pages()]
    return {
        "store": store.path.name,
        "fingerprint": store.fingerprint.as_dict(),
        "payload_bytes": store.payload_bytes,
        "capacity_bytes": store.capacity_bytes,
        "file_bytes": store.num_bytes,
        "pages": len(used),
        "tokens": sum(_num_tokens(page) for page, _ in store.pages()),
        "damaged_records": store.stats().misses.get("damaged", 0),
        "first_used_s": min(used, default=None),
        "last_used_s": max(used, default=None),
    }


def print_namespaces(rows: Sequence[dict[str, Any]]) -> None:
    """The table of `radixkv cache ls`."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for heading in ("store", "namespace", "pages", "tokens", "size", "kept", "last used"):
        table.add_column(heading, justify="left" if heading in ("store", "namespace") else "right")
    for row in rows:
        name = "none" if row["namespace"] is None else repr(row["namespace"])
        table.add_row(
            row["store"],
            escape(name + (", salted" if row["has_salt"] else "")),
            f"{row['pages']:,}",
            f"{row['tokens']:,}",
            readable_bytes(row["bytes"]),
            f"{row['kept_pages']:,}",
            age(row["last_used_s"]),
        )
    Console().print(table)


def print_summary(summary: dict[str, Any]) -> None:
    """The table of `radixkv cache stat` for one store."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"Store {summary['store']}", box=box.SIMPLE, show_header=False, title_justify="left")
    for name, value in summary["fingerprint"].items():
        table.add_row(name.replace("_", " "), escape(str(value) or "none"))
    table.add_row("page", readable_bytes(summary["payload_bytes"]))
    table.add_row("files", f"{readable_bytes(summary['file_bytes'])} of {readable_bytes(summary['capacity_bytes'])}")
    table.add_row("pages", f"{summary['pages']:,} with {summary['tokens']:,} tokens")
    if summary["damaged_records"]:
        table.add_row("damaged records", f"{summary['damaged_records']:,}")
    if summary["pages"]:
        table.add_row("last used", f"{age(summary['last_used_s'])}; the oldest page {age(summary['first_used_s'])}")
    Console().print(table)


def age(used_s: float) -> str:
    """How long ago a time was, in the unit that reads best."""
    passed_s = max(time.time() - used_s, 0.0)
    for unit_s, unit in ((DAY_S, "d"), (3600, "h"), (60, "min")):
        if passed_s >= unit_s:
            return f"{passed_s / unit_s:,.0f} {unit} ago"
    return f"{passed_s:.0f} s ago"
