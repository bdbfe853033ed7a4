"""Graphs of decodes: ladder, padding and the tensors that stay, by a capturer that just runs again; CUDA's on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from oracles import GreedyOracle
from prompts import random_ids
from radixkv import Engine, EngineConfig, SamplingParams
from radixkv.attention.backend import (
    AttentionBackend,
    AttentionNeeds,
    AttentionParams,
    AttentionPlan,
    GraphableBackend,
    register_backend,
    unregister_backend,
)
from radixkv.attention.flashinfer_backend import FlashInferBackend
from radixkv.attention.metadata import AttentionMetadata, SequenceSpan, build_metadata
from radixkv.attention.sharing_backend import make_sharing_backend, owning
from radixkv.attention.split_backend import make_split_backend, split_needs
from radixkv.attention.torch_backend import TorchBackend
from radixkv.engine.graphs import CudaCapturer, GraphRunner, Replay
from radixkv.errors import UnsupportedBackendError, UnsupportedModelError
from radixkv.memory.kv_pool import KVPool
from radixkv.memory.split_pool import SplitKVPool
from radixkv.models.paged_attention import PagedContext, flattened_forward
from radixkv.models.probe import plug_in_paged_attention
from radixkv_bench.models.small_configs import small_config
from tiny_models import make_model, tiny_model

HAS_FLASHINFER = torch.cuda.is_available() and importlib.util.find_spec("flashinfer") is not None
PAGE_SIZE = 4
SCRATCH_PAGE = 63
NUM_PAGES = 64
MAX_BATCH_SIZE = 10


class AgainCapturer:
    """ "Replays" by running once more: right only if all that changes reaches the forward pass through what stays."""

    def __init__(self) -> None:
        self.num_captures = self.num_replays = 0

    def capture(self, forward: Callable[[], Tensor]) -> Replay:
        def replay() -> Tensor:
            self.num_replays += 1
            return forward()

        forward()
        self.num_captures += 1
        return replay


class GraphTorchPlan:
    """Takes only the batches that a graph could."""

    def __init__(self, backend: TorchBackend, slots: Tensor, max_pages: int) -> None:
        self._backend, self._slots, self._max_pages = backend, slots, max_pages
        self._plan: AttentionPlan | None = None

    def update(self, metadata: AttentionMetadata) -> None:
        assert metadata.num_sequences == metadata.num_tokens == len(self._slots)
        assert len(metadata.kv_indices) == metadata.kv_indptr[-1] <= self._max_pages
        for array in (metadata.qo_indptr, metadata.kv_indptr, metadata.kv_indices, metadata.kv_last_page_len):
            assert array.dtype == np.int32
        self._plan = self._backend.plan(replace(metadata, slots=self._slots))

    def store_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert self._plan is not None, "run before the first update"
        self._plan.store_kv(layer, k, v)

    def attend(self, layer: int, q: Tensor, params: AttentionParams) -> Tensor:
        assert self._plan is not None, "run before the first update"
        return self._plan.attend(layer, q, params)


class GraphableTorchBackend(TorchBackend):
    """The smallest backend that has graph plans."""

    def __init__(self, pool: KVPool, needs: AttentionNeeds) -> None:
        super().__init__(pool, needs)
        self.sizes: list[int] = []
        self.shares = False

    def graph_plan(self, slots: Tensor, max_pages: int) -> GraphTorchPlan:
        self.sizes.append(len(slots))
        return GraphTorchPlan(self, slots, max_pages)

    def pays_to_share(self, metadata: AttentionMetadata) -> bool:
        return self.shares


class Sequences:
    """Token ids and the pages of some sequences over one pool; pages come in a random order."""

    def __init__(self, model: PreTrainedModel, backend: AttentionBackend, prompts: Sequence[Sequence[int]]) -> None:
        self.model, self.backend = model, backend
        free = list(np.random.default_rng(0).permutation(SCRATCH_PAGE).astype(np.int32))
        self.ids = [list(prompt) for prompt in prompts]
        self.pages = [np.array([free.pop() for _ in range(6)], np.int32) for _ in prompts]

    def decodes(self) -> tuple[Tensor, AttentionMetadata]:
        """The last token of each sequence."""
        spans = [SequenceSpan(len(ids) - 1, len(ids), pages) for ids, pages in zip(self.ids, self.pages, strict=True)]
        device = self.model.device
        last = torch.tensor([ids[-1] for ids in self.ids], device=device)
        return last, build_metadata(spans, page_size=PAGE_SIZE, device=device)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Logits of the last token of each sequence, without graphs."""
        last_rows = torch.from_numpy(metadata.qo_indptr[1:] - 1).to(self.model.device, torch.int64)
        context = PagedContext(self.backend.plan(metadata), self.backend.num_layers)
        return flattened_forward(self.model, input_ids, metadata.positions, last_rows, context).float()

    def prefill(self) -> None:
        """Compute all tokens but the last of each."""
        known = [(ids[:-1], pages) for ids, pages in zip(self.ids, self.pages, strict=True)]
        spans = [SequenceSpan(0, len(ids), pages) for ids, pages in known]
        input_ids = torch.tensor([token_id for ids, _ in known for token_id in ids], device=self.model.device)
        self.forward(input_ids, build_metadata(spans, page_size=PAGE_SIZE, device=self.model.device))

    def append(self, logits: Tensor) -> None:
        for ids, token_id in zip(self.ids, logits.argmax(-1).tolist(), strict=True):
            ids.append(token_id)


