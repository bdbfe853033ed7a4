"""Engines whose runner tests can watch or break."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from radixkv import Engine, EngineConfig
from radixkv.engine.assembly import EngineParts, assemble
from radixkv.engine.runner import Runner, nothing
from radixkv.engine.step_input import StepInput

Around: TypeAlias = Callable[[StepInput, Callable[[], Tensor]], Tensor]
"""around(step, compute): the logits of a step, which `compute()` returns."""


class TamperedRunner:
    """A runner with something around each of its steps."""

    def __init__(self, runner: Runner, around: Around) -> None:
        self._runner, self._around = runner, around

    def run(
        self, step: StepInput, input_ids: Tensor | None = None, on_compute: Callable[[], object] = nothing
    ) -> Tensor:
        on_compute()
        return self._around(step, lambda: self._runner.run(step, input_ids))


def tampered_parts(
    model: PreTrainedModel,
    around: Around,
    config: EngineConfig,
    tokenizer: Any | None = None,
) -> EngineParts:
    """The parts of an engine, with `around` around its runner."""
    parts = assemble(model, tokenizer, config)
    return replace(parts, runner=TamperedRunner(parts.runner, around))


def tampered_engine(
    model: PreTrainedModel, around: Around, config: EngineConfig, tokenizer: Any | None = None
) -> Engine:
    """An engine with `around` around its runner."""
    return Engine.from_parts(tampered_parts(model, around, config, tokenizer))


def checked(engine: Engine) -> Engine:
    """Prove the invariants after every step."""
    step = engine.step

    def step_and_check() -> None:
        step()
        engine.check_invariants()

    engine.step = step_and_check  # type: ignore[method-assign]
    return engine
