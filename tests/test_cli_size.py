"""`radixkv size` and the application around it: figures, JSON, and errors of one line with exit code 2."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import radixkv
from radixkv.cli.app import COMMANDS, Commands, app
from radixkv.cli.size_report import readable_bytes
from radixkv.errors import ConfigError

GIB = 2**30
LLAMA_3_8B = {
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_config(tmp_path / "llama", LLAMA_3_8B)


def write_config(directory: Path, content: Any) -> Path:
    directory.mkdir()
    path = directory / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="radixkv")


def run_json(*arguments: object) -> dict[str, Any]:
    result = run("size", *arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    figures = json.loads(result.stdout)
    assert isinstance(figures, dict)
    return figures


def assert_one_line_error(result: Result, message: str) -> None:
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("radixkv: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


# ----------------------------------------------------------------------------------------------- figures


def test_json_holds_every_figure_that_was_asked(llama: Path) -> None:
    figures = run_json(llama, "--seq-len", 2048, "--batch", 4, "--memory-gb", 80, "--weights-gb", 16, "--reserve", 0.1)
    assert figures["bytes_per_token"] == 128 * 1024
    assert figures["bytes_per_sequence"] == 2048 * 128 * 1024
    assert figures["bytes_per_batch"] == 4 * 2048 * 128 * 1024
    assert figures["max_batch"] == 230
    assert figures["budget_bytes"] == 64 * GIB * 9 // 10
    assert figures["max_tokens"] == figures["budget_bytes"] // (128 * 1024)
    assert (figures["model"], figures["model_type"], figures["dtype"]) == (str(llama), "llama", "bfloat16")
    assert (figures["num_layers"], figures["num_kv_layers"]) == (32, 32)
    assert figures["layers"] == [{"num_kv_heads": 8, "k_head_dim": 128, "v_head_dim": 128}] * 32


def test_json_holds_null_where_nothing_was_asked(llama: Path) -> None:
    figures = run_json(llama)
    assert figures["bytes_per_token"] == 128 * 1024
    unasked = "seq_len batch memory_bytes bytes_per_sequence bytes_per_batch budget_bytes max_tokens max_batch"
    assert [figures[name] for name in unasked.split()] == [None] * 8
    assert run_json(llama, "--memory-gb", 80)["max_batch"] is None
    assert run_json(llama, "--batch", 2)["bytes_per_batch"] is None


@pytest.mark.parametrize(
    ("dtype", "bytes_per_value"), [("float32", 4), ("fp8_e5m2", 1), ("int4", 0.5 + 4 / 128), ("fp4", 4.5 / 8)]
)
def test_the_dtype_option_beats_the_config(llama: Path, dtype: str, bytes_per_value: float) -> None:
    assert run_json(llama, "--dtype", dtype)["bytes_per_token"] == 2 * 32 * 8 * 128 * bytes_per_value


@pytest.mark.parametrize(
    ("stated", "dtype"),
    [({"torch_dtype": "float16"}, "float16"), ({"dtype": "torch.float32"}, "float32"), ({}, "bfloat16")],
)
def test_the_dtype_is_the_configs_own(tmp_path: Path, stated: dict[str, str], dtype: str) -> None:
    fields = {name: value for name, value in LLAMA_3_8B.items() if name != "torch_dtype"}
    assert run_json(write_config(tmp_path / "flat", {**fields, **stated}))["dtype"] == dtype
    assert run_json(write_config(tmp_path / "nested", {"text_config": fields, **stated}))["dtype"] == dtype


def test_gigabytes_are_gib_and_decimals_are_exact(llama: Path) -> None:
    assert run_json(llama, "--memory-gb", "0.1")["memory_bytes"] == GIB // 10
    tight = run_json(llama, "--memory-gb", 1, "--seq-len", 8192)
    assert (tight["memory_bytes"], tight["max_batch"]) == (GIB, 1)


QWEN3_NEXT_80B = {
    "model_type": "qwen3_next",
    "torch_dtype": "bfloat16",
    "num_hidden_layers": 48,
    "full_attention_interval": 4,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_value_head_dim": 128,
    "linear_num_value_heads": 32,
}
QWEN3_NEXT_STATE = 36 * (8192 * 4 * 2 + 32 * 128 * 128 * 4)


def test_states_are_counted_beside_the_kv(tmp_path: Path) -> None:
    config = write_config(tmp_path / "hybrid", QWEN3_NEXT_80B)
    figures = run_json(config, "--memory-gb", 192, "--weights-gb", 150, "--seq-len", 8192)
    assert (figures["bytes_per_token"], figures["bytes_per_state"]) == (12 * 2 * 2 * 256 * 2, QWEN3_NEXT_STATE)
    assert figures["state_tokens"] == QWEN3_NEXT_STATE // figures["bytes_per_token"] == 3168
    assert figures["num_state_layers"] == 36
    assert figures["states"][0] == {
        "kind": "gated delta rule",
        "conv": [8192, 4],
        "recurrent": [32, 128, 128],
        "is_float32": True,
    }
    budget = 42 * GIB
    assert figures["max_states"] == budget // 3 // QWEN3_NEXT_STATE
    assert figures["max_states_bytes"] == figures["max_states"] * QWEN3_NEXT_STATE
    kv_bytes = budget - figures["max_states_bytes"]
    assert figures["max_tokens"] == kv_bytes // figures["bytes_per_token"]
    assert figures["max_batch"] == figures["max_states"] // 2 < kv_bytes // figures["bytes_per_sequence"]
    longer = run_json(config, "--memory-gb", 192, "--weights-gb", 150, "--seq-len", 65536)
    assert longer["max_batch"] == kv_bytes // longer["bytes_per_sequence"] < figures["max_batch"]
    assert run_json(config, "--memory-gb", 1, "--seq-len", 1)["max_tokens"] == 0, "not even the fewest states fit"


def test_states_keep_the_dtype_of_the_model_where_kv_is_quantised(tmp_path: Path) -> None:
    config = write_config(tmp_path / "hybrid", QWEN3_NEXT_80B)
    in_float32 = 36 * (8192 * 4 * 4 + 32 * 128 * 128 * 4)
    for dtype, state_bytes in (("fp8", QWEN3_NEXT_STATE), ("float16", QWEN3_NEXT_STATE), ("float32", in_float32)):
        assert run_json(config, "--dtype", dtype)["bytes_per_state"] == state_bytes


def test_a_table_tells_of_states_if_there_are_any(llama: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "hybrid", QWEN3_NEXT_80B)
    printed = run("size", config, "--memory-gb", 192, "--weights-gb", 150).stdout
    for text in ("gated delta rule", "2,162,688 bytes a state", "74.2 MiB", "3,168 tokens", "states that fit"):
        assert text in printed
    assert "state" not in run("size", "demo", "--memory-gb", 80, "--seq-len", 8).stdout
    figures = run_json(llama, "--memory-gb", 80)
    assert [figures[name] for name in ("bytes_per_state", "state_tokens", "max_states", "num_state_layers")] == [0] * 4


def test_states_that_are_not_known_are_said_to_be_left_out(tmp_path: Path) -> None:
    layout = {"model_type": "minimax_m1", "attn_type_list": [0, 1] * 16}
    config = write_config(tmp_path / "unknown", {**LLAMA_3_8B, **layout})
    figures = run_json(config, "--memory-gb", 80)
    assert [figures[name] for name in ("bytes_per_state", "max_states", "num_state_layers")] == [None] * 3
    assert figures["bytes_per_token"] == 64 * 1024
    assert figures["missing"][0].startswith(
        "states are not counted: the states of the 16 recurrent layers of model_type"
    )
    assert "states are not counted" in run("size", config).stderr


def test_what_a_class_in_transformers_fills_in_counts_for_states(tmp_path: Path) -> None:
    left_out = {name: value for name, value in QWEN3_NEXT_80B.items() if name != "linear_conv_kernel_dim"}
    assert run_json(write_config(tmp_path / "hybrid", left_out))["bytes_per_state"] == QWEN3_NEXT_STATE


def test_a_table_in_readable_units(llama: Path) -> None:
    result = run("size", llama, "--seq-len", 4096, "--batch", 3, "--memory-gb", 80, "--weights-gb", 16)
    assert result.exit_code == 0
    for text in ("8 KV heads of 128", "128 KiB", "131,072 bytes", "512 MiB", "1.5 GiB", "64 GiB", "524,288", "128"):
        assert text in result.stdout
    assert "largest batch" not in run("size", llama).stdout


def test_the_table_tells_layer_kinds_apart(tmp_path: Path) -> None:
    hybrid = {**LLAMA_3_8B, "layer_types": ["linear_attention"] * 31 + ["full_attention"], "v_head_dim": 64}
    output = run("size", write_config(tmp_path / "hybrid", hybrid)).stdout
    assert "31 of 32 layers" in output
    assert "no KV" in output
    assert "8 KV heads of 128/64" in output
    latent = {**LLAMA_3_8B, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert "a latent of 576" in run("size", write_config(tmp_path / "latent", latent)).stdout


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (70272, "68.6 KiB"), (3 * GIB // 2, "1.5 GiB")],
)
def test_readable_bytes(num_bytes: int, text: str) -> None:
    assert readable_bytes(num_bytes) == text


# ---------------------------------------------------------------------------- what it would cost otherwise


def costs(figures: dict[str, Any]) -> dict[str, tuple[int | None, int | None, float]]:
    return {
        row["name"]: (row["bytes_per_token"], row["bytes_per_sequence"], round(row["ratio"], 4))
        for row in figures["alternatives"]
    }


def test_json_tells_what_each_alternative_costs(llama: Path) -> None:
    figures = run_json(llama, "--seq-len", 4096)
    vectors = 2 * 32 * 8  # K and V
    per_token = {
        "bfloat16": 128 * 1024,
        "fp8": 64 * 1024,
        "int8": 64 * 1024 + 2 * vectors,
        "int4": 32 * 1024 + 4 * vectors,
        "fp4": 32 * 1024 + 8 * vectors,
        "multi-head": 512 * 1024,
        "multi-query": 16 * 1024,
    }
    expected = {name: (n, 4096 * n, round(n / (128 * 1024), 4)) for name, n in per_token.items()}
    assert costs(figures) == expected
    assert figures["missing"] == []
    assert figures["windows"] == [None] * 32
    assert costs(run_json(llama))["fp8"] == (64 * 1024, None, 0.5)
    assert costs(run_json(llama, "--dtype", "float32"))["fp8"] == (64 * 1024, None, 0.25)
    assert costs(run_json(llama, "--dtype", "float32"))["multi-head"] == (1024 * 1024, None, 4.0)


def test_windows_save_what_their_layers_forget(tmp_path: Path) -> None:
    types = ["sliding_attention"] * 24 + ["full_attention"] * 8
    windowed = write_config(tmp_path / "windowed", {**LLAMA_3_8B, "layer_types": types, "sliding_window": 1000})
    figures = run_json(windowed, "--seq-len", 4000)
    assert costs(figures)["window"] == (None, 4096 * (24 * 1000 + 8 * 4000), 0.4375)
    assert figures["windows"] == [1000] * 24 + [None] * 8
    assert costs(run_json(windowed, "--seq-len", 500))["window"][2] == 1
    assert "window" not in costs(run_json(windowed))
    assert "24 of 32 layers keep 1,000 tokens" in run("size", windowed, "--seq-len", 4000).stdout


def test_the_second_table_in_readable_units(llama: Path) -> None:
    lines = [" ".join(line.split()) for line in run("size", llama, "--seq-len", 4096).stdout.splitlines()]
    for line in (
        "one token 4,096 tokens times",
        "bfloat16 128 KiB 512 MiB 1 ×",
        "fp8 64 KiB 256 MiB 0.5 ×",
        "int8 + a scale a vector 65 KiB 260 MiB 0.508 ×",
        "int4 + a scale and a zero 34 KiB 136 MiB 0.266 ×",
        "fp4 + a scale for 16 36 KiB 144 MiB 0.281 ×",
        "multi-head: 32 KV heads 512 KiB 2 GiB 4 ×",
        "multi-query: 1 KV head 16 KiB 64 MiB 0.125 ×",
    ):
        assert line in lines
    assert all(len(line) <= 80 for line in run("size", llama, "--seq-len", 4096).stdout.splitlines()[2:])


def test_what_the_config_does_not_tell_is_said(tmp_path: Path) -> None:
    silent = {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 16, "sliding_window": 100}
    path = write_config(tmp_path / "silent", silent)
    figures = run_json(path, "--seq-len", 1000)
    assert list(costs(figures)) == ["bfloat16", "fp8", "int8", "int4", "fp4"]
    heads, windows = figures["missing"]
    assert "the config does not give all dimensions of the query heads" in heads
    assert "the config has one of 100 tokens, and no layer_types" in windows
    assert heads in run("size", path).stderr.replace("\n", " ")


def test_the_share_of_kv_beside_the_weights(llama: Path) -> None:
    assert run_json(llama, "--seq-len", 8192, "--weights-gb", 15)["kv_share"] == 1 / 16
    assert run_json(llama, "--seq-len", 8192, "--batch", 5, "--weights-gb", 15)["kv_share"] == 0.25
    assert run_json(llama, "--seq-len", 8192)["kv_share"] is None
    assert run_json(llama, "--weights-gb", 15)["kv_share"] is None
    lines = [
        " ".join(line.split()) for line in run("size", llama, "--seq-len", 8192, "--weights-gb", 15).stdout.splitlines()
    ]
    assert "the sequence, of weights and KV 6.25% weights 15 GiB" in lines


# ----------------------------------------------------------------------------------------------- sources


def test_a_directory_is_its_config(llama: Path) -> None:
    assert run_json(llama.parent)["layers"] == run_json(llama)["layers"]


def test_demo_is_the_packaged_model() -> None:
    figures = run_json("demo", "--seq-len", 10)
    assert figures["model_type"] == "llama"
    assert figures["bytes_per_sequence"] == 10 * figures["bytes_per_token"] > 0


def test_defaults_that_a_nested_config_left_out_come_from_its_class(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34}
    figures = run_json(write_config(tmp_path / "gemma", {"model_type": "gemma3", "text_config": text}))
    assert figures["layers"] == [{"num_kv_heads": 4, "k_head_dim": 256, "v_head_dim": 256}] * 34


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", "0"], "--seq-len must be an integer of at least 1, not 0"),
        (["--seq-len", "-5"], "--seq-len must be an integer of at least 1, not -5"),
        (["--seq-len", "many"], "--seq-len"),
        (["--batch", "0"], "--batch must be an integer of at least 1, not 0"),
        (["--memory-gb", "0"], "--memory-gb must be"),
        (["--memory-gb", "-1"], "--memory-gb must be"),
        (["--memory-gb", "nan"], "--memory-gb must be"),
        (["--memory-gb", "inf"], "--memory-gb must be"),
        (["--weights-gb", "-1"], "--weights-gb must be"),
        (["--weights-gb", "nan"], "--weights-gb must be"),
        (["--reserve", "1"], "--reserve must be a number in [0, 1), not 1.0"),
        (["--reserve", "nan"], "--reserve must be a number in [0, 1)"),
        (["--dtype", "float64"], "unknown dtype 'float64'; the known ones are float32"),
        (["--bogus"], "No such option"),
    ],
)
def test_bad_options(llama: Path, options: list[str], message: str) -> None:
    assert_one_line_error(run("size", llama, *options), message)
    assert_one_line_error(run("size", llama, *options, "--json"), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "must be a JSON object, not a list"),
        ({}, "missing num_hidden_layers"),
        ({"model_type": "novel", "num_hidden_layers": 2}, "missing num_attention_heads"),
        ({**LLAMA_3_8B, "num_key_value_heads": "eight"}, "num_key_value_heads"),
        ({**LLAMA_3_8B, "torch_dtype": "float64"}, "choose one with --dtype"),
    ],
)
def test_bad_configs(tmp_path: Path, content: Any, message: str) -> None:
    assert_one_line_error(run("size", write_config(tmp_path / "bad", content)), message)


def test_bad_places(tmp_path: Path) -> None:
    assert_one_line_error(run("size", tmp_path), "has no config.json")
    assert_one_line_error(run("size", tmp_path / "missing.json"), "missing.json")
    assert_one_line_error(run("size", "no such\nplace"), "there is no file or directory")
    assert_one_line_error(run("size", "typo.json"), "there is no file or directory 'typo.json'")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert_one_line_error(run("size", tmp_path / "binary.json"), "cannot be read")


# ------------------------------------------------------------------------------------------- application


def test_without_a_command_the_help_is_shown() -> None:
    bare, asked = run(), run("--help")
    assert (bare.exit_code, asked.exit_code) == (0, 0)
    assert bare.stdout.split() == asked.stdout.split()
    assert "size" in bare.stdout


def test_help_teaches_the_units_and_an_example() -> None:
    text = " ".join(run("size", "--help").stdout.replace("│", " ").split())
    assert "GiB" in text
    assert "2**30" in text
    assert "radixkv size demo" in text


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"radixkv {radixkv.__version__}\n")


def test_the_application_alone_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numba', 'huggingface_hub', 'numpy', 'jinja2', 'radixkv.cache'}"
    show_help = "from radixkv.cli.app import app; app(['--help'], standalone_mode=False)"
    code = f"import sys; {show_help}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_listed_with_what_its_docstring_says_first(name: str) -> None:
    command = getattr(importlib.import_module(f"radixkv.cli.{name}"), name)
    first_paragraph = inspect.getdoc(command).split("\n\n")[0]
    assert COMMANDS[name] == " ".join(first_paragraph.split())


def test_wrong_command_lines() -> None:
    assert_one_line_error(run("sizze", "demo"), "No such command 'sizze'")
    assert_one_line_error(run("size"), "Missing argument 'CONFIG_OR_MODEL'. (see radixkv size --help)")


def failing_app(error: BaseException) -> typer.Typer:
    failing = typer.Typer(cls=Commands)

    @failing.callback()
    def root() -> None: ...

    @failing.command()
    def fail() -> None:
        raise error

    return failing


@pytest.mark.parametrize(
    ("error", "exit_code", "stderr"),
    [
        (ConfigError("two\n lines"), 2, "radixkv: error: two lines\n"),
        (typer.Exit(7), 7, ""),
        (typer.Abort(), 130, ""),
        (KeyboardInterrupt(), 130, ""),
        (OSError(errno.ENOSPC, "No space"), 2, "radixkv: error: the output cannot be written: No space\n"),
    ],
)
def test_how_a_command_may_end(error: BaseException, exit_code: int, stderr: str) -> None:
    result = CliRunner().invoke(failing_app(error), ["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (exit_code, "", stderr)


@pytest.mark.parametrize("bug", [ZeroDivisionError("bug"), OSError(errno.ENOTDIR, "bug")])
def test_a_bug_is_not_dressed_up_as_a_user_error(bug: Exception) -> None:
    assert CliRunner().invoke(failing_app(bug), ["fail"]).exception is bug


def test_a_hub_model_is_its_config_and_a_hub_that_refuses_is_one_line(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def hub(repo_id: str, file: str) -> str:
        asked.append((repo_id, file))
        if repo_id == "some-org/gated":
            raise OSError("401 Client Error: you must log in\nand more lines")
        return str(llama)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    assert run_json("some-org/llama") == {**run_json(llama), "model": "some-org/llama"}
    assert asked == [("some-org/llama", "config.json")]
    assert_one_line_error(
        run("size", "some-org/gated"),
        "there is no file or directory 'some-org/gated', and the Hugging Face hub gave no config: "
        "401 Client Error: you must log in",
    )
    assert_one_line_error(
        run("size", "some-org/gated.json"), "there is no file or directory 'some-org/gated.json'; give"
    )


def run_entry_point(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from radixkv.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


def test_the_entry_point_prints_figures(llama: Path) -> None:
    done = run_entry_point("size", str(llama), "--seq-len", "4096", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["bytes_per_sequence"] == 512 * 2**20


def test_the_entry_point_without_a_network_is_a_one_line_error(tmp_path: Path) -> None:
    done = run_entry_point("size", "some-org/some-model", HF_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("radixkv: error: there is no file or directory 'some-org/some-model'")
    assert done.stderr.count("\n") == 1


def test_options_without_their_partner_are_noted(llama: Path) -> None:
    assert "--batch says nothing without --seq-len" in run("size", llama, "--batch", 2).stderr
    assert "say nothing without --memory-gb" in run("size", llama, "--reserve", 0.1).stderr
    assert "say nothing without --memory-gb" in run("size", llama, "--weights-gb", 1).stderr
    assert run("size", llama, "--weights-gb", 1, "--seq-len", 8).stderr == ""
