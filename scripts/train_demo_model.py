"""Train the demo model: a small Llama with a chat template, from one text file, on the CPU.

    python scripts/train_demo_model.py tinyshakespeare.txt --out demo_model

Half of the training windows are plain text. The other half are conversations: consecutive paragraphs of the text (the
speeches of a play) alternate as user and assistant turns, so that the model learns where a turn ends. A paragraph
that opens with a line `NAME:` is spoken by that name; the name is left out of the turn and may appear in a system
turn. The last tenth of the text is held out, and the checkpoint with the lowest loss on it is kept;
Ctrl-C ends the training early and keeps the best so far.

Small texts are overfitted within a few passes. Against that: BPE dropout (every pass sees other segmentations of the
words; Provilkov et al. 2020, "BPE-Dropout"), dropout on what each block adds to the residual stream, weight decay.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("a message's role is system, user or assistant, not " ~ message['role']) -}}
    {%- endif -%}
    {{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

HELD_OUT_FRACTION = 0.1
MIN_TEXT_BYTES = 20_000
MIN_VOCAB_SIZE = 256 + 3 + len(ROLES)
MAX_CONTEXT_TOKENS = 4096
# Window length → share of the batches. Every length holds the same number of tokens per batch; the long ones are few
# because attention makes them dear, and enough to train every rotary position.
WINDOW_SHARES = {512: 0.80, 2048: 0.13, 4096: 0.07}
BATCH_TOKENS = 4096
EVAL_WINDOW_TOKENS = 1024
POSITION_BUCKETS = (0, 128, 512, 1024, 2048, 4096)
PEAK_LR, FINAL_LR_FRACTION, WARMUP_STEPS = 2e-3, 0.03, 60
WEIGHT_DECAY, RESIDUAL_DROPOUT, BPE_DROPOUT, MAX_GRAD_NORM = 0.1, 0.1, 0.1, 1.0
BPE_DROPOUT_END = 0.75  # of the run; see bpe_dropout
SEGMENTATIONS_PER_WORD = 8


@dataclass(frozen=True)
class Speech:
    """One paragraph: who says it (None if the text does not tell) and what."""

    name: str | None
    words: str


@dataclass(frozen=True)
class HeldOut:
    """Loss on text that was not trained on.

    Attributes:
        nats: summed negative log-likelihood.
        num_tokens: tokens it was summed over.
        num_bytes: UTF-8 bytes of the text.
    """

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, which the perplexity of a token is not."""
        return self.nats / math.log(2) / self.num_bytes

    def __str__(self) -> str:
        return (
            f"perplexity {math.exp(self.loss):.1f} per token, {2**self.bits_per_byte:.3f} per byte "
            f"({self.bits_per_byte:.3f} bits per byte; {self.num_tokens:,} tokens, {self.num_bytes:,} bytes)"
        )


def split_held_out(text: str) -> tuple[str, str]:
    """The training text and the held-out last tenth, cut at the nearest earlier paragraph."""
    cut = int(len(text) * (1 - HELD_OUT_FRACTION))
    paragraph = text.rfind("\n\n", 0, cut)
    cut = paragraph + 2 if paragraph > 0 else cut
    return text[:cut], text[cut:]


def parse_speeches(text: str) -> list[Speech]:
    """The paragraphs of `text`, each with its speaker if its first line is `NAME:`."""
    speeches = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        named = re.fullmatch(r"([^\n:]{1,40}):\n(.+)", paragraph, re.DOTALL)
        speeches.append(Speech(named[1], named[2]) if named else Speech(None, paragraph))
    return speeches


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer. All 256 bytes are tokens, so any text survives encode and decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD, *ROLES.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """`tokenizer` as transformers saves and loads it, with the special tokens' parts and the chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_CONTEXT_TOKENS,
    )


class DropoutSegmenter:
    """Splits words into tokens as a BPE tokenizer does, but skips each merge with some probability.

    The tokenizers library can do this too, but draws from a generator that cannot be seeded.
    """

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        model = json.loads(tokenizer.to_str())["model"]
        self._ids: dict[str, int] = model["vocab"]
        self._ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        self._pre_tokenizer = tokenizer.pre_tokenizer
        self._rng = rng

    def words(self, text: str) -> list[str]:
        """The stretches of `text` within which merges happen, in the byte alphabet of the tokenizer."""
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)]

    def segment(self, word: str, dropout: float) -> list[int]:
        """Token ids of `word`; with `dropout` 0 the tokenizer's own. O(length²)."""
        parts = list(word)
        while len(parts) > 1:
            merges = [
                (rank, i)
                for i, pair in enumerate(pairwise(parts))
                if (rank := self._ranks.get(pair)) is not None and self._rng.random() >= dropout
            ]
            if not merges:
                break
            _, i = min(merges)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self._ids[part] for part in parts]

    def variants(self, words: Iterable[str], dropout: float) -> dict[str, list[list[int]]]:
        """Some segmentations of each distinct word, to draw from for one pass over the text."""
        return {
            word: [self.segment(word, dropout) for _ in range(SEGMENTATIONS_PER_WORD)] for word in sorted(set(words))
        }


