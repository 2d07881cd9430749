"""Which documents are searched, as a mapping in the manner of MongoDB, compiled to LanceDB's SQL."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from typing import Any

from ..data.rows import check_text
from ..errors import DataError

COLUMNS = ("id", "parent_id", "title", "path", "source", "page")
"""What may be asked for beside metadata."""
Filter = Mapping[str, Any]
_COMPARISONS = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_SIGNS = {"=": "$eq", "!=": "$ne"} | {sign: name for name, sign in _COMPARISONS.items()}
_OPERATORS = ("$eq", "$ne", "$in", "$nin", *_COMPARISONS, "$contains", "$prefix")


def to_sql(where: Filter) -> str:
    """The condition that all entries hold.

    Args:
        where: field -> value, list of values, or `{operator: value}`. Fields are those of `COLUMNS`, and any other name
            is one of the metadata (`metadata.title` where it has the name of a column). Operators: `$eq`, `$ne`, `$in`,
            `$nin`, `$gt`, `$gte`, `$lt`, `$lte`, `$prefix` (of a text), `$contains` (of a list in the metadata).

    Raises:
        DataError: an unknown operator, or a value that cannot be compared.

    Example:
        >>> to_sql({"page": {"$gte": 3}, "path": ["a.md", "it's.md"]})
        "page >= 3 AND path IN ('a.md', 'it''s.md')"
    """
    if not isinstance(where, Mapping):
        raise DataError(
            f"cannot read the filter {where!r}: expected fields with their values, such as {{'year': 2020}}"
        )
    parts = []
    for name, wanted in where.items():
        if not name:
            raise DataError("filter: a field has a name, and one here is empty; leave it out")
        tests = (
            wanted if isinstance(wanted, Mapping) else {"$in" if isinstance(wanted, list | tuple) else "$eq": wanted}
        )
        for operator, value in tests.items():
            if operator not in _OPERATORS:
                raise DataError(f"filter of {name!r}: unknown operator {operator!r}; expected {', '.join(_OPERATORS)}")
            parts.append(_test(name, operator, value))
    return " AND ".join(parts)


def parse(conditions: Iterable[str]) -> dict[str, Any]:
    """A filter of conditions such as `parent_id=a.md`, `page>=3`, `year!=2020`; values are read as JSON where they are.

    Raises:
        DataError: one is no condition, or compares with what cannot be compared.
    """
    where: dict[str, dict[str, Any]] = {}
    for condition in conditions:
        match = re.fullmatch(r"([^=<>!]+?)\s*(>=|<=|!=|=|>|<)\s*([^=<>].*)", condition)
        if match is None:
            raise DataError(
                f"cannot read the condition {condition!r}; expected for instance year>=2020 or parent_id=a.md"
            )
        name, sign, text = match.groups()
        value: Any = text
        if name not in COLUMNS or name == "page":
            with suppress(ValueError):
                value = json.loads(text)
        where.setdefault(name, {})[_SIGNS[sign]] = value
    to_sql(where)  # what is wrong is said before a model is loaded
    return where


def fields_of(rows: Iterable[Mapping[str, Any]], values: int) -> list[dict[str, Any]]:
    """What a filter can name: the fields that rows have, those of the metadata first, with their most frequent values.

    Args:
        rows: columns of `COLUMNS`, and the metadata as JSON.
        values: how many of each field.

    Returns:
        For each field its `name` in a filter, whether it is a `list` (`$contains`), and pairs of `values`: value, rows.

    Example:
        >>> fields_of([{"path": "a.md", "metadata": '{"year": 2020, "by": {}}'}], 9)[0]
        {'name': 'year', 'list': False, 'values': [(2020, 1)]}
    """
    counts: dict[tuple[str, bool], Counter[str]] = {}
    for row in rows:
        metadata = json.loads(row["metadata"])
        named = [(name, row[name]) for name in COLUMNS if row.get(name) not in (None, "")]
        named += [(f"metadata.{name}" if name in COLUMNS else name, metadata[name]) for name in filter(_fits, metadata)]
        for name, value in named:
            several = isinstance(value, list)
            for one in value if several else [value]:
                if isinstance(one, str | int | float):
                    # As JSON, in which true is not 1.
                    counts.setdefault((name, several), Counter())[json.dumps(one)] += 1
    order = sorted(counts, key=lambda key: (key[0] in COLUMNS, -counts[key].total()))
    return [
        {
            "name": name,
            "list": several,
            "values": [(json.loads(text), count) for text, count in counts[name, several].most_common(values)],
        }
        for name, several in order
    ]


def unknown_in(where: Filter, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a filter names and no row has; rows, with their metadata as JSON, are read until all is found.

    Example:
        >>> unknown_in({"year": 2020, "lnag": "en", "path": "a.md"}, [{"metadata": '{"year": 1990, "lang": "en"}'}])
        ['lnag']
    """
    missing = {name.removeprefix("metadata."): name for name in where if name not in COLUMNS}
    empty = True
    for row in rows if missing else ():
        empty = False
        for name in json.loads(row["metadata"]).keys() & missing.keys():
            del missing[name]
        if not missing:
            break
    return [] if empty else sorted(missing.values())


