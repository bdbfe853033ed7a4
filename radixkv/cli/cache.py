"""`radixkv cache`: looks after the KV that engines keep on disk. Needs no model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radixkv.cli.cache_report import DAY_S, ID_CHARS, namespace_rows, print_namespaces, print_summary, store_summary
from radixkv.cli.display import note
from radixkv.cli.size_report import readable_bytes
from radixkv.cli.trace_source import progress_on_stderr
from radixkv.config.checks import Bounds, checked_number
from radixkv.errors import ConfigError, TierError

if TYPE_CHECKING:
    from radixkv.tiers.disk_store import DiskStore
    from radixkv.tiers.store_folder import Description

CACHE_EPILOG = """
PATH is the folder that an engine was given as `disk_cache`. It holds a store for each fingerprint: model, dtype, page
size and whatever else decides what KV is. `ls`, `stat`, `verify` and `export` only read, beside a running engine too;
`import` and `prune` need the folder for themselves.

**Examples**

What is in it: `radixkv cache ls ~/kv`

Whether all of it is right: `radixkv cache verify ~/kv`

Ship a system prompt's KV with the model: `radixkv cache export ~/kv prompt.kv --max-pages 500`, and on the other
machine `radixkv cache import ~/kv prompt.kv --capacity-gb 20`

