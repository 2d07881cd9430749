"""What requests hold. Contracts of others ignore fields that they do not know; ours refuse them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...modes import Mode, SearchMode

Texts = str | list[str]
Count = Annotated[int, Field(ge=1, le=1000)]


class Ours(BaseModel):
    """A request in this package's own form."""

    model_config = ConfigDict(extra="forbid")


class EmbeddingsRequest(BaseModel):
    """OpenAI's `/v1/embeddings`, with fields of ours that its clients pass as `extra_body`."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str = "search-r3"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None
    input_type: Literal["query", "document"] | None = Field(None, description="In place of what the model id says.")
    mode: Mode | None = Field(None, description="In place of what the model id says.")
    instruction: str = Field("", description="Follows each query.")
    max_new_tokens: int | None = Field(None, ge=1, description="Reasoning budget; by default the model's own.")
    truncate: bool = Field(False, description="Texts that are too long lose their ends; else they are an error.")


class EmbedRequest(BaseModel):
    """TEI's `/embed`."""

    inputs: Texts
    truncate: bool = False
    prompt_name: Literal[Mode, "query", "document"] | None = Field(
        None, description="What the texts are; by default queries, in the server's mode."
    )
    normalize: Literal[True] = Field(True, description="Vectors have the length 1; there are no others.")
    dimensions: Annotated[int, Field(ge=1)] | None = None


class _Pairs(BaseModel):
    source_sentence: str
    sentences: list[str]


class _Parameters(BaseModel):
    truncate: bool = False
    prompt_name: Literal[Mode, "query"] | None = None


class SimilarityRequest(BaseModel):
    """TEI's `/similarity`: a query and documents."""

    inputs: _Pairs
    parameters: _Parameters = Field(default_factory=_Parameters)


class TextsRerankRequest(BaseModel):
    """TEI's `/rerank`."""

    query: str
    texts: list[str]
    raw_scores: bool = Field(False, description="Changes nothing: scores are the model's, as they are.")
    return_text: bool = False
    truncate: bool = False


class _Text(BaseModel):
    text: str


class RerankRequest(BaseModel):
    """Jina's `/v1/rerank` and Cohere's `/v2/rerank`."""

    query: str
    documents: list[str | _Text]
    model: str = "search-r3"
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = Field(None, description="By default as Jina and as Cohere have it: yes, and no.")
    instruction: str = Field("", description="Follows the query.")
    truncate: bool = False


class SearchRequest(Ours):
    """`/v1/search`."""

    query: str
    k: Count = 10
    mode: SearchMode | None = Field(None, description="By default the server's.")
    instruction: str = Field("", description="Follows the query.")
    filter: dict[str, Any] | None = Field(None, description="Fields and their values, or `{'year': {'$gte': 2020}}`.")
    hybrid: bool = Field(False, description="Ranks by words and by vectors are fused.")
    rerank: bool = Field(False, description="The hits are ranked anew by the server's cross-encoder.")
    stream: bool = Field(False, description="Server-sent events `reasoning`, `hits`, `done`.")
    max_new_tokens: int | None = Field(None, ge=1, description="Reasoning budget; by default the model's own.")
    truncate: bool = False


_CUT = Field(
    True, description="Queries that are too long lose their ends, as in the reference; else they are an error."
)


class RetrieveRequest(BaseModel):
    """Search-R1's `/retrieve`."""

    queries: list[str] = Field(description="An empty one has no hits.")
    topk: Count | None = None
    return_scores: bool = False
    truncate: bool = _CUT


class QueriesRequest(BaseModel):
    """R1-Searcher's `/queries`."""

    queries: list[str] = Field(description="An empty one has no hits.")
    k: Count = 3
    truncate: bool = _CUT


class OneDocument(Ours):
    """A document that is written; it replaces the one of its id."""

    id: Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]+$")]
    text: str
    title: str = ""
    metadata: dict[str, Any] = Field(default_factory=dict)


class DocumentsRequest(Ours):
    """Documents to be written."""

    documents: list[OneDocument]


class IdsRequest(Ours):
    """Documents to be removed."""

    ids: list[str]
