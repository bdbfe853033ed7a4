"""What guesses the next tokens of requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from radixkv.cache.namespace import Namespace


class Text(NamedTuple):
    """What a drafter may know of a request.

    Attributes:
        request_id: the same in each step.
        token_ids: int32, prompt and output so far; a view that is valid during the call.
        num_prompt: how many of them are the prompt.
        namespace: no draft may depend on what others hold in another one.
        most: tokens of a draft at most; 1 at least.
    """

    request_id: int
    token_ids: NDArray[np.int32]
    num_prompt: int
    namespace: Namespace
    most: int


class Draft(NamedTuple):
    """A guess of the next tokens of a request, int32; it may be empty.

    Attributes:
        source: where it comes from, a short word; drafts of one source are counted together.
        evidence: how sure it is, from 0 on: drafts of one source with equal evidence are taken to be equally good. For
            drafts from text it is the number of last tokens that stood there before.
    """

    token_ids: NDArray[np.int32]
    source: str = ""
    evidence: int = 0


NO_DRAFT = Draft(np.empty(0, np.int32))


class Drafter(Protocol):
    """Guesses the next tokens of requests. The engine checks them, so a wrong guess costs time and no token.

    All is called by the thread that runs the engine. What it raises is logged, and the engine goes on without drafts.
    """

    def draft(self, texts: Sequence[Text]) -> Sequence[Draft]:
        """A draft for each of `texts`, of `most` tokens at most."""
        ...

    def ended(self, request_id: int) -> None:
        """Forget that request; it may never have been asked about."""
        ...
