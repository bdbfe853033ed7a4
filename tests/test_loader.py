"""Models from directories and hub ids: what is found beside them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf

from radixkv import Engine, SamplingParams, demo_model
from radixkv.errors import ConfigError, MissingTokenizerError, ModelNotFoundError, UnsupportedModelError
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
