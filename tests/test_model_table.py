"""The table of models: small configs, trials in processes of their own, the page, and what is wrong is called so."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import trial_behaviours
from radixkv_bench.models import command, trial
from radixkv_bench.models.families import Family, all_families
from radixkv_bench.models.finding import Finding, Outcome
from radixkv_bench.models.isolation import make_context, run_alone
from radixkv_bench.models.page import page
from radixkv_bench.models.recipes import RECIPES
from radixkv_bench.models.small_configs import small_config
from radixkv_bench.models.trial import examine, try_family
from tiny_models import make_model

LLAMA, BLOOM = Family("LlamaForCausalLM", "llama", ("internlm3",)), Family("BloomForCausalLM", "bloom", ())


def small_model(model_type: str) -> PreTrainedModel:
    return make_model(small_config(model_type))


def test_families_are_classes_each_with_the_type_of_its_text_model() -> None:
    families = {family.class_name: family for family in all_families()}
    assert len(families) > 150
    assert families["LlamaForCausalLM"].model_type == "llama"
    assert families["GPT2LMHeadModel"] == Family("GPT2LMHeadModel", "gpt2", ("gpt-sw3",))
    assert families["Qwen3_5ForCausalLM"] == Family("Qwen3_5ForCausalLM", "qwen3_5_text", ("qwen3_5",))


@pytest.mark.parametrize("model_type", ["olmo3", "gemma3_text", "qwen3_next", "jamba", "lfm2", "granitemoehybrid"])
def test_a_small_config_has_layers_of_every_kind(model_type: str) -> None:
    config = small_config(model_type)
    assert len(set(config.layer_types)) == 2
    assert config.hidden_size == 32
    assert len(config.layer_types) == config.num_hidden_layers == 3


def test_every_recipe_is_for_a_type_that_is_tried() -> None:
    known = {name for family in all_families() for name in (family.model_type, *family.aliases)}
    assert set(RECIPES) <= known


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_a_family_that_is_served(model_type: str) -> None:
    finding = try_family(model_type)
    assert (finding.outcome, finding.backend, finding.reason) == (Outcome.SERVED, "numba", "")


def test_a_family_that_is_served_with_a_limit() -> None:
    finding = try_family("gpt2")
    assert finding.outcome is Outcome.LIMITED
    assert finding.limits == ("no `window`: layer 0 marks positions otherwise than by rotating queries and keys",)


def test_a_family_that_is_refused_in_the_words_of_the_error() -> None:
    finding = try_family("mamba2")
    assert finding.outcome is Outcome.REFUSED
    assert "none of its layers attends" in finding.reason


def test_a_family_with_recurrent_layers() -> None:
    finding = try_family("qwen3_next")
    assert finding.outcome is Outcome.LIMITED
    assert finding.limits[0] == "finds what two prompts share when a third one asks for it"
    assert finding.layers == "linear, full"


def test_a_model_that_is_too_large_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MAX_PARAMETERS", 1000)
    finding = try_family("llama")
    assert finding.outcome is Outcome.UNTRIED
    assert "lacks a recipe" in finding.reason


class _DimAfter(torch.nn.Module):
    """A norm that halves what comes after the first rows of a batch: of a prompt alone, and of all prompts together."""

    def __init__(self, norm: torch.nn.Module, rows: int) -> None:
        super().__init__()
        self._norm, self._rows = norm, rows

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        places = torch.arange(hidden.shape[1])[None, :, None]
        return self._norm(hidden) * torch.where(places < self._rows, 1.0, 0.5)


def test_what_depends_on_the_place_in_the_batch_is_called_wrong() -> None:
    """The probe's two short sequences do not meet it."""
    model = small_model("llama")
    model.model.norm = torch.nn.Sequential()  # which would hide it
    for layer in model.model.layers:
        layer.input_layernorm = _DimAfter(layer.input_layernorm, rows=20)
    finding = examine(copy.deepcopy(model), model)
    assert finding.outcome is Outcome.WRONG
    assert finding.reason.startswith("cold, prompt")


def test_logits_that_are_off_are_called_wrong_where_tokens_are_right() -> None:
    model = small_model("llama")
    hotter = copy.deepcopy(model)
    with torch.no_grad():
        hotter.lm_head.weight.mul_(1.05)
    finding = examine(hotter, model)
    assert finding.outcome is Outcome.WRONG
    assert "log probabilities differ by" in finding.reason


@pytest.mark.parametrize(
    ("behaviour", "limit_s", "reason"),
    [
        (trial_behaviours.ends_by_a_signal, 60, "its process ended with -9"),
        (trial_behaviours.hangs, 0.2, "did not end within 0.2 s"),
        (trial_behaviours.raises, 60, "KeyError: 'a bug'"),
    ],
)
def test_a_trial_that_goes_wrong_ends_alone(behaviour: Callable[[str], Finding], limit_s: float, reason: str) -> None:
    finding = run_alone(make_context(()), behaviour, "llama", limit_s)
    assert finding == Finding(Outcome.FAILED, reason)


def test_the_page_is_the_same_whatever_the_order() -> None:
    served = Finding(Outcome.SERVED, layers="full", backend="numba")
    refused = Finding(Outcome.REFUSED, "BloomForCausalLM does not run on paged attention: a | b")
    text = page([(LLAMA, served), (BLOOM, refused)], "5.0")
    assert text == page([(BLOOM, refused), (LLAMA, served)], "5.0")
    assert "transformers 5.0" in text
    assert "| served | 1 |" in text
    assert "| `llama`, `internlm3` | `LlamaForCausalLM` | full | `numba` |" in text
    assert "| `bloom` | `BloomForCausalLM` |  | a \\| b |" in text
    assert "WRONG" not in text


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["model_table", *map(str, arguments)])
    return command.main()


def test_the_command_writes_the_page_and_all_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PRELOADED", ())
    monkeypatch.setattr(command, "try_quietly", trial_behaviours.refuses)
    out, figures = tmp_path / "models.md", tmp_path / "models.json"
    assert run_command(monkeypatch, "--family", "bloom", "--out", out, "--json", figures) == 0
    assert "no bloom" in out.read_text(encoding="utf-8")
    (family,) = json.loads(figures.read_text(encoding="utf-8"))["families"]
    assert (family["model_type"], family["outcome"]) == ("bloom", "refused")


@pytest.mark.parametrize("outcome", [Outcome.WRONG, Outcome.FAILED])
def test_what_must_not_occur_is_an_exit_code(
    outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "try_all", lambda families, limit_s: [(LLAMA, Finding(outcome, "other tokens"))])
    assert run_command(monkeypatch, "--family", "llama", "--out", tmp_path / "models.md") == 1
    assert f"llama: {outcome}: other tokens" in capsys.readouterr().err


def test_an_unknown_family_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(monkeypatch, "--family", "llamma") == 2
    assert "not 'llamma'" in capsys.readouterr().err
