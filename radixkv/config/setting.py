"""A setting described once: the text, unit and bounds from which its check, flag, docs and schema are made.

A class of settings is a frozen dataclass whose fields say everything about themselves:

    page_size: Annotated[int, Setting("Tokens in a page.", minimum=1)] = 16

`check_settings` checks a new object, `described` writes the class's docstring, `radixkv.config.schema` makes a JSON
schema; the command line makes its flags, and `scripts/write_settings_docs.py` the tables of docs/api.md.
No pydantic: its import alone takes several times as long as that of this package, which the cache needs, too.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from radixkv.config.checks import Bounds, checked_choice, checked_flag, checked_int, checked_number, checked_text, shown
from radixkv.errors import ConfigError, RadixKVError

T = TypeVar("T")
Check = Callable[[str, object], object]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a field means, and which values it takes.

    Attributes:
        help: one or two sentences; names of other settings stand in backticks.
        unit: what a number counts or measures.
        minimum: the least value.
        above: what the value exceeds.
        maximum: the largest value.
        choices: the texts that are allowed; empty if others are.
        unset: what None means.
    """

    help: str
    unit: str = ""
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    unset: str = ""

    @property
    def bounds(self) -> Bounds:
        """The bounds of a number, or of each number in a list."""
        return Bounds(self.minimum, self.above, self.maximum)


class SettingField(NamedTuple):
    """A field of a class of settings.

    Attributes:
        type: of values that are not None: int, float, bool, str, `list[int]`, `list[str]`, `dict[int, float]` (whose
            numbers the bounds are for) or Callable.
        optional: whether None is allowed.
        default: `dataclasses.MISSING` if the setting must be given.
    """

    name: str
    type: Any
    optional: bool
    default: Any
    setting: Setting

    @property
    def is_required(self) -> bool:
        """Whether the setting has no default."""
        return self.default is MISSING

    @property
    def is_data(self) -> bool:
        """Whether values can be written down, in JSON for instance."""
        return self.type is not Callable

    @property
    def allowed(self) -> str:
        """The allowed values in words."""
        setting = self.setting
        if setting.choices:
            words = f"one of {', '.join(setting.choices)}"
        else:
            words = {
                int: f"an integer{setting.bounds}",
                float: f"a number{setting.bounds}",
                bool: "True or False",
                str: "text",
                list[int]: f"a list of integers{setting.bounds}",
                list[str]: "text, or a list of texts, none of them empty",
                dict[int, float]: f"a mapping of token ids to numbers{setting.bounds}",
                Callable: "a function",
            }[self.type]
        return f"{words}, or None" if self.optional else words


def setting_fields(settings: type) -> tuple[SettingField, ...]:
    """The fields of a class of settings, in order."""
    key: Any = settings  # mypy takes no class for hashable
    return _fields(key)


@cache
def _fields(settings: type) -> tuple[SettingField, ...]:
    hints = get_type_hints(settings, include_extras=True)
    return tuple(_field(field, hints[field.name]) for field in dataclasses.fields(settings))


def setting_field(settings: type, name: str) -> SettingField:
    """One field of a class of settings."""
    return next(field for field in setting_fields(settings) if field.name == name)


def _field(field: dataclasses.Field[Any], hint: Any) -> SettingField:
    plain, setting = get_args(hint)
    assert get_origin(hint) is Annotated, field.name
    options = get_args(plain) if get_origin(plain) in (Union, UnionType) else (plain,)
    kinds = [option for option in options if option is not NoneType]
    if get_origin(kinds[0]) is Literal:
        setting = dataclasses.replace(setting, choices=get_args(kinds[0]))
        kinds = [str]
    elif get_origin(kinds[-1]) is Sequence:  # `Sequence[int]`, or `str | Sequence[str]`
        (item,) = get_args(kinds[-1])
        kinds = [{int: list[int], str: list[str]}[item]]
    elif get_origin(kinds[0]) is Mapping:
        kinds = [dict[int, float]]
    elif get_origin(kinds[0]) is Callable:
        kinds = [Callable]
    (kind,) = kinds
    return SettingField(field.name, kind, NoneType in options, field.default, setting)


