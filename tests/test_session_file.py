"""Sessions that are saved and opened again: the same tokens, the KV from below, and files that cannot be used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chat_conversation import ScriptedEngine
from chat_templates import FAMILIES
from chat_tokenizers import byte_level, sentence_piece
from oracles import GreedyOracle
from page_stores import MemoryStore
from prompts import random_ids
from radixkv import Engine, SamplingParams, Session
from radixkv.errors import ClosedError, SessionFileError
from radixkv.memory.page_bytes import PageBytes
from radixkv.tiers.writer import PageWriter

MakeEngine = Callable[..., Engine]
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
SMALL = {"kv_cache_tokens": 2048, "attention_backend": "torch", "page_size": 16}
SYSTEM = "You are a citizen of Rome."


def scripted(name: str = "chatml", answers: int = 9) -> ScriptedEngine:
    family = FAMILIES[name]
    tokenizer = byte_level(*family.special)
    tokenizer.chat_template = family.template
    return ScriptedEngine(tokenizer, [f"<think>hm</think> the answer is {i}" for i in range(answers)], family.end)


def load(engine: Any, path: Path) -> Session:
    return Session.load(engine, path)


# ------------------------------------------------------------------------------------------------------ what goes on


@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_session_asks_exactly_the_prompts_of_the_one_that_was_saved(name: str, tmp_path: Path) -> None:
    engine = scripted(name)
    session = engine.session(system="user assistant", user_special_tokens="text")
    for text in ("hello", "what is the answer?"):
        session.send(text)
    session.save(tmp_path / "chat.json")
    again = load(engine, tmp_path / "chat.json")
    assert (again.token_ids, again.messages) == (session.token_ids, session.messages)
    assert again.explain() == session.explain()
    engine.answers = ["yes", "yes"]
    asked = "again <|im_end|> and again" if name == "chatml" else "again"
    assert again.send(asked).prompt_token_ids == session.send(asked).prompt_token_ids
    assert again.token_ids == session.token_ids


def test_what_was_appended_before_and_after_answers_is_there(tmp_path: Path) -> None:
    engine = scripted()
    session = engine.session()
    session.append("hello world")
    session.send("hello")
    session.append("the answer")
    session.generate(SamplingParams(max_tokens=3))
    session.save(tmp_path / "chat.json")
    again = load(engine, tmp_path / "chat.json")
    engine.answers = ["yes", "yes"]
    assert again.send("hm").prompt_token_ids == session.send("hm").prompt_token_ids
    assert again.token_ids == session.token_ids


def test_namespace_and_options_are_those_of_the_saved_session(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine()
    session = engine.session(extra_key="tenant \udc80", cache_salt="salt", priority=3, keep_for_s=2.5)
    session.append(random_ids(0, 30))
    session.generate(SHORT)
    session.save(tmp_path / "chat.json")
    again = load(engine, tmp_path / "chat.json")
    assert again.namespace == ("tenant \udc80", "salt")
    assert again.generate(SHORT).cached_tokens == 35, "the same namespace, so its KV is found in the pool"
    again.save(tmp_path / "again.json")
    saved, resaved = (json.loads((tmp_path / name).read_text().split("\n")[1]) for name in ("chat.json", "again.json"))
    assert resaved["options"] == saved["options"]
    assert saved["options"] == {"extra_key": "tenant \udc80", "cache_salt": "salt", "priority": 3, "keep_for_s": 2.5}


def test_during_a_turn_the_state_before_it_is_saved(make_engine: MakeEngine, tmp_path: Path) -> None:
    session = scripted().session()
    chunks = session.stream("hello")
    next(chunks)
    session.save(tmp_path / "chat.json")
    assert [*chunks]
    assert load(scripted(), tmp_path / "chat.json").messages == []


def test_a_closed_session_is_not_saved_and_a_closed_engine_does_not_prevent_it(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    engine = make_engine()
    session = engine.session()
    session.append([5, 6])
    engine.close()
    session.save(tmp_path / "chat.json")
    session.close()
    with pytest.raises(ClosedError):
        session.save(tmp_path / "late.json")
    assert load(make_engine(), tmp_path / "chat.json").token_ids == [5, 6]


# --------------------------------------------------------------------------------------------------------- its KV


def test_the_next_turn_after_a_restart_is_the_one_without_and_loads_the_past_from_disk(tmp_path: Path) -> None:
    def engine() -> Engine:
        return Engine.from_pretrained(
            "demo", disk_cache=str(tmp_path / "kv"), disk_cache_gb=0.1, warm_start_share=0, **SMALL
        )

    with engine() as first:
        session = first.session(system=SYSTEM)
        session.send("Who are you?", SHORT)
        session.save(tmp_path / "chat.json")
        past = len(session.token_ids)
        in_pool = load(first, tmp_path / "chat.json").send("Where is Caesar?", SHORT)
        assert dict(in_pool.cached_by) == {"pool": past - 1}
    with engine() as second:
        output = load(second, tmp_path / "chat.json").send("Where is Caesar?", SHORT)
    assert output.prompt_token_ids == in_pool.prompt_token_ids
    assert output.token_ids == in_pool.token_ids
    # the turn above was stored, too
    assert dict(output.cached_by) == {"pool": 0, "disk": len(output.prompt_token_ids) - 1}


@pytest.mark.parametrize("writes", ["through", "selective", "back"])
@pytest.mark.parametrize("length", [3, 30, 32])
def test_saving_puts_the_kv_below_whatever_is_written_as_a_rule(
    make_engine: MakeEngine, oracle: GreedyOracle, tmp_path: Path, writes: str, length: int
) -> None:
    plain = make_engine()
    store = MemoryStore(plain.config.page_size, PageBytes(plain.pool).payload_bytes)  # type: ignore[arg-type]
    tiers = {"parts": {"stores": (store,)}, "warm_start_share": 0}
    engine = make_engine(tier_writes=writes, **tiers)
    session = engine.session(extra_key="a")
    session.append(random_ids(0, length))
    session.generate(SHORT)
    session.save(tmp_path / "chat.json")
    stored = dict(store.pages)  # as if the process ended here
    assert engine.stats().tiers[0].dropped_pages == 0
    assert len(stored) == -(-(length + 5) // 4)
    store.pages = stored
    again = load(make_engine(tier_writes=writes, **tiers), tmp_path / "chat.json")
    before = again.token_ids
    output = again.generate(SHORT)
    assert output.token_ids == oracle.continuation(before, 6)
    assert dict(output.cached_by) == {"pool": 0, "disk": length + 5}


def test_a_context_longer_than_the_writers_queue_is_written_whole(
    make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_engine()
    store = MemoryStore(plain.config.page_size, PageBytes(plain.pool).payload_bytes)  # type: ignore[arg-type]
    monkeypatch.setitem(PageWriter.__init__.__kwdefaults__, "max_queued_bytes", 5 * store.payload_bytes)
    engine = make_engine(parts={"stores": (store,)}, warm_start_share=0, tier_writes="back")
    session = engine.session()
    session.append(random_ids(0, 400))
    session.generate(SHORT)
    session.save(tmp_path / "chat.json")
    assert len(store.pages) == -(-405 // 4)


def test_a_store_that_fails_loses_kv_and_says_so_and_the_file_is_written(
    make_engine: MakeEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_engine()
    store = MemoryStore(plain.config.page_size, PageBytes(plain.pool).payload_bytes)  # type: ignore[arg-type]

    def fail() -> None:
        raise OSError("no space left")

    store.before_write = fail
    engine = make_engine(parts={"stores": (store,)}, warm_start_share=0, tier_writes="selective")
    session = engine.session()
    session.append(random_ids(0, 40))
    session.generate(SHORT)
    session.save(tmp_path / "chat.json")
    assert "the session is saved; what could not be written of its KV will be computed again" in caplog.text
    assert load(engine, tmp_path / "chat.json").token_ids == session.token_ids


def test_handing_down_a_prefix_writes_it_and_nothing_of_other_namespaces(make_engine: MakeEngine) -> None:
    plain = make_engine()
    store = MemoryStore(plain.config.page_size, PageBytes(plain.pool).payload_bytes)  # type: ignore[arg-type]
    engine = make_engine(parts={"stores": (store,)}, warm_start_share=0, tier_writes="back")
    prompt = random_ids(0, 41)
    for key in (None, "a"):
        engine.generate(prompt, SamplingParams(max_tokens=0), extra_key=key)
    assert not store.pages
    assert engine.hand_down(prompt[:20], extra_key="a")
    assert {facts.namespace for _, facts in store.pages.values()} == {("a", None)}
    assert plain.hand_down(prompt), "an engine without tiers has nothing to write"


# ------------------------------------------------------------------------------------------------------- the file


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    session = scripted().session(system=SYSTEM)
    session.send("hello")
    session.save(tmp_path / "chat.json")
    return tmp_path / "chat.json"


def test_the_file_is_private_and_replaced_as_a_whole(saved: Path) -> None:
    assert saved.stat().st_mode & 0o777 == 0o600
    session = load(scripted(), saved)
    session.send("again")
    session.save(str(saved))
    assert len(load(scripted(), saved).messages) == 5
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def refused(engine: Any, path: Path, match: str | None = None) -> None:
    with pytest.raises(SessionFileError, match=match) as raised:
        Session.load(engine, path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_file_that_is_damaged_anywhere_is_refused(saved: Path) -> None:
    whole, engine = saved.read_bytes(), scripted()
    for offset in range(len(whole)):
        saved.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
        refused(engine, saved)


def test_a_file_that_is_cut_anywhere_is_refused(saved: Path) -> None:
    whole, engine = saved.read_bytes(), scripted()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        refused(engine, saved)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{}\n{}\n", b"[1]\n", b"null\n", b"[" * 100_000, b'{"format": 1}']
)
def test_a_foreign_file_is_refused(saved: Path, content: bytes) -> None:
    saved.write_bytes(content)
    refused(scripted(), saved, "is no session of radixkv")


def test_a_newer_file_is_refused_by_its_version(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes().replace(b'"version": 1', b'"version": 2'))
    refused(scripted(), saved, "saved by a newer radixkv, in version 2 of the format; this one reads version 1")


def with_content(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a file holds, and give it the checksum that fits."""
    from hashlib import blake2b

    head, body = map(json.loads, path.read_text().splitlines())
    body = change(body) or body
    written = json.dumps(body).encode()
    head["checksum"] = blake2b(written, digest_size=16, person=b"radixkv1 session").hexdigest()
    path.write_bytes(json.dumps(head).encode() + b"\n" + written + b"\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: [body],
        lambda body: body.pop("conversation") and None,
        lambda body: body.update(tokenizer=[1]),
        lambda body: body.update(user_special_tokens="never"),
        lambda body: body.update(warned=1),
        lambda body: body["options"].update(priority="high"),
        lambda body: body["options"].update(surplus=1),
        lambda body: body["conversation"].update(ids=[1.5]),
        lambda body: body["conversation"].update(ids="abc"),
        lambda body: body["conversation"].update(messages=None),
        lambda body: body["conversation"]["messages"].pop() and None,
        lambda body: body["conversation"]["messages"][0].update(role="tool"),
        lambda body: body["conversation"]["messages"][0].update(content=None),
        lambda body: body["conversation"]["messages"][0].update(content="\ud800"),
        lambda body: body["conversation"]["answers"][0].update(start=-1),
        lambda body: body["conversation"]["answers"][0].update(start=99),
        lambda body: body["conversation"]["answers"][0].update(before=[True]),
        lambda body: body["conversation"]["answers"].append(3),
    ],
)
def test_a_file_whose_fields_make_no_session_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    with_content(saved, change)
    refused(scripted(), saved, "is damaged")


