"""A random model whose every token is a word, so that a text is tokenised as it was generated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from radixkv_bench.common.models import RandomModel, build_random


def save(sizes: RandomModel, context_tokens: int, path: Path) -> None:
    """Save a model and its tokenizer in a directory. No token ends an answer."""
    model = build_random(sizes, context_tokens)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = None
    model.save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({_word(i): i for i in range(sizes.vocab)}, unk_token=_word(0)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=_word(0)).save_pretrained(path)


def text_of(token_ids: Sequence[int]) -> str:
    """The words of these tokens."""
    return " ".join(map(_word, token_ids))


def _word(token_id: int) -> str:
    return f"t{token_id}"
