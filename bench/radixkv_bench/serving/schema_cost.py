"""Case "schema": decoding with and without a JSON schema, and with one where every token is chosen by a step."""

from __future__ import annotations

from statistics import median
from typing import Any

from radixkv_bench.common.device_timing import OnStep
from radixkv_bench.serving.client import CHATS, Address, counters
from radixkv_bench.serving.http_cost import MODEL, texts
from radixkv_bench.serving.raw_client import stream_all
from radixkv_bench.serving.servers import Settings, radixkv_server

LINES = 200  # of the answer at least, so that it is longer than what is generated
LINE_CHARACTERS = 40
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": LINE_CHARACTERS},
        "lines": {
            "type": "array",
            "minItems": LINES,
            "items": {
                "type": "object",
                "properties": {
                    "speaker": {"enum": ["ROMEO", "JULIET", "NURSE"]},
                    "text": {"type": "string", "minLength": 8, "maxLength": LINE_CHARACTERS},
                    "number": {"type": "integer"},
                },
                "required": ["speaker", "text", "number"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["title", "lines"],
    "additionalProperties": False,
}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "scene", "schema": SCHEMA, "strict": True}}
MAX_OUTPUT_TOKENS = 1024  # the least that so many lines have
KINDS: dict[str, dict[str, Any]] = {
    "free": {},
    "schema": {"response_format": RESPONSE_FORMAT},
    "chosen": {"response_format": RESPONSE_FORMAT, "speculate": False},
}
FORCED, GENERATED = "radixkv_forced_tokens_total", "radixkv_generated_tokens_total"


def measure(
    batch: int, prompt_tokens: int, output_tokens: int, rounds: int, seed: int, settings: Settings, advance: OnStep
) -> dict[str, Any]:
    """Decode the same prompts in each of `KINDS`, in turns; the grammar was compiled before."""
    speeds: dict[str, list[float]] = {name: [] for name in KINDS}
    forced = generated = 0.0
    with radixkv_server(MODEL, settings) as server:
        for number in range(rounds + 1):
            prompts = texts(batch, prompt_tokens, seed + number)
            for name, more in KINDS.items():
                before = counters(server.address)
                speed = _decode(server.address, prompts, output_tokens, more)
                if number:  # the first one warms up and compiles
                    speeds[name].append(speed)
                if name == "schema":
                    after = counters(server.address)
                    forced += after[FORCED] - before[FORCED]
                    generated += after[GENERATED] - before[GENERATED]
            advance(1)
    ratios = {
        name: median(speed / free for free, speed in zip(speeds["free"], speeds[name], strict=True)) for name in KINDS
    }
    return {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "free_tokens_a_second": median(speeds["free"]),
        "schema_tokens_a_second": median(speeds["schema"]),
        "ratio": ratios["schema"],
        "forced_share": forced / generated,
        "chosen_tokens_a_second": median(speeds["chosen"]),
        "chosen_ratio": ratios["chosen"],
    }


def _decode(address: Address, prompts: list[str], output_tokens: int, more: dict[str, Any]) -> float:
    """Tokens a second of all streams together, from the first token of each on."""
    fixed = {"max_tokens": output_tokens, "temperature": 0, "ignore_eos": True, **more}
    fixed["stream_options"] = {"include_usage": True}
    bodies = [{**fixed, "messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
    return sum(reply.tokens_a_second for reply in stream_all(address, CHATS, bodies))