class TrainingText:
    """The training text in both forms, segmented anew by `resegment`, from which windows are drawn."""

    def __init__(self, text: str, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._rng = rng
        self._segmenter = DropoutSegmenter(tokenizer, rng)
        self._special: dict[str, int] = {
            token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._plain_words = self._segmenter.words(text)
        self._speeches = parse_speeches(text)
        self._turn_words = [self._segmenter.words(speech.words) for speech in self._speeches]
        self._systems = {speech.name: self._segmenter.words(system_text(speech.name)) for speech in self._speeches}
        self.resegment(bpe_dropout(0.0))

    def resegment(self, dropout: float) -> None:
        """Draw other token boundaries for the whole text. A few seconds per MB."""
        everything = [self._plain_words, *self._turn_words, *self._systems.values()]
        variants = self._segmenter.variants((word for words in everything for word in words), dropout)

        def ids(words: Sequence[str]) -> list[int]:
            return [token for word in words for token in self._rng.choice(variants[word])]

        self._plain_ids = ids(self._plain_words)
        self._turn_ids = [ids(words) for words in self._turn_words]
        self._system_ids = {name: ids(words) for name, words in self._systems.items()}

    @property
    def num_tokens(self) -> int:
        """Tokens of the text in its plain form."""
        return len(self._plain_ids)

    @property
    def steps_per_pass(self) -> int:
        """Batches that hold as many tokens as the text does in both forms."""
        return max(1, 2 * self.num_tokens // BATCH_TOKENS)

    def window(self, length: int) -> list[int]:
        """`length` token ids, plain text or conversations with equal probability."""
        return self._plain_window(length) if self._rng.random() < 0.5 else self._chat_window(length)

    def _plain_window(self, length: int) -> list[int]:
        start = self._rng.randrange(max(1, len(self._plain_ids) - length))
        ids = self._plain_ids[start : start + length]
        # Now and then after <|begin|>, so that text can be written from nothing.
        return [self._special[BEGIN], *ids][:length] if self._rng.random() < 0.25 else ids

    def _chat_window(self, length: int) -> list[int]:
        """Conversations one after another; the last is cut off. A long window holds long conversations."""
        ids: list[int] = []
        turn = self._rng.randrange(len(self._turn_ids))
        while len(ids) < length:
            num_turns = self._rng.randint(2, max(4, length // 32))
            ids += self.conversation(turn, num_turns)
            turn = (turn + num_turns) % len(self._turn_ids)
        return ids[:length]

    def conversation(self, first: int, num_turns: int) -> list[int]:
        """Paragraphs [first, first + num_turns) as turns, a system turn before every third conversation."""
        special = self._special
        ids = [special[BEGIN]]
        if self._rng.random() < 1 / 3:
            replying = self._speeches[(first + 1) % len(self._speeches)].name
            ids += [special[ROLES["system"]], *self._system_ids[replying], special[END]]
        for i in range(num_turns):
            role = ROLES["assistant" if i % 2 else "user"]
            ids += [special[role], *self._turn_ids[(first + i) % len(self._turn_ids)], special[END]]
        return ids


def bpe_dropout(progress: float) -> float:
    """Share of merges to skip when `progress` of the run lies behind.

    It falls to 0 for the last passes: probability spent on segmentations that the tokenizer never makes is lost, and
    when such rare pieces are sampled they seldom join into words.
    """
    return BPE_DROPOUT * max(0.0, 1 - progress / BPE_DROPOUT_END)


def system_text(name: str | None) -> str:
    """What a system turn says when `name` replies."""
    return f"You are {name}." if name else "You answer what is said."


def chat_form(text: str) -> str:
    """The paragraphs of `text` as conversations of eight turns, without names, as the chat template writes them."""
    return "".join(
        f"{BEGIN if i % 8 == 0 else ''}{ROLES['assistant' if i % 2 else 'user']}{speech.words}{END}"
        for i, speech in enumerate(parse_speeches(text))
    )


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A freshly initialised Llama of 2.8M parameters (with 2,048 tokens), ready for training."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=[config.eos_token_id], pad_token_id=config.pad_token_id
    )
    return model


def add_residual_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Dropout, while training, on the embeddings and on what attention and MLP add to the residual stream."""

    def drop(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, probability, training=module.training)

    added = [part for layer in model.model.layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for module in (model.model.embed_tokens, *added):
        module.register_forward_hook(drop)


def make_optimizer(
    model: LlamaForCausalLM, num_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW (no decay on norms) with a linear warm-up and a cosine to `FINAL_LR_FRACTION`."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.98), fused=True)

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))
        return min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LR_FRACTION + (1 - FINAL_LR_FRACTION) * cosine)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def token_nats(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of ids[:, 1:] given what stands before; ids [B, T+1] → nats [B, T], float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # [B, T, vocab]
    flat = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(ids.shape[0], -1)


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, ids: Sequence[int], num_bytes: int, *, stride: int) -> HeldOut:
    """Loss on `ids` in windows that overlap by all but `stride` tokens; each token counts once, in its first window.

    Cost: one forward over `EVAL_WINDOW_TOKENS` per `stride` tokens.
    """
    model.eval()
    nats, counted = 0.0, 1
    while counted < len(ids):
        end = min(len(ids), EVAL_WINDOW_TOKENS + 1 if counted == 1 else counted + stride)
        start = max(0, end - EVAL_WINDOW_TOKENS - 1)
        window = token_nats(model, torch.tensor([ids[start:end]]))
        nats += window[0, counted - start - 1 :].sum().item()
        counted = end
    return HeldOut(nats, len(ids) - 1, num_bytes)


@torch.inference_mode()
def loss_by_position(model: LlamaForCausalLM, ids: Sequence[int]) -> dict[tuple[int, int], float]:
    """Mean nats per token at positions [low, high) of full-length windows: does a long context still work?"""
    model.eval()
    rows = [
        token_nats(model, torch.tensor([ids[start : start + MAX_CONTEXT_TOKENS + 1]]))
        for start in range(0, len(ids) - MAX_CONTEXT_TOKENS, MAX_CONTEXT_TOKENS)
    ]
    buckets = pairwise(POSITION_BUCKETS)
    return {(low, high): torch.cat(rows)[:, low:high].mean().item() for low, high in buckets} if rows else {}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model's directory: weights in float16 for size, to be loaded as the float32 that config.json says."""
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(out, state_dict=half)
    tokenizer.save_pretrained(out)


def batches(text: TrainingText, rng: random.Random, num_steps: int) -> Iterator[torch.Tensor]:
    """`num_steps` batches of ids [windows, length + 1], segmented anew after each pass over the text in both forms."""
    lengths = [length for length in WINDOW_SHARES if length < text.num_tokens] or [text.num_tokens // 2]
    shares = [WINDOW_SHARES.get(length, 1.0) for length in lengths]
    steps_per_pass = text.steps_per_pass
    for step in range(num_steps):
        if step and step % steps_per_pass == 0:
            text.resegment(bpe_dropout(step / num_steps))
        (length,) = rng.choices(lengths, shares)
        rows = [text.window(length + 1) for _ in range(max(1, BATCH_TOKENS // length))]
        yield torch.from_numpy(np.array(rows, dtype=np.int64))


@dataclass(frozen=True)
class Settings:
    """What a run can be asked for; `num_steps` None means as many as `epochs` take."""

    vocab_size: int
    num_steps: int | None
    epochs: float
    num_evals: int
    seed: int


class Run:
    """One training run: data, model and optimiser, and the best checkpoint so far in `out`."""

    def __init__(self, text: str, out: Path, settings: Settings) -> None:
        self._out = out
        self._rng = random.Random(settings.seed)
        torch.manual_seed(settings.seed)
        training_text, self._held_out_text = split_held_out(text)
        self._tokenizer = train_tokenizer(training_text, settings.vocab_size)
        self._held_out_ids = self._tokenizer.encode(self._held_out_text).ids
        self._data = TrainingText(training_text, self._tokenizer, self._rng)
        self._num_steps = settings.num_steps or max(1, round(settings.epochs * self._data.steps_per_pass))
        self._eval_steps = max(1, self._num_steps // settings.num_evals)
        self._model = build_model(self._tokenizer)
        add_residual_dropout(self._model, RESIDUAL_DROPOUT)
        self._optimizer, self._schedule = make_optimizer(self._model, self._num_steps)
        self._best_loss = math.inf

    def __str__(self) -> str:
        return (
            f"{self._model.num_parameters():,} parameters, {self._tokenizer.get_vocab_size():,} tokens; "
            f"{self._data.num_tokens:,} tokens to train on, {len(self._held_out_ids):,} held out; "
            f"{self._num_steps:,} steps of {BATCH_TOKENS:,} tokens"
        )

    @property
    def has_checkpoint(self) -> bool:
        """Whether this run has saved a model yet."""
        return math.isfinite(self._best_loss)

    def train(self, console: Console) -> None:
        """Take all steps; measure the held-out loss now and then and save the model whenever it is the lowest."""
        with progress_bar(console) as progress:
            task = progress.add_task("training", total=self._num_steps, loss="-", held_out="-")
            for step, batch in enumerate(batches(self._data, self._rng, self._num_steps), start=1):
                loss = self._step(batch)
                progress.update(task, advance=1, loss=f"{loss:.3f}")
                if step % self._eval_steps == 0 or step == self._num_steps:
                    held_out = self.checkpoint()
                    progress.update(task, held_out=f"{held_out.loss:.3f}")
                    console.print(f"step {step:,}: loss {loss:.3f}, held out {held_out.loss:.3f}, {held_out}")

    def _step(self, batch: torch.Tensor) -> float:
        self._model.train()
        loss = token_nats(self._model, batch).mean()
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        self._schedule.step()
        return loss.item()

    def checkpoint(self) -> HeldOut:
        num_bytes = len(self._held_out_text.encode())
        held_out = evaluate(self._model, self._held_out_ids, num_bytes, stride=EVAL_WINDOW_TOKENS)
        if held_out.loss < self._best_loss:
            self._best_loss = held_out.loss
            save(self._model, wrap_tokenizer(self._tokenizer), self._out)
        return held_out

    def report(self, console: Console) -> None:
        """Print the held-out figures of the best checkpoint, as it loads from disk, and what it writes."""
        model = LlamaForCausalLM.from_pretrained(self._out)
        plain = self._held_out_text
        spoken = "".join(speech.words for speech in parse_speeches(plain))
        for form, text, num_bytes in (
            ("plain text", plain, len(plain.encode())),
            ("as chat", chat_form(plain), len(spoken.encode())),
        ):
            ids = self._tokenizer.encode(text).ids
            console.print(f"held out, {form}: {evaluate(model, ids, num_bytes, stride=EVAL_WINDOW_TOKENS // 2)}")
        for (low, high), nats in loss_by_position(model, self._held_out_ids).items():
            console.print(f"    positions {low} to {high}: perplexity {math.exp(nats):.1f} per token")
        write_samples(model, wrap_tokenizer(self._tokenizer), parse_speeches(self._held_out_text)[0], console)


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]} held out {task.fields[held_out]}"),
        TimeRemainingColumn(),
        console=console,
    )


def write_samples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, speech: Speech, console: Console
) -> None:
    """Print a continuation of the text and a reply to `speech`, both greedy and sampled."""
    continuation = f"{speech.name}:\n" if speech.name else speech.words[:80]
    turn = [{"role": "user", "content": speech.words[:300]}]
    reply = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    for prompt in (continuation, reply):
        ids = torch.tensor([tokenizer.encode(prompt)])
        for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.95}):
            written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, **sampling)
            console.rule("sampled" if sampling["do_sample"] else "greedy")
            console.print(tokenizer.decode(written[0]), markup=False, highlight=False)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("text_file", type=Path, help="UTF-8 text with empty lines between paragraphs, best 1 MB and more")
    add("--out", type=Path, default=Path("demo_model"), help="directory to write (default: %(default)s)")
    add("--epochs", type=float, default=9.0, help="passes over the text in both forms (default: %(default)s)")
    add("--steps", type=int, help=f"batches of {BATCH_TOKENS} tokens, instead of --epochs")
    add("--evals", type=int, default=20, help="how often the held-out loss is measured (default: %(default)s)")
    add("--vocab-size", type=int, default=2048, help="tokens of the tokenizer (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("epochs", "steps", "evals", "threads"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            parser.error(f"--{name} must be positive, not {value}")
    if arguments.vocab_size < MIN_VOCAB_SIZE:
        parser.error(f"--vocab-size must be at least {MIN_VOCAB_SIZE}, not {arguments.vocab_size}")
    return arguments


def read_text(path: Path) -> str:
    """The file's text. Exits with one line if it cannot be read or is too short to learn from."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{path}: cannot be read as UTF-8 text: {error}")
    if len(text.encode()) < MIN_TEXT_BYTES:
        sys.exit(f"{path}: {len(text.encode()):,} bytes are too few to train on; give at least {MIN_TEXT_BYTES:,}")
    return text


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    text = read_text(arguments.text_file)
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    console = Console()
    settings = Settings(
        vocab_size=arguments.vocab_size,
        num_steps=arguments.steps,
        epochs=arguments.epochs,
        num_evals=arguments.evals,
        seed=arguments.seed,
    )
    run = Run(text, arguments.out, settings)
    console.print(str(run))
    try:
        run.train(console)
    except KeyboardInterrupt:
        if not run.has_checkpoint:
            sys.exit(f"interrupted before the first checkpoint; {arguments.out} was not written")
        console.print("interrupted; the best checkpoint so far stands")
    run.report(console)


if __name__ == "__main__":
    main()
