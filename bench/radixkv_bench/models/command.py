"""Try every family of transformers, and write docs/models.md.

python scripts/model_table.py --help
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import transformers
import typer
from rich.console import Console

from radixkv_bench.common.command import Outcome, command, error_console
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.files import check_folder
from radixkv_bench.common.progress import counting_bar
from radixkv_bench.common.tables import number_table
from radixkv_bench.models.families import Family, all_families
from radixkv_bench.models.finding import MUST_NOT_BE
from radixkv_bench.models.isolation import make_context, run_alone
from radixkv_bench.models.page import Findings, page, summary
from radixkv_bench.models.trial import try_quietly

PRELOADED = ("torch", "transformers", "radixkv.engine.engine")
PAGE = Path(__file__).parents[3] / "docs" / "models.md"


@command("model_table", plots=False)
def main(
    family: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE", help="A model_type; may be given again.", show_default="all"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.md", help="Where to write the page.", show_default="docs/models.md for all"),
    ] = None,
    limit_s: Annotated[float, typer.Option(min=1, help="Seconds that a family may take.")] = 120.0,
) -> Outcome:
    """Serve a small random model of every family of transformers, and compare with the unmodified model.

    Exits with 1 if a family is served wrongly, or crashes; with 2 if the command cannot be run.
    """
    check_folder(out)
    findings = try_all(chosen(family), limit_s)
    if out is None and not family:
        out = PAGE
    if out is not None:
        out.write_text(page(findings, transformers.__version__), encoding="utf-8")
    figures = {
        "transformers": transformers.__version__,
        "families": [{**each._asdict(), **asdict(finding)} for each, finding in findings],
    }
    return Outcome(figures, partial(show, findings, out), failures=bugs(findings))


def chosen(model_types: Sequence[str] | None) -> list[Family]:
    """The families of those types; all without any. Raises: BenchError for a type that leads to none."""
    families = all_families()
    if not model_types:
        return families
    known = {name: family for family in families for name in (family.model_type, *family.aliases)}
    for model_type in model_types:
        if model_type not in known:
            raise BenchError(f"--family must be a model_type that AutoModelForCausalLM knows, not {model_type!r}")
    return [known[model_type] for model_type in model_types]


def try_all(families: Sequence[Family], limit_s: float) -> Findings:
    """What was found out about each, one after another."""
    context, findings = make_context(PRELOADED), []
    with counting_bar(error_console()) as progress:
        progress.disable = not sys.stderr.isatty()
        task = progress.add_task("families", total=len(families))
        for family in families:
            progress.update(task, description=family.model_type)
            findings.append((family, run_alone(context, try_quietly, family.model_type, limit_s)))
            progress.advance(task)
    return findings


def bugs(findings: Findings) -> list[str]:
    """A line for each family that is served wrongly or not refused as it should be."""
    return [
        f"{family.model_type}: {finding.outcome}: {finding.reason}"
        for family, finding in findings
        if finding.outcome in MUST_NOT_BE
    ]


def show(findings: Findings, out: Path | None, console: Console) -> None:
    """Print how many families there are of each outcome."""
    heading, *rows = summary(findings)
    table = number_table(heading[:1], heading[1:2])
    for row in rows:
        table.add_row(*row[:2])
    console.print(table)
    if out is not None:
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)
