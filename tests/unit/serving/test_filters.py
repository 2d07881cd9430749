"""Filters: what each operator lets through, whatever stands in the metadata, and what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from search_r3.errors import DataError
from search_r3.serving import Store
from search_r3.serving.filters import fields_of, parse, to_sql
from tests.stores import document, fingerprint, vector, vectors

METADATA = {
    "a": {"year": 1999, "lang": "en", "tags": ["x", "it's"], "open": True, "it's": "so"},
    "b": {"year": 2000.5, "lang": "de", "tags": [], "open": False},
    "c": {"year": "2001", "lang": "e\"n\n'é", "none": None},
    "d": {},
}
RANGES = {
    "day": {"at": "2020-01-01"},
    "noon": {"at": "2020-01-01 12:00"},
    "tea!": {"at": "2020-01-01!"},
    "before": {"at": "2019-12-31"},
    "none": {"at": None},
    "list": {"at": ["2020-01-01", "1"]},
    "numbers": {"at": {"o": 1}, "some": [1, 2]},
    "number": {"at": 2020, "some": ["1"]},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    pytest.importorskip("lancedb")
    made = Store.create(tmp_path_factory.mktemp("filters") / "store", fingerprint())
    chunks = [chunk for name, metadata in METADATA.items() for chunk in document(name, metadata=metadata, title=name)]
    made.upsert(chunks, vectors(chunks))
    return made


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ({"year": 1999}, "a"),
        ({"year": 1999.0}, "a"),
        ({"year": {"$gt": 1999}}, "b"),
        ({"year": {"$gte": 1999, "$lt": 2000}}, "a"),
        ({"year": "2001"}, "c"),
        ({"year": [1999, "2001", 5]}, "ac"),
        ({"year": {"$ne": 1999}}, "bcd"),
        ({"year": {"$nin": [1999, 2000.5]}}, "cd"),
        ({"year": []}, ""),
        ({"lang": "en"}, "a"),
        ({"lang": {"$gte": "en"}}, "a"),
        ({"lang": "e\"n\n'é"}, "c"),
        ({"lang": {"$prefix": "e"}}, "ac"),
        ({"lang": {"$prefix": "e\"n"}}, "c"),
        ({"open": True}, "a"),
        ({"open": False}, "b"),
        ({"none": None}, "abcd"),
        ({"lang": None}, "d"),
        ({"tags": {"$contains": "x"}}, "a"),
        ({"tags": {"$contains": "it's"}}, "a"),
        ({"it's": "so"}, "a"),
        ({"parent_id": ["a", "d", "' OR 1=1"]}, "ad"),
        ({"path": {"$prefix": "/notes/c"}}, "c"),
        ({"title": {"$ne": "a"}}, "bcd"),
        ({"metadata.title": "a"}, ""),
        ({"page": None}, "abcd"),
        ({"page": {"$gt": 3}}, ""),
        ({"year": {"$gt": 0}, "lang": "de"}, "b"),
    ],
)  # fmt: skip
def test_a_filter_lets_through(store: Store, where: Any, names: str) -> None:
    [hits] = store.search(vector("q")[None], k=9, where=where)
    assert sorted(hit.chunk.parent_id for hit in hits) == list(names)
    [hits] = store.search(texts=["text"], k=9, where=where)
    assert sorted(hit.chunk.parent_id for hit in hits) == list(names)
    assert [entry.doc_id for entry in store.documents(where)] == list(names)


@pytest.fixture(scope="module")
def ranges(tmp_path_factory: pytest.TempPathFactory) -> Store:
    pytest.importorskip("lancedb")
    made = Store.create(tmp_path_factory.mktemp("ranges") / "store", fingerprint())
    chunks = [chunk for name, metadata in RANGES.items() for chunk in document(name, metadata=metadata)]
    made.upsert(chunks, vectors(chunks))
    return made


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ({"at": {"$gte": "2020-01-01"}}, ["day", "noon", "tea!"]),
        ({"at": {"$gt": "2020-01-01"}}, ["noon", "tea!"]),
        ({"at": {"$lt": "2020-01-01"}}, ["before"]),
        ({"at": {"$lte": "2020-01-01 12:00"}}, ["before", "day", "noon"]),
        ({"at": {"$gte": "zzz"}}, []),
        ({"at": {"$gt": 2019}}, ["number"]),
        ({"some": {"$contains": "1"}}, ["number"]),
    ],
)
def test_a_range_of_texts_has_texts_alone_in_the_order_of_their_letters(
    ranges: Store, where: Any, names: list[str]
) -> None:
    assert [entry.doc_id for entry in ranges.documents(where)] == names


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("year = 3", "cannot read the filter 'year = 3'"),
        ({"year": {"$like": 1}}, "filter of 'year': unknown operator '$like'; expected $eq, $ne, $in"),
        ({"year": {"$in": 1}}, "filter of 'year': $in takes a list, found 1"),
        ({"year": {"$eq": [1]}}, "filter of 'year': cannot compare with [1]"),
        ({"year": float("nan")}, "filter of 'year': cannot compare with nan"),
        ({"year": float("inf")}, "filter of 'year': cannot compare with inf"),
        ({"page": "3"}, "filter of 'page': expected a number, found '3'"),
        ({"page": True}, "filter of 'page': expected the number of a page, found True"),
        ({"page": 1.5}, "filter of 'page': expected the number of a page, found 1.5"),
        ({"page": {"$lt": 10**30}}, "filter of 'page': expected the number of a page, found 1000"),
        ({"": 4}, "filter: a field has a name, and one here is empty"),
        ({"name": ["\ud800"]}, "in a condition holds half a surrogate pair"),
        ({"path": 3}, "filter of 'path': expected a text, found 3"),
        ({"path": {"$contains": "x"}}, "$contains looks into lists of the metadata"),
        ({"path": {"$prefix": None}}, "$prefix takes a text, found None"),
        ({'a"b': 1}, "a name of metadata holds no quotes and backslashes"),
    ],
)
def test_a_filter_that_cannot_be_understood_is_refused_by_name(where: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        to_sql(where)


def test_conditions_of_the_command_line_are_filters() -> None:
    conditions = ["year>=2000", "year < 2010", "lang=en", "open=true", "title=2020", "page!=3", "name=a=b"]
    assert parse(conditions) == {
        "year": {"$gte": 2000, "$lt": 2010},
        "lang": {"$eq": "en"},
        "open": {"$eq": True},
        "title": {"$eq": "2020"},
        "page": {"$ne": 3},
        "name": {"$eq": "a=b"},
    }
    for condition in ("year", "=3", "year=", "year==3", "year=>3", "year>=<3"):
        with pytest.raises(DataError, match="cannot read the condition"):
            parse([condition])
    with pytest.raises(DataError, match="filter of 'page': expected a number, found 'a3'"):
        parse(["page>a3"])


def test_a_name_that_no_document_has_is_told_with_those_that_there_are(store: Store) -> None:
    for where in ({}, {"metadata.year": 1066, "title": "a"}, {"page": 9, "tags": {"$contains": "nothing"}}):
        store.check_filter(where)
    with pytest.raises(DataError, match=r"has 'title2', 'yaer'; those that can be named are .*\byear\b.*\btitle\b"):
        store.check_filter({"yaer": 1, "year": 1, "title2": "a"})
    Store.create("memory://no-documents", store.info.fingerprint).check_filter({"yaer": 1})


def test_the_fields_of_a_store_are_what_a_filter_can_name(store: Store) -> None:
    fields = {(one["name"], one["list"]): dict(map(tuple, one["values"])) for one in store.fields()}
    assert fields["year", False] == {1999: 1, 2000.5: 1, "2001": 1} and fields["open", False] == {True: 1, False: 1}
    assert fields["tags", True] == {"x": 1, "it's": 1} and fields["title", False] == dict.fromkeys("abcd", 1)
    assert fields.keys().isdisjoint({("none", False), ("page", False), ("id", False)})
    for (name, several), values in fields.items():
        for value, count in values.items():
            hits = store.documents({name: {"$contains" if several else "$eq": value}})
            assert len(hits) == count, (name, value)


def test_fields_have_their_most_frequent_values_those_of_the_metadata_first() -> None:
    metadata = [json.dumps({"title": i % 2, '"': 1, "in": {"a": 1}}) for i in range(4)]
    rows = [{"title": str(i % 3), "metadata": metadata[i]} for i in range(4)]
    assert fields_of(rows, 1) == [
        {"name": "metadata.title", "list": False, "values": [(0, 2)]},
        {"name": "title", "list": False, "values": [("0", 2)]},
    ]
    several = [{"metadata": '{"one": true}'}, {"metadata": '{"one": 1}'}]
    [field] = fields_of(several, 9)
    assert [type(value) for value, _ in field["values"]] == [bool, int]
