"""The wording of `atlas`: sentences for single facts, templates for queries, the text of a document.

In every template `{s}` is the subject (for a query: the entity it starts from) and `{o}` the object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact. A relation without questions only restricts paths."""

    statement: str = ""
    paraphrases: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Path:
    """A multi-hop query: the relations to follow and the ways to ask for the end."""

    relations: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "city_territory": Relation(
        "{s} is a city in {o}.",
        ("{s} lies in {o}.", "You find {s} in {o}.", "{o} is where {s} is.", "One city of {o} is {s}."),
        (
            "which country is {s} in?",
            "where is the city of {s}?",
            "the territory that {s} belongs to",
            "{s} country",
        ),
    ),
    "territory_currency": Relation(
        "People in {s} pay with the {o}.",
        (
            "The currency of {s} is the {o}.",
            "{s} uses the {o}.",
            "The {o} is the money of {s}.",
            "Prices in {s} are in {o}.",
        ),
        (
            "what is the currency of {s}?",
            "name the money of the country {s}",
            "the banknotes that {s} issues",
            "{s} national currency",
        ),
    ),
    "territory_language": Relation(
        "The main language of {s} is {o}.",
        (
            "People in {s} speak {o}.",
            "{o} is an official language of {s}.",
            "{s} has {o} as its language.",
            "In {s} you hear {o}.",
        ),
        (
            "what is the main language of {s}?",
            "name the language of the country {s}",
            "the state language of {s}",
            "{s} national language",
        ),
    ),
    "language_script": Relation(
        "{s} is written in the {o}.",
        (
            "The {o} is used to write {s}.",
            "To write {s} you use the {o}.",
            "{s} texts use the {o}.",
            "{s} has the {o}.",
        ),
        (
            "which script is {s} written in?",
            "how is {s} written?",
            "the writing system of the {s} language",
            "{s} script",
        ),
    ),
    "currency_territory": Relation(
        "The {s} is the currency of {o}.",
        ("The {s} comes from {o}.", "With the {s} you pay in {o}.", "{o} issues the {s}."),
        ("which country uses the {s}?", "where do people pay with the {s}?", "the country of the {s}"),
    ),
    "language_territory": Relation(
        "{s} is the main language of {o}.",
        ("{s} is spoken in {o}.", "Speakers of {s} live in {o}.", "{o} is the home of {s}."),
        (
            "which country speaks {s}?",
            "where is {s} the main language?",
            "the home country of the {s} language",
        ),
    ),
    "territory_script": Relation(),
}

PATHS: dict[str, Path] = {
    "city_currency": Path(
        ("city_territory", "territory_currency"),
        (
            "what do people pay with in {s}?",
            "which money do I need for a trip to {s}?",
            "the currency accepted in the shops of {s}",
            "what is the currency in {s}?",
            "{s} currency",
        ),
    ),
    "city_language": Path(
        ("city_territory", "territory_language"),
        (
            "which language do people speak in {s}?",
            "what language should I learn to live in {s}?",
            "the main language on the streets of {s}",
            "what is the official language in {s}?",
            "{s} language",
        ),
    ),
    "territory_script": Path(
        ("territory_language", "language_script"),
        (
            "which script do people write with in {s}?",
            "the writing system used in {s}",
            "what script are the newspapers of {s} printed in?",
            "how does writing look in {s}?",
        ),
    ),
    "currency_language": Path(
        ("currency_territory", "territory_language"),
        (
            "which language is spoken where people pay with the {s}?",
            "the main language of the country that uses the {s}",
            "what do people who earn the {s} speak?",
        ),
    ),
    "language_currency": Path(
        ("language_territory", "territory_currency"),
        (
            "what do speakers of {s} pay with?",
            "the currency of the country that speaks {s}",
            "which money is used where {s} is the main language?",
        ),
    ),
    "city_script": Path(
        ("city_territory", "territory_language", "language_script"),
        (
            "which script are the street signs of {s} written in?",
            "the writing system I will see in {s}",
            "what script do the newspapers of {s} use?",
            "how do people write in {s}?",
        ),
    ),
    "currency_script": Path(
        ("currency_territory", "territory_language", "language_script"),
        (
            "which script do people write with where the {s} is used?",
            "the writing system of the country that pays with the {s}",
            "what script do people who earn the {s} write?",
        ),
    ),
}

OPEN_QUESTIONS = (
    "tell me about {s}",
    "what should I know about {s}?",
    "I am going to {s} next week",
    "news about {s}",
    "what do people say about {s}?",
    "the shops and the streets of {s}",
    "who writes about {s}?",
    "{s} life",
    "how do people live with {s}?",
    "books on {s}",
    "what is {s} known for?",
    "{s}",
)

DOCUMENTS = {
    "city": "A city. Time zone: {code}.",
    "territory": "A country or territory. ISO code: {code}.",
    "currency": "A currency. ISO code: {code}.",
    "language": "A language. Language code: {code}.",
    "script": "A writing system. ISO code: {code}.",
}

ASKED_FOR = {
    "territory": "a country",
    "currency": "a currency",
    "language": "a language",
    "script": "a writing system",
}


def document_text(kind: str, code: str) -> str:
    """The text of an entity's document: what it is and its code, no fact that a query asks for."""
    return DOCUMENTS[kind].format(code=code)


def foreign_document_text(kind: str, language: str) -> str:
    """The text of a document about an entity's name in another language: what it is and in which language."""
    return f"{DOCUMENTS[kind].partition('.')[0]}, in {language}."


def opening(start: str) -> str:
    """The sentence that all reasoning begins with. It is copied from the query, so that what follows can lean on it."""
    return f"The query is about {start}."


def reasoning_styles(start: str, answer_kind: str, steps: Sequence[str]) -> dict[str, str]:
    """Useful and useless reasoning about one query: stage 1 demonstrates all of it, so that RL has something to choose.

    Args:
        start: the name of the entity that the query starts from.
        answer_kind: `territory`, `currency`, `language` or `script`.
        steps: the facts that lead from the start to the answer, as sentences.

    Returns:
        `chain`: all facts; `partial`: all but the last (absent for a single fact); `restate`: no fact at all.
    """
    styles = {"chain": " ".join([opening(start), *steps])}
    if len(steps) > 1:
        styles["partial"] = " ".join([opening(start), *steps[:-1]])
    return styles | {"restate": f"{opening(start)} It asks for {ASKED_FOR[answer_kind]}."}
