"""Runs the scheduler's batches and hands out their tokens; on a GPU one step ahead of the tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from radixkv.engine.drafts.speculation import Speculation
from radixkv.engine.gpu_sampling import DeviceSampler, PendingTokens, RowSampling
from radixkv.engine.logit_edits import LogitEdits, RowEdits, edit_logits, start_transforms
from radixkv.engine.request import Request
from radixkv.engine.runner import Runner, nothing
from radixkv.engine.sampling import Sampler
from radixkv.engine.scheduler import Scheduler
from radixkv.engine.span import Span
from radixkv.engine.step_input import make_step_input
from radixkv.engine.step_times import StepTimes
from radixkv.errors import InvalidRequestError, NonFiniteLogitsError


class _Launched(NamedTuple):
    """A batch whose forward pass is under way, or done."""

    batch: list[Span]
    logits: Tensor  # [spans, vocab_size], after the edits that requests ask for
    own_logits: dict[int, Tensor]  # the model's, of the rows with edits whose log probabilities are wanted
    more_logits: Tensor  # [rows that `prompt_logprobs` and drafts need besides, vocab_size]
    pending: PendingTokens | None  # None where tokens are chosen on the CPU
    started_at: float


class Executor:
    """One step after another: schedule, compute, choose tokens.

    Where a device sampler is given, a step of decodes is launched before the tokens of the last one are read: the model
    takes them where they lie on the device, and what the CPU does for a step (pages, index arrays, launches, and after
    it text and stop conditions) is done while the device computes. A request that turns out to have ended has then a
    token computed for nothing. Its pages may go to others at once: the device works in order, so what it wrote there in
    vain is overwritten before it is read.

    Attributes:
        computed_tokens, generated_tokens, forced_tokens, sampled_steps: counts since the executor was made.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        sampler: Sampler,
        device_sampler: DeviceSampler | None,
        speculation: Speculation | None,
        step_times: StepTimes,
    ) -> None:
        """step_times: learn how long steps of decodes take; `speculation`, if there is one, notes them in its own."""
        self._runner = runner
        self._scheduler = scheduler
        self._sampler = sampler
        self._device_sampler = device_sampler
        self._ahead: _Launched | None = None
        self._speculation = speculation
        self._step_times = step_times
        self._ended_at = 0.0  # the last step
        self.computed_tokens = self.generated_tokens = self.forced_tokens = self.sampled_steps = 0

    def step(self, on_compute: Callable[[], object] = nothing) -> list[Span]:
        """Run one batch, and give its requests their tokens; those that ended are still to be released.

        Args:
            on_compute: as in `Runner.run`; not called if nothing is computed.

        Returns: the batch; empty if there is nothing to do.
        """
        launched, self._ahead = self._ahead, None
        if launched is None or all(span.request.is_finished for span in launched.batch):
            batch = self._scheduler.next_batch()
            try:
                launched = self._launch(batch, on_compute=on_compute) if batch else None
            except Exception as error:
                self._run_apart(batch, error)
                return batch
        if launched is None:
            return []
        ahead = self._look_ahead(launched, on_compute)
        try:
            token_ids, finite = self._read(launched)
        except Exception as error:  # of the device, which tells late
            self._run_apart(launched.batch, error)
            return launched.batch
        accepted = self._hand_out(launched, token_ids, finite)
        began_at, self._ended_at = max(launched.started_at, self._ended_at), time.perf_counter()
        self._note_time(launched.batch, accepted, self._ended_at - began_at)
        self._ahead = ahead
        return launched.batch

    def _note_time(self, batch: list[Span], accepted: int, seconds: float) -> None:
        """Learn from a step that computed tokens of outputs alone; `accepted` drafted ones were right."""
        is_of_use = self._speculation is not None or self.forced_tokens
        if not is_of_use or not all(span.first >= len(span.request.prompt_ids) for span in batch):
            return
        num_tokens = sum(span.last - span.first for span in batch)
        if self._speculation is not None:
            num_drafted = sum(span.num_drafted for span in batch)
            self._speculation.stepped(num_tokens - num_drafted, num_tokens, accepted, seconds)
        else:
            self._step_times.note(num_tokens, seconds)

    def _launch(
        self, batch: list[Span], input_ids: Tensor | None = None, on_compute: Callable[[], object] = nothing
    ) -> _Launched:
        started_at = time.perf_counter()
        edited = [RowEdits(row, edits) for row, span in enumerate(batch) if (edits := _edits(span)) is not None]

        def begin_transforms() -> None:
            """Not earlier: their threads would take the interpreter from what Python still does for the step."""
            outputs = [batch[row].request.output_ids for row, _ in edited]
            for row, failure in start_transforms(edited, outputs).items():
                batch[row].request.finish("error", failure)  # what is computed for it is ignored
            on_compute()

        step = make_step_input(batch, self._scheduler.req_to_token, known_tokens=input_ids is None)
        logits = self._runner.run(step, input_ids, begin_transforms if edited else on_compute)
        logits, more_logits = logits[: len(batch)], logits[len(batch) :]
        own_logits: dict[int, Tensor] = {}
        if edited:  # but for drafts, whose rows are edited one after the other, with the tokens that are accepted
            edited = [
                edit for edit in edited if not (span := batch[edit.row]).request.is_finished and not span.num_drafted
            ]
            own_logits = {row: logits[row].clone() for row, edits in edited if edits.params.logprobs is not None}
            for row, failure in edit_logits(logits, edited).items():
                batch[row].request.finish("error", failure)
        pending = None
        if self._device_sampler is not None:
            pending = self._device_sampler.start(logits, [_row(span) for span in batch])
        return _Launched(batch, logits, own_logits, more_logits, pending, started_at)

    def _look_ahead(self, launched: _Launched, on_compute: Callable[[], object]) -> _Launched | None:
        """Launch the next step of the same requests, if it is certain that they are the next step."""
        if launched.pending is None or not all(self._surely_goes_on(span) for span in launched.batch):
            return None
        if self._speculation is not None and self._speculation.needs_tokens:
            return None  # drafts need the tokens
        batch = self._scheduler.look_ahead([span.request for span in launched.batch])
        if batch is None:
            return None
        try:
            return self._launch(batch, launched.pending.ids, on_compute)
        except Exception:
            return None  # the step is scheduled again when the tokens are there, and fails then if it must

    def _surely_goes_on(self, span: Span) -> bool:
        """Whether nothing but a stop token or string can end the request with this step's token."""
        request, sampler = span.request, self._device_sampler
        chosen_on_device = request.generator is None or (sampler is not None and sampler.draws(_row(span)))
        return (
            not request.is_finished
            and span.samples
            and not span.num_drafted
            and len(request.output_ids) + 1 < request.max_new_tokens
            and request.params.logprobs is None
            and request.edits is None
            and chosen_on_device
        )

    def _read(self, launched: _Launched) -> tuple[list[int], list[bool]]:
        if launched.pending is None:
            return self._sampler.likeliest(launched.logits)
        return launched.pending.read()

    def _run_apart(self, batch: Sequence[Span], error: Exception) -> None:
        """After a batch failed, find out whose fault it was: alone, the others succeed."""
        if len(batch) == 1:
            batch[0].request.finish("error", error)
            return
        for span in batch:
            if span.request.is_finished:
                continue
            try:
                launched = self._launch([Span(span.request, span.first, span.last - span.num_drafted)])
                self._hand_out(launched, *self._read(launched))
            except Exception as own_error:
                span.request.finish("error", own_error)

    def _hand_out(self, launched: _Launched, token_ids: list[int], finite: list[bool]) -> int:
        """Give the requests their tokens. Returns: how many drafted tokens were right."""
        live = [(row, span) for row, span in enumerate(launched.batch) if not span.request.is_finished]
        self.computed_tokens += sum(span.last - span.first for _, span in live)
        accepted = self._check_drafts(
            launched, [(row, span) for row, span in live if span.num_drafted], token_ids, finite
        )
        prompt_logits = _prompt_logits(launched)
        given = [span for _, span in live if span.num_drafted]
        for row, span in live:
            try:
                if span.num_drafted:
                    continue
                if not finite[row]:
                    raise _not_finite(span.request, launched.logits[row])
                if row in prompt_logits:
                    self._report_prompt(span, prompt_logits[row])
                if not span.samples:
                    continue
                if span.request.max_new_tokens == 0:
                    span.request.finish_without_tokens()
                else:
                    self._accept(span, token_ids[row], launched.logits[row], launched.own_logits.get(row))
                    self.sampled_steps += 1
                    given.append(span)
            except Exception as error:  # of this request's logits or tokenizer: the others go on
                span.request.finish("error", error)
        for span in given:
            self._append_forced(span, launched.logits.shape[1])
        # After the tokens, not before: whoever interrupts in between leaves requests that compute a token once more,
        # never one that has nothing to compute. What gave bad logits is not shared.
        for _, span in live:
            try:
                if span.request.finish_reason != "error":
                    self._scheduler.computed(span)
            except Exception as error:  # of sharing what this request computed
                span.request.finish("error", error)
        return accepted

    def _append_forced(self, span: Span, vocab_size: int) -> None:
        """Give a request that was given a token those that its transform forces after it, up to one that may end it."""
        request = span.request
        may_be_forced = request.params.speculate and request.params.logprobs is None
        if request.edits is None or request.is_finished or not may_be_forced:
            return
        try:
            for token_id in map(index, request.edits.forced(request.output_ids)):
                if not 0 <= token_id < vocab_size:
                    raise InvalidRequestError(
                        f"tokens that a logits_transform forces must be from 0 to {vocab_size - 1}, not {token_id}"
                    )
                if token_id in request.stop_ids or request.is_finished:
                    break
                if request.generator is not None and not self._is_drawn_on_device(request):
                    self._sampler.pass_over(vocab_size, request.params, request.generator)
                request.append(token_id, is_forced=True)
                self.generated_tokens += 1
                self.forced_tokens += 1
        except Exception as error:  # of this request's transform or tokenizer: the others go on
            request.finish("error", error)

    def _check_drafts(
        self, launched: _Launched, drafted: list[tuple[int, Span]], token_ids: list[int], finite: list[bool]
    ) -> int:
        """Give requests with drafts the tokens that are right, and one more. Returns: how many were right."""
        if not drafted or self._speculation is None:
            return 0
        more_ids, more_finite = self._sampler.likeliest(launched.more_logits)
        places = _more_places(launched.batch)
        accepted = 0
        for row, span in drafted:
            place = places[row]
            rows = [launched.more_logits[place], launched.logits[row : row + 1]]
            chosen = list(zip([*more_ids[place], token_ids[row]], [*more_finite[place], finite[row]], strict=True))
            try:
                right = self._check_draft(span, rows, chosen)
                span.request.was_drafted(span.draft.source, span.num_drafted, right)
                self._speculation.checked(span.request, span.draft, right)
                accepted += right
            except Exception as error:  # of this request's logits, edits or tokenizer: the others go on
                span.request.finish("error", error)
        return accepted

    def _check_draft(self, span: Span, logits: list[Tensor], chosen: list[tuple[int, bool]]) -> int:
        """Take the tokens of one draft as long as they are what the model says, and then what it says instead.

        Each token is chosen as it would be without a draft: the likeliest one, or one that is drawn with the request's
        own generator. A draft names one token for each place, so to accept it if the draw gives that token is
        speculative sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2) with a proposal that
        has all its mass there; and the generator's draws are those of a request without drafts.

        Args:
            logits: [tokens of the draft, vocab_size] and [1, vocab_size]; edits are still to be made.
            chosen: for each row the likeliest token, and whether the row can be sampled from.
        """
        request, draft = span.request, span.draft.token_ids.tolist()
        right = 0
        for place, (token_id, is_finite) in enumerate(chosen):
            row = logits[0][place : place + 1] if place < len(draft) else logits[1]
            own_logits = None
            if request.edits is not None:
                own_logits = row[0].clone() if request.params.logprobs is not None else None
                _edit_alone(request, request.edits, row)
                (token_id,), (is_finite,) = self._sampler.likeliest(row)
            if not is_finite:
                raise _not_finite(request, row[0])
            self._accept(span, token_id, row[0], own_logits)
            is_right = place < len(draft) and request.output_ids[-1] == draft[place]
            right += is_right
            if request.is_finished or not is_right:
                break
        self.sampled_steps += 1
        return right

    def _report_prompt(self, span: Span, logits: Tensor) -> None:
        """Note the log probabilities of the tokens after `span.prompt_positions`, whose logits are given."""
        request, positions = span.request, span.prompt_positions
        assert request.prompt_logprobs is not None, request
        assert request.params.prompt_logprobs is not None, request
        if not bool(torch.isfinite(logits.amax(dim=-1)).all()):
            raise _not_finite(request, logits)
        token_ids = request.prompt_ids[positions.start + 1 : positions.stop + 1].tolist()
        request.prompt_logprobs += self._sampler.logprobs_of_rows(logits, token_ids, request.params.prompt_logprobs)

    def _accept(self, span: Span, token_id: int, logits: Tensor, own_logits: Tensor | None) -> None:
        """Take a token for the request, drawn from `logits`; `own_logits` are the model's, if they were edited."""
        request = span.request
        if request.generator is not None and (span.num_drafted or not self._is_drawn_on_device(request)):
            token_id = self._sampler.draw(logits, request.params, request.generator)
        if request.params.logprobs is not None:
            reported = logits if own_logits is None else own_logits
            request.logprobs.append(self._sampler.logprobs(reported, token_id, request.params.logprobs))
        request.append(token_id)
        self.generated_tokens += 1

    def _is_drawn_on_device(self, request: Request) -> bool:
        row = RowSampling(request.params, request.generator)
        return self._device_sampler is not None and self._device_sampler.draws(row)


