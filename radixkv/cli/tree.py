"""`radixkv tree`: run a file of prompts, then draw what the radix tree keeps of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import typer

from radixkv.cli.common import EngineOptions, SamplingOptions
from radixkv.cli.display import decode, excerpt, excerpt_ids, percent
from radixkv.cli.prompts import FILE_HELP, from_file, raise_first_error, run
from radixkv.cli.setting_options import setting_option, with_option_groups
from radixkv.cli.size_report import readable_bytes
from radixkv.config import SamplingParams

if TYPE_CHECKING:
    from rich.text import Text

    from radixkv.engine.engine import Engine
    from radixkv.engine.outputs import RequestOutput

TREE_EPILOG = """
**Examples**

What prompts have in common: `radixkv tree prompts.txt`

To the token, and without outputs that hide it: `radixkv tree prompts.jsonl --page-size 1 --max-tokens 1`

For a script: `radixkv tree prompts.jsonl --json | jq '.children[].num_prompts'`
"""

INDENT = 4  # columns a level
EDGE_COLUMNS = 160  # what an edge needs at most
NARROW_EDGE_COLUMNS = 60  # what a deep edge gets where lines end with the terminal


class Edge(NamedTuple):
    """An edge of the tree and the node it leads to; those below the root have `depth` 1.

    `age` counts the uses of the tree since this edge was last used; `num_prompts` passed through it, with their
    outputs. `text` is None if the model has no tokenizer.
    """

    depth: int
    num_tokens: int
    num_pages: int
    lock_ref: int
    age: int
    num_prompts: int
    text: str | None
    token_ids: list[int]


class TreeReport(NamedTuple):
    """What the prompts needed and what the tree keeps.

    `saved_tokens` were computed once instead of once more for a later prompt. `total_tokens` lie in the tree;
    without sharing, the same prompts and outputs would hold `unshared_tokens`.
    """

    model: str
    page_size: int
    num_prompts: int
    prompt_tokens: int
    saved_tokens: int
    hit_rate: float
    num_nodes: int
    total_tokens: int
    total_pages: int
    total_bytes: int
    unshared_tokens: int
    evicted_tokens: int


@with_option_groups
def tree(
    prompts_file: Annotated[Path, typer.Argument(metavar="PROMPTS_FILE", help=FILE_HELP, show_default=False)],
    max_tokens: Annotated[int, setting_option(SamplingParams, "max_tokens", "--max-tokens", "-n")] = 16,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with the edges nested in it.")
    ] = False,
    *,
    engine_options: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Run prompts, then draw the radix tree: which beginnings they share, and what is kept of them.

    Each edge shows its tokens and pages, how many running requests pin it (refs), how many uses of the tree ago it
    was used last (age), how many prompts pass through it, and its text.
    """
    prompts = from_file(prompts_file)
    params = sampling.params(max_tokens)
    engine = engine_options.load()
    outputs = run(engine, prompts, params)
    report, edges = examine(engine, engine_options.model, outputs)
    if as_json:
        typer.echo(nested_json(report, edges))
    else:
        _draw(report, edges)
    raise_first_error(prompts, outputs)


def examine(engine: Engine, model: str, outputs: Sequence[RequestOutput]) -> tuple[TreeReport, list[Edge]]:
    """What `engine` keeps of `outputs`; edges come parents first."""
    kept_tokens, uses = _paths(engine, outputs)
    edges = list(_edges(engine, uses))
    cache, stats = engine.cache, engine.cache.stats()
    pages = np.concatenate([np.empty(0, np.int32), *(node.page_ids for _, node in cache.nodes())])
    prompt_tokens = sum(output.prompt_tokens for output in outputs)
    saved_tokens = sum(output.cached_tokens for output in outputs)
    report = TreeReport(
        model=model,
        page_size=cache.page_size,
        num_prompts=len(outputs),
        prompt_tokens=prompt_tokens,
        saved_tokens=saved_tokens,
        hit_rate=saved_tokens / prompt_tokens,
        num_nodes=len(edges),
        total_tokens=stats.total_tokens,
        total_pages=len(pages),
        total_bytes=engine.pool.bytes_of(pages, stats.total_tokens),
        unshared_tokens=kept_tokens,
        evicted_tokens=stats.evicted_tokens,
    )
    return report, edges


