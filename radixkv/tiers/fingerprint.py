"""What KV depends on besides its tokens: a store whose fingerprint differs holds other KV, and is another store."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from radixkv.errors import TierError
from radixkv.tiers.page_record import FORMAT

_BLOCK_BYTES = 1 << 22
_MAX_CACHED_HASHES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """All that decides what the KV of a token is, besides the tokens up to it.

    >>> ours = Fingerprint(weights="6a", dtype="float32", kv_dtype="auto", layout="NHD", page_size=16, model="none")
    >>> from dataclasses import replace
    >>> differences(ours, replace(ours, dtype="bfloat16", page_size=32))
    ["dtype is 'bfloat16' there and 'float32' here", 'page_size is 32 there and 16 here']
    """

    weights: str  # a hash of their content: `hash_files` or `hash_tensors`
    dtype: str
    kv_dtype: str
    layout: str  # what a payload is: how values lie in a page of the pool, and of which layers
    page_size: int
    model: str  # what its config says that decides what it computes, rotary parameters included, as JSON
    adapter: str = ""
    format: int = FORMAT

    def digest(self) -> bytes:
        """A name for it. 16 bytes."""
        text = json.dumps(asdict(self), sort_keys=True)
        return blake2b(text.encode(), digest_size=16, person=b"radixkv1 store").digest()

    def as_dict(self) -> dict[str, Any]:
        """Its fields, as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: object) -> Fingerprint:
        """Undo `as_dict`. Raises: TierError."""
        types = {field.name: int if field.type == "int" else str for field in fields(cls)}
        if (
            not isinstance(content, dict)
            or set(content) != set(types)
            or not all(type(content[name]) is types[name] for name in types)
        ):
            raise TierError(f"a fingerprint has the fields {', '.join(types)}; this one is damaged")
        return cls(**content)


def differences(ours: Fingerprint, theirs: Fingerprint) -> list[str]:
    """What differs, a line for each field."""
    pairs = ((field.name, getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(ours))
    return [f"{name} is {_short(there)} there and {_short(here)} here" for name, here, there in pairs if here != there]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}…{text[-16:]}"


def hash_tensors(tensors: Iterable[tuple[str, str, Sequence[int], memoryview | bytes]]) -> str:
    """The content of tensors: (name, dtype, shape, bytes) of each, in any order. O(bytes), of which memory holds one.

    A tensor is hashed by itself; the hash of all is that of the sorted list, so that their order is nothing.
    """
    lines = []
    for name, dtype, shape, content in tensors:
        digest = sha256(content).hexdigest()
        lines.append(json.dumps([name, dtype, [int(size) for size in shape], digest]))
    return blake2b("\n".join(sorted(lines)).encode(), digest_size=16, person=b"radixkv1 tensors").hexdigest()


def hash_files(
    paths: Iterable[str | Path], *, cache: Path | None = None, progress: Callable[[int], None] = lambda num_bytes: None
) -> str:
    """The content of the files of a model's weights (and of its config: give all that decide what it computes).

    Where they lie and how they are called changes nothing. O(bytes).

    Args:
        cache: file that remembers the hashes by each file's identity (path, device, inode, size, time of change), so
            that only files that changed are read. It may be missing, damaged, or not writable.
        progress: called with the bytes read since the last call.

    Raises: TierError if a file cannot be read.
    """
    known = _read_cache(cache)
    hashes = []
    for path in sorted(Path(path).resolve() for path in paths):
        try:
            identity = _identity(path)
            if identity not in known:
                digest = _hash_file(path, progress)
                if _identity(path) == identity:  # else it changed while it was read: do not remember
                    known[identity] = digest
                hashes.append(digest)
            else:
                hashes.append(known[identity])
                known[identity] = known.pop(identity)  # used last
        except OSError as error:
            raise TierError(f"{path} cannot be read to fingerprint it: {error.strerror}") from error
    _write_cache(cache, known)
    return blake2b("\n".join(sorted(hashes)).encode(), digest_size=16, person=b"radixkv1 files").hexdigest()


def _identity(path: Path) -> str:
    stat = path.stat()
    return json.dumps([str(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])


def _hash_file(path: Path, progress: Callable[[int], None]) -> str:
    digest = sha256()  # about three times as fast as BLAKE2b, where the CPU helps
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def _read_cache(cache: Path | None) -> dict[str, str]:
    if cache is None:
        return {}
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        files, checksum = content["files"], content["checksum"]
        if checksum != _cache_checksum(files):
            return {}
        return dict(files)
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # it only saves time


def _write_cache(cache: Path | None, known: dict[str, str]) -> None:
    if cache is None:
        return
    files = dict(list(known.items())[-_MAX_CACHED_HASHES:])
    text = json.dumps({"files": files, "checksum": _cache_checksum(files)})
    with suppress(OSError):  # it only saves time
        descriptor, name = tempfile.mkstemp(dir=cache.parent, prefix=cache.name)  # 0600
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, cache)
        except OSError:
            os.unlink(name)
            raise


def _cache_checksum(files: object) -> str:
    return blake2b(json.dumps(files).encode(), digest_size=16).hexdigest()
