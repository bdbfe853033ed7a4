"""An engine for sessions that answers what a test says, so that conversations need no model."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from radixkv.engine.arguments import CacheOptions
from radixkv.engine.detokenizer import decode
from radixkv.engine.outputs import Progress, RequestMetrics, RequestOutput
from radixkv.engine.session import Session


class ScriptedEngine:
    """Answers with the ids of `answers`, one after another, each followed by the token `end` if there is one."""

    def __init__(self, tokenizer: Any, answers: Sequence[str], end: str) -> None:
        self.tokenizer, self.answers, self._end = tokenizer, list(answers), end
        self._sessions: list[Session] = []

    def session(self, **settings: Any) -> Session:
        return Session(self, CacheOptions(), **settings)  # type: ignore[arg-type]

    def register_session(self, session: Session) -> None:
        self._sessions.append(session)

    def require_tokenizer(self, what_for: str) -> Any:
        return self.tokenizer

    def encode(self, text: str, *, add_special_tokens: bool = True) -> Any:
        return np.array(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids, np.int32)

    def known_ids(self, ids: Any) -> Any:
        return np.asarray(ids, np.int32)

    def hand_down(self, prefix: Any, **options: Any) -> bool:
        return True

    @contextmanager
    def exclusive(self) -> Generator[None]:
        with nullcontext():
            yield

    def stream(self, prompt: Any, params: Any = None, **options: Any) -> Generator[Progress]:
        ids = self.encode(self.answers.pop(0)).tolist()
        text = decode(self.tokenizer, ids)
        ids += self.tokenizer.convert_tokens_to_ids([self._end]) if self._end else []
        output = RequestOutput(
            request_id=0,
            text=text,
            token_ids=ids,
            prompt_token_ids=prompt.tolist(),
            cached_tokens=0,
            finish_reason="stop" if self._end else "length",
            metrics=RequestMetrics(0, 0, 0, 0, 0),
        )
        return self._chunks(output)

    def _chunks(self, output: RequestOutput) -> Generator[Progress]:
        yield Progress(0, [], "", None)
        yield Progress(0, output.token_ids, output.text or "", output)

    @staticmethod
    def shared(a: Sequence[int], b: Sequence[int]) -> int:
        """How many leading ids `a` and `b` share."""
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
