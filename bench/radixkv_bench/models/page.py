"""The page docs/models.md: what was found out about each family, as tables in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from radixkv_bench.models.families import Family
from radixkv_bench.models.finding import Finding, Outcome

COMMAND = "python scripts/model_table.py"
CAPABLE = (Outcome.SERVED, Outcome.LIMITED)
MEANINGS: Mapping[Outcome, str] = {
    Outcome.SERVED: "tokens and log probabilities are the unmodified model's",
    Outcome.LIMITED: "the same, and something that other families have is missing",
    Outcome.REFUSED: "the engine raises an error that says why; it never serves such a model wrongly",
    Outcome.UNTRIED: "no small model of the family could be made and run by itself here",
    Outcome.FAILED: "a bug: it crashed, hung or raised an error that is none of radixkv's",
    Outcome.WRONG: "a bug: other tokens than the unmodified model's",
}
INTRODUCTION = """\
# Which models are served

Models are Hugging Face's own classes, unchanged, with paged attention plugged in; what the engine finds out by running
a model once decides whether it is served ([attention](attention.md)). This page was written by `{command}` with
transformers {version}: for each class that `AutoModelForCausalLM` makes, a small random model in float32 was served on
the CPU and compared with the unmodified one: prompts cold, with a cached prefix, several at once, and in chunks.
"""

Findings = Sequence[tuple[Family, Finding]]


def page(findings: Findings, version: str) -> str:
    """The whole page. The same findings give the same text."""
    parts = [INTRODUCTION.format(command=COMMAND, version=version), *_table(summary(findings)), ""]
    for outcome, group in groupby(sorted(findings, key=_order), key=lambda pair: pair[1].outcome):
        rows = list(group)
        parts += [f"## {_heading(outcome)}", "", *_rows(outcome, rows), ""]
    return "\n".join(parts).rstrip() + "\n"


def summary(findings: Findings) -> list[tuple[str, ...]]:
    """A heading, and how many families there are of each outcome that occurs."""
    counts = Counter(finding.outcome for _, finding in findings)
    rows = [(outcome.value, str(counts[outcome]), MEANINGS[outcome]) for outcome in Outcome if counts[outcome]]
    return [("outcome", "families", "meaning"), *rows]


def _order(pair: tuple[Family, Finding]) -> tuple[int, str]:
    family, finding = pair
    return list(Outcome).index(finding.outcome), family.model_type


def _heading(outcome: Outcome) -> str:
    return outcome.value[0].upper() + outcome.value[1:]


def _rows(outcome: Outcome, findings: Findings) -> Iterator[str]:
    if outcome in CAPABLE:
        limited = outcome is Outcome.LIMITED
        names: tuple[str, ...] = ("family", "class", "layers", "attention", *(["limits"] if limited else []))
        cells = [
            (*_names(family), finding.layers, f"`{finding.backend}`", *(["; ".join(finding.limits)] if limited else []))
            for family, finding in findings
        ]
    else:
        names = ("family", "class", "layers", "why")
        cells = [(*_names(family), finding.layers, _shortened(family, finding.reason)) for family, finding in findings]
    yield from _table([names, *cells])


def _names(family: Family) -> tuple[str, str]:
    return ", ".join(f"`{name}`" for name in (family.model_type, *family.aliases)), f"`{family.class_name}`"


def _shortened(family: Family, reason: str) -> str:
    return reason.removeprefix(f"{family.class_name} does not run on paged attention: ")


def _table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    heading, *others = rows
    for row in (heading, ["---"] * len(heading), *others):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
