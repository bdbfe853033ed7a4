"""Room for drafts in a step's batch: tokens of its budget, and pages."""

from __future__ import annotations

from contextlib import suppress

from radixkv.engine.drafts.drafter import Draft
from radixkv.engine.drafts.speculation import Speculation
from radixkv.engine.span import Span
from radixkv.errors import OutOfPagesError


def add_drafts(batch: list[Span], speculation: Speculation, max_batch_tokens: int) -> None:
    """Let the decodes in `batch` check drafts of the tokens after theirs, where these are worth it.

    They take what is left of the budget of `max_batch_tokens`, and pages that are free or evictable: nobody is
    retracted for them.
    """
    num_tokens = sum(span.last - span.first for span in batch)
    room = max_batch_tokens - num_tokens
    decodes = [place for place, span in enumerate(batch) if span.samples and span.last - span.first == 1]
    if room < 1 or not decodes:
        return
    drafts = speculation.drafts([batch[place].request for place in decodes], num_tokens, room)
    for place, draft in zip(decodes, drafts, strict=True):
        if len(draft.token_ids):
            batch[place] = _with_draft(batch[place], draft)


def _with_draft(span: Span, draft: Draft) -> Span:
    """`span` with as much of `draft` as there are pages for."""
    request = span.request
    lease, _ = request.running()
    with suppress(OutOfPagesError):  # the rest of its last page may do
        lease.grow(span.last + len(draft.token_ids))
    num = min(lease.capacity_tokens, lease.coverable_tokens()) - span.last
    ids = draft.token_ids[: max(0, num)]
    if not len(ids):
        lease.shrink(request.num_tokens)
        return span
    lease.cover(span.first, span.last + len(ids))
    request.guess(ids)
    return Span(request, span.first, span.last + len(ids), draft._replace(token_ids=ids))
