"""The file of a saved session: two lines of JSON, first what it is with a checksum, then the conversation.

    {"format": "radixkv session", "version": 1, "checksum": "…"}
    {"conversation": {…}, "options": {…}, "tokenizer": {…}, "user_special_tokens": "allow", "warned": false}

The checksum is over the bytes of the second line, so a file that was damaged or cut anywhere is recognised. No weights
and no KV are in it: the token ids are, and what the next prompts are made of. `tokenizer` holds hashes of all of the
tokenizer that they depend on.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

from radixkv.cache.token_ids import TokenIds
from radixkv.engine.arguments import CacheOptions, checked_cache_options
from radixkv.engine.conversation import Answer, Conversation, Ids
from radixkv.engine.prompt_encoder import PromptEncoder
from radixkv.errors import InvalidTokenIdsError, RadixKVError, SessionFileError
from radixkv.tiers.store_folder import replace_file

if TYPE_CHECKING:
    from radixkv.engine.engine import Engine

UserSpecialTokens = Literal["allow", "text"]

FORMAT, VERSION = "radixkv session", 1
MAX_HEAD_BYTES = 4096  # of the first line
SAVED_OPTIONS = ("extra_key", "cache_salt", "priority", "keep_for_s")  # conversations always use the cache
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token")  # that chat templates write
SAMPLE = (
    "Hello, world!\n\n  It's 12345 tokens:\tx_y <a> [INST] "
    "na\u00efve \ufb01n\u00e9 cafe\u0301 \u4f60\u597d \u0434\u0430 \U0001f642"
)
"""A text that tokenizers cut in different ways: it shows merges, normalisation and what is cut beforehand."""


class SavedSession(NamedTuple):
    """What a file holds, besides the hashes of the tokenizer."""

    conversation: Conversation
    options: CacheOptions
    user_special_tokens: UserSpecialTokens
    warned: bool  # whether it was told already that the chat template changes the past


def write_session(path: Path, saved: SavedSession, engine: Engine) -> None:
    """Write a private file (0600) that is whole at any moment. O(tokens + vocabulary).

    Raises: SessionFileError if it cannot be written; the file is as it was before then.
    """
    content = {
        "conversation": _written_conversation(saved.conversation),
        "options": {name: getattr(saved.options, name) for name in SAVED_OPTIONS},
        "tokenizer": tokenizer_hashes(engine),
        "user_special_tokens": saved.user_special_tokens,
        "warned": saved.warned,
    }
    body = json.dumps(content).encode()
    head = json.dumps({"format": FORMAT, "version": VERSION, "checksum": _checksum(body)}).encode()
    try:
        target = Path(os.path.realpath(path))  # a link stays one
        if os.path.lexists(target) and not target.is_file():  # a link that leads to itself, too
            raise SessionFileError(f"the session cannot be saved as {path}: that is no regular file")
        replace_file(target, head + b"\n" + body + b"\n", alone=False)
    except SessionFileError:
        raise
    except OSError as error:
        raise SessionFileError(f"the session cannot be saved as {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL byte, or half of a surrogate pair
        raise SessionFileError(f"the session cannot be saved as {str(path)!r}: {error}") from error


def read_session(path: Path, engine: Engine) -> SavedSession:
    """Read what `write_session` wrote. O(tokens + vocabulary).

    Raises: SessionFileError if it cannot be read, is none of ours, newer or damaged, or was saved with a tokenizer that
        encodes or renders something else than the engine's.
    """
    try:
        with _opened(path) as file:
            content = _checked_content(path, file)
    except SessionFileError:
        raise
    except OSError as error:
        raise SessionFileError(f"the session {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a NUL byte, or half of a surrogate pair
        raise SessionFileError(f"the session {str(path)!r} cannot be read: {error}") from error
    try:
        _check_tokenizer(path, content["tokenizer"], engine)
        return SavedSession(
            _read_conversation(content["conversation"], engine.known_ids, PromptEncoder(engine)),
            checked_cache_options(**content["options"]),
            _one_of(content["user_special_tokens"], "allow", "text"),
            _of_type(content["warned"], bool),
        )
    except SessionFileError:
        raise
    except InvalidTokenIdsError as error:
        raise SessionFileError(f"the session {path} holds what this model cannot read: {error}") from error
    except (RadixKVError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise SessionFileError(f"the session {path} is damaged: its fields are not those of a session") from error


def tokenizer_hashes(engine: Engine) -> dict[str, str]:
    """What a conversation's prompts depend on besides their text; empty for a model without a tokenizer. O(vocabulary).

    It tells tokenizers apart by what they do, not by how a version of a library writes them down.
    """
    tokenizer = engine.tokenizer
    if tokenizer is None:
        return {}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = sorted((i, str(token), bool(getattr(token, "special", False))) for i, token in added.items())
    vocabulary = [sorted(tokenizer.get_vocab().items()), marked]
    try:
        sample: object = engine.encode(SAMPLE, add_special_tokens=False).tolist()
    except InvalidTokenIdsError as error:  # the model lacks some of its ids; that says as much of the tokenizer
        sample = str(error)
    return {
        "vocabulary": _hash(vocabulary),
        "special tokens": _hash([str(getattr(tokenizer, name, None)) for name in NAMED_TOKENS]),
        "encoding of text": _hash(sample),
        "chat template": _hash(getattr(tokenizer, "chat_template", None)),
    }


# ------------------------------------------------------------------------------------------------------------- inside


def _opened(path: Path) -> BinaryIO:
    """A file to read; no pipe, which would be waited for, and no device, which may have no end.

    Raises: OSError, SessionFileError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SessionFileError(f"the session {path} cannot be read: it is no regular file")
    return os.fdopen(descriptor, "rb")


