"""Where two token sequences part, as text and as lines for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from radixkv.cli.display import decode, excerpt

if TYPE_CHECKING:
    from rich.text import Text

LABEL_COLUMNS = 12
SAME_COLUMNS = 60  # of what is the same, on a line of its own
LEAD_COLUMNS = 20  # of it, at the beginning of the lines of what differs
REST_COLUMNS = 48  # of what differs
NO_CHARACTER = "\ufffd"  # what tokens that are no whole character are decoded to


class Difference(NamedTuple):
    """What two sequences have in common before they part, and how each goes on.

    They are the same for `position` tokens, the last of which are `same_ids`; `cached_ids` and `asked_ids` come next,
    and are empty where a sequence ends. The texts are None without a tokenizer. They part at the first character that
    differs, if need be within a token; but where they `look_alike`, at the token.
    """

    position: int
    same_ids: list[int]
    cached_ids: list[int]
    asked_ids: list[int]
    same_text: str | None
    cached_text: str | None
    asked_text: str | None
    look_alike: bool


class Side(NamedTuple):
    """How one of the sequences goes on where they part, and how that is drawn; `goes_on` even behind this text."""

    label: str
    ids: list[int]
    text: str | None
    style: str
    goes_on: bool
    note: str = ""


def difference(
    tokenizer: Any, position: int, same_ids: Sequence[int], cached_ids: Sequence[int], asked_ids: Sequence[int]
) -> Difference:
    """How two sequences part after `position` tokens; see `Difference`. `tokenizer` may be None."""
    ids = position, list(same_ids), list(cached_ids), list(asked_ids)
    if tokenizer is None:
        return Difference(*ids, None, None, None, look_alike=False)
    same = _text(tokenizer, same_ids)
    # decoded with what comes before, since a character may lie in several tokens
    cached, asked = (_text(tokenizer, [*same_ids, *next_ids]) for next_ids in (cached_ids, asked_ids))
    common = _common_prefix(cached, asked)
    firsts = [_text(tokenizer, [*same_ids, *next_ids[:2]]) for next_ids in (cached_ids, asked_ids)]
    look_alike = bool(cached_ids and asked_ids) and all(map(common.startswith, firsts))
    if look_alike or common in (cached, asked):
        common = _common_prefix(common, same)
    return Difference(*ids, common, cached[len(common) :], asked[len(common) :], look_alike)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return decode(tokenizer, ids) or ""


def _common_prefix(a: str, b: str) -> str:
    return a[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))]


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(difference: Difference, sides: Sequence[Side]) -> Iterator[Text]:
    """The lines that show `sides` of a difference below what is the same."""
    if difference.same_text is None:
        yield from _draw_ids(difference, sides)
        return
    yield from _draw_texts(difference, difference.same_text, sides)
    cached, asked = (difference.cached_text or "")[:1], (difference.asked_text or "")[:1]
    if difference.look_alike or NO_CHARACTER in (cached, asked):
        yield from (_line(f"{side.label} ids", (_ids(side), side.style)) for side in sides)
    elif cached and asked and cached.isascii() != asked.isascii():
        yield _line("", (f"{_name(cached)} is cached, {_name(asked)} asked for", "dim"))


def _draw_texts(difference: Difference, same: str, sides: Sequence[Side]) -> Iterator[Text]:
    lead = _end(same, LEAD_COLUMNS)
    before = same[: len(same) - len(lead)]
    shown = _end(before, SAME_COLUMNS)
    dots = "… " if len(difference.same_ids) < difference.position or len(shown) < len(before) else ""
    if shown:
        yield _line("the same", (f'{dots}"{_visible(shown)}"', "dim"))
        dots = ""
    for side in sides:
        text = (side.text or "").rstrip(NO_CHARACTER * side.goes_on)  # of a character whose tokens are not all here
        rest = text[: _fitting(text, REST_COLUMNS)]
        end = '"' if rest == text and not side.goes_on else '" …'
        yield _line(
            side.label,
            (f'{dots}"{_visible(lead)}', "dim"),
            (_visible(rest), side.style),
            (f"{end}{'' if side.ids else ' ends here'}", "dim"),
            (side.note and f"  ({side.note})", "dim"),
        )
    yield _caret(len(dots) + 1 + _columns(lead), difference.position)


def _draw_ids(difference: Difference, sides: Sequence[Side]) -> Iterator[Text]:
    dots = "… " if len(difference.same_ids) < difference.position else ""
    if difference.same_ids:
        yield _line("the same", (dots + " ".join(map(str, difference.same_ids)), "dim"))
    for side in sides:
        yield _line(side.label, (_ids(side), side.style), (side.note and f"  ({side.note})", "dim"))
    yield _caret(0, difference.position)


def _line(label: str, *parts: tuple[str, str]) -> Text:
    from rich.text import Text

    return Text.assemble((f"  {label:<{LABEL_COLUMNS}}", "dim"), *parts)


def _caret(columns: int, position: int) -> Text:
    return _line("", (f"{' ' * columns}^ token {position:,}", "dim"))


def _ids(side: Side) -> str:
    if not side.ids:
        return "ends here"
    return " ".join(map(str, side.ids)) + " …" * side.goes_on


def _name(character: str) -> str:
    return f"'{_visible(character)}' {unicodedata.name(character, f'U+{ord(character):04X}')}"


def _visible(text: str) -> str:
    return excerpt(text, len(text))


def _columns(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(_visible(text))


def _end(text: str, columns: int) -> str:
    """As much of the end of `text` as fits, from the beginning of a word."""
    end = text[len(text) - _fitting(reversed(text), columns) :]
    return end if len(end) == len(text) else end[end.find(" ", 0, -1) + 1 :]


def _fitting(characters: Iterable[str], columns: int) -> int:
    """How many characters fit, with the escapes they are shown as."""
    count = used = 0
    for character in characters:
        used += _columns(character)
        if used > columns:
            break
        count += 1
    return count