def make_pool(model: PreTrainedModel) -> tuple[KVPool, AttentionNeeds]:
    layers = plug_in_paged_attention(model)
    kept = [layer.kv for layer in layers]
    pool = KVPool(kept, num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=model.dtype, device=model.device)
    return pool, AttentionNeeds(layers, PAGE_SIZE, model.dtype, model.device)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def backend(model: PreTrainedModel) -> GraphableTorchBackend:
    backend = GraphableTorchBackend(*make_pool(model))
    for pages in (*backend.pool.k, *backend.pool.v):
        pages.fill_(float("nan"))
    return backend


def make_runner(model: PreTrainedModel, backend: GraphableTorchBackend, **options: object) -> GraphRunner:
    defaults = {"capturer": AgainCapturer(), "max_batch_size": MAX_BATCH_SIZE, "max_pages": 60}
    return GraphRunner(model, backend, page_size=PAGE_SIZE, scratch_page=SCRATCH_PAGE, **{**defaults, **options})


@pytest.mark.parametrize(
    ("max_batch_size", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10]), (32, [1, 2, 4, 8, 16, 24, 32])],
)
def test_ladder(max_batch_size: int, sizes: list[int]) -> None:
    assert GraphRunner.ladder(max_batch_size) == sizes


@pytest.mark.parametrize("num_sequences", range(1, MAX_BATCH_SIZE + 1))
def test_each_batch_size(model: PreTrainedModel, backend: GraphableTorchBackend, num_sequences: int) -> None:
    sequences = Sequences(model, backend, [random_ids(seed, 2 + 2 * seed) for seed in range(num_sequences)])
    sequences.prefill()
    input_ids, metadata = sequences.decodes()
    runner = make_runner(model, backend)
    assert runner.can_run(metadata)
    found = runner.run(input_ids, metadata).clone()
    expected = sequences.forward(input_ids, metadata)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "llama4"])
def test_steps_give_what_the_model_alone_gives(family: str) -> None:
    """Across page borders, through batches that shrink and grow, by the same graphs."""
    model = tiny_model(family)
    backend = GraphableTorchBackend(*make_pool(model))
    oracle = GreedyOracle(tiny_model(family))
    prompts = [random_ids(seed, 3 + 2 * seed) for seed in range(5)]
    sequences = Sequences(model, backend, prompts)
    sequences.prefill()
    runner = make_runner(model, backend)
    for num_running in (5, 5, 3, 1, 2, 4, 5, 5):
        part = Sequences(model, backend, [])
        part.ids, part.pages = sequences.ids[:num_running], sequences.pages[:num_running]
        part.append(runner.run(*part.decodes()))
    for prompt, ids in zip(prompts, sequences.ids, strict=True):
        assert ids == prompt + oracle.continuation(prompt, len(ids) - len(prompt))


