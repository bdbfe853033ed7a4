"""Page keys: equal exactly where namespace and tokens are, and the same in every process and version."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from radixkv.cache.page_keys import KEY_BYTES, page_key, page_keys, prompt_keys, root_key, tail_key

FIXED = settings(max_examples=60, derandomize=True, database=None, deadline=None)
names = st.none() | st.sampled_from(["", "a", "b", "ab", "\0", "\1"]) | st.text(max_size=3)
tokens_of_a_prompt = st.lists(st.sampled_from([0, 1, 2**31 - 1]), max_size=9)


def keys_of(
    tokens: list[int], page_size: int, extra_key: str | None = None, salt: str | None = None
) -> tuple[bytes, ...]:
    return prompt_keys(np.array(tokens, np.int32), page_size, extra_key=extra_key, cache_salt=salt)


def test_known_answers() -> None:
    """They must never change: files and other replicas have them."""
    assert root_key(None, None).hex() == "24a7503aa563e8377b4688a9139e5cc1"
    assert root_key("", "").hex() == "19512a0eaaa4ec7b44e4746984caab5c"
    assert root_key("tenant a", "salt").hex() == "c50768d603da92763ab82e2f4a1bbc0b"
    assert [key.hex() for key in keys_of(list(range(10)), 4, "tenant a", "salt")] == [
        "a4d1a1008ec86b3b2a41a539aa5e07db",
        "e01d930c25cb1a493c91b9223e7510d7",
        "053441498301363bf054f2511b8fad08",
    ]


def test_the_format_written_out() -> None:
    root = blake2b(b"\x01\x02\0\0\0\0\0\0\0ab" + b"\0", digest_size=KEY_BYTES, person=b"radixkv1 root").digest()
    page = blake2b(root + b"\x05\0\0\0" + b"\x06\0\0\0", digest_size=KEY_BYTES, person=b"radixkv1 page").digest()
    tail = blake2b(page + b"\x07\0\0\0", digest_size=KEY_BYTES, person=b"radixkv1 tail").digest()
    assert keys_of([5, 6, 7], 2, "ab") == (page, tail)


@FIXED
@given(one=st.tuples(names, names), other=st.tuples(names, names))
@example(one=(None, "a"), other=("a", None))
@example(one=("", None), other=(None, ""))
@example(one=("\ud800\udc00", None), other=("\U00010000", None))
def test_roots_are_equal_exactly_where_namespaces_are(
    one: tuple[str | None, str | None], other: tuple[str | None, str | None]
) -> None:
    assert (root_key(*one) == root_key(*other)) == (one == other)
    assert len(root_key(*one)) == KEY_BYTES


@FIXED
@given(
    one=tokens_of_a_prompt,
    other=tokens_of_a_prompt,
    namespaces=st.lists(st.sampled_from([(None, None), ("a", None), (None, "a")]), min_size=2, max_size=2),
    page_size=st.integers(1, 4),
)
def test_keys_are_equal_exactly_where_namespace_and_tokens_up_to_the_page_are(
    one: list[int], other: list[int], namespaces: list[tuple[str | None, str | None]], page_size: int
) -> None:
    keys, other_keys = keys_of(one, page_size, *namespaces[0]), keys_of(other, page_size, *namespaces[1])
    assert len(keys) == -(-len(one) // page_size)
    for i, key in enumerate(keys):
        for j, other_key in enumerate(other_keys):
            tokens, other_tokens = one[: (i + 1) * page_size], other[: (j + 1) * page_size]
            same = namespaces[0] == namespaces[1] and tokens == other_tokens
            assert (key == other_key) == same


@FIXED
@given(tokens=tokens_of_a_prompt, more=tokens_of_a_prompt, page_size=st.integers(1, 4), cut=st.integers(0, 9))
def test_whole_pages_of_a_prefix_are_a_prefix_and_keys_can_be_continued(
    tokens: list[int], more: list[int], page_size: int, cut: int
) -> None:
    num_pages = len(tokens) // page_size
    longer = keys_of([*tokens, *more], page_size)
    assert longer[:num_pages] == keys_of(tokens, page_size)[:num_pages]
    start = min(cut, num_pages)
    parent = longer[start - 1] if start else root_key(None, None)
    rest = np.array([*tokens, *more][start * page_size :], np.int32).tobytes()
    assert page_keys(parent, rest, page_size) == longer[start:]


@FIXED
@given(tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12))
def test_no_page_size_and_no_tail_gives_the_key_of_another(tokens: list[int]) -> None:
    whole = [key for size in (1, 2, 3, 5) for key in keys_of(tokens[: len(tokens) // size * size], size)]
    tails = {keys_of(tokens, size)[-1] for size in (2, 3, 5) if len(tokens) % size}
    assert len({*whole, *tails}) == len(whole) + len(tails)


@pytest.mark.parametrize("tokens", [b"", b"\0\0\0\0"])
def test_kinds_of_keys_are_apart(tokens: bytes) -> None:
    parent = root_key(None, None)
    assert len({parent, page_key(parent, tokens), tail_key(parent, tokens)}) == 3


def test_a_prompt_may_be_part_of_another_array() -> None:
    tokens = np.arange(20, dtype=np.int32)
    assert prompt_keys(tokens[::2], 4) == prompt_keys(tokens[::2].copy(), 4)
