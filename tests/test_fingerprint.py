"""Fingerprints of stores: what they hash, what they remember, which field they name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest

from radixkv.errors import TierError
from radixkv.tiers.fingerprint import Fingerprint, differences, hash_files, hash_tensors
from radixkv.tiers.store_folder import weights_cache
from store_cases import FINGERPRINT

Tensor = tuple[str, str, Sequence[int], bytes]


def test_every_field_makes_another_fingerprint_and_is_named() -> None:
    for field in fields(Fingerprint):
        value = getattr(FINGERPRINT, field.name)
        other = replace(FINGERPRINT, **{field.name: value + 1 if isinstance(value, int) else value + "'" * 60})
        assert other.digest() != FINGERPRINT.digest()
        (line,) = differences(FINGERPRINT, other)
        assert line.startswith(f"{field.name} is ")
        assert len(line) < 130
        assert Fingerprint.from_dict(other.as_dict()) == other
    assert differences(FINGERPRINT, FINGERPRINT) == []


@pytest.mark.parametrize("content", [None, [], {}, {"weights": "x"}, FINGERPRINT.as_dict() | {"page_size": "4"}])
def test_a_damaged_fingerprint_is_refused(content: object) -> None:
    with pytest.raises(TierError, match="fingerprint has the fields weights"):
        Fingerprint.from_dict(content)


def test_files_are_hashed_by_content_and_once(tmp_path: Path) -> None:
    cache = weights_cache(tmp_path / "kv")
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first.write_bytes(b"first" * 1000)
    second.write_bytes(b"second")
    read: list[int] = []
    digest = hash_files([first, second], cache=cache, progress=read.append)
    assert sum(read) == 5006
    read.clear()
    assert hash_files([second, first], cache=cache, progress=read.append) == digest
    assert read == []
    assert cache.stat().st_mode & 0o777 == 0o600
    second.rename(tmp_path / "other.safetensors")
    assert hash_files([first, tmp_path / "other.safetensors"], cache=cache, progress=read.append) == digest
    assert read == [6]
    stat = first.stat()
    first.write_bytes(b"First" * 1000)
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as some tools do: the time of change tells
    assert hash_files([first, tmp_path / "other.safetensors"], cache=cache) != digest


def test_a_damaged_cache_of_hashes_costs_time_alone(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    cache = weights_cache(tmp_path / "kv")
    digest = hash_files([weights], cache=cache)
    content = cache.read_bytes()
    for offset in range(len(content)):
        cache.write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        assert hash_files([weights], cache=cache) == digest
    cache.write_bytes(b"[]")
    assert hash_files([weights], cache=cache) == digest
    assert hash_files([weights], cache=tmp_path / "nowhere" / "weights.json") == digest


def test_a_cache_of_hashes_that_cannot_be_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    cache = weights_cache(tmp_path / "kv")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        digest = hash_files([weights], cache=cache)
    assert [path.name for path in cache.parent.iterdir() if path.name.startswith(cache.name)] == []
    assert hash_files([weights], cache=cache) == digest == hash_files([weights], cache=None)


def test_the_cache_of_hashes_is_bounded(tmp_path: Path) -> None:
    cache = weights_cache(tmp_path / "kv")
    weights = tmp_path / "model.safetensors"
    for number in range(80):
        weights.write_bytes(b"x" * number)
        hash_files([weights], cache=cache)
    assert cache.stat().st_size < 32 * 400


def test_weights_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="cannot be read to fingerprint it: No such file"):
        hash_files([tmp_path / "none.safetensors"])


def test_tensors_are_hashed_by_name_type_shape_and_content() -> None:
    tensors: list[tuple[str, str, Sequence[int], bytes]] = [
        ("a", "float32", (2, 2), b"1234"),
        ("b", "int8", (4,), b"1"),
    ]
    digest = hash_tensors(tensors)
    assert hash_tensors(reversed(tensors)) == digest
    others: list[Tensor] = [
        ("c", "float32", (2, 2), b"1234"),
        ("a", "float16", (2, 2), b"1234"),
        ("a", "float32", (4, 1), b"1234"),
        ("a", "float32", (2, 2), b"1235"),
    ]
    assert len({digest, *(hash_tensors([other, tensors[1]]) for other in others)}) == 5
