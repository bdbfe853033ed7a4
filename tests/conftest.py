"""The order of the test files, and what the processes load that run them."""

from __future__ import annotations

import atexit
import gc
import os
import signal
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: tests never ask the network

# Files that take longest: begun first, so that no process idles at the end. The first compiles what others use, and the
# second needs nothing of it: so two processes do not compile the same kernel side by side.
SLOW_FILES = [
    "test_attention.py",
    "test_triton.py",
    "test_quantized_attention.py",
    "test_skinny_linear.py",
    "test_hf_radix_cache.py",
    "test_speculation.py",
    "test_fused_decoder.py",
    "test_route.py",
    "test_models.py",
    "test_pool_kinds.py",
    "test_windows.py",
    "test_serving_anthropic.py",
    "test_engine.py",
    "test_hf_disk_cache.py",
    "test_torch_defaults.py",
    "test_serving_forms.py",
    "test_tiles.py",
    "test_request_options.py",
    "test_latent_attention.py",
    "test_cli_replay.py",
    "test_serving_schema.py",
]


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, except where other processes run the tests: the one that hands them out starts at once."""
    hands_out = config.getoption("numprocesses", None) and not config.getoption("collectonly")
    if not hands_out:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background runs ignore
        gc.disable()  # until all is loaded: it stays, so to search it for garbage is in vain
        if hasattr(config, "workerinput"):  # its results have been handed over when it ends
            atexit.register(os._exit, 0)  # first, so it is called last: to take apart all that was loaded takes seconds
        config.pluginmanager.import_plugin("shared_fixtures")
        if hasattr(config, "workerinput") and config.workerinput["workerid"] == "gw1":
            load_backwards(config)


def load_backwards(config: pytest.Config) -> None:
    """Load the test files from the last to the first, while another process loads them from the first to the last.

    In a fresh clone every file must be compiled first: so each of the two compiles one half, and reads what the other
    one wrote. A file that fails to load is reported when it is collected.
    """
    if config.args == config.getini("testpaths"):  # all are wanted
        for file in sorted(Path(__file__).parent.glob("test_*.py"), reverse=True):
            with suppress(Exception, pytest.skip.Exception):
                import_module(file.stem)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first; the order is otherwise kept."""
    rank = {name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
