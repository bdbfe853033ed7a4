"""The folder of disk stores: who owns it, which stores lie in it, and how much they take together.

    PATH/                 0700
      radixkv-store       marks the folder; whoever has it locked owns all of it, and has written its process id there
      weights.json        hashes of weights by file identity (fingerprint.hash_files)
      <32 hex digits>/    one store for each fingerprint
        store.json        what it holds: fingerprint, bytes of a payload, capacity
        index             records of fixed size (page_record), one for each payload
        payloads          payloads of fixed size
        names             the names of the namespaces, a line each

The owner's lock is one of `flock`: it is tied to the open file, so it ends with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from radixkv.errors import TierError
from radixkv.tiers.fingerprint import Fingerprint

MARKER = "radixkv-store"
WEIGHTS_CACHE = "weights.json"
DESCRIPTION = "store.json"
_DIGEST_CHARS = 32


class Description(NamedTuple):
    """What a store says of itself."""

    folder: Path
    fingerprint: Fingerprint
    payload_bytes: int
    capacity_bytes: int

    @property
    def identity(self) -> bytes:
        """What tells this store from others, whoever copied their files. 16 bytes."""
        return store_identity(self.fingerprint, self.payload_bytes)


def store_identity(fingerprint: Fingerprint, payload_bytes: int) -> bytes:
    """A name for a store. 16 bytes."""
    content = fingerprint.digest() + payload_bytes.to_bytes(8, "little")
    return blake2b(content, digest_size=_DIGEST_CHARS // 2, person=b"radixkv1 folder").digest()


class StoreFolder:
    """An open folder of stores, owned by this process or, if read-only, by nobody here."""

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        """Make the folder if there is none, and take its lock; neither if `read_only`.

        Raises: TierError if it is no folder of stores, cannot be used, or has another owner.
        """
        self.path = Path(path)
        self.read_only = read_only
        self._lock: int | None = None
        self._owner = os.getpid()
        try:
            self._check_kind()
            if not read_only:
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._take_lock()
        except OSError as error:
            raise TierError(f"the store {self.path} cannot be opened: {error.strerror}") from error
        except ValueError as error:  # a NUL byte, or half of a surrogate pair
            raise TierError(f"the store {str(self.path)!r} cannot be opened: {error}") from error

    def _check_kind(self) -> None:
        if not self.path.exists():
            if self.read_only:
                raise TierError(f"there is no store at {self.path}")
        elif not self.path.is_dir():
            raise TierError(f"a store is a folder; {self.path} is none")
        elif not (self.path / MARKER).is_file() and (self.read_only or not self._is_empty()):
            raise TierError(f"{self.path} is no store of radixkv; give the path of one, or of a new or empty folder")

    def _is_empty(self) -> bool:
        return all(entry.name == "lost+found" for entry in self.path.iterdir())  # which a new file system has

    def _take_lock(self) -> None:
        lock = os.open(self.path / MARKER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()[:64]}\n".encode(), 0)
        except BlockingIOError:
            owner = os.pread(lock, 200, 0).decode("utf-8", "replace").strip() or "another process"
            os.close(lock)
            raise TierError(
                f"the store {self.path} is in use by {owner}; one engine at a time owns a store: give another path"
            ) from None
        except OSError:  # of a full disk, too
            os.close(lock)
            raise
        self._lock = lock

    def store_path(self, identity: bytes) -> Path:
        """Where the store of that identity lies."""
        return self.path / identity.hex()

    def stores(self) -> Iterator[Path]:
        """The folders of all stores, whether their descriptions are whole or not."""
        for path in sorted(self.path.iterdir()):
            if len(path.name) == _DIGEST_CHARS and path.is_dir() and not path.is_symlink():
                yield path

    def other_bytes(self, path: Path) -> int:
        """Bytes of all files but those of the store at `path`."""
        loose = sum(entry.stat().st_size for entry in self.path.iterdir() if entry.is_file())
        return loose + sum(folder_bytes(other) for other in self.stores() if other != path)

    def longest_unused(self, path: Path) -> Path | None:
        """The store, other than that at `path`, that was written to longest ago."""
        others = [other for other in self.stores() if other != path]
        return min(others, key=_last_written, default=None)

    def delete(self, path: Path) -> None:
        """Delete a store. Raises: OSError."""
        shutil.rmtree(path)

    def close(self) -> None:
        """Give up the lock. Idempotent; in a forked child it leaves the parent's lock alone."""
        if self._lock is not None:
            if os.getpid() == self._owner:  # in a child it would unlock it for the parent, too
                fcntl.flock(self._lock, fcntl.LOCK_UN)  # at once, whoever was forked and has not let go of its copy yet
            os.close(self._lock)
            self._lock = None


def weights_cache(path: str | Path) -> Path:
    """Where hashes of weights are remembered beside the stores at `path`; the folder is made if there is none.

    Raises: TierError if `path` is no folder of stores.
    """
    StoreFolder(path).close()
    return Path(path) / WEIGHTS_CACHE


def folder_bytes(path: Path) -> int:
    """Bytes of the files of one store."""
    with suppress(FileNotFoundError):
        return sum(entry.stat().st_size for entry in path.iterdir() if entry.is_file())
    return 0


def _last_written(path: Path) -> float:
    return max((entry.stat().st_mtime for entry in path.iterdir()), default=0.0)


def read_description(folder: Path) -> Description:
    """What the store in `folder` says of itself. Raises: TierError if that is damaged, or of another version."""
    try:
        content: Any = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        described = Description(
            folder,
            Fingerprint.from_dict(content["fingerprint"]),
            int(content["payload_bytes"]),
            int(content["capacity_bytes"]),
        )
    except (OSError, ValueError, TypeError, KeyError, TierError):
        raise TierError(f"{folder / DESCRIPTION} is damaged; an engine with that store's settings mends it") from None
    if described.identity.hex() != folder.name:
        raise TierError(f"{folder / DESCRIPTION} describes another store than the one beside it")
    return described


def write_description(described: Description) -> None:
    """Write what a store says of itself, unless it says so already. Raises: OSError."""
    with suppress(TierError):
        if read_description(described.folder) == described:
            return
    content = {
        "fingerprint": described.fingerprint.as_dict(),
        "payload_bytes": described.payload_bytes,
        "capacity_bytes": described.capacity_bytes,
    }
    replace_file(described.folder / DESCRIPTION, json.dumps(content, indent=2).encode())


def replace_file(path: Path, content: bytes, *, alone: bool = True) -> None:
    """Write a private file so that at any moment it is there whole, as it was or as it is to be. Raises: OSError.

    alone: whether nobody else writes it at the same time. A draft that a kill leaves behind is written over then; else
        each has a name of its own, so that none is taken for another.
    """
    if alone:
        draft = path.with_name(path.name + ".new")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    else:
        descriptor, name = tempfile.mkstemp(".new", ".radixkv-", path.parent)  # short, as `path` may have a long name
        draft = Path(name)
    try:
        try:
            written = 0
            while written < len(content):
                written += os.write(descriptor, content[written:])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