def _edges(engine: Engine, uses: Counter[int]) -> Iterator[Edge]:
    for depth, node in engine.cache.nodes():
        if node.is_root:
            continue
        token_ids = node.token_ids.tolist()
        yield Edge(
            depth=depth,
            num_tokens=node.num_tokens,
            num_pages=len(node.page_ids),
            lock_ref=node.lock_ref,
            age=engine.cache.tick - node.last_access,
            num_prompts=uses[id(node)],
            text=decode(engine.tokenizer, token_ids),
            token_ids=token_ids,
        )


def _paths(engine: Engine, outputs: Iterable[RequestOutput]) -> tuple[int, Counter[int]]:
    """How many tokens the tree keeps of each output with its prompt, summed up; and how many pass each node, by id."""
    total, uses = 0, Counter[int]()
    for output in outputs:
        kept_tokens, path = engine.cache.cached_path([*output.prompt_token_ids, *output.token_ids])
        total += kept_tokens
        uses.update(map(id, path))
    return total, uses


# -------------------------------------------------------------------------------------------------------------- output


def nested_json(report: TreeReport, edges: Iterable[Edge]) -> str:
    """One object: the report, with the edges below the root as its `children`, and theirs as theirs.

    Written piece by piece: a tree may be deeper than `json.dumps` can recurse.
    """
    pieces = [_opened(report._asdict())]
    open_depth = 0
    for edge in edges:
        num_closed = open_depth - edge.depth + 1
        pieces.append("]}" * num_closed + ("," if num_closed else ""))
        pieces.append(_opened({name: value for name, value in edge._asdict().items() if name != "depth"}))
        open_depth = edge.depth
    return "".join([*pieces, "]}" * (open_depth + 1)])


def _opened(fields: dict[str, Any]) -> str:
    """`fields` as a JSON object that is still open for its children."""
    return json.dumps(fields, ensure_ascii=False).removesuffix("}") + ', "children": ['


def _draw(report: TreeReport, edges: Sequence[Edge]) -> None:
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    console = Console()
    edge_columns = NARROW_EDGE_COLUMNS if console.is_terminal else EDGE_COLUMNS
    console.width = max(console.width, INDENT * max((edge.depth for edge in edges), default=0) + edge_columns)
    drawn = Tree(Text(f"{report.model}, pages of {report.page_size} tokens", "bold"), guide_style="dim")
    branches = [drawn]
    for edge in edges:
        del branches[edge.depth :]
        branches.append(branches[-1].add(_label(edge)))
    console.print(drawn)
    typer.echo("\n".join(["", *_summary(report)]))


def _label(edge: Edge) -> Text:
    from rich.text import Text

    shown = f'"{excerpt(edge.text)}"' if edge.text is not None else f"[{excerpt_ids(edge.token_ids)}]"
    return Text.assemble(
        (_count(edge.num_tokens, "token"), "bold"),
        (f" · {_count(edge.num_pages, 'page')}", "dim"),
        (f" · {_count(edge.lock_ref, 'ref')} · age {edge.age}", "dim"),
        f" · {_count(edge.num_prompts, 'prompt')}  ",
        (shown, "cyan"),
        no_wrap=True,
        overflow="ellipsis",
    )


def _summary(report: TreeReport) -> Iterator[str]:
    computed_tokens = report.prompt_tokens - report.saved_tokens
    yield (
        f"{_count(report.num_prompts, 'prompt')} of {_count(report.prompt_tokens, 'token')}: "
        f"{computed_tokens:,} computed, {report.saved_tokens:,} saved by sharing (hit rate {percent(report.hit_rate)})"
    )
    if report.num_nodes:
        yield (
            f"{_count(report.num_nodes, 'node')} keep {_count(report.total_tokens, 'token')} in "
            f"{_count(report.total_pages, 'page')}, {readable_bytes(report.total_bytes)}; "
            f"without sharing they would be {report.unshared_tokens:,}"
        )
    else:
        yield f"the tree is empty: no prompt fills a page of {report.page_size} tokens; try --page-size 1"
    if report.evicted_tokens:
        yield f"{report.evicted_tokens:,} tokens were evicted; a larger --kv-cache-tokens keeps the whole tree"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