def test_layers_that_read_anothers_kv_run_in_graphs() -> None:
    model = make_model(small_config("gemma4_text"))
    needs = AttentionNeeds(plug_in_paged_attention(model), PAGE_SIZE, model.dtype, model.device)
    owners = owning(needs)
    pool = KVPool([layer.kv for layer in owners.layers], num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=model.dtype)
    backend = make_sharing_backend(needs.layers, GraphableTorchBackend(pool, owners))
    assert isinstance(backend, GraphableBackend)
    assert len(pool.layers) < backend.num_layers
    prompts = [random_ids(seed, 3 + 2 * seed) for seed in range(3)]
    sequences = Sequences(model, backend, prompts)
    sequences.prefill()
    runner = make_runner(model, backend)
    for _ in range(4):
        sequences.append(runner.run(*sequences.decodes()))
    oracle = GreedyOracle(make_model(small_config("gemma4_text")))
    for prompt, ids in zip(prompts, sequences.ids, strict=True):
        assert ids == prompt + oracle.continuation(prompt, len(ids) - len(prompt))


def test_padding_touches_the_scratch_page_alone(model: PreTrainedModel, backend: GraphableTorchBackend) -> None:
    sequences = Sequences(model, backend, [random_ids(seed, 5) for seed in range(5)])
    sequences.prefill()
    runner = make_runner(model, backend)
    runner.capture()
    before = [pages.flatten(0, 1).clone() for pages in (*backend.pool.k, *backend.pool.v)]
    input_ids, metadata = sequences.decodes()
    runner.run(input_ids, metadata)
    runner.run(input_ids[:1], sequences_first(metadata, 1))
    allowed = {*metadata.slots.tolist(), *range(SCRATCH_PAGE * PAGE_SIZE, (SCRATCH_PAGE + 1) * PAGE_SIZE)}
    for old, pages in zip(before, (*backend.pool.k, *backend.pool.v), strict=True):
        same = (old == pages.flatten(0, 1)) | (old.isnan() & pages.flatten(0, 1).isnan())
        changed = (~same.flatten(1).all(1)).nonzero().flatten().tolist()
        assert set(changed) <= allowed
        assert set(metadata.slots.tolist()) <= set(changed)


def sequences_first(metadata: AttentionMetadata, num_sequences: int) -> AttentionMetadata:
    return AttentionMetadata(
        metadata.page_size,
        metadata.qo_indptr[: num_sequences + 1],
        metadata.kv_indptr[: num_sequences + 1],
        metadata.kv_indices[: metadata.kv_indptr[num_sequences]],
        metadata.kv_last_page_len[:num_sequences],
        metadata.kv_lens[:num_sequences],
        metadata.positions[:num_sequences],
        metadata.slots[:num_sequences],
    )


def test_which_backends_have_graphs(model: PreTrainedModel, backend: GraphableTorchBackend) -> None:
    assert isinstance(backend, GraphableBackend)
    assert not isinstance(TorchBackend(*make_pool(model)), GraphableBackend)
    assert all(hasattr(FlashInferBackend, name) for name in ("graph_plan", "pays_to_share"))


def test_captured_once_and_the_largest_first(model: PreTrainedModel, backend: GraphableTorchBackend) -> None:
    progress: list[tuple[int, int]] = []
    capturer = AgainCapturer()
    runner = make_runner(
        model, backend, capturer=capturer, on_capture=lambda done, total: progress.append((done, total))
    )
    sequences = Sequences(model, backend, [random_ids(0, 3)])
    sequences.prefill()
    runner.run(*sequences.decodes())
    runner.run(*sequences.decodes())
    runner.capture()
    assert backend.sizes == [10, 8, 4, 2, 1]
    assert capturer.num_captures == 5
    assert progress == [(done, 5) for done in range(1, 6)]


