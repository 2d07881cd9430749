"""The tokens that BM25 counts: words without stop words, stemmed or not, or characters where words are not set apart.

`LexicalTokens(language)` is what mteb's BM25 does (a test compares the two): bm25s's words of two letters and more, its
stop words where it has some for the language, Snowball's stemmer, and single characters in Chinese, Japanese, Korean,
Thai, Khmer, Lao, Burmese and Tibetan. Where there is no list of stop words, what stands in 9 of 10 documents is one.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import islice
from typing import Any

from ..errors import ConfigError
from ..extras import extra

AUTO = "auto"
STOP_WORDS = ("de", "en", "es", "fr", "it", "nl", "no", "pt", "ru", "sv", "zh")
"""Languages whose stop words bm25s has and mteb takes."""
STEMMED = tuple("ar ca da de el en eo es et eu fi fr ga hi hu hy id it lt ne nl no pt ro ru sr sv ta tr yi".split())
"""Languages that mteb stems."""
BY_CHARACTER = ("bo", "ja", "km", "ko", "lo", "my", "th", "zh")
"""Languages that are read character by character, as mteb does."""
SCRIPTS = {
    "ja": "\u3040-\u30ff",
    "zh": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff",
    "ko": "\u1100-\u11ff\uac00-\ud7af",
    "th": "\u0e00-\u0e7f",
    "lo": "\u0e80-\u0eff",
    "bo": "\u0f00-\u0fff",
    "my": "\u1000-\u109f",
    "km": "\u1780-\u17ff",
}
"""Language -> the characters that give it away."""
FREQUENT = 0.9
"""Share of the documents in which a word without meaning stands."""
SAMPLE, BEGINNING = 1000, 500
"""Texts, and characters of each, that tell the language."""
_LANGUAGE = re.compile(r"[a-z]{2}")


class LexicalTokens:
    """Tokens of documents and of queries alike.

    Args:
        language: two letters (ISO 639-1), or `auto`: that of the documents' script where it knows no spaces, else
            English.
        stemmed: whether words are reduced to their stems; without it languages other than those of `BY_CHARACTER` have
            English stop words.

    Attributes:
        language: what the documents were read as; `auto` before there are any.

    Raises:
        ConfigError: a language that is not two letters.
        MissingExtraError: PyStemmer is not installed, which the stems need.
    """

    def __init__(self, language: str = AUTO, stemmed: bool = True) -> None:
        if language != AUTO and not _LANGUAGE.fullmatch(language):
            raise ConfigError(f"language {language!r}: expected two letters, such as en, de or zh, or {AUTO}")
        self.language, self.stemmed = language, stemmed
        self._stop_words: frozenset[str] = frozenset()
        self._stemmer: Any = None
        if stemmed:
            self._load()

    @property
    def settings(self) -> dict[str, str]:
        """What the tokens depend on, for caches and records."""
        if not self.stemmed:
            return {"stop_words": "en", "stemming": "none", "language": self.language}
        return {"stemming": f"PyStemmer {version('PyStemmer')}", "language": self.language}

    @property
    def by_character(self) -> bool:
        """Whether texts are read character by character."""
        return self.language in BY_CHARACTER

    @property
    def familiar(self) -> bool:
        """Whether something is known of the language that its texts are read by."""
        return self.language in (*STOP_WORDS, *STEMMED, *BY_CHARACTER)

    def of_documents(self, texts: Sequence[str]) -> list[list[str]]:
        """The tokens of the documents; what is learned from them then serves the queries."""
        if self.language == AUTO:
            self.language = guess_language(texts)
            if self.stemmed:
                self._load()
        self._stop_words = frozenset()
        tokens = self(texts)
        if self.language in STOP_WORDS or not (self.stemmed or self.by_character):
            return tokens
        counts = Counter(token for line in tokens for token in set(line))
        self._stop_words = frozenset(token for token, count in counts.items() if count / len(texts) >= FREQUENT)
        return [[token for token in line if token not in self._stop_words] for line in tokens]

    def __call__(self, texts: Sequence[str]) -> list[list[str]]:
        """The tokens of each text."""
        with extra("eval"):
            import bm25s
        if self.by_character:
            stop_words = {*self._stop_words, *(bm25s.tokenization.STOPWORDS_CHINESE if self.language == "zh" else ())}
            return [[one for one in _characters(text) if one not in stop_words] for text in texts]
        tokenize: Any = bm25s.tokenize
        listed = self.language if self.stemmed and self.language in STOP_WORDS else None
        tokens: list[list[str]] = tokenize(
            list(texts),
            stopwords=listed if self.stemmed else "en",
            stemmer=self._stemmer,
            show_progress=False,
            return_ids=False,
            allow_empty=False,
        )
        # Of a text without any word bm25s makes the one token "", with which it cannot search.
        return [[token for token in line if token and token not in self._stop_words] for line in tokens]

    def _load(self) -> None:
        """Take Snowball's stemmer of the language."""
        with extra("eval"):
            import Stemmer
        self._stemmer = Stemmer.Stemmer(self.language) if self.language in STEMMED else None


def guess_language(texts: Iterable[str]) -> str:
    """The language of texts in a script without spaces, where a quarter of the letters are of it; else `en`.

    Example:
        >>> guess_language(["東京は日本の首都です。"]), guess_language(["塔什干是首都。"]), guess_language(["Tashkent"])
        ('ja', 'zh', 'en')
    """
    sample = "".join(text[:BEGINNING] for text in islice(texts, SAMPLE))
    letters = sum(map(str.isalpha, sample))
    counts = {language: len(re.findall(f"[{script}]", sample)) for language, script in SCRIPTS.items()}
    if 4 * sum(counts.values()) < max(letters, 1):
        return "en"
    # Japanese is written with Chinese characters, too.
    if 20 * counts["ja"] >= counts["ja"] + counts["zh"] > 0 and counts["ja"] + counts["zh"] >= max(counts.values()):
        return "ja"
    return max(counts, key=lambda language: counts[language])


def _characters(text: str) -> list[str]:
    return list(unicodedata.normalize("NFKC", text).lower().replace(" ", ""))
