"""`radixkv explain`: its JSON against `PrefixCache.explain`, and what it draws where prompts part."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from cli_runs import PREAMBLE, FakeTerminal, assert_one_line_error, demo_copy, run, write_lines
from radixkv import PrefixCache
from radixkv.cli.difference import Side, difference, draw
from radixkv.cli.display import decode
from radixkv.cli.trace_source import load_tokenizer, pretrained_tokenizer

CACHED = [f"{PREAMBLE}First Citizen: You are all", f"{PREAMBLE}ROMEO: But soft, what", "JULIET: O Romeo, Romeo!"]
ASKED = [CACHED[0], f"{PREAMBLE}First Citizen: You are gone", "JULIET: O Romeo, Romeo! wherefore", "xyz", CACHED[2]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pretrained_tokenizer("demo")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_lines(tmp_path / "first.txt", CACHED), write_lines(tmp_path / "second.txt", ASKED)


def explain(*arguments: object) -> str:
    result = run("explain", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def explain_json(*arguments: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in explain(*arguments, "--json").splitlines()]


def drawn(tmp_path: Path, cached: str | list[int], asked: str | list[int], *options: object) -> list[str]:
    """The lines for one prompt asked for where another is cached; the files are called "first" and "second" in them."""
    paths = []
    for name, content in (("first", cached), ("second", asked)):
        row = {"prompt" if isinstance(content, str) else "token_ids": content}
        paths.append(write_lines(tmp_path / f"{name}.jsonl", [json.dumps(row)]))
    output = explain(*paths, *options).replace(f"{paths[0]}, line 1", "first").replace(f"{paths[1]}, line 1", "second")
    return [line for line in output.splitlines() if line][:-1]


# ----------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("options", "settings", "extra_key"),
    [
        ([], {"num_pages": 64}, None),
        (["--page-size", 1], {"num_pages": 999, "page_size": 1}, None),
        (["--kv-cache-tokens", 63], {"num_pages": 4}, None),
        (["--kv-cache-tokens", 64, "--policy", "fifo"], {"num_pages": 4, "policy": "fifo"}, None),
        (["--whole-pages"], {"num_pages": 64, "copy_page": None}, None),
        (["--extra-key-first", "tenant"], {"num_pages": 64}, "tenant"),
    ],
)
def test_json_is_what_the_cache_explains(
    files: tuple[Path, Path], tokenizer: Any, options: list[Any], settings: dict[str, Any], extra_key: str | None
) -> None:
    rows = explain_json(*files, *options)
    cache = PrefixCache(**{"page_size": 16, "copy_page": lambda *_: None, **settings})
    for text in CACHED:
        with cache.acquire(tokenizer(text).input_ids, extra_key=extra_key) as lease:
            lease.commit(tokenizer(text).input_ids)
    for number, (row, text) in enumerate(zip(rows, ASKED, strict=True), start=1):
        found = cache.explain_as_admin(tokenizer(text).input_ids)
        assert (row["prompt"], row["place"]) == (number, f"{files[1]}, line {number}")
        assert {"prompt", "place", *found._fields} == set(row)
        for name in ("num_tokens", "cached_tokens", "reason", "evicted_tokens"):
            assert row[name] == getattr(found, name)
        assert (row["other_namespaces"] is None) == (found.other_namespaces is None)
        if found.other_namespaces is not None:
            assert row["other_namespaces"] == found.other_namespaces._asdict()
        assert (row["eviction"] is None) == (found.eviction is None) == (row["evicted_ago_s"] is None)
        if found.eviction is not None:
            assert row["evicted_ago_s"] >= 0
            for name in ("num_pages", "policy", "evicted_tick", "last_use_tick", "unused_ticks"):
                assert row["eviction"][name] == getattr(found.eviction, name)
        assert (row["near_miss"] is None) == (found.near_miss is None)
        if found.near_miss is not None:
            for name in found.near_miss._fields:
                assert row["near_miss"][name] == getattr(found.near_miss, name)


def test_json_has_the_texts(files: tuple[Path, Path], tokenizer: Any) -> None:
    near_miss = explain_json(*files)[1]["near_miss"]
    assert near_miss["place"] == f"{files[0]}, line 1"
    assert CACHED[0].endswith(near_miss["same_text"] + near_miss["cached_text"])
    assert ASKED[1].endswith(near_miss["same_text"] + near_miss["asked_text"])
    assert (near_miss["cached_text"], near_miss["asked_text"]) == ("all", "gone")
    assert explain_json(*files)[2]["near_miss"]["cached_text"] == ""
    assert explain_json(*files)[2]["near_miss"]["asked_text"] == " wherefore"


def test_json_names_the_prompts_behind_an_eviction(tmp_path: Path) -> None:
    rows = [{"token_ids": [first, *range(100, 131)]} for first in (1, 2, 3, 1, 4)]  # of 3, the pool keeps 2
    file = write_lines(tmp_path / "ids.jsonl", map(json.dumps, rows))
    found = explain_json(file, file, "--kv-cache-tokens", 64, "--policy", "fifo")
    assert [row["reason"] for row in found] == ["hit", "evicted", "evicted", "hit", "hit"]
    eviction = found[1]["eviction"]
    assert (eviction["last_used_by"], eviction["evicted_for"]) == (f"{file}, line 2", f"{file}, line 4")
    assert (eviction["unused_prompts"], eviction["policy"]) == (2, "fifo")


def test_nothing_is_cached_of_the_second_file(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "first.txt", CACHED[:1])
    second = write_lines(tmp_path / "second.txt", [*CACHED, *CACHED])
    rows = explain_json(first, second)
    assert [row["reason"] for row in rows] == ["hit", "never seen", "never seen"] * 2
    assert rows[1]["cached_tokens"] == rows[4]["cached_tokens"]


# ----------------------------------------------------------------------------------------------------------------- text


def test_what_is_printed(files: tuple[Path, Path]) -> None:
    first, second = files
    rows = explain_json(*files)
    cached, total = ([row[name] for row in rows] for name in ("cached_tokens", "num_tokens"))
    assert explain(*files).splitlines() == [
        f"prompt 1 ({second}, line 1): all {total[0]} tokens cached",
        f"prompt 2 ({second}, line 2): {cached[1]} of {total[1]} tokens cached; never seen from there on",
        '  the same    … "any further, hear me speak. All: Speak, speak. First "',
        f'  cached      "Citizen: You are all"  ({first}, line 1)',
        '  asked       "Citizen: You are gone"',
        f"                                ^ token {cached[1]}",
        "",
        f"prompt 3 ({second}, line 3): {cached[2]} of {total[2]} tokens cached; "
        "it goes on where the cached prompt ends",
        '  the same    "JULIET: "',
        f'  cached      "O Romeo, Romeo!" ends here  ({first}, line 3)',
        '  asked       "O Romeo, Romeo! wherefore"',
        f"                              ^ token {cached[2]}",
        "",
        f"prompt 4 ({second}, line 4): 0 of {total[3]} tokens cached; nothing cached begins like this",
        f"prompt 5 ({second}, line 5): all {total[4]} tokens cached",
        f"5 prompts of {sum(total)} tokens: {sum(cached)} cached ({100 * sum(cached) / sum(total):.1f} %) · "
        "2 hit, 3 never seen",
    ]


@pytest.mark.parametrize(
    ("cached", "asked", "cached_rest", "asked_rest"),
    [
        ("Speak of Rome.", "Speak of Romeo.", ".", "o."),
        ("Speak of Rome.", "Speak of Rome. ", "", " "),
        ("Speak of Rome", "Speak of  Rome", "Rome", " Rome"),
        ("Speak:\n\tRome", "Speak:\n    Rome", "\\tRome", "    Rome"),
        ("Speak:\nRome", "Speak:\r\nRome", "\\nRome", "\\r\\nRome"),
        ("Speak", "Speak\u200b of Rome", "", "\\u200b of Rome"),
        ("中文, 中文 Rome", "中文, 中国 Rome", "文 Rome", "国 Rome"),
    ],
)
def test_all_that_differs_is_seen(tmp_path: Path, cached: str, asked: str, cached_rest: str, asked_rest: str) -> None:
    lines = drawn(tmp_path, cached, asked)
    lead, above = lines[-2].removesuffix(f'{asked_rest}"'), lines[-3].removesuffix("  (first)")
    assert lead.startswith('  asked       "')
    assert lead != lines[-2]
    assert above == lead.replace("asked ", "cached") + cached_rest + ('"' if cached_rest else '" ends here')
    columns = sum(1 + (unicodedata.east_asian_width(character) == "W") for character in lead)
    assert lines[-1].startswith(" " * columns + "^ token ")


@pytest.mark.parametrize(
    ("cached", "asked", "names"),
    [
        (
            "Speak of e",
            "Speak of \u0435",
            "'e' LATIN SMALL LETTER E is cached, '\u0435' CYRILLIC SMALL LETTER IE asked",
        ),
        (
            "caf\u00e9 noir",
            "cafe\u0301 noir",
            "'é' LATIN SMALL LETTER E WITH ACUTE is cached, 'e' LATIN SMALL",
        ),
        ("to be", "to\u00a0be", "' ' SPACE is cached, '\\xa0' NO-BREAK SPACE asked for"),
        ("to be", "to see", None),
        ("中文", "中国", None),
    ],
)
def test_characters_that_may_look_alike_are_named(tmp_path: Path, cached: str, asked: str, names: str | None) -> None:
    lines = drawn(tmp_path, cached, asked)
    assert (names is None) == ("^ token" in lines[-1])
    assert names is None or names in lines[-1]


def test_the_same_text_in_other_tokens(tmp_path: Path, tokenizer: Any) -> None:
    cached = tokenizer("weather in the window of Rome").input_ids
    asked = [*tokenizer("weather in the win").input_ids, *tokenizer("dow of Rome").input_ids]
    assert decode(tokenizer, cached) == decode(tokenizer, asked)
    assert drawn(tmp_path, cached, asked) == [
        "prompt 1 (second): 4 of 9 tokens cached; "
        "never seen from there on: the text looks the same, but its tokens are others",
        '  cached      "weather in the window of Rome"  (first)',
        '  asked       "weather in the window of Rome"',
        "                             ^ token 4",
        f"  cached ids  {' '.join(map(str, cached[4:]))}",
        f"  asked ids   {' '.join(map(str, asked[4:]))}",
    ]


def test_a_character_is_not_torn(tmp_path: Path, tokenizer: Any) -> None:
    """Where its tokens part, and where what is shown ends."""
    assert len(tokenizer("é").input_ids) == 2
    lines = drawn(tmp_path, "caf\u00e9 " + "é" * 30, "caf\u00e8 " + "é" * 30)
    assert lines[1].startswith('  cached      "café éé')
    assert lines[2].startswith('  asked       "cafè éé')
    assert "\ufffd" not in "".join(lines)
    assert lines[1].endswith('é" …  (first)')


def test_long_texts_are_shortened(tmp_path: Path) -> None:
    start = " ".join(f"word{number}" for number in range(100))
    lines = drawn(tmp_path, f"{start} {'a' * 500}", f"{start} {'b' * 500}")
    assert lines[1].startswith('  the same    … "')
    assert lines[2].endswith('a" …  (first)')
    assert lines[3].endswith('b" …')
    assert all(len(line) < 90 for line in lines[1:])


def test_ids_that_no_token_has_are_shown_as_ids(tmp_path: Path) -> None:
    lines = drawn(tmp_path, [100, 10**6, 101], [100, 10**6 + 1, 101])
    assert lines[-2:] == ["  cached ids  1000000 101", "  asked ids   1000001 101"]


# -------------------------------------------------------------------------------------------------------- other reasons


def test_evictions_tell_for_whom_and_when(tmp_path: Path) -> None:
    """The first prompt's second page stays as long as the second prompt copies from it; then the third needs it."""
    prompts = [[*range(300, 340)], [*range(300, 320), *range(400, 420)], [*range(500, 516)]]
    file = write_lines(tmp_path / "ids.jsonl", (json.dumps({"token_ids": ids}) for ids in prompts))
    lines = explain(file, file, "--kv-cache-tokens", 64).splitlines()
    assert lines[:2] == [
        f"prompt 1 ({file}, line 1): 20 of 40 tokens cached; the next 20 were evicted by lru",
        f"  to make room for {file}, line 3; last used by {file}, line 2, 1 prompt before",
    ]
    assert lines[3].startswith('  evicted     "')
    assert lines[3].endswith('" …')
    assert lines[4].endswith("^ token 20")
    assert lines[-1].endswith("2 hit, 1 evicted")


