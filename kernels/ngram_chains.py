"""Where the last tokens of a text stood before, in a store of pages of tokens: hash chains, as compressors have them.

The structure is that of LZ77 coders (zlib's chains; LZMA's HC4 with a second table of shorter n-grams): a table maps
the hash of `GRAM` tokens to the newest place after which they stand, and each place is linked with the next older one
of the same hash. A second table knows the newest place of each pair of tokens alone, to fall back on. Places are
verified by comparing tokens, so a hash that two n-grams share costs time and nothing else.

Arrays (all int32):

    tokens [num_pages * page_size]    the token in each slot
    links [num_pages * page_size, 2]  the next older slot of its chain, or -1; the next newer one, -1 if it is in no
                                      chain, or -2 - bucket if it is the newest
    pages [num_pages, 5]              the page before it in its sequence (-1: none); one of the pages after it (-1);
                                      how many tokens it holds (0: none, it is not stored); its space; its place in the
                                      sequence, in pages
    heads [3 * 2**k]                  the newest slot of each chain, or -1; then the newest two slots of each bucket of
                                      pairs

A *space* is a number; texts of different spaces never meet.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from radixkv.kernels.compiling import can_cache, inner

GRAM = 4  # tokens that are hashed for the chains
PAIR = 2  # tokens that must match at least
OLDER, NEWER = 0, 1
PARENT, NEXT, COUNT, SPACE, DEPTH = 0, 1, 2, 3, 4
PAGE_FIELDS = 5

NONE = -1


@inner
def _mix(hashed, token):
    mixed = (hashed ^ np.uint64(token)) * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(29))


@inner
def _bucket_of_gram(space, a, b, c, d, size):
    hashed = _mix(_mix(_mix(_mix(np.uint64(space + 1), a), b), c), d)
    return np.int64(hashed & np.uint64(size - 1))


@inner
def _bucket_of_pair(space, c, d, size):
    return size + 2 * np.int64(_mix(_mix(np.uint64(space + 1), c), d) & np.uint64(size - 1))


@inner
def _unlink(links, heads, slot):
    older, newer = links[slot, OLDER], links[slot, NEWER]
    if newer == NONE:
        return
    if newer >= 0:
        links[newer, OLDER] = older
    else:
        heads[-2 - newer] = older
    if older >= 0:
        links[older, NEWER] = newer
    links[slot, NEWER] = NONE


@inner
def _link(tokens, links, pages, heads, page_size, page, first, last):
    """Enter the places `[first, last)` of `page`, whose tokens are there, into the chains."""
    size = len(heads) // 3
    space = pages[page, SPACE]
    a, b, c, d = np.int32(0), np.int32(0), np.int32(0), np.int32(0)  # the tokens before a place
    known = 0
    before, offset = np.int64(page), first
    while known < GRAM:
        offset -= 1
        if offset < 0:
            before = np.int64(pages[before, PARENT])
            if before < 0 or pages[before, COUNT] < page_size:
                break
            offset = page_size - 1
        token = tokens[before * page_size + offset]
        if known == 0:
            d = token
        elif known == 1:
            c = token
        elif known == 2:
            b = token
        else:
            a = token
        known += 1
    for place in range(page * page_size + first, page * page_size + last):
        links[place, OLDER] = links[place, NEWER] = NONE
        if known >= PAIR:
            bucket = _bucket_of_pair(space, c, d, size)
            heads[bucket + 1] = heads[bucket]
            heads[bucket] = place
        if known >= GRAM:
            bucket = _bucket_of_gram(space, a, b, c, d, size)
            older = heads[bucket]
            links[place, OLDER] = older
            links[place, NEWER] = -2 - bucket
            if older >= 0:
                links[older, NEWER] = place
            heads[bucket] = place
        a, b, c, d = b, c, d, tokens[place]
        known += 1


@inner
def _forget_page(links, pages, heads, page_size, page):
    for place in range(page * page_size, page * page_size + pages[page, COUNT]):
        _unlink(links, heads, place)
    parent = pages[page, PARENT]
    if parent >= 0 and pages[parent, NEXT] == page:
        pages[parent, NEXT] = NONE
    pages[page, COUNT] = 0


@nb.njit(cache=can_cache())
def store(
    tokens,
    links,
    pages,
    heads,
    page_size,
    new,
    run,
    parent,
    space,
    depth,
):
    """Store the tokens `new` in the pages of `run`, after page `parent` (-1: none). O(new tokens).

    Pages that are stored already are stored anew. The last one may be filled in part.
    """
    before = np.int64(parent)
    for number in range(len(run)):
        page = np.int64(run[number])
        if pages[page, COUNT] > 0:
            _forget_page(links, pages, heads, page_size, page)
        first = number * page_size
        count = min(page_size, len(new) - first)
        pages[page, PARENT], pages[page, NEXT], pages[page, COUNT] = before, NONE, count
        pages[page, SPACE], pages[page, DEPTH] = space, depth + number
        if before >= 0:
            pages[before, NEXT] = page
        for offset in range(count):
            tokens[page * page_size + offset] = new[first + offset]
        _link(tokens, links, pages, heads, page_size, page, 0, count)
        before = page


@nb.njit(cache=can_cache())
def forget(links, pages, heads, page_size, run, num_tokens):
    """Forget the pages of `run`, which hold `num_tokens` tokens. O(tokens).

    A page that holds another number of them was stored anew meanwhile, and stays. Returns: how many were forgotten.
    """
    forgotten = 0
    for number in range(len(run)):
        page = np.int64(run[number])
        if pages[page, COUNT] == min(page_size, num_tokens - number * page_size):
            _forget_page(links, pages, heads, page_size, page)
            forgotten += 1
    return forgotten


@inner
def _match(tokens, pages, page_size, place, text, most, space):
    """How many tokens before `place` are the last of `text`; at most `most`."""
    page, offset = place // page_size, place % page_size
    if pages[page, SPACE] != space or offset >= pages[page, COUNT]:
        return 0
    end = len(text)
    length = 0
    while length < most:
        offset -= 1
        if offset < 0:
            page = np.int64(pages[page, PARENT])
            if page < 0 or pages[page, COUNT] < page_size:
                break
            offset = page_size - 1
        if tokens[page * page_size + offset] != text[end - 1 - length]:
            break
        length += 1
    return length


@inner
def _longest(tokens, links, pages, heads, page_size, text, space, most, candidates):
    """The longest match with the end of `text`, and its place."""
    size, end = len(heads) // 3, len(text)
    best, found = 0, np.int64(NONE)
    if end >= GRAM:
        place = np.int64(
            heads[_bucket_of_gram(space, text[end - 4], text[end - 3], text[end - 2], text[end - 1], size)]
        )
        looked = 0
        while place >= 0 and looked < candidates and best < most:
            length = _match(tokens, pages, page_size, place, text, most, space)
            if length > best:
                best, found = length, place
            place = np.int64(links[place, OLDER])
            looked += 1
    if best < PAIR and end >= PAIR:
        bucket = _bucket_of_pair(space, text[end - 2], text[end - 1], size)
        for way in range(2):
            place = np.int64(heads[bucket + way])
            if place >= 0:
                length = _match(tokens, pages, page_size, place, text, most, space)
                if length > best:
                    best, found = length, place
    return (best, found) if best >= PAIR else (0, np.int64(0))


@nb.njit(cache=can_cache())
def find(
    tokens,
    links,
    pages,
    heads,
    page_size,
    text,
    space,
    max_match,
    candidates,
    out,
):
    """Find where the longest end of `text` stood before in `space`, and what came after it.

    Looks at the newest `candidates` places at most, and compares `max_match` tokens at each; of equally long matches
    the newest counts. O(candidates * max_match + len(out)).

    Args:
        out32; what came after is written here.

    Returns: (the length of the match, its place, how many tokens were written); zeros if there is none.
    """
    most = min(max_match, len(text))
    best, found = _longest(tokens, links, pages, heads, page_size, text, space, most, candidates)
    if best == 0:
        return 0, 0, 0
    page, offset = found // page_size, found % page_size
    num = 0
    while num < len(out):
        if offset >= pages[page, COUNT]:
            after = np.int64(pages[page, NEXT])
            if offset < page_size or after < 0 or pages[after, PARENT] != page or pages[after, COUNT] == 0:
                break
            page, offset = after, np.int64(0)
        out[num] = tokens[page * page_size + offset]
        num += 1
        offset += 1
    return best, found, num


@nb.njit(cache=can_cache())
def extend_and_find(tokens, links, pages, heads, text, max_match, candidates, out):
    """Store what `text` has beyond the tokens of a store of one page, and find its end in what was there before.

    What reaches the end of the text goes on from where it began: `out` is filled. As `find` otherwise.

    Returns: (the length of the match, its place); zeros if there is none.
    """
    page_size = np.int64(len(tokens))
    first, last = np.int64(pages[0, COUNT]), np.int64(len(text))
    for place in range(first, last):
        tokens[place] = text[place]
    _link(tokens, links, pages, heads, page_size, np.int64(0), first, last)
    pages[0, COUNT] = last
    most = min(max_match, len(text))
    best, found = _longest(tokens, links, pages, heads, page_size, text, np.int64(0), most, candidates)
    if best > 0:
        for num in range(len(out)):
            place = found + num
            out[num] = tokens[place] if place < last else out[place - last]
    return best, found
