"""The options of `radixkv replay`, and its help."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, get_args

import typer

from radixkv.cache.eviction.policies import POLICIES
from radixkv.cli.setting_options import count_option, setting_option
from radixkv.cluster.router import ROUTERS
from radixkv.config import CacheConfig, TierWrites
from radixkv.replay.simulation import BELADY

WRITES: tuple[TierWrites, ...] = get_args(TierWrites)

EPILOG = f"""
**Traces** are files of JSON lines, one object a request; the first good line tells which kind a file is:

- "hash_ids" with "input_length", as Mooncake publishes them: ids of prefix-chained blocks of --block-tokens tokens.
  Each block is hit, stored and evicted as a whole; with --keys token it becomes pseudo-random tokens.

- "token_ids" or "input_tok_ids": token ids, with those of the output in "output_token_ids" or "output_tok_ids".

- "input", "prompt" or "text": text, with the text of the "output"; needs --tokenizer.

- "conversations" (ShareGPT), "messages" (OpenAI) or "turns" (aiperf): one request a turn; needs --tokenizer.

JSON arrays, CSV with a column of prompts, plain text (one prompt a line), gzip and UTF-16 are read too. CSV that only
counts tokens (Azure, BurstGPT) is refused: shared prefixes cannot be known from counts.

Prompts are looked up; prompts and outputs are stored, but for the last token, as an engine does. Hits are whole pages.
"timestamp" (milliseconds or seconds, from 0 or since 1970, or ISO 8601) or "arrival_time_ns" drives policies that look
at the time.

**Policies**: {", ".join(POLICIES)}.

**What cannot be exceeded**: the *ceiling* is what a cache without limit hits. *{BELADY}*, always computed, is the
clairvoyant optimum: of all caches of this size that hold whole pages, and all pages of the request that runs, none
hits more, whatever it evicts and whatever it knows of the future.

**Tiers**: with --tiers, what the pool lacks is looked for in the tiers below it, which keep pages in LRU order. Pages
go down as `tier_writes` of an engine says: "through", when they were computed; "selective", when they were found a
second time; "back", when the pool evicts them. Loads take no time here.

**Replicas**: with --replicas, so many replicas share the capacity in equal parts, and a router sends each request to
one of them, in virtual time. Arrivals are those of the trace, stretched to --load. *cost* is the
router of radixkv; {", ".join(name for name in ROUTERS if name != "cost")} are rules to compare with.

**Examples**

Four sizes, two policies: `radixkv replay trace.jsonl --capacity-tokens 1000000,2000000,4000000,8000000 --policy
lru,slru`

With a picture, and figures for a script: `radixkv replay trace.jsonl --capacity-tokens 250000,500000 --plot hits.png
--json hits.json`

Whether a disk below the pool is worth it: `radixkv replay trace.jsonl --tiers pool:1M --tiers pool:1M,disk:20M`

Eight replicas with an eighth of the capacity each, or one pool: `radixkv replay trace.jsonl --capacity-tokens 8M
--replicas 1,8 --router cost,random,consistent-hash`

Texts of an agent, as Qwen3 would see them: `radixkv replay agent.jsonl --capacity-tokens 50000 --tokenizer
Qwen/Qwen3-8B`
"""


class KeyKind(StrEnum):
    """What the keys of a trace of blocks are."""

    BLOCK = "block"
    TOKEN = "token"


TraceFile = Annotated[
    Path, typer.Argument(metavar="TRACE", help="A file of JSON lines; see below.", show_default=False)
]
CapacityTokens = Annotated[
    str | None,
    typer.Option(help="Sizes of the cache in tokens, separated by commas; 1M is 1,000,000.", show_default=False),
]
TierTexts = Annotated[
    list[str] | None,
    typer.Option(
        help="Instead: the pool and what lies below it, such as pool:1M,disk:20M, in tokens. May be given several "
        "times.",
        show_default=False,
    ),
]
Writes = Annotated[
    str, typer.Option(help=f"When pages go down to the tiers: {', '.join(WRITES)}, separated by commas.")
]
Replicas = Annotated[
    str | None,
    typer.Option(
        help="Simulate so many replicas that share the capacity; several numbers are separated by commas.",
        show_default=False,
    ),
]
Router = Annotated[
    str | None,
    typer.Option(
        help=f"With --replicas: {', '.join(ROUTERS)}, separated by commas.  [default: cost]", show_default=False
    ),
]
Load = Annotated[
    float | None,
    typer.Option(
        help="With --replicas: how much of the time they would compute if nothing were cached.  [default: 0.6]",
        show_default=False,
    ),
]
SharedTier = Annotated[
    str | None,
    typer.Option(help="With --replicas: a tier below them that all share, in tokens, such as 20M.", show_default=False),
]
DecodeS = Annotated[
    float | None,
    typer.Option(
        "--decode-s",
        help="With --replicas: how long a request decodes after its first token; each that does makes prompts "
        "there take 2 % longer.  [default: 0]",
        show_default=False,
    ),
]
Happening = Annotated[
    list[str] | None,
    typer.Option(
        help="With --replicas: what happens after so many requests, such as 6000:die:3, 6000:drain:3, "
        "6000:slow:3:4 or 6000:join. May be given several times.",
        show_default=False,
    ),
]
Policy = Annotated[str, typer.Option(help="Eviction policies, separated by commas.")]
PageSize = Annotated[int, setting_option(CacheConfig, "page_size", more="Blocks that are keys are pages themselves.")]
BlockTokens = Annotated[int, count_option("Tokens that each of a trace's hash_ids stands for.")]
Keys = Annotated[
    KeyKind | None,
    typer.Option(help="What a trace of hash_ids is replayed as.  [default: block]", show_default=False),
]
Tokenizer = Annotated[
    str | None, typer.Option(help='For a trace of texts: "demo", a directory or a hub id.', show_default=False)
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at a malformed line instead of skipping it.")]
Limit = Annotated[int | None, count_option("Requests to read at most.", show_default=False)]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="OUT", help="Write all figures there.", show_default=False)
]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="OUT.png", help="Draw hit rate over size there.", show_default=False),
]