def test_what_is_not_for_graphs(model: PreTrainedModel, backend: GraphableTorchBackend) -> None:
    eleven = Sequences(model, backend, [random_ids(seed, 3) for seed in range(10)])
    runner = make_runner(model, backend)
    assert runner.can_run(eleven.decodes()[1])
    assert not make_runner(model, backend, max_batch_size=9).can_run(eleven.decodes()[1]), "too many"
    extend = build_metadata([SequenceSpan(0, 2, np.arange(1, dtype=np.int32))], page_size=PAGE_SIZE)
    assert not runner.can_run(extend)
    mixed = [SequenceSpan(4, 5, np.arange(2, dtype=np.int32)), SequenceSpan(0, 2, np.arange(1, dtype=np.int32))]
    assert not runner.can_run(build_metadata(mixed, page_size=PAGE_SIZE))
    backend.shares = True
    assert not runner.can_run(eleven.decodes()[1]), "the backend does better"


def test_too_many_pages(model: PreTrainedModel, backend: GraphableTorchBackend) -> None:
    """Five sequences of three pages and padding of three, a page each."""
    sequences = Sequences(model, backend, [random_ids(seed, 10) for seed in range(5)])
    sequences.prefill()
    input_ids, metadata = sequences.decodes()
    assert not make_runner(model, backend, max_pages=17).can_run(metadata)
    runner = make_runner(model, backend, max_pages=18)
    assert runner.can_run(metadata)
    runner.run(input_ids, metadata)


def test_a_model_that_waits_for_the_device(model: PreTrainedModel, backend: GraphableTorchBackend) -> None:
    class Failing:
        def capture(self, forward: Callable[[], Tensor]) -> Replay:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    runner = make_runner(model, backend, capturer=Failing())
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM .* \(CUDA error: .*ing\); run it without"):
        runner.capture()


# -- an engine with graphs -------------------------------------------------------------------------------------------


class GraphedBackend(GraphableTorchBackend):
    name = "graphed"


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[AgainCapturer]:
    """Engines are assembled as on a GPU, with the capturer that runs again in place of CUDA's."""
    capturer = AgainCapturer()
    monkeypatch.setattr("radixkv.engine.assembly._on_gpu", lambda model: True)
    monkeypatch.setattr("radixkv.engine.graphs.CudaCapturer", lambda device: capturer)
    register_backend(GraphedBackend)
    yield capturer
    unregister_backend(GraphedBackend.name)


def engine_of(backend: str, **settings: object) -> Engine:
    config = EngineConfig(**{"page_size": 4, "kv_cache_tokens": 512, "attention_backend": backend, **settings})
    return Engine(tiny_model("llama"), config=config)


def test_an_engine_decodes_in_graphs_of_every_batch_size(as_on_a_gpu: AgainCapturer) -> None:
    engine = engine_of("graphed", max_running_requests=5)
    assert as_on_a_gpu.num_captures == 4, "batches of 1, 2, 4 and 5, before the first request"
    prompts = [random_ids(seed, 3 + 4 * seed) for seed in range(6)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=9))
    oracle = GreedyOracle(tiny_model("llama"))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == oracle.continuation(prompt, 9)
    assert as_on_a_gpu.num_captures == 4
    assert as_on_a_gpu.num_replays >= 8, "each decode of the batch"
    engine.check_invariants()
    engine.close()


def test_graphs_are_left_out_where_they_are_not_wanted_or_cannot_be(as_on_a_gpu: AgainCapturer) -> None:
    for backend, settings in (("graphed", {"cuda_graphs": False}), ("torch", {})):
        engine_of(backend, **settings).close()
    assert as_on_a_gpu.num_captures == 0
    with pytest.raises(UnsupportedBackendError, match="'torch' cannot run in CUDA graphs; set cuda_graphs=None"):
        engine_of("torch", cuda_graphs=True)