Give room back: `radixkv cache prune ~/kv --older-than 30d`
"""
GIB = 2**30
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}
NO_NAMESPACE = "-"

StorePath = Annotated[Path, typer.Argument(metavar="PATH", help="The folder of the stores.", show_default=False)]
StoreId = Annotated[
    str | None, typer.Option("--store", metavar="ID", help="Only the store whose id begins so.", show_default=False)
]
NamespaceOption = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        metavar="NAME",
        help=f"Only pages of this extra_key, whatever their salt; {NO_NAMESPACE} means those without one.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, all sizes in bytes, times in seconds since 1970.")]

CACHE_COMMANDS = typer.Typer(
    name="cache",
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    epilog=CACHE_EPILOG,
)


@CACHE_COMMANDS.callback()
def cache() -> None:
    """Look after KV on disk: what it holds, whether it is right, what is pruned, exported and imported."""


@CACHE_COMMANDS.command("ls")
def list_namespaces(path: StorePath, store_id: StoreId = None, as_json: AsJson = False) -> None:
    """List what is stored, by store and namespace."""
    rows = [row for store in _readable(path, store_id) for row in namespace_rows(store)]
    _note_undescribed(path, store_id)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        print_namespaces(rows)
    else:
        note(f"{path} holds no pages")


@CACHE_COMMANDS.command()
def stat(path: StorePath, store_id: StoreId = None, as_json: AsJson = False) -> None:
    """Tell what each store is of, its size and its age."""
    summaries = [store_summary(store) for store in _readable(path, store_id)]
    _note_undescribed(path, store_id)
    if as_json:
        typer.echo(json.dumps(summaries, indent=2))
        return
    for summary in summaries:
        print_summary(summary)
    if not summaries:
        note(f"{path} holds no stores")


@CACHE_COMMANDS.command()
def verify(path: StorePath, store_id: StoreId = None, as_json: AsJson = False) -> None:
    """Read every page and compare it with its checksum. Exits with 1 if any is damaged; repairs nothing.

    Damaged pages are never used: an engine misses them, and writes them anew when it has computed them again.
    """
    results = [_verify(store) for store in _readable(path, store_id)]
    results += [{"store": folder, "description": problem} for folder, problem in _undescribed(path, store_id)]
    is_damaged = any(row.get("damaged_pages") or row.get("damaged_records") or "description" in row for row in results)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        for row in results:
            typer.echo(f"{row['store'][:ID_CHARS]}: {_verdict(row)}")
        if not results:
            note(f"{path} holds no stores")
    raise typer.Exit(1 if is_damaged else 0)


def _verify(store: DiskStore) -> dict[str, Any]:
    good = damaged = 0
    with progress_on_stderr() as progress:
        task = progress.add_task(store.path.name[:ID_CHARS], total=store.stats().pages)
        for checked in store.check():
            good, damaged = good + checked.is_right, damaged + (not checked.is_right)
            progress.advance(task)
    records = store.stats().misses.get("damaged", 0)
    return {"store": store.path.name, "good_pages": good, "damaged_pages": damaged, "damaged_records": records}


def _verdict(row: dict[str, Any]) -> str:
    if "description" in row:
        return str(row["description"])
    text = f"{row['good_pages']:,} pages are right"
    if row["damaged_pages"] or row["damaged_records"]:
        text += f", {row['damaged_pages']:,} pages and {row['damaged_records']:,} records are damaged"
    return text


@CACHE_COMMANDS.command("export")
def export_archive(
    path: StorePath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive to write.", show_default=False)],
    store_id: StoreId = None,
    namespace: NamespaceOption = None,
    max_pages: Annotated[
        int | None, typer.Option(min=1, help="At most so many, the most worth keeping first.", show_default=False)
    ] = None,
) -> None:
    """Write pages of one store to a file, for `import` on another machine.

    Namespaces go along with their names and salts: they decide who finds the pages there.
    """
    from radixkv.tiers.page_archive import export_pages

    store = next(stores := _only(path, store_id))  # `stores` keeps it open
    pages = store.hottest(store.stats().pages)
    if namespace is not None:
        pages = [(page, facts) for page, facts in pages if _is_of(facts.namespace, namespace)]
    pages = pages[:max_pages]
    with _archive(file, "xb") as archive, progress_on_stderr() as progress:
        task = progress.add_task("exporting", total=len(pages))
        try:
            count = export_pages(
                store, store.fingerprint, pages, archive, progress=lambda done: progress.advance(task, done)
            )
        except BaseException:
            file.unlink()
            raise
    stores.close()
    typer.echo(f"{count:,} pages exported, {readable_bytes(file.stat().st_size)}")


@CACHE_COMMANDS.command("import")
def import_archive(
    path: StorePath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The archive to read.", show_default=False)],
    capacity_gb: Annotated[
        float | None,
        typer.Option(
            help="Bound of the folder in GiB; needed where there is no such store yet.  [default: what it was]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Store the pages of an archive. Import only archives that you trust: what they say is what the model sees.

    An engine with the same model and settings finds the pages; for any other they lie in a store of their own.
    """
    from radixkv.tiers.disk_store import DiskStore
    from radixkv.tiers.page_archive import import_pages, read_header
    from radixkv.tiers.store_folder import store_identity

    with ExitStack() as stack:
        archive = stack.enter_context(_archive(file, "rb"))
        fingerprint, payload_bytes = read_header(archive)
        archive.seek(0)
        capacity = _gib_to_bytes("--capacity-gb", capacity_gb)
        if capacity is None:
            identity = store_identity(fingerprint, payload_bytes).hex()
            known = [there.capacity_bytes for there in _described(path, identity)] if path.exists() else []
            if not known:
                raise ConfigError(
                    f"{path} holds no store of this model and settings yet; set --capacity-gb to make one"
                )
            capacity = known[0]
        store = DiskStore(path, fingerprint, payload_bytes, capacity)
        stack.callback(store.close)
        progress = stack.enter_context(progress_on_stderr())
        task = progress.add_task("importing", total=None)
        count = import_pages(store, fingerprint, archive, progress=lambda done: progress.advance(task, done))
    lost = store.stats().pages_evicted
    typer.echo(f"{count:,} pages imported" + (f", {lost:,} gave way: the bound is too small for all" if lost else ""))


@CACHE_COMMANDS.command()
def prune(
    path: StorePath,
    store_id: StoreId = None,
    to_gb: Annotated[
        float | None,
        typer.Option(help="Bound of the whole folder in GiB: what was not used for longest goes.", show_default=False),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="Remove what was not used for as long: 90s, 12h, 7d, 4w.", show_default=False),
    ] = None,
    namespace: NamespaceOption = None,
) -> None:
    """Remove pages, and give their room back to the file system.

    Pages that were promised to be kept stay with --older-than until the promise is over. With --to-gb, stores of other
    fingerprints than the one used last (or --store) give way first, whole.
    """
    if to_gb is None and older_than is None and namespace is None:
        raise ConfigError("say what to remove: --to-gb, --older-than or --namespace")
    age_s = None if older_than is None else _seconds(older_than)
    capacity = _gib_to_bytes("--to-gb", to_gb)
    before, removed = _files_bytes(path), 0
    described = _described(path, store_id)
    if capacity is not None:
        main = max(described, key=lambda there: (there.folder / "index").stat().st_mtime, default=None)
        if main is None:
            raise TierError(f"{path} holds no store" + (f" {store_id}" if store_id else ""))
        with _owned(path, main, capacity) as store:
            removed += store.stats().pages_evicted
        described = [main]
    for there in described:
        with _owned(path, there, capacity) as store:
            if namespace is not None:
                roots = {_root(facts.namespace) for _, facts in store.pages() if _is_of(facts.namespace, namespace)}
                removed += sum(store.remove(root) for root in roots)
            if age_s is not None:
                removed += store.remove_unused(time.time() - age_s)
            store.compact()
    freed = before - _files_bytes(path)
    typer.echo(f"{removed:,} pages removed, {readable_bytes(max(freed, 0))} given back")


