"""Reasoning for stories about relatives: who is whose, person by person, in the story's own names.

A story names the relatives, its metadata only the chain of relations. Which person stands where in the chain is found
by three signs that have to agree: the relation's sex is the person's, a sentence (or two neighbouring ones) names both
people, and it has a word of that kind of relation. Where two orders do as well, there is no trace: a trace with the
wrong people teaches a model to write at random.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise, permutations

KINDS = (
    "father mother son daughter dad mom parent parents child children kids sons daughters",
    "brother sister brothers sisters sibling siblings",
    "husband wife married spouse",
    "grandfather grandmother grandson granddaughter grandpa grandma grandparents grandchild grandchildren grandsons",
    "uncle aunt nephew niece nephews nieces",
    "father-in-law mother-in-law son-in-law daughter-in-law",
)
"""Words of one kind of relation: a story says `her son Ann's mother` either way round."""
MALE = frozenset("father son brother husband grandfather grandson uncle nephew father-in-law son-in-law".split())
APART, OTHER_WORDS = 1, 4
"""Price of a step that two neighbouring sentences say, and of one that is said without a word of its kind."""
Story = tuple[str, Sequence[str], str]
"""Text that ends with `How is B related to A?`, relations on the way from A to B, and what B is to A."""


class Kinship:
    """What all stories tell together: whose name is a man's, and what two relations make.

    Args:
        stories: of the whole collection.
    """

    def __init__(self, stories: Iterable[Story]) -> None:
        sexes: dict[str, Counter[bool]] = {}
        made: dict[tuple[str, str], Counter[str]] = {}
        for text, chain, target in stories:
            if (asked := _asked(text)) is not None:
                sexes.setdefault(asked[1], Counter())[target in MALE] += 1
            if len(chain) == 2:
                made.setdefault((chain[0], chain[1]), Counter())[target] += 1
        self.male = {name: counts.most_common(1)[0][0] for name, counts in sexes.items()}
        self.table = {pair: counts.most_common(1)[0][0] for pair, counts in made.items()}

    def trace(self, story: Story) -> str:
        """`A's son is C. C's sister is B, so B is A's daughter.`; empty where the story leaves it open."""
        text, chain, target = story
        people = self.people(text, chain)
        if not people:
            return ""
        said: list[str] = []
        whole: str | None = chain[0]
        for place, (one, other) in enumerate(pairwise(people)):
            sentence = f"{one}'s {chain[place]} is {other}"
            if place:
                whole = self.table.get((whole, chain[place])) if whole else None
                if place == len(chain) - 1:
                    whole = whole or target
                if whole:  # some pairs, such as a husband's brother, have no name among the relations
                    sentence += f", so {other} is {people[0]}'s {whole}"
            said.append(sentence + ".")
        return " ".join(said) if whole == target else ""

    def people(self, text: str, chain: Sequence[str]) -> list[str]:
        """The people along the chain, A first and B last; empty where none or several orders fit."""
        asked = _asked(text)
        if asked is None:
            return []
        story, last, first = asked
        sentences = re.split(r"(?<=[.?!])\s+", story)
        named = dict.fromkeys(re.findall(r"\b[A-Z][a-z]+\b", story))
        others = [name for name in named if name in self.male and name not in (first, last)]
        parts = [(0, _words(one)) for one in sentences]
        parts += [(APART, _words(" ".join(pair))) for pair in pairwise(sentences)]

        def price(one: str, other: str, relation: str) -> int:
            kind = next(frozenset(words.split()) for words in KINDS if relation in words.split())
            found = [apart + (0 if words & kind else OTHER_WORDS) for apart, words in parts if {one, other} <= words]
            return min(found, default=2 * OTHER_WORDS)

        priced: list[tuple[int, list[str]]] = []
        for middle in permutations(others, len(chain) - 1):
            path = [first, *middle, last]
            if all(self.male.get(one) == (relation in MALE) for one, relation in zip(path[1:], chain, strict=True)):
                steps = zip(pairwise(path), chain, strict=True)
                priced.append((sum(price(one, other, relation) for (one, other), relation in steps), path))
        priced.sort()
        if not priced or priced[0][0] >= OTHER_WORDS or (len(priced) > 1 and priced[1][0] == priced[0][0]):
            return []
        return priced[0][1]


def _asked(text: str) -> tuple[str, str, str] | None:
    """The story without its question, and B and A of `How is B related to A?`."""
    found = re.search(r"How is (\w+) related to (\w+)\?", text)
    return None if found is None else (text[: found.start()], found[1], found[2])


def _words(text: str) -> set[str]:
    """Words as they stand, and in small letters."""
    found = re.findall(r"[A-Za-z-]+", text)
    return {*found, *(word.lower() for word in found)}
