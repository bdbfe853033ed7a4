"""What bench/serving.py measured: as tables and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from radixkv_bench.common.tables import number_table

Report = dict[str, Any]
THREAD_NAMES = {"loop": "event loop", "engine": "engine"}


def print_tables(report: Report, console: Console) -> None:
    """A table or some lines for each case that was run."""
    shown = {"transformers": _talks, "http": _http, "soak": _soak, "schema": _schema, "retokenised": _retokenised}
    for name, show in shown.items():
        figures = report["cases"].get(name)
        if figures is None:
            continue
        if "left_out" in figures:
            _say(console, f"{name}: left out; {figures['left_out']}")
        else:
            show(figures, console)


def _talks(figures: Report, console: Console) -> None:
    _head(
        console,
        f"{figures['clients']} clients, {figures['system_tokens']:,} tokens of system prompt, "
        f"{figures['turns']} turns of {figures['user_tokens']} in and {figures['output_tokens']} out",
    )
    table = number_table(("server",), ("tokens/s", "TTFT p50\nms", "cached"))
    for name, server in figures["servers"].items():
        cached = sum(server["cached_tokens"]) / sum(server["prompt_tokens"])
        shown = f"{cached:.0%}" if name == "radixkv" else "not told"
        table.add_row(name, f"{server['tokens_a_second']:,.1f}", f"{server['ttft_p50_s'] * 1e3:,.0f}", shown)
    console.print(table)
    _say(
        console,
        f"radixkv has {figures['throughput_ratio']:.2f} × the tokens/s and {figures['ttft_ratio']:.2f} × the TTFT; "
        f"{figures['same_answers']:.0%} of the answers are the same",
    )


def _http(figures: Report, console: Console) -> None:
    _head(
        console,
        f"{figures['streams']} streams, {figures['prompt_tokens']} tokens in and {figures['output_tokens']} out",
    )
    _say(
        console,
        f"HTTP {figures['http_tokens_a_second']:,.0f} tokens/s, Engine.generate "
        f"{figures['engine_tokens_a_second']:,.0f}: {figures['ratio']:.1%}",
    )
    used = ", ".join(f"{name} {value:,.1f}" for name, value in figures["processor_us_a_token"].items())
    _say(console, f"processor time in µs a token: {used}")
    for thread, parts in figures["profile_us_a_token"].items():
        total = sum(parts.values()) or 1.0
        shares = ", ".join(f"{part} {value / total:.0%}" for part, value in parts.items() if value / total >= 0.005)
        _say(console, f"thread of the {THREAD_NAMES[thread]}, by a profiler: {shares}")


def _soak(figures: Report, console: Console) -> None:
    _head(
        console, f"{figures['streams']:,} streams at once, then {figures['requests']:,} requests, half of them cut off"
    )
    _say(
        console,
        f"{figures['streams_finished']:,} of {figures['streams']:,} streams finished in {figures['streams_s']:.1f} s; "
        f"the requests took {figures['requests_s']:.1f} s, {figures['at_once']} at a time",
    )
    _say(
        console,
        f"at the end: {figures['leased_pages']} pages leased, {figures['running']} requests run, "
        f"{figures['waiting']} wait",
    )
    _say(
        console,
        f"resident memory over the last half: {figures['resident_bytes_a_request']:,.1f} bytes a request by the "
        f"straight line, {figures['resident_growth_bytes'] / 1e6:,.2f} MB in all",
    )


def _schema(figures: Report, console: Console) -> None:
    _head(console, f"batch {figures['batch']}, {figures['output_tokens']} tokens out, JSON schema compiled before")
    _say(
        console,
        f"decoding: {figures['schema_tokens_a_second']:,.0f} tokens/s with the schema, "
        f"{figures['free_tokens_a_second']:,.0f} without: {figures['ratio']:.1%}",
    )
    _say(
        console,
        f"{figures['forced_share']:.0%} of these are the only ones that the schema allows; where a step chooses each, "
        f"too: {figures['chosen_tokens_a_second']:,.0f} tokens/s, {figures['chosen_ratio']:.1%}",
    )


def _retokenised(figures: Report, console: Console) -> None:
    answers, differing, lost = figures["answers"], figures["retokenised_answers"], figures["lost_tokens"]
    _head(console, f"{answers:,} answers of the demo model at temperature 1, {figures['output_tokens']:,} tokens")
    _say(
        console,
        f"{differing:,} ({differing / answers:.0%}) are tokenised otherwise when they come back; of the cached tokens "
        f"{lost:,} are missed, {lost / max(1, differing):,.1f} for each of them",
    )
    _say(console, f"--keep-answer-ids: {figures['kept_answers']:,} answers keep their ids")


def _head(console: Console, text: str) -> None:
    console.print(text, style="bold", highlight=False)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False)