def _readable(path: Path, store_id: str | None) -> Generator[DiskStore, None, None]:
    """Each store at `path`, open to be read, until the next one is asked for."""
    from radixkv.tiers.disk_store import DiskStore

    for there in _described(path, store_id):
        store = DiskStore(path, there.fingerprint, there.payload_bytes, there.capacity_bytes, read_only=True)
        try:
            yield store
        finally:
            store.close()


@contextmanager
def _owned(path: Path, there: Description, capacity: int | None) -> Iterator[DiskStore]:
    """A store, open to be written, its bound as it was unless `capacity` is given."""
    from radixkv.tiers.disk_store import DiskStore

    store = DiskStore(path, there.fingerprint, there.payload_bytes, capacity or there.capacity_bytes)
    try:
        yield store
    finally:
        store.close()


def _only(path: Path, store_id: str | None) -> Generator[DiskStore, None, None]:
    """As `_readable`, of the only store. Raises: TierError if there are none or several."""
    described = _described(path, store_id)
    if len(described) != 1:
        ids = ", ".join(there.folder.name[:ID_CHARS] for there in described)
        raise TierError(f"{path} holds several stores; choose with --store: {ids}" if ids else f"{path} holds no store")
    return _readable(path, store_id)


def _described(path: Path, store_id: str | None) -> list[Description]:
    """What the stores at `path` say of themselves; those that cannot are left out. Raises: TierError."""
    from radixkv.tiers.store_folder import read_description

    found = []
    for folder in _folders(path, store_id):
        try:
            found.append(read_description(folder))
        except TierError:
            continue  # `_undescribed` tells
    return found


def _undescribed(path: Path, store_id: str | None) -> list[tuple[str, str]]:
    """Id and problem of the stores at `path` whose description is damaged."""
    from radixkv.tiers.store_folder import read_description

    problems = []
    for folder in _folders(path, store_id):
        try:
            read_description(folder)
        except TierError as error:
            problems.append((folder.name, str(error)))
    return problems


def _note_undescribed(path: Path, store_id: str | None) -> None:
    for _, problem in _undescribed(path, store_id):
        note(problem)


def _folders(path: Path, store_id: str | None) -> Sequence[Path]:
    from radixkv.tiers.store_folder import StoreFolder

    folders = list(StoreFolder(path, read_only=True).stores())
    chosen = [folder for folder in folders if folder.name.startswith(store_id or "")]
    if store_id and not chosen:
        raise TierError(f"{path} holds no store {store_id}; it holds {', '.join(f.name[:ID_CHARS] for f in folders)}")
    return chosen


def _files_bytes(path: Path) -> int:
    from radixkv.tiers.store_folder import folder_bytes

    return sum(folder_bytes(folder) for folder in _folders(path, None))


def _is_of(namespace: tuple[str | None, str | None], name: str) -> bool:
    return namespace[0] is None if name == NO_NAMESPACE else namespace[0] == name


def _root(namespace: tuple[str | None, str | None]) -> bytes:
    from radixkv.cache.page_keys import root_key

    return root_key(*namespace)


@contextmanager
def _archive(file: Path, mode: str) -> Iterator[Any]:
    """An open archive. Raises: TierError, also for what goes wrong in the block."""
    try:
        with file.open(mode) as archive:
            yield archive
    except OSError as error:
        raise TierError(f"{file}: {error.strerror}") from error


def _gib_to_bytes(option: str, gib: float | None) -> int | None:
    if gib is None:
        return None
    return int(checked_number(option, gib, Bounds(above=0), what="a finite number of GiB") * GIB)


def _seconds(age: str) -> float:
    """An age such as 7d.

    >>> _seconds("1.5h")
    5400.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", age)
    if match is None:
        raise ConfigError(f"--older-than must be a number and s, m, h, d or w, such as 7d, not {age!r}")
    return float(match[1]) * UNITS_S[match[2]]
