"""The live page in a browser: headless Chromium, driven by Playwright.

Skipped where one of the two is missing: `pip install playwright`, and a `chromium` on the PATH or where CHROMIUM says.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from http_server import SMALL, Running, running
from radixkv import AsyncEngine, EngineConfig
from radixkv.engine.core import EngineCore
from recurrent_models import recurrent_model
from routed_servers import Routed, new_engine, routed

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH, and CHROMIUM names none"),
]
WIDTHS = (400, 2000)
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # tests may run as root
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(AsyncEngine.from_pretrained("demo", **{**SMALL, "kv_cache_tokens": 65_536, "page_size": 1})) as server:
        yield server


@pytest.fixture(autouse=True)
def _empty(server: Running) -> Iterator[None]:
    yield
    in_loop(server.engine.reset_cache())


def in_loop(work: Any) -> Any:
    """The result of a coroutine. Playwright has a loop in this thread, so it is run in another."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(work)))
    thread.start()
    thread.join()
    return results[0]


class Page:
    """An open page, and what it had to complain of."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.problems: list[str] = []
        self.hosts: set[str] = set()
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda message: self.problems.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self.hosts.add("/".join(request.url.split("/")[:3])))
        page.goto(f"{address}/")

    def data(self, name: str) -> str:
        """What the drawing tells of itself."""
        return str(self.page.evaluate("name => document.getElementById('icicle').dataset[name] ?? ''", name))

    def wait_for(self, condition: str, *values: Any) -> None:
        """Wait until a JavaScript expression over `data` (the drawing's) and `values` is true."""
        script = f"values => {{ const data = document.getElementById('icicle').dataset; return {condition}; }}"
        self.page.wait_for_function(script, arg=list(values))

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))


@contextmanager
def opened(browser: Any, server: Running | Routed, *, width: int = 1200, scheme: str = "light") -> Iterator[Page]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        yield Page(context.new_page(), server.address)
    finally:
        context.close()


def fill(core: EngineCore, prompts: list[list[int]]) -> None:
    """Let the cache hold `prompts`, without computing them."""
    for prompt in prompts:
        with core.cache.acquire(prompt) as lease:
            lease.commit(prompt)


def cache_prompts(server: Running, prompts: list[list[int]]) -> None:
    in_loop(server.engine.observe(lambda core: fill(core, prompts)))


def cache_texts(server: Running, *texts: str) -> None:
    cache_prompts(server, [server.engine.tokenizer(text)["input_ids"] for text in texts])  # type: ignore[misc]


SPEECHES = ("ROMEO: But, soft! what light", "ROMEO: But, soft! who comes here", "JULIET: Ay me! he speaks")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_draws_the_tree_without_a_complaint_and_asks_no_other_host(
    browser: Any, server: Running, width: int, scheme: str
) -> None:
    cache_texts(server, *SPEECHES)
    with opened(browser, server, width=width, scheme=scheme) as page:
        page.wait_for("data.nodes === '5' && Number(data.rects) === 5")  # a root, and two speeches that share an edge
        assert page.text("#status") == "live"
        assert page.text("#tree-note").startswith("4 prefixes")
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is too wide"
        background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(244, 246, 248)", "dark": "rgb(14, 20, 27)"}[scheme]
        assert page.problems == []
        assert page.hosts == {server.address}


def test_it_shows_what_comes_and_what_goes(browser: Any, server: Running) -> None:
    with opened(browser, server) as page:
        page.wait_for("data.nodes === '0'")
        assert "Nothing is cached yet" in page.text("#empty")
        server.openai().completions.create(model="demo", prompt=SPEECHES[0], max_tokens=2)
        page.wait_for("Number(data.nodes) >= 2")
        assert not page.page.is_visible("#empty")
        page.page.wait_for_selector("#misses .reason")
        assert page.text("#misses .reason") == "never seen"
        assert page.text("#pool-legend").startswith("in use 0")
        in_loop(server.engine.reset_cache())
        page.wait_for("data.nodes === '0'")
        assert page.problems == []


def test_a_running_request_is_shown(browser: Any, server: Running) -> None:
    stream = server.openai().completions.create(model="demo", prompt=SPEECHES[0], max_tokens=3000, stream=True)
    next(iter(stream))
    with opened(browser, server) as page:
        page.page.wait_for_selector("#running:text-is('1')")
        page.page.wait_for_selector("#requests :text('running for')")
        stream.close()
        page.page.wait_for_selector("#running:text-is('0')")
        assert page.problems == []
    in_loop(_until_idle(server))