# --------------------------------------------------------------------------------------------------------------- checks


def check_settings(settings: Any, error: type[RadixKVError] = ConfigError) -> None:
    """Check each field of a new object of settings, and turn numbers of NumPy into Python's. About 1 µs a field.

    Raises: `error`, which names the field, what is allowed and what was given.
    """
    key: Any = (type(settings), error)
    for name, default, check in _checks(*key):
        value = getattr(settings, name)
        if value is default:
            continue
        checked = check(name, value)
        if checked is not value:
            object.__setattr__(settings, name, checked)


@cache
def _checks(settings: type, error: type[RadixKVError]) -> list[tuple[str, object, Check]]:
    return [(field.name, field.default, field_check(field, error)) for field in setting_fields(settings)]


def field_check(field: SettingField, error: type[RadixKVError] = ConfigError) -> Check:
    """A function of a name for messages and a value, which returns the checked value or raises `error`."""

    bounds, kind, optional, check_value = field.setting.bounds, field.type, field.optional, _check_of_value(field)

    def check(name: str, value: Any) -> object:
        if value is None and optional:
            return None
        if type(value) is kind and (kind is int or kind is float) and bounds.hold(value):
            return value  # as `check_value` would find, in less time
        try:
            return check_value(name, value)
        except RadixKVError:
            raise error(f"{name} must be {field.allowed}, not {shown(value)}") from None

    return check


def _check_of_value(field: SettingField) -> Check:
    setting, bounds = field.setting, field.setting.bounds
    if setting.choices:
        return lambda name, value: checked_choice(name, value, setting.choices)
    checks: dict[Any, Check] = {
        int: lambda name, value: _bounded_int(name, value, bounds),
        float: lambda name, value: checked_number(name, value, bounds),
        bool: checked_flag,
        str: checked_text,
        list[int]: lambda name, value: _ids(name, value, bounds),
        list[str]: _texts,
        dict[int, float]: lambda name, value: _numbers_of_ids(name, value, bounds),
        Callable: _function,
    }
    return checks[field.type]


def _bounded_int(name: str, value: object, bounds: Bounds) -> int:
    number = checked_int(name, value)
    if not bounds.hold(number):
        raise ConfigError(f"{name} is out of bounds")
    return number


def _ids(name: str, value: object, bounds: Bounds) -> object:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ConfigError(f"{name} is no list")
    for number in value:
        _bounded_int(name, number, bounds)
    return value


def _texts(name: str, value: object) -> object:
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise ConfigError(f"{name} is no list")
    for text in (value,) if isinstance(value, str) else value:
        if not checked_text(name, text):
            raise ConfigError(f"{name} holds an empty text")
    return value


def _numbers_of_ids(name: str, value: object, bounds: Bounds) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is no mapping")
    return {checked_int(name, key, 0): checked_number(name, number, bounds) for key, number in value.items()}


def _function(name: str, value: object) -> object:
    if not callable(value):
        raise ConfigError(f"{name} is no function")
    return value


# ------------------------------------------------------------------------------------------------------------ docstring


def described(settings: type[T]) -> type[T]:
    """A decorator: add each setting to the docstring of a class of settings, where `help()` shows it."""
    lines = [line for field in setting_fields(settings) for line in _docstring_lines(field)]
    settings.__doc__ = "\n".join([inspect.cleandoc(settings.__doc__ or ""), "", "Attributes:", *lines])
    return settings


def _docstring_lines(field: SettingField) -> list[str]:
    unset = f" None: {field.setting.unset}." if field.setting.unset else ""
    allowed = "" if field.type in (bool, str) and not field.setting.choices else f" Allowed: {field.allowed}."
    text = f"{field.name}: {field.setting.help}{unset}{allowed}"
    return textwrap.wrap(text, 110, initial_indent="    ", subsequent_indent="        ")
