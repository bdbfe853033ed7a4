"""Every form of token ids means the same; everything else is refused with the value and its position."""

from __future__ import annotations

import array
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radixkv import PrefixCache, RadixTree
from radixkv.cache.token_ids import MAX_TOKEN_ID, token_array, token_bytes
from radixkv.errors import InvalidTokenIdsError, TokenIdsTypeError
from strategies import dump, snapshot

IDS = [3, 0, 1, 127, 2, 127]

INT_TYPECODES = "bBhHiIlLqQ"
INT_DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i2", ">u2", ">i4", ">u4", ">i8", ">u8"]
TORCH_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def read_only(values: Any) -> Any:
    """A numpy array that cannot be written."""
    result = np.array(values, np.int32)
    result.flags.writeable = False
    return result


def unaligned(values: Any) -> Any:
    """An int32 array that starts at an odd address."""
    data = b"\0" + np.array(values, np.int32).tobytes()
    return np.frombuffer(data, np.uint8)[1:].view(np.int32)


class Token(IntEnum):
    """Ids by name."""

    LARGEST = 127


def spread(values: list[int]) -> list[int]:
    """`values` with a number that does not count after each."""
    return [number for value in values for number in (value, 99)]


def strided(values: list[int], dtype: str) -> Any:
    """Every second number of a numpy array."""
    return np.array(spread(values), dtype)[::2]


def strided_tensor(values: list[int], dtype: torch.dtype) -> Any:
    """Every second number of a torch tensor."""
    return torch.tensor(spread(values), dtype=dtype)[::2]


FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "list of numpy integers": lambda values: [np.int64(value) for value in values],
    "list of several kinds": lambda values: [Token(v) if v == 127 else np.uint8(v) if v == 2 else v for v in values],
    **{f"array {code}": partial(array.array, code) for code in INT_TYPECODES},
    **{f"numpy {dtype}": partial(np.array, dtype=dtype) for dtype in INT_DTYPES},
    "numpy strided": lambda values: np.array(spread(values), np.int64)[::2],
    "numpy reversed": lambda values: np.array(values[::-1], np.int32)[::-1],
    "numpy reversed and strided": lambda values: np.array(spread(values[::-1]), np.int16)[::2][::-1],
    **{f"numpy {dtype} strided": partial(strided, dtype=dtype) for dtype in INT_DTYPES},
    "numpy column": lambda values: np.array([values, values], np.int32).T[:, 1],
    "numpy read-only": read_only,
    "numpy read-only and big-endian": lambda values: read_only(values).astype(">i4", copy=True).view(),
    "numpy unaligned": unaligned,
    **{str(dtype): partial(torch.tensor, dtype=dtype) for dtype in TORCH_DTYPES},
    "torch strided": lambda values: torch.tensor(spread(values), dtype=torch.int64)[::2],
    **{f"{dtype} strided": partial(strided_tensor, dtype=dtype) for dtype in TORCH_DTYPES},
    "torch column": lambda values: torch.tensor([values, values], dtype=torch.int64).T[:, 1],
    "torch int32 column": lambda values: torch.tensor([values, values], dtype=torch.int32).T[:, 1],
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_mean_the_same(form: str) -> None:
    ids = FORMS[form](IDS)
    result = token_array(ids)
    assert result.dtype == np.dtype("<i4")
    assert result.flags.c_contiguous
    assert result.tolist() == IDS
    assert token_bytes(ids) == b"".join(value.to_bytes(4, "little") for value in IDS)


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_no_ids(form: str) -> None:
    result = token_array(FORMS[form]([]))
    assert result.dtype == np.int32
    assert result.shape == (0,)


def use_tree(make: Callable[[list[int]], Any]) -> list[object]:
    """Every verb of the tree that takes ids, and what it says."""
    tree = RadixTree(page_size=2)
    said: list[object] = [
        tree.insert(make(IDS), make([0, 1, 2])).prefix_len,
        tree.insert(make([*IDS[:4], 5, 6, 7]), make([0, 1, 3])).prefix_len,
    ]
    found = tree.match_prefix(make([*IDS[:3], 9, 9]))
    tail = tree.insert_tail(found.node, make([7]), 4)
    partial = tree.find_partial(found.node, make([7, 8]))
    assert partial is not None
    assert partial.node is tail
    said += [found.length, found.pages.tolist(), partial[:2], tree.peek(make(IDS)), tree.peek_path(make(IDS[:5]))[0]]
    tree.check_invariants()
    return [*said, dump(tree)]


def use_cache(make: Callable[[list[int]], Any]) -> list[object]:
    """Every verb of the cache that takes ids, and what it says."""
    cache = PrefixCache(8, 2, copy_page=lambda source, target, num_tokens: None)
    said: list[object] = []
    for ids in (IDS, [*IDS[:5], 4, 4]):
        with cache.acquire(make(ids)) as lease:
            said += [cache.peek(make(ids)), lease.cached_tokens, lease.commit(make(ids[:5])), lease.commit(make(ids))]
    cache.check_invariants()
    return [*said, cache.peek(make(IDS)), cache.explain(make([*IDS[:4], 1])).cached_tokens, dump(cache.tree)]