def test_other_namespaces(files: tuple[Path, Path], tokenizer: Any) -> None:
    lines = explain(*files, "--extra-key-first", "tenant a").splitlines()
    num_tokens = len(tokenizer(ASKED[0]).input_ids)
    assert lines[0].endswith(
        f"line 1): 0 of {num_tokens} tokens cached; "
        f"never seen in this namespace, but another namespace holds {num_tokens}"
    )
    assert lines[-1].endswith("0 cached (0.0 %) · 4 other namespace, 1 never seen")


def test_whole_pages(tmp_path: Path) -> None:
    cached, asked = [*range(300, 340)], [*range(300, 320), 350, 351]
    lines = drawn(tmp_path, cached, asked, "--whole-pages")
    assert lines[0] == "prompt 1 (second): 16 of 22 tokens cached; 4 more are the same, but fill no page of 16"
    assert lines[-1].endswith("^ token 20")
    assert drawn(tmp_path, cached, [*cached, 1], "--whole-pages") == [
        "prompt 1 (second): 32 of 41 tokens cached; the last 9 fill no page of 16"
    ]
    lines = drawn(tmp_path, cached, [*cached, *range(20)], "--whole-pages")
    assert lines[0].endswith("; it goes on where what is cached ends")
    assert lines[2].endswith(" ends here  (first, of which no more is cached)")


