"""The names of a store's namespaces, so that a store that is opened again knows which tenant a page belongs to.

A line each: a checksum, and the two names as JSON. A line that is damaged costs the names alone: its pages are found
as ever, by keys that the names are digested into, and the next use of one of them writes the line again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from radixkv.cache.page_keys import root_key
from radixkv.tiers.page_record import NO_NAMES, Namespaces
from radixkv.tiers.store_folder import replace_file

NAMES = "names"
Namespace = tuple[str | None, str | None]


class NameTable:
    """The names of namespaces by their root key, in memory and in a file of at most `max_bytes`."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Read the file, if there is one. Raises: OSError."""
        self._path = folder / NAMES
        self._max_bytes = max_bytes
        self.names: Namespaces = dict(NO_NAMES)
        self.num_damaged = 0
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            content = b""
        self.num_bytes = len(content)
        self._ends_cleanly = content.endswith(b"\n") or not content
        for line in content.splitlines():
            namespace = _parsed(line)
            if namespace is None:
                self.num_damaged += bool(line)
            else:
                self.names[root_key(*namespace)] = namespace

    def add(self, root: bytes, namespace: Namespace, used_roots: Callable[[], set[bytes]]) -> bool:
        """Write the names of a namespace, unless they are known. O(1) unless the file is full.

        Returns: False if the file would be too long, even with those of `used_roots()` alone.

        Raises: OSError; the table is as before then.
        """
        if root in self.names:
            return True
        line = _line(namespace)
        if self.num_bytes + 1 + len(line) > self._max_bytes:
            self.keep(used_roots())
            if self.num_bytes + len(line) > self._max_bytes:
                return False
        self._append(line if self._ends_cleanly else b"\n" + line)
        self.names[root] = namespace
        return True

    def keep(self, roots: set[bytes]) -> None:
        """Forget the names of all namespaces but `roots`. Raises: OSError; the table is as before then."""
        kept = {root: names for root, names in self.names.items() if root in roots or root in NO_NAMES}
        content = b"".join(_line(names) for root, names in kept.items() if root not in NO_NAMES)
        replace_file(self._path, content)
        self.names, self.num_bytes, self._ends_cleanly = kept, len(content), True

    def _append(self, data: bytes) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            written = os.pwrite(file, data, self.num_bytes)
            if written < len(data):
                os.ftruncate(file, self.num_bytes)
                raise OSError(28, os.strerror(28))
        finally:
            os.close(file)
        self.num_bytes += len(data)
        self._ends_cleanly = True


def _line(namespace: Namespace) -> bytes:
    text = json.dumps(namespace).encode()
    return _checksum(text) + b" " + text + b"\n"


def _parsed(line: bytes) -> Namespace | None:
    """The names in a line; None if it is damaged."""
    checksum, _, text = line.partition(b" ")
    if checksum != _checksum(text):
        return None
    extra_key, cache_salt = json.loads(text)
    return extra_key, cache_salt


def _checksum(text: bytes) -> bytes:
    return blake2b(text, digest_size=16, person=b"radixkv1 names").hexdigest().encode()