@pytest.mark.parametrize("form", FORMS)
def test_every_verb_takes_every_form(form: str) -> None:
    assert use_tree(FORMS[form]) == use_tree(list)
    assert use_cache(FORMS[form]) == use_cache(list)


def test_ranges_and_numbers_repeated_in_place() -> None:
    tree = RadixTree(page_size=2)
    tree.insert(range(3, 13, 2), range(2))
    assert tree.match_prefix(np.arange(3, 13, 2)).length == 4
    repeated = np.broadcast_to(np.int32(7), (6,))
    assert repeated.strides == (0,)
    tree.insert(repeated, [5, 6, 7])
    assert tree.match_prefix([7] * 6).pages.tolist() == [5, 6, 7]
    assert tree.peek(torch.tensor(7).expand(6)) == 6


@pytest.mark.parametrize("ids", [range(5), range(4, -1, -1), range(0, 20, 7), range(0), range(5, 2)])
def test_ranges(ids: range) -> None:
    assert token_array(ids).tolist() == list(ids)


def test_the_tree_does_not_keep_the_callers_memory() -> None:
    ids = np.array([1, 2, 3], np.int32)
    tree = RadixTree()
    tree.insert(ids, [0, 1, 2])
    ids[:] = 9
    assert tree.peek([1, 2, 3]) == 3


@settings(derandomize=True, database=None, deadline=None, max_examples=50)
@given(st.lists(st.integers(0, MAX_TOKEN_ID)))
def test_any_valid_ids_survive(ids: list[int]) -> None:
    for form in (list, tuple, *(FORMS[name] for name in ["array q", "numpy >i4", "numpy strided", "torch strided"])):
        assert token_array(form(ids)).tolist() == ids


# -- refusals --------------------------------------------------------------------------------------------------------

WIDE_FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array": lambda values: array.array("q", values),
    "numpy": lambda values: np.array(values, np.int64),
    "big-endian": lambda values: np.array(values, ">i8"),
    "strided": lambda values: np.array(spread(values), np.int64)[::2],
    "torch": torch.tensor,
}


@pytest.mark.parametrize("form", WIDE_FORMS)
@pytest.mark.parametrize("value", [-1, -(2**31), -(2**31) - 1, 2**31, 2**32, 2**40, -(2**63)])
def test_values_out_of_range(form: str, value: int) -> None:
    with pytest.raises(InvalidTokenIdsError, match=rf"token id {value} at position 2 lies outside \[0, 2\*\*31\)"):
        token_array(WIDE_FORMS[form]([5, MAX_TOKEN_ID, value, 0]))


@pytest.mark.parametrize("value", [2**63, 2**64 - 1])
def test_values_beyond_int64(value: int) -> None:
    for ids in ([1, value], array.array("Q", [1, value]), np.array([1, value], np.uint64)):
        with pytest.raises(InvalidTokenIdsError, match=f"token id {value} at position 1"):
            token_array(ids)


def test_values_beyond_any_integer_type() -> None:
    with pytest.raises(InvalidTokenIdsError, match=f"token id {2**70} at position 1"):
        token_array([1, 2**70])


