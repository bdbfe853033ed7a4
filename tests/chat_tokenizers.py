"""Small tokenizers of the two great kinds, trained on a few lines, with special tokens of the test's choice."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "hello world again and again",
    "user assistant system the answer is yes",
    "a <think>hm</think> caf\u00e9 \u4f60\u597d\n",
] * 4


@functools.cache
def byte_level(*special: str, eos: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2 began it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, extra_special_tokens=list(special))


@functools.cache
def sentence_piece(*special: str) -> PreTrainedTokenizerFast:
    """BPE over blanks as letters, with a dummy blank in front and byte fallback, as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", "<s>", "</s>", *special, *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=440, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    state = tokenizer.to_str().replace('"special":true', '"special":false')
    tokenizer = Tokenizer.from_str(state)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=list(special),
    )