# ------------------------------------------------------------------------------------------------------- no tokenizer


def test_without_a_tokenizer_there_are_ids(tmp_path: Path) -> None:
    model = demo_copy(tmp_path / "bare", without=["tokenizer.json", "tokenizer_config.json"])
    cached, asked = [*range(100, 140), 7], [*range(100, 140), 8, 9, *range(20)]
    assert drawn(tmp_path, cached, asked, "--model", model) == [
        "prompt 1 (second): 40 of 62 tokens cached; never seen from there on",
        f"  the same    … {' '.join(map(str, range(108, 140)))}",
        "  cached      7  (first)",
        f"  asked       8 9 {' '.join(map(str, range(14)))} …",
        "              ^ token 40",
    ]
    assert drawn(tmp_path, cached, [*cached, 5], "--model", model)[-3:] == [
        "  cached      ends here  (first)",
        "  asked       5",
        "              ^ token 41",
    ]
    texts = write_lines(tmp_path / "texts.txt", ["a text"])
    assert_one_line_error(
        run("explain", texts, texts, "--model", model), f"{texts}, line 1: '{model}' has no tokenizer; give token_ids"
    )
    result = run("replay", texts, "--capacity-tokens", 64, "--tokenizer", model)
    assert_one_line_error(result, f"no tokenizer can be loaded from '{model}': the directory has none")


