"""Models from directories and hub ids: what is found beside them, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from radixkv import Engine, SamplingParams, demo_model
from radixkv.errors import (
    ConfigError,
    MissingTokenizerError,
    ModelLoadError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from radixkv.models.loader import eos_token_ids, load, max_context_tokens
from tiny_models import tiny_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with a random model in bfloat16 and no tokenizer."""
    model = tiny_model("qwen2").to(torch.bfloat16)
    model.generation_config.eos_token_id = [5, 7]
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_directory_without_a_tokenizer_serves_ids(saved: Path) -> None:
    engine = Engine.from_pretrained(saved, kv_cache_tokens=256)
    (output,) = engine.generate([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(output.token_ids) == 3
    assert output.text is None
    with pytest.raises(MissingTokenizerError, match="give token ids"):
        engine.generate("text")


def test_dtype_is_the_checkpoints_own_unless_asked_otherwise(saved: Path) -> None:
    assert load(saved).model.dtype == torch.bfloat16
    assert load(str(saved), dtype="float32").model.dtype == torch.float32
    engine = Engine.from_pretrained(saved, kv_cache_tokens=256)
    assert engine.config.dtype == "bfloat16"
    assert engine.pool.dtype == torch.bfloat16
    assert engine.config.attention_backend == "numba"


def test_bfloat16_serves_cold_as_warm(saved: Path) -> None:
    engine = Engine.from_pretrained(saved, kv_cache_tokens=256, page_size=4)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    prompt = list(range(3, 30))
    cold, warm = engine.generate(prompt, params)[0], engine.generate(prompt, params)[0]
    assert warm.cached_tokens == 26
    assert len(cold.token_ids) == len(warm.token_ids) == 5
    engine.check_invariants()


def test_ends_come_from_the_generation_config_first(saved: Path) -> None:
    model = load(saved).model
    assert eos_token_ids(model) == {5, 7}
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model) == {2}
    model.config.eos_token_id = None
    assert eos_token_ids(model) == frozenset()


def test_the_demo_comes_with_everything(tmp_path: Path) -> None:
    copy = shutil.copytree(demo_model.path(), tmp_path / "demo")
    for place in ("demo", copy):
        model, tokenizer = load(place)
        assert model.dtype == torch.float32
        assert tokenizer.chat_template
        assert eos_token_ids(model) == {tokenizer.eos_token_id}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["no-such-directory/at-all", "./nowhere"])
def test_nothing_there(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no model") as raised:
        load(name)
    assert "\n" not in str(raised.value)


def test_a_directory_without_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="no model can be loaded"):
        load(saved)


def test_an_unknown_architecture(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))
    with pytest.raises(ModelNotFoundError, match="abacus"):
        load(saved)


def test_a_model_that_is_no_decoder(tmp_path: Path) -> None:
    tiny_model("t5").save_pretrained(tmp_path)
    with pytest.raises((ModelNotFoundError, UnsupportedModelError), match="T5"):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 512),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 512),
        ({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}, 64),
        (
            {
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 128,
            },
            128,
        ),
    ],
)  # fmt: skip
def test_contexts_end_where_angles_would_change(rope: dict[str, object] | None, expected: int) -> None:
    config = hf.LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        max_position_embeddings=512,
        **({"rope_parameters": rope} if rope else {}),
    )
    assert max_context_tokens(config) == expected


@pytest.mark.parametrize("name", [None, 5, ""])
def test_what_is_no_name(name: object) -> None:
    with pytest.raises(ConfigError, match='"demo", a directory or a hub id'):
        load(name)


def test_angles_that_change_with_the_length_bound_the_context_in_some_layers_too() -> None:

    stretched = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
    }
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    config = hf.Gemma3TextConfig(
        head_dim=8,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=128,
        rope_parameters={"full_attention": stretched, "sliding_attention": plain},
    )
    assert max_context_tokens(config) == 32


# ------------------------------------------------------------------------------- damaged and incomplete files

Tensors = dict[str, torch.Tensor]


