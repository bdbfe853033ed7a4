"""The small model that ships with radixkv, so that everything runs offline.

This package holds data only: a Llama of 2.8 million parameters in the layout of Hugging Face, trained by
`scripts/train_demo_model.py`. The README beside this file says on what, how well it does, and what it is not for.
"""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The directory of the model, as `from_pretrained` takes it.

    >>> (path() / "config.json").is_file()
    True
    """
    return Path(__file__).resolve().parent
