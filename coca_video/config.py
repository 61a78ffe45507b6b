"""Configs as JSON: what was resolved goes beside every checkpoint and result, and models are rebuilt from it."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")
JSON = Any  # what json.loads gives


def to_json(value: object) -> JSON:
    """A config as plain JSON values; a dataclass carries its class name under "type", which tells unions apart."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    assert value is None or isinstance(value, (bool, int, float, str)), f"no JSON for {type(value)}"
    return value


def from_json(config_type: type[Config], data: JSON) -> Config:
    """The config that `to_json` wrote. ValueError for a field that is unknown, missing, or of a class not permitted."""
    result: Config = _build(config_type, data, where=config_type.__name__)
    return result


def _build(annotation: Any, data: JSON, *, where: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _build_union(arguments, data, where=where)
    if dataclasses.is_dataclass(annotation):
        return _build_dataclass(typing.cast(type, annotation), data, where=where)
    if origin is tuple:
        return tuple(_build(arguments[0], item, where=where) for item in data)
    return annotation(data) if annotation in (float, Path) else data


def _build_union(members: tuple[Any, ...], data: JSON, *, where: str) -> Any:
    if data is None and type(None) in members:
        return None
    names = {member.__name__: member for member in members if isinstance(member, type)}
    if isinstance(data, dict):
        if data.get("type") not in names:
            raise ValueError(f"{where}: expected one of {', '.join(names)}; got {data.get('type')!r}.")
        return _build(names[data["type"]], data, where=where)
    return _build(next(member for member in members if member is not type(None)), data, where=where)


def _build_dataclass(config_type: type, data: JSON, *, where: str) -> Any:
    annotations = typing.get_type_hints(config_type)
    given = {name: value for name, value in data.items() if name != "type"}
    required = {field.name for field in dataclasses.fields(config_type) if _has_no_default(field)}
    unknown, missing = given.keys() - annotations.keys(), required - given.keys()
    if unknown or missing:
        raise ValueError(
            f"{where}: {config_type.__name__} has no field {sorted(unknown)} and needs {sorted(missing)}; "
            "was this written by another version of coca_video?"
        )
    return config_type(
        **{name: _build(annotations[name], value, where=f"{where}.{name}") for name, value in given.items()}
    )


def _has_no_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def differing_fields(old: JSON, new: JSON, *, ignored: frozenset[str], where: str = "") -> list[str]:
    """Lines "name: old -> new" for every leaf that differs, fields named in `ignored` apart."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted((old.keys() | new.keys()) - ignored)
        return [
            line
            for key in keys
            for line in differing_fields(
                old.get(key), new.get(key), ignored=ignored, where=f"{where}.{key}" if where else key
            )
        ]
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]
