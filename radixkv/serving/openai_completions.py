"""`POST /v1/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from radixkv.engine.outputs import Progress, RequestOutput
from radixkv.engine.sampling import TokenLogprobs
from radixkv.serving.answer_form import ToolUse, grammar_of
from radixkv.serving.bodies import GenerationBody
from radixkv.serving.cache_use import implicit_keep
from radixkv.serving.chat_prompts import TextEncoder
from radixkv.serving.errors import bad_request
from radixkv.serving.generation import Generation, Ids
from radixkv.serving.openai_logprobs import of_completion
from radixkv.serving.openai_usage import StreamEnd, usage_object
from radixkv.serving.sampling_fields import sampling_params
from radixkv.serving.service import Service, tenant_of
from radixkv.serving.streaming import EventForm, event

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 1024


class CompletionBody(GenerationBody):
    """A request for completions of one prompt or several, each a text or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/completions", response_model=None)
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        """Continue prompts."""
        return await service.completed(body, request, _CompletionCall.of)

    return routes


class _CompletionCall:
    """A completion that is being made."""

    def __init__(self, service: Service, body: CompletionBody, generation: Generation) -> None:
        self.generation = generation
        self._service = service
        self._body = body
        self._offsets: dict[int, int] = {}  # characters of each choice whose tokens were told
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name,
        }

    @classmethod
    async def of(cls, service: Service, body: CompletionBody, request: Request) -> _CompletionCall:
        """The call that `body` asks for. Raises: ApiError, RadixKVError."""
        if body.suffix:
            raise bad_request("suffix must be empty: text is continued, not filled in", "suffix")
        if body.best_of not in (None, body.n or 1):
            raise bad_request(f"best_of must be n, or left out; got {body.best_of}", "best_of")
        params = sampling_params(
            body,
            max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        params = await service.fitting(params, grammar_of(body, None, ToolUse({})))
        prompts = await encode_all(service.engine, body.prompt)
        keeps = [keep for prompt in prompts for keep in implicit_keep(body.prompt_cache_options, prompt)]
        return cls(service, body, service.generation(prompts, params, body, tenant_of(request), keeps))

    def answer(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The completion as a whole."""
        choices = [
            self._choice(
                index,
                self.echo(index) + (output.text or ""),
                self.logprobs(index, output.logprobs, self._prompt_logprobs(outputs, index)),
                output.finish_reason,
            )
            for index, output in enumerate(outputs)
        ]
        return {**self._head, "choices": choices, "usage": usage_object(self.generation.usage(outputs))}

    def stream_end(self) -> StreamEnd:
        """The end of its stream."""
        return StreamEnd(self.generation, self._body, self._head)

    def streamed(self) -> _CompletionEvents:
        """The completion, piece by piece."""
        return _CompletionEvents(self)

    def chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        """An event's data: what a choice gained."""
        return {**self._head, "choices": [self._choice(index, text, logprobs, finish_reason)]}

    def _choice(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _prompt_logprobs(self, outputs: list[RequestOutput], index: int) -> Sequence[TokenLogprobs | None]:
        """Those of the prompt of a choice, which the first choice of the prompt has."""
        return outputs[index - index % self.generation.num_choices].prompt_logprobs or ()

    def logprobs(
        self, index: int, of_output: Sequence[TokenLogprobs] | None, of_prompt: Sequence[TokenLogprobs | None]
    ) -> dict[str, Any] | None:
        """Those of the next tokens of a choice, as OpenAI writes them; None if they were not asked for."""
        if of_output is None:
            return None
        first_id = int(self.generation.prompt_of(index)[0])
        offset = self._offsets.get(index, 0)
        found = of_completion([*of_prompt, *of_output], self._service.token_texts, first_id=first_id, offset=offset)
        self._offsets[index] = offset + sum(map(len, found["tokens"]))
        return found

    def echo(self, index: int) -> str:
        """What comes before the text of a choice: the prompt, if it is to be echoed."""
        if not self._body.echo:
            return ""
        given = self._body.prompt
        prompt = given[index // self.generation.num_choices] if isinstance(given, list) else given
        if isinstance(prompt, str):
            return prompt
        tokenizer = self._service.engine.require_tokenizer("echo")
        text: str = tokenizer.decode(self.generation.prompt_of(index).tolist(), skip_special_tokens=True)
        return text


class _CompletionEvents:
    """Makes the events of a completion."""

    def __init__(self, call: _CompletionCall) -> None:
        self._call = call
        self._end = call.stream_end()
        self._begun: set[int] = set()
        self._forms: dict[int, EventForm] = {}  # of chunks that bring text alone

    def events(self, index: int, progress: Progress) -> Sequence[bytes]:
        """The event that tells what a choice gained, if that is text or more."""
        if index in self._forms and progress.output is None and progress.logprobs is None:  # most of them
            return (self._forms[index].event(progress.text),) if progress.text else ()
        text = progress.text if index in self._begun else self._call.echo(index) + progress.text
        logprobs = self._call.logprobs(index, progress.logprobs, progress.prompt_logprobs or ())
        self._begun.add(index)
        reason = None
        if progress.output is not None:
            self._end.outputs[index], reason = progress.output, progress.output.finish_reason
        if reason is not None or logprobs is not None:
            return (event(self._call.chunk(index, text, logprobs, reason)),)
        if not text:
            return ()
        if index not in self._forms:
            self._forms[index] = EventForm(partial(self._call.chunk, index))
        return (self._forms[index].event(text),)

    def last_events(self) -> Sequence[bytes]:
        """The usage, if it was asked for, and the end."""
        return self._end.events()


async def encode_all(engine: TextEncoder, given: str | list[str] | list[int] | list[list[int]]) -> list[Ids]:
    """The ids of all prompts. Raises: ApiError, RadixKVError."""
    if isinstance(given, str):
        return [await engine.encode(given)]
    if not given:
        raise bad_request("prompt must not be an empty list", "prompt")
    if isinstance(given[0], int):
        return [engine.known_ids(given)]
    if len(given) > MAX_PROMPTS:
        raise bad_request(f"prompt may hold {MAX_PROMPTS} prompts; got {len(given)}", "prompt")
    return [await engine.encode(prompt) if isinstance(prompt, str) else engine.known_ids(prompt) for prompt in given]