@pytest.mark.parametrize("ids", [[-1], [1 << 31], [1 << 70], [211]])
def test_tokens_that_the_model_has_not_are_refused(make_engine: MakeEngine, tmp_path: Path, ids: list[int]) -> None:
    engine = make_engine()
    engine.session().save(tmp_path / "chat.json")
    with_content(tmp_path / "chat.json", lambda body: body["conversation"].update(ids=ids))
    refused(engine, tmp_path / "chat.json", "holds what this model cannot read")


def test_places_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    engine = scripted()
    refused(engine, tmp_path / "none.json", "cannot be read: No such file")
    refused(engine, tmp_path, "cannot be read: it is no regular file")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "none" / "chat.json", tmp_path / "folder"):
        with pytest.raises(SessionFileError, match=f"cannot be saved as {path}: "):
            engine.session().save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("path", ["a\0b", "half \ud800 of a pair"])
def test_a_path_that_no_file_can_have_is_refused(path: str) -> None:
    engine = scripted()
    with pytest.raises(SessionFileError, match="cannot be saved as '"):
        engine.session().save(path)
    with pytest.raises(SessionFileError, match=r"the session '.* cannot be read: "):
        load(engine, Path(path))


@pytest.mark.parametrize("path", ["", ".", "/", "/dev/null", "/dev/zero", "pipe"])
def test_what_is_no_regular_file_is_neither_read_nor_replaced(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    before, engine = os.stat(path or "."), scripted()
    with pytest.raises(SessionFileError, match="that is no regular file"):
        engine.session().save(path)
    with pytest.raises(SessionFileError, match="it is no regular file"):
        Session.load(engine, path)
    assert os.stat(path or ".").st_mode == before.st_mode
    assert os.listdir() == ["pipe"]


def test_a_foreign_file_of_any_size_is_refused_by_its_beginning(saved: Path) -> None:
    saved.write_bytes(b"")
    os.truncate(saved, 1 << 40)  # takes no room, and would take all memory
    refused(scripted(), saved, "is no session of radixkv")


def test_a_link_to_the_file_stays_a_link(saved: Path, tmp_path: Path) -> None:
    link, other = tmp_path / "link.json", tmp_path / "folder" / "other.json"
    other.parent.mkdir()
    endless = tmp_path / "endless.json"
    endless.symlink_to(endless)
    with pytest.raises(SessionFileError, match="that is no regular file"):
        load(scripted(), saved).save(endless)
    link.symlink_to(other)
    load(scripted(), saved).save(link)  # makes the file that the link names
    assert link.is_symlink()
    assert load(scripted(), link).token_ids == load(scripted(), other).token_ids == load(scripted(), saved).token_ids


def test_a_name_may_be_as_long_as_the_file_system_allows(saved: Path, tmp_path: Path) -> None:
    session = load(scripted(), saved)
    session.save(tmp_path / ("x" * 255))
    assert load(scripted(), tmp_path / ("x" * 255)).token_ids == session.token_ids


def test_who_writes_the_file_at_the_same_time_neither_mixes_with_it_nor_loses_a_file_beside_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process is at the same point in the middle of this one's write."""
    session, neighbour = load(scripted(), saved), saved.with_name("chat.json.new")
    neighbour.write_text("mine")
    fsync = os.fsync

    def another_begins(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(SessionFileError, match="No space left on device"):
            session.save(saved)
        monkeypatch.setattr(os, "fsync", fsync)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", another_begins)
    session.save(saved)
    assert load(scripted(), saved).token_ids == session.token_ids
    assert neighbour.read_text() == "mine"
    assert sorted(entry.name for entry in saved.parent.iterdir()) == ["chat.json", "chat.json.new"]


# -------------------------------------------------------------------------------------------------- what must match


def test_another_chat_template_is_refused_by_name(saved: Path) -> None:
    engine = scripted()
    engine.tokenizer.chat_template += " "
    try:
        refused(engine, saved, "another tokenizer than this engine's: these differ: chat template$")
    finally:
        engine.tokenizer.chat_template = engine.tokenizer.chat_template[:-1]


def test_another_tokenizer_is_refused_by_what_differs(saved: Path) -> None:
    tokenizer = sentence_piece(*FAMILIES["chatml"].special)
    tokenizer.chat_template = FAMILIES["chatml"].template
    refused(ScriptedEngine(tokenizer, [], ""), saved, "these differ: vocabulary, special tokens, encoding of text$")


def test_a_tokenizer_is_told_by_what_it_does_not_by_its_object(saved: Path) -> None:
    engine = scripted()
    copy = type(engine.tokenizer)(
        tokenizer_object=engine.tokenizer.backend_tokenizer, extra_special_tokens=list(FAMILIES["chatml"].special)
    )
    copy.chat_template = engine.tokenizer.chat_template
    copy("something", padding="max_length", truncation=True, max_length=8) if copy.pad_token else None
    assert len(load(ScriptedEngine(copy, [], ""), saved).messages) == 3


def test_with_and_without_a_tokenizer_are_two_things(make_engine: MakeEngine, saved: Path, tmp_path: Path) -> None:
    refused(make_engine(), saved, "was saved with a tokenizer, and this engine has none")
    make_engine().session().save(tmp_path / "ids.json")
    refused(scripted(), tmp_path / "ids.json", "was saved with no tokenizer, and this engine has one")


def test_other_weights_are_no_matter(tmp_path: Path, demo_engine: Engine) -> None:
    session = demo_engine.session(system=SYSTEM)
    session.send("Who are you?", SHORT)
    session.save(tmp_path / "chat.json")
    for parameter in (other := Engine.from_pretrained("demo", **SMALL)).model.parameters():
        parameter.data.mul_(1.01)
    with other:
        again = load(other, tmp_path / "chat.json")
        assert again.token_ids == session.token_ids
        assert again.send("And I?", SHORT).cached_tokens == 0