def test_a_model_that_cannot_be_captured_runs_without_graphs_unless_they_were_asked_for(
    as_on_a_gpu: AgainCapturer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(forward: Callable[[], Tensor]) -> Replay:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(as_on_a_gpu, "capture", fails)
    engine = engine_of("graphed")
    assert "going on without CUDA graphs: the forward pass of LlamaForCausalLM cannot be captured" in caplog.text
    prompt = random_ids(1, 6)
    (output,) = engine.generate(prompt, SamplingParams(max_tokens=5))
    assert output.token_ids == GreedyOracle(tiny_model("llama")).continuation(prompt, 5)
    engine.close()
    with pytest.raises(UnsupportedModelError, match="cannot be captured in a CUDA graph"):
        engine_of("graphed", cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FLASHINFER, reason="needs CUDA and flashinfer")
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_cuda_graphs(num_kv_heads: int) -> None:
    """The same logits as without graphs, and nothing waits for the device."""
    config = hf.LlamaConfig(
        vocab_size=211,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=64,
    )
    model = make_model(config).to("cuda", torch.bfloat16)
    backend = FlashInferBackend(*make_pool(model))
    sequences = Sequences(model, backend, [random_ids(seed, 3 + 2 * seed) for seed in range(7)])
    sequences.prefill()
    runner = GraphRunner(
        model,
        backend,
        max_batch_size=8,
        max_pages=60,
        page_size=PAGE_SIZE,
        scratch_page=SCRATCH_PAGE,
        capturer=CudaCapturer(model.device),
    )
    runner.capture()
    for num_running in (7, 7, 3, 1, 7):
        part = Sequences(model, backend, [])
        part.ids, part.pages = sequences.ids[:num_running], sequences.pages[:num_running]
        input_ids, metadata = part.decodes()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = runner.run(input_ids, metadata)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = found.clone()
        expected = part.forward(input_ids, metadata)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
        part.append(expected)


def test_two_pools_in_one_graph() -> None:
    """Layers that see a window read window pages, whose slots lie in a tensor that stays."""
    model = tiny_model("gemma3")
    layers = plug_in_paged_attention(model)
    needs = AttentionNeeds(layers, PAGE_SIZE, model.dtype, model.device)
    full_needs, window_needs = split_needs(needs)
    num_window_pages = 40
    of_page = np.full(NUM_PAGES, num_window_pages, np.int32)
    of_page[np.random.default_rng(1).permutation(SCRATCH_PAGE)[:num_window_pages]] = np.arange(num_window_pages)
    pools = [
        KVPool(
            [layer.kv for layer in part.layers],
            num_pages=size,
            page_size=PAGE_SIZE,
            dtype=model.dtype,
        )
        for part, size in ((full_needs, NUM_PAGES), (window_needs, num_window_pages + 1))
    ]
    split = SplitKVPool(*pools, of_page)
    full, window = (
        GraphableTorchBackend(pool, part) for pool, part in zip(pools, (full_needs, window_needs), strict=True)
    )
    backend = make_split_backend(needs, full, window, split.of_page)
    assert isinstance(backend, GraphableBackend)
    sequences = Sequences(model, backend, [random_ids(seed, length) for seed, length in enumerate((9, 5, 14))])
    lent = np.flatnonzero(of_page < num_window_pages).astype(np.int32)
    sequences.pages = [lent[6 * i : 6 * i + 6] for i in range(3)]
    sequences.prefill()
    graphs = GraphRunner(
        model,
        backend,
        max_batch_size=4,
        max_pages=60,
        page_size=PAGE_SIZE,
        scratch_page=SCRATCH_PAGE,
        capturer=AgainCapturer(),
    )
    for _ in range(5):
        input_ids, metadata = sequences.decodes()
        assert graphs.can_run(metadata)
        expected = sequences.forward(input_ids, metadata)
        torch.testing.assert_close(graphs.run(input_ids, metadata), expected, rtol=0, atol=1e-5)
        sequences.append(expected)
