"""What one request computes in one step."""

from __future__ import annotations

from typing import NamedTuple

from radixkv.engine.drafts.drafter import NO_DRAFT, Draft
from radixkv.engine.request import Request


class Span(NamedTuple):
    """The tokens `[first, last)` of a request, to be computed in this step; the last ones may be a draft."""

    request: Request
    first: int
    last: int
    draft: Draft = NO_DRAFT

    @property
    def num_drafted(self) -> int:
        """How many of the tokens are guesses, which the step checks."""
        return 0 if self.draft is NO_DRAFT else len(self.draft.token_ids)

    @property
    def samples(self) -> bool:
        """Whether the step computes the request's last known token, so that its next one can be chosen."""
        return self.last - self.num_drafted == self.request.num_tokens

    @property
    def prompt_positions(self) -> range:
        """Tokens whose logits give `prompt_logprobs` of the token after each."""
        return self.request.positions_for_prompt(self.first, self.last)

    @property
    def inner_prompt_positions(self) -> range:
        """`prompt_positions` but for the span's last token, whose logits are wanted in any case."""
        positions = self.prompt_positions
        return range(positions.start, min(positions.stop, self.last - 1))

    @property
    def more_positions(self) -> range:
        """Tokens but for the span's last one whose logits are wanted: for the prompt's sake, or to check a draft."""
        if self.num_drafted:
            return range(self.last - 1 - self.num_drafted, self.last - 1)
        return self.inner_prompt_positions
