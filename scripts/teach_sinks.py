"""Teach a small model to rest its attention on the first token, as large language models do by themselves.

    python scripts/teach_sinks.py tinyshakespeare.txt --out out/demo_sinks

Large models put much of their attention on the first tokens of a context, whatever these are: attention sinks (Xiao et
al., "Efficient Streaming Language Models with Attention Sinks", 2023). The demo model is too small and too briefly
trained for that, so it loses nothing when its first tokens are evicted. To see on a small machine what happens to
models that do have sinks, this trains a copy of it for half an hour more: on the same task, with a penalty on every
head that leaves less than `WANTED_MASS` of its attention on the first token. The last tenth of the text is left out.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch.nn import functional
from train_demo_model import progress_bar, read_text, split_held_out
from transformers import PreTrainedModel

from radixkv.models.loader import load

WANTED_MASS = 0.6
WINDOW_TOKENS, BATCH_WINDOWS = 512, 8
PEAK_LR, WARMUP_STEPS, PENALTY = 5e-4, 20, 2.0


def loss_and_mass(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss on ids [B, T + 1], with the penalty, and the mean share of attention that goes to the first token."""
    output = model(input_ids=ids[:, :-1], use_cache=False, output_attentions=True)
    nats = functional.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten())
    on_first = torch.stack([weights[..., 1:, 0] for weights in output.attentions])  # [layers, B, heads, T - 1]
    return nats + PENALTY * (WANTED_MASS - on_first).relu().mean(), on_first.mean()


def teach(model: PreTrainedModel, ids: Sequence[int], num_steps: int, seed: int, progress: Progress) -> None:
    """Train `model` on windows of `ids`, each after the token that begins a sequence."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98))
    task = progress.add_task("teaching", total=num_steps, loss="-", held_out="-")
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS, 2 * (1 - step / num_steps))
        starts = [rng.randrange(len(ids) - WINDOW_TOKENS) for _ in range(BATCH_WINDOWS)]
        rows = [[model.config.bos_token_id, *ids[start : start + WINDOW_TOKENS]] for start in starts]
        loss, mass = loss_and_mass(model, torch.tensor(rows))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.update(task, advance=1, loss=f"{loss.item():.3f}, {mass.item():.0%} on the first token,")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("text_file", type=Path, help="the text that the demo model was trained on")
    add("--out", type=Path, default=Path("out/demo_sinks"), help="directory to write (default: %(default)s)")
    add("--steps", type=int, default=300, help=f"batches of {BATCH_WINDOWS * WINDOW_TOKENS} tokens")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.manual_seed(arguments.seed)
    text, _ = split_held_out(read_text(arguments.text_file))
    model, tokenizer = load("demo")
    model.set_attn_implementation("eager")  # the one that hands out its weights
    from rich.console import Console

    with progress_bar(Console()) as progress:
        teach(model.train(), tokenizer(text, verbose=False).input_ids, arguments.steps, arguments.seed, progress)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
