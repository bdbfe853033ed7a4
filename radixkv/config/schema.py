"""A class of settings as a JSON schema (draft 2020-12), for HTTP bodies and forms."""

from __future__ import annotations

from typing import Any

from radixkv.config.setting import SettingField, setting_fields

Schema = dict[str, Any]
TYPES: dict[Any, Schema] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    str: {"type": "string"},
}
TEXT: Schema = {"type": "string", "minLength": 1}


def schema_of(settings: type) -> Schema:
    """The JSON schema of `settings`, a class such as `SamplingParams`. Units are in "x-unit"; functions are left out.

    >>> from radixkv import SamplingParams
    >>> schema = schema_of(SamplingParams)["properties"]["top_p"]
    >>> schema["type"], schema["exclusiveMinimum"], schema["maximum"], schema["default"]
    ('number', 0, 1, 1.0)
    """
    fields = [field for field in setting_fields(settings) if field.is_data]
    return {
        "title": settings.__name__,
        "type": "object",
        "properties": {field.name: _property(field) for field in fields},
        "required": [field.name for field in fields if field.is_required],
        "additionalProperties": False,
    }


def _property(field: SettingField) -> Schema:
    schema = _values(field)
    if field.optional:
        schema = {"anyOf": [schema, {"type": "null"}]}
    setting = field.setting
    schema["description"] = f"{setting.help} Without it: {setting.unset}." if setting.unset else setting.help
    if setting.unit:
        schema["x-unit"] = setting.unit
    if not field.is_required:
        schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    return schema


def _values(field: SettingField) -> Schema:
    setting = field.setting
    bounds = {"minimum": setting.minimum, "exclusiveMinimum": setting.above, "maximum": setting.maximum}
    stated = {name: bound for name, bound in bounds.items() if bound is not None}
    if setting.choices:
        return {"enum": list(setting.choices)}
    if field.type == list[int]:
        return {"type": "array", "items": {"type": "integer", **stated}}
    if field.type == list[str]:
        return {"anyOf": [dict(TEXT), {"type": "array", "items": dict(TEXT)}]}
    if field.type == dict[int, float]:
        numbers = {"type": "number", **stated}
        return {"type": "object", "propertyNames": {"pattern": "^[0-9]+$"}, "additionalProperties": numbers}
    return {**TYPES[field.type], **stated}