async def _until_idle(server: Running) -> None:
    while (await server.engine.stats()).running:
        pass


def test_the_filter_finds_prefixes_by_their_text(browser: Any, server: Running) -> None:
    cache_texts(server, *SPEECHES)
    with opened(browser, server) as page:
        page.wait_for("data.nodes === '5'")
        page.page.keyboard.press("/")
        page.page.keyboard.type("juliet")
        page.wait_for("data.found === '1'")
        assert page.text("#detail") == "1 prefix found."
        page.page.fill("#filter", "no such text")
        page.wait_for("data.found === '0'")
        page.page.keyboard.press("Escape")
        page.wait_for("data.found === ''")
        assert page.page.input_value("#filter") == ""
        assert page.page.evaluate("document.activeElement.id") == "icicle"


def test_keys_walk_the_tree_and_zoom(browser: Any, server: Running) -> None:
    # one more than other tests: until the page shows it, it may show what they left, and lose what is selected in that
    cache_texts(server, *SPEECHES, "NURSE: Ay, ay")
    with opened(browser, server) as page:
        page.wait_for("data.nodes === '6'")
        page.page.focus("#icicle")
        page.page.keyboard.press("ArrowDown")
        assert page.text("#detail").startswith("all of shared")
        page.page.keyboard.press("ArrowDown")
        shared = page.text("#detail")
        assert "ROMEO: But, soft!" in shared
        assert "hit 1 time" in shared
        page.page.keyboard.press("ArrowRight")
        assert "JULIET" in page.text("#detail")
        page.page.keyboard.press("ArrowLeft")
        assert page.text("#detail").split(" · used")[0] == shared.split(" · used")[0]  # the rest tells the time
        page.page.keyboard.press("Enter")
        page.wait_for("data.rects === '3'")
        assert page.text("#crumbs").startswith("everything")
        page.page.keyboard.press("Escape")
        page.page.keyboard.press("Escape")
        page.wait_for("data.rects === '6' && data.focus === ''")
        assert page.problems == []


def test_the_pointer_is_told_what_lies_under_it(browser: Any, server: Running) -> None:
    cache_texts(server, *SPEECHES)
    with opened(browser, server) as page:
        page.wait_for("data.nodes === '5'")
        page.page.hover("#icicle", position={"x": 30, "y": 45})
        assert "ROMEO" in page.text("#tip")
        assert "used" in page.text("#tip")
        page.page.click("#icicle", position={"x": 30, "y": 45})
        page.wait_for("data.focus !== ''")
        page.page.click("#crumbs button:first-of-type")
        page.wait_for("data.focus === ''")


def test_ten_thousand_prefixes_are_drawn_in_no_more_rectangles_than_fit(browser: Any, server: Running) -> None:
    rng = np.random.default_rng(0)
    prompts = [[group, 300 + child, *rng.integers(0, 500, 3).tolist()] for group in range(100) for child in range(100)]
    cache_prompts(server, prompts)
    with opened(browser, server) as page:
        page.wait_for("data.nodes === '10101'")
        assert 100 < int(page.data("rects")) < 3 * 1200
        page.page.select_option("#colour", "tenant")
        page.page.fill("#filter", "the")
        page.wait_for("Number(data.found) > 0")
        page.page.focus("#icicle")
        for _ in range(2):
            page.page.keyboard.press("ArrowDown")
        page.page.keyboard.press("Enter")
        page.wait_for("Number(data.rects) === 101")
        assert page.problems == []
        print(f"drawn in {page.data('drawMs')} ms")  # noqa: T201 - the figure that docs/serving.md gives


