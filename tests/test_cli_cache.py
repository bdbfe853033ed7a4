"""`radixkv cache`: stores listed, verified, pruned, and carried to another folder."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cli_runs import assert_one_line_error, run
from radixkv.errors import TierError
from store_cases import FINGERPRINT, chain, facts, found_tokens, open_store

DAY_S = 86_400


@pytest.fixture
def kv(tmp_path: Path) -> Path:
    """A store with two namespaces, one of them long unused."""
    now_s = time.time()
    store = open_store(tmp_path / "kv", clock=time.time)
    store.write(chain(range(10), facts(now_s - 10 * DAY_S)))
    store.write(chain(range(8), facts(now_s - 5, kept_until_s=now_s + DAY_S, namespace=("acme[b]", "secret"))))
    store.close()
    return tmp_path / "kv"


def file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_ls_and_stat_tell_namespaces_and_fingerprint(kv: Path) -> None:
    shown = run("cache", "ls", kv).stdout
    assert "10 d ago" in shown
    assert "'acme[b]', salted" in shown
    assert "secret" not in shown
    rows = json.loads(run("cache", "ls", kv, "--json").stdout)
    assert [(row["namespace"], row["pages"], row["tokens"], row["kept_pages"]) for row in rows] == [
        (None, 3, 10, 0),
        ("acme[b]", 2, 8, 2),
    ]
    shown = run("cache", "stat", kv).stdout
    assert "5 with 18 tokens" in shown
    assert "c0ffee" in shown
    (summary,) = json.loads(run("cache", "stat", kv, "--json").stdout)
    assert summary["fingerprint"] == FINGERPRINT.as_dict()
    assert summary["file_bytes"] == sum(file.stat().st_size for file in (kv / summary["store"]).iterdir())


def test_verify_tells_what_is_damaged_and_exits_with_1(kv: Path) -> None:
    result = run("cache", "verify", kv)
    assert (result.exit_code, result.stdout.count("5 pages are right")) == (0, 1)
    payloads = next(kv.rglob("payloads"))
    content = bytearray(payloads.read_bytes())
    content[100] ^= 1
    payloads.write_bytes(content)
    index = next(kv.rglob("index"))
    index.write_bytes(b"x" + index.read_bytes()[1:])
    result = run("cache", "verify", kv)
    assert result.exit_code == 1
    assert "3 pages are right, 1 pages and 1 records are damaged" in result.stdout
    assert json.loads(run("cache", "verify", kv, "--json").stdout)[0]["damaged_pages"] == 1
    shown = " ".join(run("cache", "stat", kv).stdout.split())
    assert "damaged records 1" in shown
    next(kv.rglob("store.json")).write_text("{}")
    result = run("cache", "verify", kv)
    assert result.exit_code == 1
    assert "store.json is damaged" in result.stdout
    assert "store.json is damaged" in run("cache", "stat", kv).stderr


def test_pages_go_to_another_machine_and_back(kv: Path, tmp_path: Path) -> None:
    result = run("cache", "export", kv, tmp_path / "all.kv")
    assert (result.exit_code, "5 pages exported" in result.stdout) == (0, True)
    assert_one_line_error(run("cache", "export", kv, tmp_path / "all.kv"), "File exists")
    assert_one_line_error(
        run("cache", "import", tmp_path / "new", tmp_path / "all.kv"), "set --capacity-gb to make one"
    )
    result = run("cache", "import", tmp_path / "new", tmp_path / "all.kv", "--capacity-gb", "0.001")
    assert (result.exit_code, result.stdout) == (0, "5 pages imported\n")
    store = open_store(tmp_path / "new", 10**6)
    assert (found_tokens(store, range(10)), found_tokens(store, range(8), ("acme[b]", "secret"))) == (10, 8)
    store.close()
    assert run("cache", "import", tmp_path / "new", tmp_path / "all.kv").exit_code == 0
    run("cache", "export", kv, tmp_path / "some.kv", "--namespace", "acme[b]", "--max-pages", 1)
    result = run("cache", "import", tmp_path / "few", tmp_path / "some.kv", "--capacity-gb", "0.001")
    assert result.stdout == "1 pages imported\n"
    damaged = tmp_path / "damaged.kv"
    damaged.write_bytes((tmp_path / "all.kv").read_bytes()[:-3])
    assert_one_line_error(run("cache", "import", tmp_path / "few", damaged), "5 pages before it are stored")
    assert_one_line_error(run("cache", "import", tmp_path / "few", tmp_path / "none.kv"), "No such file")


def test_prune_by_age_namespace_and_size(kv: Path) -> None:
    before = file_bytes(kv)
    assert run("cache", "prune", kv, "--older-than", "11d").stdout.startswith("0 pages removed")
    result = run("cache", "prune", kv, "--older-than", "9.5d")
    assert result.stdout.startswith("3 pages removed")
    assert file_bytes(kv) < before
    store = open_store(kv)
    assert (found_tokens(store, range(10)), found_tokens(store, range(8), ("acme[b]", "secret"))) == (0, 8)
    store.write(chain(range(300), facts(time.time())))
    store.close()
    assert run("cache", "prune", kv, "--namespace", "acme[b]").stdout.startswith("2 pages removed")
    assert run("cache", "prune", kv, "--namespace", "acme[b]").stdout.startswith("0 pages removed")
    pages = json.loads(run("cache", "stat", kv, "--json").stdout)[0]["pages"]
    result = run("cache", "prune", kv, "--to-gb", 16_000 / 2**30)
    assert result.exit_code == 0
    assert file_bytes(kv) <= 16_000
    left = json.loads(run("cache", "stat", kv, "--json").stdout)[0]["pages"]
    assert 0 < left < pages
    assert result.stdout.startswith(f"{pages - left} pages removed")
    assert run("cache", "prune", kv, "--namespace", "-").stdout.startswith(f"{left} pages removed")
    assert "holds no pages" in run("cache", "ls", kv).stderr


def test_several_stores_are_told_apart(kv: Path, tmp_path: Path) -> None:
    other = open_store(kv, fingerprint=replace(FINGERPRINT, dtype="float16"))
    other.write(chain(range(4), facts(time.time())))
    other.close()
    store = other.path.name[:6]
    assert len(json.loads(run("cache", "stat", kv, "--json").stdout)) == 2
    assert len(json.loads(run("cache", "stat", kv, "--json", "--store", store).stdout)) == 1
    assert_one_line_error(run("cache", "export", kv, tmp_path / "x.kv"), "several stores; choose with --store")
    assert "1 pages exported" in run("cache", "export", kv, tmp_path / "x.kv", "--store", store).stdout
    assert_one_line_error(run("cache", "stat", kv, "--store", "zzz"), "holds no store zzz")
    result = run("cache", "prune", kv, "--store", store, "--older-than", "1h")
    assert result.stdout.startswith("0 pages removed")


def test_a_store_in_use_can_be_read_but_not_pruned(kv: Path) -> None:
    store = open_store(kv)
    assert run("cache", "verify", kv).exit_code == 0
    assert_one_line_error(run("cache", "prune", kv, "--older-than", "1h"), "in use by process")
    store.close()


def test_mistakes_are_one_line(kv: Path, tmp_path: Path) -> None:
    assert_one_line_error(run("cache", "ls", tmp_path / "nowhere"), "there is no store at")
    assert_one_line_error(run("cache", "verify", tmp_path), "is no store of radixkv")
    assert_one_line_error(run("cache", "prune", kv), "say what to remove")
    assert_one_line_error(run("cache", "prune", kv, "--older-than", "soon"), "such as 7d, not 'soon'")
    assert_one_line_error(run("cache", "prune", kv, "--to-gb", 0), "--to-gb must be")
    assert_one_line_error(run("cache", "prune", kv, "--to-gb", 1e-9), "needs about")
    assert_one_line_error(run("cache", "frobnicate", kv), "No such command 'frobnicate'")
    assert_one_line_error(run("cache", "export", kv, tmp_path / "no" / "x.kv"), "No such file or directory")


def test_a_folder_whose_stores_are_gone_holds_none(kv: Path) -> None:
    store = next(path for path in kv.iterdir() if path.is_dir())
    shutil.rmtree(store)
    for command, what in {"ls": "pages", "stat": "stores", "verify": "stores"}.items():
        result = run("cache", command, kv)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"{kv} holds no {what}\n"), command
    assert_one_line_error(run("cache", "prune", kv, "--to-gb", 1), "holds no store")


def test_an_export_that_fails_leaves_no_half_of_an_archive(
    kv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> int:
        raise TierError("a page cannot be read")

    monkeypatch.setattr("radixkv.tiers.page_archive.export_pages", fails)
    assert_one_line_error(run("cache", "export", kv, tmp_path / "all.kv"), "a page cannot be read")
    assert not (tmp_path / "all.kv").exists()


def test_help_teaches(kv: Path) -> None:
    text = " ".join(run("cache", "--help").stdout.split())
    for name in ("ls", "stat", "verify", "export", "import", "prune"):
        assert name in text
        assert run("cache", name, "--help").exit_code == 0
    assert "radixkv cache import ~/kv prompt.kv" in text