def quote(text: str) -> str:
    """A string of SQL.

    Raises:
        DataError: half a surrogate pair.
    """
    return "'" + check_text(text, f"{text!r} in a condition").replace("'", "''") + "'"


def one_of(column: str, values: Sequence[str]) -> str:
    """That a column of texts holds one of these."""
    return f"{column} IN ({', '.join(map(quote, values))})"


def _test(name: str, operator: str, value: Any) -> str:
    if operator in ("$in", "$nin"):
        if not isinstance(value, list | tuple):
            raise DataError(f"filter of {name!r}: {operator} takes a list, found {value!r}")
        if name in COLUMNS and value and all(isinstance(one, str) for one in value):
            found = one_of(name, list(value))
        else:
            found = "(" + (" OR ".join(_test(name, "$eq", one) for one in value) or "false") + ")"
        return found if operator == "$in" else f"{found} IS NOT TRUE"
    if operator == "$ne":
        return f"({_test(name, '$eq', value)}) IS NOT TRUE"
    if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not isfinite(value)):
        raise DataError(
            f"filter of {name!r}: cannot compare with {value!r}; expected a text, a number, true, false or null"
        )
    if name in COLUMNS:
        if value is not None and isinstance(value, str) != (name != "page"):
            kind = "a number" if name == "page" else "a text"
            raise DataError(f"filter of {name!r}: expected {kind}, found {value!r}")
        if name == "page" and value is not None and (type(value) is not int or abs(value) >= 2**31):
            raise DataError(f"filter of {name!r}: expected the number of a page, found {value!r}")
        return _compare(name, operator, value, quote)
    # As JSON text it can be compared whatever it is; functions that want one type fail at the first row of another.
    member = f"json_extract(metadata, {_path(name)})"
    if operator == "$contains":
        text = value if isinstance(value, str) else json.dumps(value)
        found = f"json_array_contains(metadata, {_path(name)}, {quote(text)})"
        # It takes a text and a number for the same.
        return f"({found} AND contains({member}, {_json(value)}))" if isinstance(value, str) else found
    if isinstance(value, str) and operator in _COMPARISONS:
        # Both without the mark at their end, which blanks would come before.
        open_ended = f"left({member}, char_length({member}) - 1)"
        compared = f"{open_ended} {_COMPARISONS[operator]} {quote(json.dumps(value, ensure_ascii=False)[:-1])}"
        return f"(starts_with({member}, '\"') AND {compared})"
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return _compare(member, operator, value, _json)
    return _compare(f"try_cast({member} AS double)", operator, value, quote)


def _compare(left: str, operator: str, value: Any, write: Any) -> str:
    if operator == "$contains":
        raise DataError("filter: $contains looks into lists of the metadata; use $prefix or a list of values")
    if operator == "$prefix":
        if not isinstance(value, str):
            raise DataError(f"filter: $prefix takes a text, found {value!r}")
        text = write(value)
        return f"starts_with({left}, {text if left in COLUMNS else text[:-2] + chr(39)})"
    if value is None:
        return f"({left} IS NULL OR {left} = 'null')" if left not in COLUMNS else f"{left} IS NULL"
    right = (
        ("'true'" if value else "'false'")
        if isinstance(value, bool)
        else write(value)
        if isinstance(value, str)
        else repr(value)
    )
    return f"{left} {_COMPARISONS.get(operator, '=')} {right}"


def _json(text: str) -> str:
    """A string of SQL, of a text as it stands in JSON."""
    return quote(json.dumps(text, ensure_ascii=False))


def _fits(key: str) -> bool:
    """Whether a filter can name a key of the metadata."""
    return '"' not in key and "\\" not in key


def _path(name: str) -> str:
    key = name.removeprefix("metadata.")
    if not _fits(key):
        raise DataError(f"filter: a name of metadata holds no quotes and backslashes, found {key!r}; rename the field")
    return quote(f'$."{key}"')