def test_prompts_are_encoded_as_an_engine_does(tokenizer: Any) -> None:
    assert load_tokenizer("demo")("O Romeo") == tokenizer("O Romeo", add_special_tokens=False).input_ids


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors_are_one_line(tmp_path: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = files
    assert_one_line_error(run("explain", first), "Missing argument 'SECOND_FILE'. (see radixkv explain --help)")
    assert_one_line_error(run("explain", first, tmp_path / "none"), "none cannot be read: No such file")
    bad = write_lines(tmp_path / "bad.jsonl", ['{"prompt": "good"}', "{}"])
    assert_one_line_error(run("explain", bad, second), f"{bad}, line 2: a row needs")
    assert_one_line_error(run("explain", first, write_lines(tmp_path / "empty.txt", [])), "empty.txt holds no prompts")
    cases: list[tuple[list[Any], str]] = [
        (["--page-size", 0], "--page-size must be an integer of at least 1, not 0"),
        (["--kv-cache-tokens", -1], "--kv-cache-tokens must be an integer in [1, 2147483647], not -1"),
        (["--policy", "mru"], "unknown eviction policy 'mru'; the policies are lru, "),
        (["--model", "./no/such"], "no tokenizer can be loaded from './no/such'"),
        (["--kv-cache-tokens", 9], " tokens, and the pool has room for 16; make --kv-cache-tokens larger"),
    ]
    for options, message in cases:
        assert_one_line_error(run("explain", first, second, *options), message)


def test_failing_tokenizers_are_one_line(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise ArithmeticError("no\nluck")

    for tokenizer, message in [
        (broken, "line 1: the tokenizer failed: ArithmeticError: no luck"),
        (lambda _: SimpleNamespace(input_ids=[]), "line 1: the tokenizer makes no tokens of this"),
    ]:
        monkeypatch.setattr("radixkv.cli.explain.pretrained_tokenizer", lambda _, t=tokenizer: t)
        assert_one_line_error(run("explain", *files), message)


# ------------------------------------------------------------------------------------------------------------- terminal


def test_colours_are_for_terminals(files: tuple[Path, Path], tokenizer: Any) -> None:
    assert "\x1b" not in explain(*files)
    rome, paris = tokenizer(" Rome").input_ids, tokenizer(" Paris").input_ids
    parted = difference(tokenizer, 0, [], rome, paris)
    terminal = FakeTerminal()
    console = Console(file=terminal, force_terminal=True, color_system="standard", width=80)
    for line in draw(parted, [Side("cached", rome, parted.cached_text, "bold red", goes_on=False)]):
        console.print(line)
    assert "\x1b[1;31mRome\x1b[0m" in terminal.getvalue()


def test_bars_are_for_terminals(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = FakeTerminal()
    bars = Progress(console=Console(file=terminal, force_terminal=True))
    monkeypatch.setattr("radixkv.cli.explain.progress_on_stderr", lambda: bars)
    assert run("explain", *files).exit_code == 0
    for work in ("making tokens", "caching", "explaining"):
        assert work in terminal.getvalue()


def test_help_teaches_examples() -> None:
    text = " ".join(run("explain", "--help").stdout.replace("│", " ").split())
    for part in ("radixkv explain old.txt new.txt", "never seen", "other namespace", "token_ids", "--whole-pages"):
        assert part in text