def _checked_content(path: Path, file: BinaryIO) -> dict[str, Any]:
    """The second line, once the first has told that the file is ours; of any other no more is read."""
    try:
        described = json.loads(file.readline(MAX_HEAD_BYTES))
        is_ours = described["format"] == FORMAT
        version = _of_type(described["version"], int)
    except (LookupError, TypeError, ValueError, RecursionError):
        is_ours, version = False, 0
    if not is_ours:
        raise SessionFileError(f"{path} is no session of radixkv, or its first line is damaged")
    if version > VERSION:
        raise SessionFileError(
            f"the session {path} was saved by a newer radixkv, in version {version} of the format; this one reads "
            f"version {VERSION}"
        )
    body = file.read()
    if version < 1 or not body.endswith(b"\n") or described.get("checksum") != _checksum(body[:-1]):
        raise SessionFileError(f"the session {path} is damaged or cut short: its checksum does not fit")
    try:
        content: dict[str, Any] = _of_type(json.loads(body), dict)
    except (TypeError, ValueError, RecursionError) as error:
        raise SessionFileError(f"the session {path} is damaged: it is not JSON") from error
    return content


def _check_tokenizer(path: Path, saved: Mapping[str, str], engine: Engine) -> None:
    ours = tokenizer_hashes(engine)
    if bool(saved) != bool(ours):
        which = "a tokenizer, and this engine has none" if saved else "no tokenizer, and this engine has one"
        raise SessionFileError(f"the session {path} was saved with {which}")
    different = [name for name in {**saved, **ours} if saved.get(name) != ours.get(name)]
    if different:
        raise SessionFileError(
            f"the session {path} was saved with another tokenizer than this engine's: these differ: "
            f"{', '.join(different)}"
        )


def _written_conversation(conversation: Conversation) -> dict[str, Any]:
    return {
        "ids": conversation.ids.tolist(),
        "messages": conversation.messages,
        "answers": [
            {
                "ids": answer.ids,
                "start": answer.start,
                "before": answer.before,
                "lead": answer.lead,
                "content": answer.content,
                "added": answer.added.tolist(),
                "model_added_last": answer.model_added_last,
            }
            for answer in conversation.answers
        ],
        "preface": conversation.preface.tolist(),
    }


def _read_conversation(
    content: Mapping[str, Any], known_ids: Callable[[TokenIds], Ids], encoder: PromptEncoder
) -> Conversation:
    """Undo `_written_conversation`. Raises: InvalidTokenIdsError, LookupError, TypeError, ValueError."""

    def ids_of(value: object) -> Ids:
        return known_ids([_of_type(token, int) for token in _of_type(value, list)]).copy()

    answers = []
    for answer in content["answers"]:
        ids = ids_of(answer["ids"]).tolist()
        start = _of_type(answer["start"], int)
        if not 0 <= start <= len(ids):
            raise ValueError(f"an answer of {len(ids)} tokens that begins at {start}")
        answers.append(
            Answer(
                ids=ids,
                start=start,
                before=ids_of(answer["before"]).tolist(),
                lead=_of_type(answer["lead"], str),
                content=_of_type(answer["content"], str),
                encoder=encoder,
                added=ids_of(answer["added"]),
                model_added_last=_of_type(answer["model_added_last"], bool),
            )
        )
    messages = tuple(
        {
            "role": _one_of(message["role"], "system", "user", "assistant"),
            "content": _text(message["content"]),
        }
        for message in content["messages"]
    )
    if sum(message["role"] == "assistant" for message in messages) != len(answers):
        raise ValueError("a conversation has an answer for each message of the assistant")
    return Conversation(ids_of(content["ids"]), messages, tuple(answers), ids_of(content["preface"]))


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _text(value: object) -> str:
    text: str = _of_type(value, str)
    text.encode()  # raises UnicodeEncodeError, which is a ValueError
    return text


def _one_of(value: Any, *allowed: str) -> Any:
    if value not in allowed:
        raise ValueError(f"{value!r} is none of {allowed}")
    return value


def _hash(value: object) -> str:
    written = json.dumps(value, sort_keys=True, default=str).encode()
    return blake2b(written, digest_size=16, person=b"radixkv1 tokens").hexdigest()


def _checksum(body: bytes) -> str:
    return blake2b(body, digest_size=16, person=b"radixkv1 session").hexdigest()
