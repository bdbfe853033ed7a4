"""The flags of the command line are made of the descriptions of the settings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, get_args

import pytest

from radixkv.cli.chat import chat
from radixkv.cli.common import ENGINE_SETTINGS, SAMPLING_SETTINGS
from radixkv.cli.generate import generate
from radixkv.cli.setting_options import FromSettings
from radixkv.cli.tree import tree
from radixkv.config import EngineConfig, SamplingParams
from radixkv.config.setting import setting_fields

GROUPS = {"EngineConfig": ENGINE_SETTINGS, "SamplingParams": SAMPLING_SETTINGS}
COMMANDS: dict[str, Callable[..., None]] = {"generate": generate, "chat": chat, "tree": tree}


def option_of(command: Callable[..., None], name: str) -> tuple[Any, Any]:
    """(default, the `typer.Option`) of a parameter of a command."""
    parameter = inspect.signature(command).parameters[name]
    return parameter.default, get_args(parameter.annotation)[1]


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_each_setting_has_an_option_or_a_reason(group: FromSettings) -> None:
    names = [field.name for field in setting_fields(group.settings)]
    assert set(group.left_out) | {field.name for field in group.offered} == set(names)
    assert not set(group.left_out) & {field.name for field in group.offered}
    assert all(group.left_out.values()), "a reason is a sentence"
    assert set(group.more) <= {field.name for field in group.offered}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_help_and_default_are_those_of_the_settings(group: FromSettings, command: Callable[..., None]) -> None:
    flags = {f"--{field.name.replace('_', '-')}" for field in group.offered}
    for field in group.offered:
        default, option = option_of(command, field.name)
        help_text = option.help
        words = re.sub(r"`(\w+)`", lambda match: f"--{match[1].replace('_', '-')}", field.setting.help)
        assert help_text.startswith(words)
        assert default == (None if field.default == () else field.default)
        assert ("[default: " in help_text) == field.optional
        assert set(re.findall(r"--[a-z-]+", help_text)) <= flags, "the help names options that are there"
        assert "`" not in help_text or field.name in group.more


def test_max_tokens_of_each_command_is_the_setting() -> None:
    description = next(field for field in setting_fields(SamplingParams) if field.name == "max_tokens").setting.help
    for command, default in ((generate, SamplingParams().max_tokens), (chat, 256), (tree, 16)):
        found, option = option_of(command, "max_tokens")
        assert (found, option.help) == (default, description)


def test_settings_left_alone_are_the_defaults() -> None:
    for group in GROUPS.values():
        values = {field.name: field.default for field in group.offered}
        assert group.settings(**values) == group.settings()
    assert [field.name for field in ENGINE_SETTINGS.offered][:2] == ["dtype", "device"]
    assert EngineConfig().page_size == 16