def test_range_out_of_range() -> None:
    with pytest.raises(InvalidTokenIdsError, match="token id -1 at position 2"):
        token_array(range(1, -5, -1))
    with pytest.raises(InvalidTokenIdsError, match=f"token id {2**31} at position 1"):
        token_array(range(2**31 - 1, 2**31 + 1))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2.0], r"not float \(2.0 at position 1\)"),
        ([1, np.float32(2)], r"not float32 \(.*2.0.* at position 1\)"),
        ([True, 1], r"not bool \(True at position 0\)"),
        ([1, np.True_], r"not bool.* \(.*True.* at position 1\)"),
        ([1, "2"], r"not str \('2' at position 1\)"),
        ([1, b"2"], r"not bytes \(b'2' at position 1\)"),
        ((1, 2, None), r"not NoneType \(None at position 2\)"),
        ([[1, 2], [3]], r"not list \(\[1, 2\] at position 0\)"),
        ([1, (2,)], r"not tuple \(\(2,\) at position 1\)"),
        ([1, 2j], r"not complex \(2j at position 1\)"),
        (array.array("d", [1.5]), r"not float64 \(.*1.5.* at position 0\)"),
        (array.array("f", [1.5]), r"not float32 \(.*1.5.* at position 0\)"),
        (array.array("u", "ab"), r"\(.*a.* at position 0\)"),
        (np.array([0.5, 1]), r"not float64 \(.*0.5.* at position 0\)"),
        (np.array([True]), r"not bool \(.*True.* at position 0\)"),
        (np.array(["a"]), r"\(.*a.* at position 0\)"),
        (np.array([1, None]), r"not object \(1 at position 0\)"),
        (np.array([0], "m8[s]"), "not timedelta64"),
        (torch.tensor([0.5]), "not torch.float32 .0.5 at position 0.$"),
        (torch.tensor([0.5], requires_grad=True), "not torch.float32 .0.5 at position 0.$"),
        (torch.tensor([1.0]).bfloat16(), "not torch.bfloat16 .1.0 at position 0.$"),
        (torch.tensor([1j]), "not torch.complex64"),
        (torch.empty(3, dtype=torch.int64, device="meta"), "not a tensor of torch.int64 on meta"),
        (torch.tensor([1, 0]).to_sparse(), "not a tensor of torch.int64 on cpu"),
        (torch.tensor([True]), r"not bool \(.*True.* at position 0\)"),
        ("123", "not str"),
        (b"123", "not bytes"),
        (None, "not NoneType"),
        (7, "not int"),
        ({1: 2}, "not dict"),
        ({1, 2}, "not set"),
        pytest.param(iter([1]), "not list_iterator", id="an iterator"),
    ],
    ids=repr,
)
def test_what_is_not_integers(ids: Any, message: str) -> None:
    with pytest.raises(TokenIdsTypeError, match=message) as caught:
        token_array(ids)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("ids", "shape"),
    [
        (np.zeros((2, 3), np.int32), r"\(2, 3\)"),
        (np.zeros((0, 3), np.int32), r"\(0, 3\)"),
        (np.ones((1, 1), np.int32), r"\(1, 1\)"),
        (np.array(5), r"\(\)"),
        (torch.zeros((1, 4), dtype=torch.long), r"\(1, 4\)"),
        (torch.tensor(5), r"\(\)"),
    ],
    ids=repr,
)
def test_what_is_not_one_sequence(ids: Any, shape: str) -> None:
    with pytest.raises(InvalidTokenIdsError, match=f"must be one sequence, not an array of shape {shape}") as caught:
        token_array(ids)
    assert isinstance(caught.value, ValueError)


BAD: dict[str, tuple[Any, type[Exception]]] = {
    "negative": ([3, 0, -1], InvalidTokenIdsError),
    "negative int32": (np.array([3, 0, -1], np.int32), InvalidTokenIdsError),
    "negative, strided": (np.array([3, 9, 0, 9, -1], np.int32)[::2], InvalidTokenIdsError),
    "negative tensor": (torch.tensor([3, 0, -1], dtype=torch.int32), InvalidTokenIdsError),
    "negative array": (array.array("b", [3, 0, -1]), InvalidTokenIdsError),
    "too large": ([3, 0, 2**31], InvalidTokenIdsError),
    "too large tensor": (torch.tensor([3, 0, 2**31]), InvalidTokenIdsError),
    "too large for any integer": ([3, 0, 2**80], InvalidTokenIdsError),
    "fraction": ([3, 0, 1.5], TokenIdsTypeError),
    "fractions": (np.array([3.0, 0.0]), TokenIdsTypeError),
    "tensor of fractions": (torch.tensor([3.0, 0.0]), TokenIdsTypeError),
    "text": ("3 0 1", TokenIdsTypeError),
    "truth": ([True, False], TokenIdsTypeError),
    "matrix": (np.array([IDS, IDS]), InvalidTokenIdsError),
    "nothing": (None, TokenIdsTypeError),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_ids_leave_everything_as_it_was(name: str) -> None:
    bad, error = BAD[name]
    cache = PrefixCache(8, 2, copy_page=lambda source, target, num_tokens: None)
    tree = cache.tree
    with cache.acquire(IDS) as lease:
        lease.commit(IDS[:5])
        before, stats, pages = snapshot(tree), cache.stats(), lease.pages.tolist()
        for call in (
            tree.match_prefix,
            tree.peek,
            tree.peek_path,
            lambda ids: tree.insert(ids, [6]),
            cache.peek,
            cache.acquire,
            cache.explain,
            lease.commit,
        ):
            with pytest.raises(error):
                call(bad)
            assert snapshot(tree) == before
        assert cache.stats() == stats
        assert lease.pages.tolist() == pages
        assert lease.commit(IDS) == len(IDS)
    cache.check_invariants()


def test_a_bad_match_after_a_probe_loses_nothing() -> None:
    tree = RadixTree()
    tree.insert([1, 2, 3], [0, 1, 2])
    tree.match_prefix([1, 2])
    for call in (tree.match_prefix, lambda ids: tree.insert(ids, [5])):
        with pytest.raises(InvalidTokenIdsError):
            call([-1])
        tree.check_invariants()
        assert tree.peek([1, 2, 3]) == 3
        assert tree.tick == 2
