"""One prompt that was explained, as JSON and as lines for a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from radixkv.cache.insight.explanation import Explanation
from radixkv.cli.difference import Difference, Side, draw

if TYPE_CHECKING:
    from rich.text import Text

CACHED_STYLE, ASKED_STYLE = "bold underline red", "bold underline green"  # underlined: spaces are seen, too


class Likest(NamedTuple):
    """The near miss as text, and the prompt it comes from, which perhaps `ends_there`."""

    difference: Difference
    place: str
    ends_there: bool


class Loss(NamedTuple):
    """What was evicted, as text; for which prompt, and which one had used it last, `unused_prompts` before that."""

    gone: Difference
    evicted_for: str
    last_used_by: str
    unused_prompts: int


class Finding(NamedTuple):
    """Why prompt `number` of its file, counted from 1, is not cached further; and the prompts and texts behind it."""

    number: int
    place: str
    explanation: Explanation
    likest: Likest | None
    loss: Loss | None


def as_json(finding: Finding) -> str:
    """All that is known, as one object on one line."""
    explanation, likest, loss = finding.explanation, finding.likest, finding.loss
    fields = {"prompt": finding.number, "place": finding.place, **explanation._asdict()}
    fields["below"] = [tier._asdict() for tier in explanation.below]
    if explanation.other_namespaces is not None:
        fields["other_namespaces"] = explanation.other_namespaces._asdict()
    if loss is not None and explanation.eviction is not None:
        fields["eviction"] = {
            **explanation.eviction._asdict(),
            "unused_s": explanation.eviction.unused_s,
            "unused_ticks": explanation.eviction.unused_ticks,
            "unused_prompts": loss.unused_prompts,
            "evicted_for": loss.evicted_for,
            "last_used_by": loss.last_used_by,
            "text": loss.gone.asked_text,
        }
    if likest is not None and explanation.near_miss is not None:
        fields["near_miss"] = {
            **explanation.near_miss._asdict(),
            "place": likest.place,
            "same_text": likest.difference.same_text,
            "cached_text": likest.difference.cached_text,
            "asked_text": likest.difference.asked_text,
        }
    return json.dumps(fields, ensure_ascii=False)


def as_lines(finding: Finding, page_size: int) -> Iterator[Text]:
    """How far the prompt is cached and why not further, on one line; then the text around that place."""
    from rich.text import Text

    explanation, loss, likest = finding.explanation, finding.loss, finding.likest
    cached_tokens, num_tokens = explanation.cached_tokens, explanation.num_tokens
    place = f"prompt {finding.number} ({finding.place}): "
    if explanation.reason == "hit":
        yield Text.assemble(place, (f"all {num_tokens:,} tokens cached", "bold green"))
        return
    share = f"{cached_tokens:,} of {num_tokens:,} tokens cached"
    yield Text.assemble(place, (share, "bold"), f"; {_why(finding, page_size)}")
    if loss is not None:
        yield from _loss_lines(loss, explanation.evicted_tokens)
    elif likest is not None and (explanation.reason != "page" or likest.difference.position > cached_tokens):
        yield from _likest_lines(likest, num_tokens)


def _why(finding: Finding, page_size: int) -> str:
    explanation, likest = finding.explanation, finding.likest
    if explanation.eviction is not None:
        return f"the next {explanation.evicted_tokens:,} were evicted by {explanation.eviction.policy}"
    if explanation.reason == "other namespace":
        return f"never seen in this namespace, but {explanation.other_namespaces}"
    if explanation.reason == "page":
        more_tokens = 0 if likest is None else likest.difference.position - explanation.cached_tokens
        if more_tokens > 0:
            return f"{more_tokens:,} more are the same, but fill no page of {page_size}"
        return f"the last {explanation.num_tokens - explanation.cached_tokens:,} fill no page of {page_size}"
    if likest is None:
        return "nothing cached begins like this"
    if likest.difference.look_alike:
        return "never seen from there on: the text looks the same, but its tokens are others"
    if likest.difference.cached_ids:
        return "never seen from there on"
    return f"it goes on where {'the cached prompt' if likest.ends_there else 'what is cached'} ends"


def _loss_lines(loss: Loss, evicted_tokens: int) -> Iterator[Text]:
    from rich.text import Text

    prompts = f"{loss.unused_prompts:,} prompt{'' if loss.unused_prompts == 1 else 's'}"
    yield Text(f"  to make room for {loss.evicted_for}; last used by {loss.last_used_by}, {prompts} before")
    ids, text = loss.gone.asked_ids, loss.gone.asked_text
    yield from draw(loss.gone, [Side("evicted", ids, text, CACHED_STYLE, goes_on=evicted_tokens > len(ids))])


def _likest_lines(likest: Likest, num_tokens: int) -> Iterator[Text]:
    difference = likest.difference
    cached_ids, asked_ids = difference.cached_ids, difference.asked_ids
    cached_goes_on = bool(cached_ids) and not likest.ends_there
    asked_goes_on = difference.position + len(asked_ids) < num_tokens
    note = likest.place if cached_ids or likest.ends_there else f"{likest.place}, of which no more is cached"
    yield from draw(
        difference,
        [
            Side("cached", cached_ids, difference.cached_text, CACHED_STYLE, cached_goes_on, note),
            Side("asked", asked_ids, difference.asked_text, ASKED_STYLE, asked_goes_on),
        ],
    )