def without(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def with_tensor(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def change_tensors(place: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def check_refused(place: Path, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as raised:
        load(place)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), r"lacks model\.layers\.1\.mlp\.up_proj\.weight, which Qwen2"),
        (without("model.norm.weight", "model.layers.0.self_attn.q_proj.bias"), r"lacks .*q_proj\.bias, model\.norm"),
        (without("lm_head.weight"), r"lacks lm_head\.weight"),
        (with_tensor("model.norm.weight", 3, 4), r"other shapes in model\.norm\.weight \(3×4, not 32\)"),
        (with_tensor("model.layers.1.mlp.up_proj.bias", 48), r"would leave out model\.layers\.1\.mlp\.up_proj\.bias"),
        (with_tensor("model.layers.3.mlp.up_proj.weight", 48, 32), r"would leave out model\.layers\.3\."),
    ],
)
def test_a_checkpoint_that_does_not_hold_the_model_is_refused(
    saved: Path, change: Callable[[Tensors], None], message: str
) -> None:
    change_tensors(saved, change)
    check_refused(saved, message)


def test_many_missing_tensors_are_counted(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3, "layer_types": None}))
    check_refused(saved, r"lacks model\.layers\.2\..* and 8 more tensors")


def test_tensors_that_no_part_of_the_model_uses_are_ignored(saved: Path) -> None:
    expected = load(saved).model.state_dict()
    change_tensors(saved, with_tensor("vision_tower.patch.weight", 4, 4))
    change_tensors(saved, with_tensor("model.layers.3.enorm.weight", 32))  # as a layer that predicts further ahead
    change_tensors(saved, with_tensor("model.layers.3.mlp.up_proj.weight", 48, 32))
    found = load(saved).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tied_weight_may_be_absent(tmp_path: Path) -> None:
    copy = shutil.copytree(demo_model.path(), tmp_path / "demo")
    change_tensors(copy, without("lm_head.weight"))
    model = load(copy).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    change_tensors(copy, without("model.embed_tokens.weight"))
    check_refused(copy, r"lacks lm_head\.weight, model\.embed_tokens\.weight")


@pytest.mark.parametrize("content", [b"", b"no tensors" * 100, None], ids=["empty", "garbage", "cut"])
def test_damaged_weights_are_named(saved: Path, content: bytes | None) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] if content is None else content)
    check_refused(saved, r"model\.safetensors is damaged or incomplete")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("content", "message"), [(b"{nope", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[1]", "a JSON object")]
)
def test_config_files_that_are_no_json_are_named(saved: Path, name: str, content: bytes, message: str) -> None:
    (saved / name).write_bytes(content)
    check_refused(saved, f"{name} .*{message}")


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "wide"}, {"hidden_act": "zork"}, {"num_attention_heads": 0}, {"dtype": "zork"}]
)
def test_configs_that_make_no_model_are_refused(saved: Path, fields: dict[str, object]) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, **fields}))
    check_refused(saved, r"make no model \(.*\); check its config\.json")


def test_ends_that_are_no_ids_are_refused(saved: Path) -> None:
    model = load(saved).model
    model.generation_config.eos_token_id = ["</s>"]
    with pytest.raises(ModelLoadError, match=r"must be token ids; got \['</s>'\]"):
        eos_token_ids(model)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{nope", r"tokenizer\.json is not valid JSON"),
        ("tokenizer.json", b"{}", r"the tokenizer in .*check its tokenizer\.json"),
        ("tokenizer.json", None, r"the tokenizer in .*check its tokenizer_config\.json"),
        ("tokenizer_config.json", b"{nope", r"tokenizer_config\.json is not valid JSON"),
        ("chat_template.jinja", b"\xff\xfe{{", r"check its .*chat_template\.jinja"),
    ],
)
def test_broken_tokenizers_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    copy = shutil.copytree(demo_model.path(), tmp_path / "demo")
    (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
    check_refused(copy, message)


@pytest.mark.parametrize("settings", [{"dtype": ["float32"]}, {"dtype": None}, {"device": None}, {"device": "abacus"}])
def test_settings_of_no_known_kind(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        load("demo", **settings)
