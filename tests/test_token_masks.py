"""Masks of tokens in bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from radixkv.engine.token_masks import forbid_tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [1, 32, 70, 2048])
@pytest.mark.parametrize("rows", [[2, 0, 3], [0, 1, 2, 3]])
def test_logits_of_tokens_whose_bit_is_0_are_forbidden(vocab_size: int, rows: list[int], device: str) -> None:
    generator = np.random.default_rng(vocab_size)
    words = generator.integers(0, 1 << 32, (len(rows), -(-vocab_size // 32)), dtype=np.uint32)
    words[0] = 0xFFFFFFFF
    logits = torch.from_numpy(generator.standard_normal((4, vocab_size)).astype(np.float32)).to(device)
    expected = logits.clone()
    for row, row_words in zip(rows, words.tolist(), strict=True):
        for token in range(vocab_size):
            if not row_words[token // 32] >> token % 32 & 1:
                expected[row, token] = -torch.inf
    forbid_tokens(logits, rows, words)
    assert torch.equal(logits, expected)
