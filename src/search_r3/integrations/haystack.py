"""Haystack 2 and later: embedders of queries and documents, and a retriever."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..client import Client, Usage
from ..errors import ConfigError, DataError
from ..extras import extra
from ..modes import Mode, SearchMode
from .source import InProcess, Source, connect, facts_of, given

with extra("haystack"):
    from haystack import Document, component, default_from_dict, default_to_dict

_OPERATORS = {
    "==": "$eq",
    "!=": "$ne",
    ">": "$gt",
    ">=": "$gte",
    "<": "$lt",
    "<=": "$lte",
    "in": "$in",
    "not in": "$nin",
}


class _Component:
    """Keeps its arguments, to be saved with a pipeline; connects at `warm_up` or the first run.

    Components set `arguments` themselves: Haystack makes a new class of each, which has another `super`.
    """

    arguments: dict[str, Any]
    _client: Client | InProcess | None = None

    @property
    def client(self) -> Client | InProcess:
        """What answers."""
        self.warm_up()
        assert self._client is not None
        return self._client

    def warm_up(self) -> None:
        """Connect; a model is loaded."""
        if self._client is None:
            self._client = connect(self.arguments["source"])

    def to_dict(self) -> dict[str, Any]:
        """For a file.

        Raises:
            ConfigError: the source is an object, of which no file can tell.
        """
        source = self.arguments["source"]
        if isinstance(source, Client | InProcess):
            raise ConfigError(
                f"a pipeline with an {type(source).__name__} cannot be saved; give an address, a store or a model"
            )
        saved: dict[str, Any] = default_to_dict(self, **self.arguments | {"source": str(source)})
        return saved

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """What `to_dict` saved."""
        return default_from_dict(cls, data)


@component
class SearchR3TextEmbedder(_Component):
    """The vector of a query.

    Args:
        source: a server's address, a model, a store (for its model), or an `InProcess` or `Client`.
        mode: `reason` or `direct`; by default the server's or the model's own.
        instruction: follows the query.
    """

    def __init__(self, source: Source, mode: Mode | None = None, instruction: str = "") -> None:
        self.arguments = {"source": source, "mode": mode, "instruction": instruction}

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """The vector, and its price."""
        mode, instruction = self.arguments["mode"], self.arguments["instruction"]
        encoded = self.client.encode_query(text, mode, instruction=instruction)
        return {"embedding": encoded.vectors[0].tolist(), "meta": _meta(encoded.usage)}


@component
class SearchR3DocumentEmbedder(_Component):
    """Documents with their vectors.

    Args:
        source: as that of `SearchR3TextEmbedder`.
        meta_fields_to_embed: are put before the content, such as the title.
    """

    def __init__(self, source: Source, meta_fields_to_embed: list[str] | None = None) -> None:
        self.arguments = {"source": source, "meta_fields_to_embed": meta_fields_to_embed}

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Copies of the documents, and the price."""
        if not documents:
            return {"documents": [], "meta": _meta(Usage())}
        fields = self.arguments["meta_fields_to_embed"] or []
        texts = []
        for one in documents:
            before = [str(one.meta[name]) for name in fields if one.meta.get(name) is not None]
            texts.append(" ".join([*before, one.content or ""]))
        encoded = self.client.encode_document(texts)
        vectors = encoded.vectors.tolist()
        copies = [replace(one, embedding=vector) for one, vector in zip(documents, vectors, strict=True)]
        return {"documents": copies, "meta": _meta(encoded.usage)}


@component
class SearchR3Retriever(_Component):
    """Passages of a store.

    Args:
        source: a server's address, a store, or an `InProcess` or `Client`.
        filters: in Haystack's form, without `OR` and `NOT`.
        top_k: passages, each of another document.
        mode: `reason`, `direct` or `bm25`; by default the server's or the model's own.
        instruction: follows the query.
        hybrid: ranks by words and by vectors are fused.
        rerank: a server's cross-encoder ranks the passages anew.
    """

    def __init__(
        self,
        source: Source,
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        mode: SearchMode | None = None,
        instruction: str = "",
        hybrid: bool = False,
        rerank: bool = False,
    ) -> None:
        options = {"mode": mode, "instruction": instruction, "hybrid": hybrid, "rerank": rerank}
        self.arguments = {"source": source, "filters": filters, "top_k": top_k, **options}

    @component.output_types(documents=list[Document], reasoning=str, meta=dict[str, Any])
    def run(self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None) -> dict[str, Any]:
        """The passages, best first, the reasoning about the query, and the price; `filters` and `top_k` of this run."""
        names = "mode", "instruction", "hybrid", "rerank"
        where = to_filter(filters or self.arguments["filters"])
        options = given(
            k=top_k or self.arguments["top_k"], filter=where, **{name: self.arguments[name] for name in names}
        )
        answer = self.client.search(query, **options)
        documents = [
            Document(id=hit.id, content=hit.text, meta=facts_of(hit, answer), score=hit.score) for hit in answer.hits
        ]
        return {"documents": documents, "reasoning": answer.reasoning, "meta": _meta(answer.usage)}


def to_filter(filters: Mapping[str, Any] | None) -> dict[str, dict[str, Any]] | None:
    """Haystack's filter in this package's form.

    Raises:
        DataError: it is none, or has an operator that there is no other for.

    Example:
        >>> to_filter({"field": "meta.year", "operator": ">=", "value": 2020})
        {'year': {'$gte': 2020}}
    """
    if not filters:
        return None
    if filters.get("operator") == "AND":
        conditions: Sequence[Mapping[str, Any]] = filters.get("conditions", ())
    else:
        conditions = [filters]
    where: dict[str, dict[str, Any]] = {}
    for one in conditions:
        if not {"field", "operator", "value"} <= one.keys() or one["operator"] not in _OPERATORS:
            raise DataError(
                f"cannot search with the filter {dict(one)!r}: expected a field, a value and one of "
                f"{', '.join(_OPERATORS)}, or several of these with AND"
            )
        tests = where.setdefault(str(one["field"]).removeprefix("meta."), {})
        operator = _OPERATORS[one["operator"]]
        if operator in tests:
            raise DataError(f"the filter has {one['operator']} for {one['field']} twice; leave one out")
        tests[operator] = one["value"]
    return where


def _meta(usage: Usage) -> dict[str, Any]:
    return {"usage": usage.model_dump() | {"total_tokens": usage.total_tokens}}
