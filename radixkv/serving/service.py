"""What the routes of one server share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from radixkv.cache.insight.explanation import Explanation
from radixkv.cache.namespace import Namespace
from radixkv.config import GB, SamplingParams, ServerConfig
from radixkv.engine.async_engine import AsyncEngine
from radixkv.engine.outputs import RequestOutput
from radixkv.errors import ConfigError, RadixKVError
from radixkv.serving.admission import Admission
from radixkv.serving.answer_events import AnswerEvents, events_of
from radixkv.serving.bodies import Body, GenerationBody, UnknownFields
from radixkv.serving.cache_use import cache_use
from radixkv.serving.chat_prompts import ChatPrompt, ChatPrompts
from radixkv.serving.errors import ApiError, as_api_error
from radixkv.serving.generation import CacheUse, Generation, Ids, Keep
from radixkv.serving.grammars import Grammar, Grammars
from radixkv.serving.kept_answers import KeptAnswers, Owner
from radixkv.serving.live_feed import LiveFeed
from radixkv.serving.metrics import Metrics
from radixkv.serving.openai_logprobs import TokenTexts
from radixkv.serving.streaming import EventStream, event, unless_gone
from radixkv.serving.tenants import KeyRing, Tenant
from radixkv.serving.told_ids import ToldIds
from radixkv.serving.wire import JsonAnswer

T = TypeVar("T")
HEALTH_TIMEOUT_S = 30.0


class Call(Protocol):
    """A completion that is being made."""

    generation: Generation

    def streamed(self) -> AnswerEvents:
        """The answer as a stream."""
        ...

    def answer(self, outputs: list[RequestOutput]) -> Any:
        """The answer as a whole."""
        ...


class Service:
    """An engine, and what a server knows besides: its settings, its tenants, and who is inside."""

    def __init__(self, engine: AsyncEngine, model_name: str, config: ServerConfig | None = None) -> None:
        """model_name: what the model is called unless the settings say otherwise. Raises: ConfigError."""
        self.engine = engine
        self.config = config or ServerConfig()
        self.model_source = model_name
        self.model_name = self.config.served_model_name or model_name
        self.created_at = int(time.time())
        self.keys = _key_ring(self.config)
        self.admission = Admission()
        kept = KeptAnswers(engine.tokenizer) if self.config.keep_answer_ids else None
        self.chat_prompts = ChatPrompts(engine, kept)
        self.grammars = Grammars(engine)
        self.token_texts = TokenTexts(engine.tokenizer)
        self.metrics = Metrics(self.model_name)
        self.live = LiveFeed(engine, self.model_name)
        self.unknown_fields = UnknownFields(strict=self.config.strict)

    async def start(self) -> None:
        """Guarantee tenants their shares of the pool, the disk and host memory. Before the first request.

        Raises: ConfigError.
        """
        config = self.engine.config
        if config.disk_cache is None and any(tenant.disk_share for _, tenant in self.keys.keys):
            raise ConfigError(f"{self.config.api_keys}: disk_share needs an engine with disk_cache; set it")
        if config.host_cache_gb is None and any(tenant.host_share for _, tenant in self.keys.keys):
            raise ConfigError(f"{self.config.api_keys}: host_share needs an engine with host_cache_gb; set it")
        disk_bytes, host_bytes = int(config.disk_cache_gb * GB), int((config.host_cache_gb or 0) * GB)
        if quotas := self.keys.quotas(config.kv_cache_tokens, disk_bytes, host_bytes):
            await self.engine.set_quotas(quotas)

    def check_model(self, name: str | None) -> None:
        """Raises: ApiError if `name` is not the model's."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404, f"the model is {self.model_name!r}, not {name[:100]!r}", param="model", code="model_not_found"
            )

    def check_fields(self, body: Body) -> None:
        """Raises: ApiError if `body` has unknown fields and the server is strict."""
        self.unknown_fields.check(body)

    async def fitting(self, params: SamplingParams, grammar: Grammar | None) -> SamplingParams:
        """`params` for outputs that fit `grammar`, which is compiled if that is needed. Raises: ApiError."""
        if grammar is None:
            return params
        transform = await in_thread(self.grammars.transform, grammar)
        return replace(params, logits_transform=transform)

    async def completed(
        self, body: GenerationBody, request: Request, make_call: Callable[..., Coroutine[Any, Any, Call]]
    ) -> Response:
        """The answer to `body` in one of OpenAI's forms, whole or as a stream. Raises: ApiError, RadixKVError.

        make_call: takes the service, body and request.
        """
        self.check_fields(body)
        self.check_model(body.model)
        call = await unless_gone(request, make_call(self, body, request))
        if body.stream:
            return self.stream_answer(call.generation, call.streamed(), body.radixkv_continue)
        return JsonAnswer(call.answer(await unless_gone(request, call.generation.outputs())))

    def generation(
        self,
        prompts: Sequence[Ids],
        params: SamplingParams,
        body: GenerationBody,
        tenant: Tenant,
        keeps: Sequence[Keep] = (),
        chat: ChatPrompt | None = None,
    ) -> Generation:
        """The requests that answer `tenant`'s call; `chat` is the prompt if it is a chat's."""

        def note(output: RequestOutput) -> None:
            self.metrics.observe(output, tenant.name)
            if chat is not None:
                self.chat_prompts.remember(chat, output)

        return Generation(
            self.engine,
            prompts,
            params,
            cache_use(body, tenant, keeps),
            keeps=keeps,
            on_prompt=self._look_up,
            on_output=note,
            output_ids=body.radixkv_output_ids or (),
        )

    def _look_up(self, prompt: Ids, use: CacheUse) -> None:
        """Count why a prompt misses the cache, as soon as the engine knows."""
        found = self.engine.explain_before(prompt, extra_key=use.extra_key, cache_salt=use.cache_salt)
        namespace = Namespace.of(use.extra_key, use.cache_salt)
        asyncio.ensure_future(found).add_done_callback(partial(self._count_miss, namespace))

    def _count_miss(self, namespace: Namespace, done: asyncio.Future[Explanation]) -> None:
        if not done.cancelled() and done.exception() is None:  # else the request itself fails, and says so
            self.metrics.count_miss(done.result())
            self.live.note_miss(done.result(), namespace)

    async def close(self) -> None:
        """End the engine and all threads. Idempotent."""
        self.live.close()
        await self.engine.close()
        self.grammars.close()

    async def check_health(self) -> None:
        """Raises: ApiError if the engine does not live, or no step of it ends in time."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self.engine.stats()
        except TimeoutError as error:
            raise ApiError(503, f"no step of the engine has ended in {HEALTH_TIMEOUT_S:.0f} s") from error
        except RadixKVError as error:
            raise as_api_error(error) from error

    def stream_answer(
        self,
        generation: Generation,
        answer: AnswerEvents,
        tell_ids: bool | None,
        on_error: Callable[[ApiError], bytes] | None = None,
    ) -> EventStream:
        """The stream of an answer, with the ids of its tokens if they are to be told; `on_error` as in `stream`."""
        told: AnswerEvents = ToldIds(answer) if tell_ids and generation.has_one_choice else answer
        return self.stream(partial(events_of, generation, told), on_error)

    def stream(
        self,
        events: Callable[[EventStream], AsyncGenerator[bytes]],
        on_error: Callable[[ApiError], bytes] | None = None,
    ) -> EventStream:
        """An answer of server-sent events; `on_error` makes the event of an error, by default OpenAI's."""
        make = on_error or (lambda error: event(error.body("")))
        return EventStream(
            events, keep_alive_s=self.config.keep_alive_s, on_error=lambda error: make(as_api_error(error))
        )


def require_admin(request: Request) -> None:
    """Raises: ApiError unless the one who asks may see and change what belongs to others."""
    if not tenant_of(request).admin:
        raise ApiError(403, "this needs the key of an administrator", code="admin_key_required")


def owner_of(request: Request, cache_salt: str | None) -> Owner:
    """Whose the answers to a request are, that has a salt or none."""
    return tenant_of(request).name, cache_salt


def tenant_of(request: Request) -> Tenant:
    """Who asks."""
    tenant: Tenant = request.state.tenant
    return tenant


async def in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """The result of `function`, which would hold up the event loop."""
    return await asyncio.to_thread(function, *arguments)


def _key_ring(config: ServerConfig) -> KeyRing:
    if config.api_keys is not None:
        return KeyRing.from_file(Path(config.api_keys))
    return KeyRing() if config.api_key is None else KeyRing.of_one_key(config.api_key)