def _edit_alone(request: Request, edits: LogitEdits, logits: Tensor) -> None:
    """Edit a row [1, vocab_size] of logits that follow the tokens of a request. Raises what edits raise."""
    rows = [RowEdits(0, edits)]
    failures = start_transforms(rows, [request.output_ids]) or edit_logits(logits, rows)
    for failure in failures.values():
        raise failure


def _more_places(batch: Sequence[Span]) -> list[slice]:
    """Which rows of the further logits belong to each span."""
    ends = list(accumulate(len(span.more_positions) for span in batch))
    return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]


def _edits(span: Span) -> LogitEdits | None:
    """The edits of the logits from which the span's token is chosen; None if there are none, or no token is."""
    request = span.request
    return request.edits if span.samples and request.max_new_tokens and not request.is_finished else None


def _prompt_logits(launched: _Launched) -> dict[int, Tensor]:
    """The logits of `prompt_positions` of each row of the batch that has some, [positions, vocab_size]."""
    found: dict[int, Tensor] = {}
    if all(span.request.prompt_logprobs is None for span in launched.batch):
        return found
    for row, (span, place) in enumerate(zip(launched.batch, _more_places(launched.batch), strict=True)):
        inner, positions = len(span.inner_prompt_positions), len(span.prompt_positions)
        if positions:
            last = launched.logits[row : row + positions - inner]
            found[row] = torch.cat([launched.more_logits[place], last])
    return found


def _not_finite(request: Request, logits: Tensor) -> Exception:
    """Why no token can be chosen from `logits`."""
    if request.edits is not None and bool((logits == -torch.inf).all()):
        return InvalidRequestError(
            f"logits_transform and min_tokens must leave a token to choose; request {request.id} has none left"
        )
    return NonFiniteLogitsError(f"the model gave NaN or infinite logits for request {request.id}")


def _row(span: Span) -> RowSampling:
    """How the span's token is chosen; spans that end before their request's last token need none."""
    request: Request = span.request
    return RowSampling(request.params, request.generator if span.samples else None)