def test_a_key_is_asked_for_and_never_in_an_address(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    tables = [
        f"[[key]]\nname = '{name}'\nsha256 = '{sha256(f'key-{name}-ü'.encode()).hexdigest()}'\nadmin = {admin}\n"
        for name, admin in (("red", "false"), ("boss", "true"))
    ]
    file.write_text("".join(tables))
    with (
        running(AsyncEngine.from_pretrained("demo", **SMALL), api_keys=str(file)) as server,
        opened(browser, server) as page,
    ):
        urls: list[str] = []
        page.page.on("request", lambda request: urls.append(request.url))
        for key, heading in (
            ("wrong", "This server needs a key"),
            ("key-red-ü", "Nobody has this key"),
            ("key-boss-ü", "This key may not see the page"),
        ):
            page.page.wait_for_selector(f"#ask-title:text-is('{heading}')")
            page.page.fill("#key", key)
            page.page.keyboard.press("Enter")
        page.page.wait_for_selector("#status[data-state=live]")
        assert not page.page.is_visible("#ask")
        page.page.reload()
        page.page.wait_for_selector("#status[data-state=live]")
        page.page.click("#forget")
        page.page.wait_for_selector("#ask-title:text-is('This server needs a key')")
        assert not [url for url in urls if "key-" in url or "wrong" in url or "?" in url]
        assert all("401" in problem or "403" in problem for problem in page.problems), page.problems


def test_tiers_below_the_pool_are_told_of(browser: Any, server: Running, tmp_path: Path) -> None:
    settings = {**SMALL, "disk_cache": str(tmp_path / "kv"), "disk_cache_gb": 2.0}
    with running(AsyncEngine.from_pretrained("demo", **settings)) as below, opened(browser, below) as page:
        page.page.wait_for_selector("#tiers li")
        assert page.text("#tiers").startswith("disk: ")
        assert page.text("#tiers").endswith(" of 1.9 GiB, 0 tokens loaded")
        assert page.problems == []
    with opened(browser, server) as page:
        page.page.wait_for_selector("#status[data-state=live]")
        assert not page.page.is_visible("#tiers")


def test_states_of_recurrent_layers_are_told_of(browser: Any, server: Running) -> None:
    config = EngineConfig(kv_cache_tokens=512, state_slots=12, attention_backend="torch")
    with running(AsyncEngine(recurrent_model("qwen3_next"), None, config)) as below, opened(browser, below) as page:
        page.page.wait_for_selector("#states li")
        assert page.text("#states").startswith("0 of 12 states in use, 48 KiB")
        assert page.text("#states").endswith("free 12")
        assert page.problems == []
    with opened(browser, server) as page:
        page.page.wait_for_selector("#status[data-state=live]")
        assert not page.page.is_visible("#states")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_router_shows_the_pages_of_its_replicas_side_by_side(browser: Any, width: int, scheme: str) -> None:
    with ExitStack() as stack:
        servers = [stack.enter_context(running(new_engine())) for _ in range(2)]
        router = stack.enter_context(routed([*servers, "http://127.0.0.1:9"]))
        cache_texts(servers[1], *SPEECHES)
        page = stack.enter_context(opened(browser, router, width=width, scheme=scheme))
        page.page.wait_for_selector("#status:text-is('2 of 3 up')")
        assert page.page.locator(".replica").count() == 3
        assert [page.text(f".replica:nth-of-type({n}) .state") for n in (1, 2, 3)] == ["up", "up", "down"]
        assert page.page.is_visible(".replica:nth-of-type(3) .trouble")
        for number in range(2):
            frame = page.page.frame_locator(f".replica:nth-of-type({number + 1}) iframe")
            frame.locator("#status[data-state=live]").wait_for()
            nodes = {0: "0", 1: "4"}[number]
            frame.locator(f"#icicle[data-nodes='{nodes}']").wait_for()
        boxes = [page.page.locator(".replica").nth(number).bounding_box() for number in range(2)]
        assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 1000)
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it is too wide"
        background = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(244, 246, 248)", "dark": "rgb(14, 20, 27)"}[scheme]
        page.page.click(".replica:nth-of-type(1) .toggle")
        assert page.page.locator("iframe").count() == 1
        page.page.click(".replica:nth-of-type(1) .toggle")
        page.page.frame_locator(".replica:nth-of-type(1) iframe").locator("#status[data-state=live]").wait_for()
        assert page.problems == []
        assert page.hosts == {router.address}


def test_one_key_opens_the_pages_of_all_replicas(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f"[[key]]\nname = 'boss'\nsha256 = '{sha256(b'key-boss').hexdigest()}'\nadmin = true\n")
    with ExitStack() as stack:
        servers = [stack.enter_context(running(new_engine(), api_keys=str(file))) for _ in range(2)]
        router = stack.enter_context(routed(servers, key="key-boss"))
        page = stack.enter_context(opened(browser, router))
        for key, heading in (("wrong", "These servers need a key"), ("key-boss", "Nobody has this key")):
            page.page.wait_for_selector(f"#ask-title:text-is('{heading}')")
            assert page.page.locator("iframe").count() == 0
            page.page.fill("#key", key)
            page.page.keyboard.press("Enter")
        for number in (1, 2):
            frame = page.page.frame_locator(f".replica:nth-of-type({number}) iframe")
            frame.locator("#status[data-state=live]").wait_for()
            assert not frame.locator("#ask").is_visible()
        assert not page.page.is_visible("#ask")
        page.page.click("header #forget")
        page.page.wait_for_selector("#ask-title:text-is('These servers need a key')")
