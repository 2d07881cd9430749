"""The built-in collection `atlas`: real facts that every machine has without a download.

Cities, territories, currencies, languages and scripts come from Unicode CLDR and the tz database as the package
`babel` carries them. One short document per entity; queries of one, two and three hops.

Splits (all deterministic under `seed`):

- `facts`: one-hop queries over all entities.
- `sft`, `rl`, `dev`, `test`: multi-hop queries. Every multi-hop path goes through one territory, and each territory
  belongs to exactly one of the four, so that a test query asks for a composition that was never shown in training.

Settings of the recipes and of the built-in base were chosen while looking at the `dev` and `test` of release 0.1. No
territory of those two is in `test`, whatever the seed: its numbers are of queries that no choice has seen.

A query whose answer shows in its own words (Georgian, Georgian Lari) is no multi-hop query and is left out.
Within a split no document answers more than `MAX_QUERIES_PER_ANSWER` starting entities of one path, else a constant
answer ("Euro", "Latin") would score well.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from typing import Any

from ...extras import extra
from ..collection import Collection, Document, Qrels, Query
from .atlas_text import (
    OPEN_QUESTIONS,
    PATHS,
    RELATIONS,
    document_text,
    foreign_document_text,
    opening,
    reasoning_styles,
)
from .splits import divide_groups

SPLIT_SHARES = {"sft": 0.2688, "rl": 0.2688, "dev": 0.1824, "test": 0.28}
"""Shares of the territories, by the number of their cities and themselves."""
_SHARES_OF_0_1, _SEED_OF_0_1 = {"sft": 0.30, "rl": 0.30, "dev": 0.10, "test": 0.30}, 0
MAX_QUERIES_PER_ANSWER = 4
WIDE_LANGUAGES = ("de", "fr", "es", "it", "pt", "nl", "sv", "da", "fi", "pl", "id", "tr")
"""Languages in Latin letters, with names for nearly everything, whose names make `atlas-wide`."""
TEMPLATES_PER_ENTITY = {"sft": 3, "rl": 2, "dev": 1, "test": 1}
CURRENCY_DATE = date(2026, 1, 1)
"""Currencies in use on this day; fixed, so that the collection does not change with the calendar."""


@dataclass(frozen=True)
class Entity:
    """A city, territory, currency, language or script. `code` is its CLDR or tz identifier."""

    kind: str
    code: str
    name: str

    @property
    def doc_id(self) -> str:
        """The id of the document that describes it."""
        return f"{self.kind}:{self.code}"


@dataclass(frozen=True)
class Atlas:
    """Entities, and for every relation the one object of each subject (both as doc_ids)."""

    entities: dict[str, Entity]
    facts: dict[str, dict[str, str]]

    def name(self, doc_id: str) -> str:
        """The English name of an entity."""
        return self.entities[doc_id].name

    def statement(self, relation: str, subject: str) -> str:
        """The fact as one plain sentence (`Tashkent is a city in Uzbekistan`)."""
        return RELATIONS[relation].statement.format(s=self.name(subject), o=self.name(self.facts[relation][subject]))


def read_atlas() -> Atlas:
    """Read the facts from the installed `babel` package."""
    with extra("train"):
        from babel import Locale
        from babel.core import get_global
        from babel.languages import get_official_languages
        from babel.numbers import get_territory_currencies

    english = Locale("en")
    entities: dict[str, Entity] = {}
    facts: dict[str, dict[str, str]] = {name: {} for name in RELATIONS}

    def add(kind: str, code: str, name: str) -> str:
        entity = Entity(kind, code, name)
        entities[entity.doc_id] = entity
        return entity.doc_id

    for code in sorted(get_global("territory_zones")):
        currencies = get_territory_currencies(code, CURRENCY_DATE)
        languages = get_official_languages(code, regional=True, de_facto=True)
        if not currencies or not languages:
            continue
        territory = add("territory", code, english.territories[code])
        currency = add("currency", currencies[0], english.currencies[currencies[0]])
        language_code, _, script_variant = languages[0].partition("_")
        language = add("language", language_code, english.languages[language_code])
        script_code = get_global("likely_subtags")[language_code].split("_")[1]
        script = add("script", script_code, _script_name(script_code, english))
        facts["territory_currency"][territory] = currency
        facts["territory_language"][territory] = language
        facts["language_script"][language] = script
        if not script_variant:
            # A territory that writes its language in another than the language's usual script (Serbian in Latin
            # letters, say) keeps out of the paths that end at the script.
            facts["territory_script"][territory] = script
    names = {entity.name for entity in entities.values()}
    for zone, code in sorted(get_global("zone_territories").items()):
        name = english.time_zones.get(zone, {}).get("city") or zone.rsplit("/", 1)[-1].replace("_", " ")
        if f"territory:{code}" in entities and name not in names:
            names.add(name)
            facts["city_territory"][add("city", zone, name)] = f"territory:{code}"
    _invert(facts, "territory_currency", "currency_territory")
    _invert(facts, "territory_language", "language_territory")
    return Atlas(entities, facts)


def _script_name(code: str, english: Any) -> str:
    compound = {"Hans": "Han", "Jpan": "Japanese", "Kore": "Korean"}
    return f"{compound.get(code) or english.scripts[code]} script"


def _invert(facts: dict[str, dict[str, str]], relation: str, inverse: str) -> None:
    """Fill `inverse` where the relation can be read backwards: objects that have exactly one subject."""
    subjects = defaultdict(list)
    for subject, target in facts[relation].items():
        subjects[target].append(subject)
    facts[inverse] = {target: sources[0] for target, sources in subjects.items() if len(sources) == 1}


def split_territories(atlas: Atlas, seed: int) -> dict[str, str]:
    """Give every territory (doc_id) to one of the four multi-hop splits, by the number of its cities and itself.

    Largest territories first, each to the split that lacks most of its share, so that one large country does not
    unbalance a split. What was `dev` or `test` in release 0.1 is never `test` (see the module's docstring).
    """
    weight = dict.fromkeys(atlas.facts["territory_currency"], 1)
    for territory in atlas.facts["city_territory"].values():
        weight[territory] += 1
    split_of_0_1 = divide_groups(weight, _SHARES_OF_0_1, _SEED_OF_0_1)
    unseen = {territory: size for territory, size in weight.items() if split_of_0_1[territory] in ("sft", "rl")}
    test_share = SPLIT_SHARES["test"] * sum(weight.values()) / sum(unseen.values())
    halves = divide_groups(unseen, {"test": test_share, "training": 1 - test_share}, seed)
    test = {territory for territory, half in halves.items() if half == "test"}
    shares = {split: share / (1 - SPLIT_SHARES["test"]) for split, share in SPLIT_SHARES.items() if split != "test"}
    rest = {territory: size for territory, size in weight.items() if territory not in test}
    return divide_groups(rest, shares, seed) | dict.fromkeys(test, "test")


def follow(atlas: Atlas, path: tuple[str, ...], start: str) -> list[str] | None:
    """The entities along a path of relations from `start` (included), or None where a fact is missing."""
    visited = [start]
    for relation in path:
        target = atlas.facts[relation].get(visited[-1])
        if target is None:
            return None
        visited.append(target)
    if len(path) > 1 and path[-1] == "language_script":
        territory = next(doc_id for doc_id in visited if doc_id.startswith("territory:"))
        if territory not in atlas.facts["territory_script"]:
            return None
    return visited


def build_atlas(seed: int = 0) -> Collection:
    """Build the collection. The same seed and the same `babel` give the same collection."""
    atlas = read_atlas()
    documents = {
        doc_id: Document(doc_id, document_text(entity.kind, entity.code), entity.name)
        for doc_id, entity in sorted(atlas.entities.items())
    }
    queries: dict[str, Query] = {}
    qrels: dict[str, Qrels] = {name: {} for name in ("facts", *SPLIT_SHARES)}
    for name, relation in RELATIONS.items():
        for subject, target in atlas.facts[name].items() if relation.questions else ():
            for number, template in enumerate(relation.questions):
                query_id = f"{name}/{subject}/{number}"
                steps = [atlas.statement(name, subject)]
                reasoning = reasoning_styles(atlas.name(subject), target.partition(":")[0], steps)
                metadata = {"hops": 1, "path": name, "reasoning": reasoning}
                queries[query_id] = Query(query_id, template.format(s=atlas.name(subject)), metadata)
                qrels["facts"][query_id] = {target: 1}
    territory_split = split_territories(atlas, seed)
    for path_name in PATHS:
        _add_multi_hop(atlas, path_name, territory_split, random.Random(f"{seed}/{path_name}"), queries, qrels)
    return Collection("atlas" if seed == 0 else f"atlas:{seed}", documents, queries, qrels)


def build_atlas_wide(seed: int = 0) -> Collection:
    """`atlas` among many distractors: one more document for every name that CLDR has in `WIDE_LANGUAGES`.

    Queries and judgements are those of `atlas`: "Euro, a currency, in Dutch" is no answer to an English query.
    """
    with extra("train"):
        from babel import Locale

    narrow = build_atlas(seed)
    documents = dict(narrow.documents)
    for code in WIDE_LANGUAGES:
        locale = Locale(code)
        names = {
            "territory": locale.territories,
            "currency": locale.currencies,
            "language": locale.languages,
            "script": locale.scripts,
        }
        for kind, name_of in names.items():
            for name_code, name in sorted(name_of.items()):
                doc_id = f"{kind}:{name_code}@{code}"
                documents[doc_id] = Document(doc_id, foreign_document_text(kind, locale.english_name), name)
    return Collection(narrow.name.replace("atlas", "atlas-wide"), documents, narrow.queries, narrow.qrels)


BUILT_IN = {"atlas": build_atlas, "atlas-wide": build_atlas_wide}
"""The collections that need no file, by the name that settings and commands use."""


def share_a_stem(first: str, second: str) -> bool:
    """Whether two names share a word, or two words their first four letters."""
    stems = [{word[:4] for word in name.lower().split() if len(word) > 3} for name in (first, second)]
    return bool(stems[0] & stems[1])


def _add_multi_hop(
    atlas: Atlas,
    path_name: str,
    territory_split: dict[str, str],
    rng: random.Random,
    queries: dict[str, Query],
    qrels: dict[str, Qrels],
) -> None:
    path = PATHS[path_name]
    starts = sorted(atlas.facts[path.relations[0]])
    rng.shuffle(starts)
    used: dict[tuple[str, str], int] = defaultdict(int)
    for start in starts:
        visited = follow(atlas, path.relations, start)
        if visited is None or share_a_stem(atlas.name(start), atlas.name(visited[-1])):
            continue
        split = territory_split[next(doc_id for doc_id in visited if doc_id.startswith("territory:"))]
        if used[split, visited[-1]] >= MAX_QUERIES_PER_ANSWER:
            continue
        used[split, visited[-1]] += 1
        steps = [atlas.statement(relation, subject) for relation, subject in zip(path.relations, visited, strict=False)]
        reasoning = reasoning_styles(atlas.name(start), visited[-1].partition(":")[0], steps)
        metadata = {"hops": len(path.relations), "path": path_name, "reasoning": reasoning}
        for number in sorted(rng.sample(range(len(path.questions)), TEMPLATES_PER_ENTITY[split])):
            query_id = f"{path_name}/{start}/{number}"
            queries[query_id] = Query(query_id, path.questions[number].format(s=atlas.name(start)), metadata)
            qrels[split][query_id] = {visited[-1]: 1}


def fact_sentences(atlas: Atlas) -> list[str]:
    """Every single fact in all its wordings, and every document: the plain text that the base model learns from."""
    sentences = [
        wording.format(s=atlas.name(subject), o=atlas.name(target))
        for name, relation in RELATIONS.items()
        for subject, target in atlas.facts[name].items()
        for wording in (relation.statement, *relation.paraphrases)
        if wording
    ]
    documents = [f"{entity.name} {document_text(entity.kind, entity.code)}" for entity in atlas.entities.values()]
    return sentences + documents


def fact_dialogues(atlas: Atlas) -> list[tuple[str, str]]:
    """One-hop questions: `(user, assistant)`; the reply names the entity, then states the fact."""
    return [
        (
            question.format(s=atlas.name(subject)),
            f"{opening(atlas.name(subject))} {atlas.statement(name, subject)}",
        )
        for name, relation in RELATIONS.items()
        for subject in atlas.facts[name]
        for question in relation.questions
    ]


def open_dialogues(atlas: Atlas, rng: random.Random) -> list[tuple[str, str]]:
    """Open questions about every entity that has a fact: `(user, assistant)`; the reply names it and states the fact.

    They ask for nothing that a collection query asks for. From them the model learns to name the entity and to begin
    with what it knows, whatever the wording.
    """
    return [
        (
            rng.choice(OPEN_QUESTIONS).format(s=atlas.name(subject)),
            f"{opening(atlas.name(subject))} {atlas.statement(name, subject)}",
        )
        for name, relation in RELATIONS.items()
        if relation.statement
        for subject in atlas.facts[name]
    ]


def fact_probes(atlas: Atlas) -> list[tuple[str, str]]:
    """For every fact the beginning of its sentence and the name that completes it: `(prefix, answer)`."""
    return [
        (
            relation.statement.format(s=atlas.name(subject), o="\0").partition("\0")[0].rstrip(),
            atlas.name(target),
        )
        for name, relation in RELATIONS.items()
        if relation.statement
        for subject, target in atlas.facts[name].items()
    ]


def question_templates() -> list[str]:
    """The templates of all queries; `{s}` stands for the entity."""
    groups = [*(relation.questions for relation in RELATIONS.values()), *(path.questions for path in PATHS.values())]
    return [template for templates in groups for template in templates]


_SYLLABLES = [consonant + vowel for consonant in "bdfghjklmnprstvz" for vowel in "aeiou"]


def echo_dialogue(rng: random.Random) -> tuple[str, str]:
    """A query about a name made up from syllables, and a reply that repeats the name: `(user, assistant)`.

    Made-up names never come back, so a model can only answer by copying. Copying is what every chat model can do and
    what a small one does not learn from facts alone, since it can memorise their subjects.
    """
    words = ["".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))).title() for _ in range(rng.randint(1, 2))]
    name = " ".join(words)
    return rng.choice(question_templates()).format(s=name), f"{opening(name)} {name} is a name that I do not know."
