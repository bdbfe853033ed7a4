"""The cases of bench/tiers.py that take more than one process: a killed engine, and a server that two share."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from transformers import PreTrainedModel

from radixkv import Engine
from radixkv_bench.common.errors import BenchError
from radixkv_bench.common.models import load, quiet_transformers
from radixkv_bench.common.redis_server import NO_SERVER, SERVER, running_redis
from radixkv_bench.tiers.workload import (
    ONE,
    RESTARTS,
    Figures,
    Sizes,
    drop_from_memory,
    first_token_s,
    get_going,
    settings_of,
)

WRITTEN = "written"


def killed(model: PreTrainedModel, sizes: Sizes) -> Figures:
    """The first token of a prompt that an engine in another process computed, before it was killed (kill -9)."""
    computed: list[float] = []
    loaded: list[float] = []
    dropped: list[float] = []
    found: list[float] = []
    with Engine(model, None, settings_of(sizes, 2 * sizes.prompt_tokens)) as plain:
        for number in range(sizes.rounds):
            prompt = sizes.prompt(number)
            plain.generate(sizes.prompt(1000 + number, 64), ONE)
            computed.append(first_token_s(plain, prompt))
            with tempfile.TemporaryDirectory() as folder:
                _write_and_be_killed(model, sizes, prompt, f"{folder}/killed")
                for turn in range(2 * RESTARTS):
                    path = shutil.copytree(f"{folder}/killed", f"{folder}/{turn}")  # each is opened once after the kill
                    if is_dropped := turn % 2 == 1:
                        drop_from_memory(Path(path))
                    with Engine(model, None, settings_of(sizes, 2 * sizes.prompt_tokens, disk_cache=path)) as engine:
                        get_going(engine, sizes, 2 * RESTARTS * number + turn)
                        (dropped if is_dropped else loaded).append(first_token_s(engine, prompt, "disk"))
                        found.append(first_token_s(engine, prompt, "pool"))
                    shutil.rmtree(path)
    return {
        "loaded / computed": median(loaded) / median(computed),
        "loaded / found": median(loaded) / median(found),
        "loaded_from_medium / computed": median(dropped) / median(computed),
        "loaded_from_medium / found": median(dropped) / median(found),
    }


def _write_and_be_killed(model: PreTrainedModel, sizes: Sizes, prompt: list[int], folder: str) -> None:
    """Have another process compute `prompt` above a disk in `folder`, and kill it once that is written."""
    with tempfile.TemporaryDirectory() as weights:
        model.save_pretrained(weights)
        given = json.dumps({"model": weights, "prompt": prompt, "folder": folder, "page_size": sizes.page_size})
        code = "from radixkv_bench.tiers.processes import write; write()"
        bench = str(Path(__file__).parents[2])
        with subprocess.Popen(
            [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {bench!r}); {code}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(given + "\n")
            process.stdin.flush()
            said = process.stdout.readline().strip()
            process.kill()
        if said != WRITTEN:
            raise BenchError(f"the process that was to write ended with {process.returncode} before it had written")


def write() -> None:
    """What the other process does: it computes what stdin tells, says that it is written, and goes on."""
    quiet_transformers()
    given = json.loads(sys.stdin.readline())
    model = load(given["model"])
    prompt: list[int] = given["prompt"]
    sizes = Sizes(len(prompt), 1, 1, 1, 1, 1, model.config.vocab_size, given["page_size"])
    engine = Engine(model, None, settings_of(sizes, 2 * len(prompt), disk_cache=given["folder"]))
    engine.generate(prompt, ONE)
    if not engine.flush_tiers():
        raise BenchError("what was computed could not be written in time")
    print(WRITTEN, flush=True)
    sys.stdin.readline()


def shared(model: PreTrainedModel, sizes: Sizes) -> Figures:
    """Two engines on one server (Valkey or Redis): what the second one computes of what the first one had computed."""
    if SERVER is None:
        raise BenchError(f"the case shared needs a server: {NO_SERVER}")
    prompts = [sizes.prompt(number) for number in range(sizes.sessions)]
    room = (sizes.sessions + 1) * sizes.prompt_tokens
    with tempfile.TemporaryDirectory() as folder, running_redis(Path(folder)) as server:
        settings = settings_of(sizes, room, shared_cache=server.url)
        with Engine(model, None, settings) as first, Engine(model, None, settings) as second:
            computed_s = [first_token_s(first, prompt) for prompt in prompts]
            first.flush_tiers()
            get_going(second, sizes, 0)
            before = second.stats().computed_tokens
            loaded_s = [first_token_s(second, prompt, "shared") for prompt in prompts]
            computed = second.stats().computed_tokens - before
    return {
        "computed by the second / by the first": computed / sum(map(len, prompts)),
        "loaded / computed": median(loaded_s) / median(computed_s),
    }
