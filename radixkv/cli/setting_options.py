"""Options of commands, made of the descriptions of settings, and groups of options that several commands share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import wraps
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import typer

from radixkv.config.setting import Setting, SettingField, field_check, setting_field, setting_fields


class FromSettings(NamedTuple):
    """Says that a field of a group of options is a dict of settings, each with an option of its own.

    Attributes:
        settings: the class that describes them.
        left_out: names of settings that have no option, each with the reason.
        more: what the help of an option says in addition.
        panel: the heading of the options in the help.
    """

    settings: type
    left_out: Mapping[str, str]
    more: Mapping[str, str]
    panel: str

    @property
    def offered(self) -> list[SettingField]:
        """The settings that have an option."""
        return [field for field in setting_fields(self.settings) if field.name not in self.left_out]


def setting_option(
    settings: type,
    name: str,
    *flags: str,
    more: str = "",
    unset: str | None = None,
    minimum: int | None = None,
    offered: Collection[str] = (),
    panel: str | None = None,
) -> Any:
    """The option for a setting: its help and its check, under `flags` or its own name.

    Args:
        more: sentences for the end of the help.
        minimum: the least value that makes sense for the command, if that is not the setting's.
        unset: what the command takes without the option; told by the setting unless given here.
        offered: names of settings that have options, too; the help calls them by their flags.
    """
    field = setting_field(settings, name)
    if minimum is not None:
        field = field._replace(setting=replace(field.setting, minimum=minimum))
    return typer.Option(
        *flags,
        help=_help(field, more, field.setting.unset if unset is None else unset, offered),
        metavar=_metavar(field),
        callback=_checking(field),
        rich_help_panel=panel,
    )


def count_option(help: str, minimum: int = 1, **options: Any) -> Any:
    """An option that takes an integer of at least `minimum`."""
    field = SettingField("", int, False, None, Setting(help, minimum=minimum))
    return typer.Option(help=help, metavar=_metavar(field), callback=_checking(field), **options)


def _checking(field: SettingField) -> Callable[[typer.CallbackParam, Any], Any]:
    """A callback that checks the value of an option. Messages name the option."""
    check = field_check(field._replace(optional=False))

    def checked(param: typer.CallbackParam, value: Any) -> Any:
        return value if value is None else check(max(param.opts, key=len), value)

    return checked


def _metavar(field: SettingField) -> str | None:
    """What the help shows for a value: `<int >= 1>`, `<float in (0, 1]>`; None leaves it to typer.

    Upper bounds of integers are limits of the machine; the help need not show them.
    """
    setting = field.setting
    if field.type not in (int, float):
        return None
    if field.type is int or (setting.maximum is None and setting.minimum is not None):
        return f"<{field.type.__name__} >= {setting.minimum}>"
    return f"<float{setting.bounds}>"


def _help(field: SettingField, more: str, unset: str, offered: Collection[str]) -> str:
    choices = f" Allowed: {', '.join(field.setting.choices)}." if field.setting.choices else ""
    sentences = f"{field.setting.help}{choices} {more}".rstrip()
    text = f"{sentences}  [default: {unset}]" if unset else sentences
    return re.sub(r"`([a-z_]+)`", lambda match: _flag(match[1]) if match[1] in offered else match[1], text)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options: a parameter typed as a dataclass becomes its fields on the command line.

    The fields say how, as parameters do: `name: Annotated[type, typer.Option(…)] = default`; or they hold settings:
    `name: Annotated[dict[str, Any], FromSettings(…)]`.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}

    @wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = _take(group, values)
        command(**values)

    own = inspect.signature(command).parameters.values()
    parameters = [parameter.replace(annotation=hints[parameter.name]) for parameter in own]
    parameters = [parameter for parameter in parameters if parameter.name not in groups]
    for group in groups.values():
        parameters += _parameters(group)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _take(group: type[Any], values: dict[str, Any]) -> Any:
    """A group of the options in `values`, which are removed there."""
    hints = get_type_hints(group, include_extras=True)
    own: dict[str, Any] = {}
    for field in fields(group):
        source = _source(hints[field.name])
        own[field.name] = values.pop(field.name) if source is None else _take_settings(source, values)
    return group(**own)


def _take_settings(source: FromSettings, values: dict[str, Any]) -> dict[str, Any]:
    taken = {field: values.pop(field.name) for field in source.offered}
    return {field.name: value for field, value in taken.items() if value is not None or field.optional}


def _parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for field in fields(group):
        source = _source(hints[field.name])
        if source is None:
            parameters.append(_parameter(field.name, field.default, hints[field.name]))
        else:
            parameters += _setting_parameters(source)
    return parameters


def _setting_parameters(source: FromSettings) -> list[inspect.Parameter]:
    names = [field.name for field in source.offered]
    parameters = []
    for field in source.offered:
        more = source.more.get(field.name, "")
        option = setting_option(source.settings, field.name, more=more, offered=names, panel=source.panel)
        several = field.type == list[str]
        kind = field.type | None if field.optional or several else field.type
        parameters.append(_parameter(field.name, None if several else field.default, Annotated[kind, option]))
    return parameters


def _source(hint: Any) -> FromSettings | None:
    return next((extra for extra in get_args(hint)[1:] if isinstance(extra, FromSettings)), None)


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
