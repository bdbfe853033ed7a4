"""Page keys: names of cached pages that stay the same outside the process, in files, events and other replicas.

The tree compares tokens and needs no names. A page key names the KV of one page: equal keys mean the same namespace
and the same tokens from the start of the sequence to the end of the page; of whole pages also the same page size.
Users choose the tokens, so the digest is cryptographic: BLAKE2b (Saarinen, Aumasson, "The BLAKE2 Cryptographic Hash
and Message Authentication Code", RFC 7693, 2015) of 16 bytes, for which a collision takes about 2**64 digests.
Whoever loads a page by its key compares the stored tokens, too. For statistics alone `prefix_hash` is faster, and can
be made to collide.

A key is `digest(key of the page before ‖ tokens of the page)`; the first page follows the key of its namespace. Each
of the three kinds of key (namespace, whole page, tail) has a personalisation string of its own, so that no input of
one kind can give a key of another.
"""

from __future__ import annotations

from hashlib import blake2b

from radixkv.cache.token_ids import TOKEN_BYTES, TokenIds, token_array

KEY_BYTES = 16
_ROOT, _PAGE, _TAIL = b"radixkv1 root", b"radixkv1 page", b"radixkv1 tail"  # 1: the version of the format


def root_key(extra_key: str | None, cache_salt: str | None) -> bytes:
    """The key that the first page of a namespace follows. O(length of the names).

    None differs from the empty string, and no two pairs of names are written as the same bytes: each name has its
    length before it. As no key tells what it was made of, `cache_salt` stays secret if it cannot be guessed.

    >>> root_key(None, None).hex()
    '24a7503aa563e8377b4688a9139e5cc1'
    >>> root_key("", None) == root_key(None, None)
    False
    """
    return _digest(_written(extra_key) + _written(cache_salt), _ROOT)


def page_key(parent_key: bytes, tokens: bytes) -> bytes:
    """The key of a whole page. O(page_size).

    Args:
        parent_key: the key of the page before it, or `root_key`.
        tokens: its tokens, little-endian int32.
    """
    return _digest(parent_key + tokens, _PAGE)


def tail_key(parent_key: bytes, tokens: bytes) -> bytes:
    """The key of the last page of a sequence, which `tokens` fill in part. As `page_key`."""
    return _digest(parent_key + tokens, _TAIL)


def page_keys(parent_key: bytes, tokens: bytes, page_size: int) -> tuple[bytes, ...]:
    """The keys of the pages that hold `tokens` (little-endian int32), the last one perhaps in part. O(tokens).

    `parent_key` is that of the page before the first, or `root_key`.

    >>> from array import array
    >>> tokens = array("i", range(6)).tobytes()
    >>> whole, tail = page_keys(root_key(None, None), tokens, page_size=4)
    >>> whole == page_key(root_key(None, None), tokens[:16]), tail == tail_key(whole, tokens[16:])
    (True, True)
    """
    page_bytes = page_size * TOKEN_BYTES
    keys = []
    key = parent_key
    num_whole, rest = divmod(len(tokens), page_bytes)
    for start in range(0, num_whole * page_bytes, page_bytes):
        key = page_key(key, tokens[start : start + page_bytes])
        keys.append(key)
    if rest:
        keys.append(tail_key(key, tokens[-rest:]))
    return tuple(keys)


def prompt_keys(
    ids: TokenIds, page_size: int, *, extra_key: str | None = None, cache_salt: str | None = None
) -> tuple[bytes, ...]:
    """The keys of all pages of a prompt, from its first token on. O(tokens).

    Raises: TokenIdsTypeError, InvalidTokenIdsError.

    >>> [key.hex()[:8] for key in prompt_keys([5, 6, 7], page_size=2)]
    ['2bca80aa', '7e3deb36']
    """
    return page_keys(root_key(extra_key, cache_salt), token_array(ids).astype("<i4", copy=False).tobytes(), page_size)


def _written(name: str | None) -> bytes:
    """A name so that no other name, and no other number of names, is written alike."""
    if name is None:
        return b"\0"
    encoded = name.encode("utf-8", "surrogatepass")
    return b"\1" + len(encoded).to_bytes(8, "little") + encoded


def _digest(data: bytes, person: bytes) -> bytes:
    return blake2b(data, digest_size=KEY_BYTES, person=person).digest()
