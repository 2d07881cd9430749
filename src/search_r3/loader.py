"""Typed settings from YAML files, which may extend others, and `key=value` overrides. An unknown key is an error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from .errors import ConfigError


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_yes_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes`, `on` and `true` as True, which is the number 1 to Python."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError("expected a number")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """An annotation, or those that it is a union of."""
    return set().union(*map(_kinds, get_args(annotation))) if get_origin(annotation) in _UNIONS else {annotation}


_UNIONS = (Union, UnionType)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which it would take the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


S = TypeVar("S", bound=Section)
RENAMED = {
    "sft.bm25_negatives": "is called 'sft.hard_negatives' now; write that",
    "grpo.reward.ranking": "is called 'grpo.reward.ndcg' now; write that",
    "grpo.reward.similarity": "has gone, since any text that says less raises a cosine; leave it out, and use "
    "'grpo.reward.log_rank' or 'grpo.reward.contrastive' for what nDCG does not see",
}
"""Settings by the names that earlier versions gave them -> what became of them."""


def load_settings(kind: type[S], path: str | Path | None, overrides: Sequence[str] = ()) -> S:
    """Read settings of any kind from YAML, as `load_recipe` does.

    Raises:
        ConfigError: as `load_recipe`.
    """
    values, origins = ({}, {}) if path is None else _read(kind, Path(path))
    for override in overrides:
        key = _apply(values, override)
        origins = {name: origin for name, origin in origins.items() if not name.startswith(f"{key}.")} | {key: None}
    return parse_settings(kind, values, path, origins)


def parse_settings(
    kind: type[S],
    values: Mapping[str, Any],
    path: str | Path | None = None,
    origins: Mapping[str, Path | None] = MappingProxyType({}),
) -> S:
    """Settings of any kind from a mapping.

    Args:
        kind: of settings.
        values: nested as in YAML.
        path: the file that they are from, for messages.
        origins: setting -> the file that it is from, where there are several.

    Raises:
        ConfigError: as `load_recipe`.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, kind, path, origins)) from error


def flat_settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of all sections under names such as `grpo.refresh.policy`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat.update(flat_settings(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def _read(
    kind: type[Section], path: Path, extended_by: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], dict[str, Path | None]]:
    """The values of a file, over those of the file that it extends; and setting -> the file that it is from."""
    chain = (*extended_by, path)
    if path.resolve() in [other.resolve() for other in extended_by]:
        raise ConfigError(f"{path} extends itself: {' extends '.join(map(str, chain))}; take one `extends` out")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}  # noqa: S506 - a SafeLoader
    except OSError as error:
        by = f", which {extended_by[-1]} extends" if extended_by else ""
        raise ConfigError(f"cannot read the recipe {path}{by}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError, as is no UTF-8
        raise ConfigError(f"{path} is not valid YAML in UTF-8: {' '.join(str(error).split())}; mend it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    parent = values.pop("extends", None)
    origins: dict[str, Path | None] = dict.fromkeys(flat_settings(values), path)
    if parent is None:
        return values, origins
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends = {parent!r}: expected the path of one recipe, relative to this one")
    inherited, inherited_origins = _read(kind, path.parent / parent, chain)
    return _merge(kind, inherited, values), inherited_origins | origins


def _merge(kind: type[Section], inherited: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values over inherited ones, section by section; a setting that is a mapping is no section."""
    merged = dict(inherited)
    for key, value in values.items():
        section = _section(kind.model_fields[key].annotation) if key in kind.model_fields else None
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(section, merged[key], value) if section and both else value
    return merged


def _apply(values: dict[str, Any], override: str) -> str:
    """Set the one value; returns its name."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"cannot read the override {override!r}; expected key=value, for instance grpo.steps=10")
    *parents, leaf = key.split(".")
    place = values
    for parent in parents:
        child = place.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"cannot set {key!r}: {parent!r} is a single value, not a section")
        place = child
    try:
        place[leaf] = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the value of {override!r} as YAML") from error
    # YAML 1.1 reads 1e-3 (no dot) as a string; people write learning rates so.
    if isinstance(place[leaf], str):
        with suppress(ValueError):
            place[leaf] = float(place[leaf])
    return key


def _explain(
    error: ValidationError, kind: type[Section], path: str | Path | None, origins: Mapping[str, Path | None]
) -> str:
    """One line for the first of pydantic's errors, an unknown key before others, with the nearest known one."""
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    names = [str(part) for part in first["loc"]]
    prefixes = [".".join(names[:end]) for end in range(len(names), 0, -1)]
    key = prefixes[0] if prefixes else "recipe"
    origin = next((origins[prefix] for prefix in prefixes if prefix in origins), path)
    where = f"{origin}: " if origin is not None else ""
    if first["type"] == "extra_forbidden":
        if key in RENAMED:
            return f"{where}the setting {key!r} {RENAMED[key]}"
        section: type[Section] = kind
        for part in first["loc"][:-1]:
            section = section if isinstance(part, int) else _section(section.model_fields[part].annotation) or section
        near = difflib.get_close_matches(names[-1], section.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(section.model_fields)}"
        return f"{where}unknown setting {key!r}{hint}"
    value = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
    return f"{where}{key}{value}: {first['msg']}"


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field holds: itself, or one of several; None where it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)
