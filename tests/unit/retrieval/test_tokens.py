"""The tokens that BM25 counts, by language."""

from __future__ import annotations

import sys

import pytest

from search_r3.errors import ConfigError, MissingExtraError
from search_r3.retrieval.lexical import BM25
from search_r3.retrieval.tokens import BY_CHARACTER, STEMMED, LexicalTokens, guess_language

WRITTEN = {
    "en": "Tashkent is the capital of Uzbekistan.",
    "zh": "塔什干是乌兹别克斯坦的首都。",
    "ja": "東京は日本の首都です。",
    "ko": "서울은 대한민국의 수도이다.",
    "th": "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย",
    "lo": "ວຽງຈັນເປັນນະຄອນຫຼວງຂອງລາວ",
    "km": "ភ្នំពេញជារាជធានី",
    "my": "နေပြည်တော်သည် မြို့တော်ဖြစ်သည်",
    "bo": "ལྷ་ས་ནི་བོད་ཀྱི་རྒྱལ་ས་ཡིན།",
}


@pytest.mark.parametrize("language", WRITTEN)
def test_a_script_tells_the_language(language: str) -> None:
    text = WRITTEN[language]
    assert guess_language([text]) == language
    assert guess_language([text, "42, 7!"]) == language
    tokens = LexicalTokens()
    tokens.of_documents([text])
    assert tokens.by_character == (language in BY_CHARACTER) == (language != "en")


def test_a_few_foreign_names_do_not_change_the_language() -> None:
    assert guess_language([WRITTEN["en"] * 4 + "(東京)"]) == "en"
    assert guess_language([WRITTEN["zh"] * 40 + "の"]) == "zh", "one Japanese letter in 500"
    assert guess_language([]) == guess_language(["42"]) == "en"


def test_words_meet_by_their_stems() -> None:
    texts = ["Houses were painted.", "A boat"]
    stemmed, plain = BM25(["a", "b"], texts, LexicalTokens()), BM25(["a", "b"], texts)
    assert stemmed.search(["painting a house"], 5) == [["a"]]
    assert plain.search(["painting a house"], 5) == [[]]
    assert plain.search(["painted"], 5) == [["a"]]
    german = BM25(["a", "b"], ["Die Häuser der Stadt", "Ein Boot"], LexicalTokens("de"))
    assert german.search(["das Haus"], 5) == [["a"]]
    assert german.search(["die der ein"], 5) == [[]], "its stop words"


@pytest.mark.parametrize("stemmed", [True, False])
def test_a_script_without_spaces_is_searched(stemmed: bool) -> None:
    texts = [WRITTEN["zh"], "北京是中国的首都。", "上海是一座城市。"]
    bm25 = BM25(["tashkent", "beijing", "shanghai"], texts, LexicalTokens(stemmed=stemmed))
    assert [ranking[0] for ranking in bm25.search(["乌兹别克斯坦的首都", "中国", "上海"], 5)] == [
        *("tashkent", "beijing", "shanghai"),
    ]


def test_what_stands_in_most_documents_is_a_stop_word_where_none_are_listed() -> None:
    tokens = LexicalTokens("fi")
    texts = [f"talo numero {name}" for name in ("yksi", "kaksi", "kolme")]
    assert all(len(line) == 1 for line in tokens.of_documents(texts))
    assert tokens(["numero kaksi"]) == [tokens.of_documents(texts)[1]]
    assert len(LexicalTokens("en").of_documents(texts)[0]) == 3


def test_settings_name_what_tokens_depend_on() -> None:
    each = [LexicalTokens(), LexicalTokens("de"), LexicalTokens(stemmed=False), LexicalTokens("de", stemmed=False)]
    assert len({str(tokens.settings) for tokens in each}) == 4


@pytest.mark.parametrize("language", ["english", "eng", "EN", "", "en-US"])
def test_a_language_is_two_letters(language: str) -> None:
    with pytest.raises(ConfigError, match="expected two letters, such as en, de or zh, or auto"):
        LexicalTokens(language)


def test_the_stemmer_knows_every_language_that_is_stemmed() -> None:
    import Stemmer

    for language in STEMMED:
        assert Stemmer.Stemmer(language).stemWord("a")


def test_stems_need_pystemmer_and_words_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    with pytest.raises(MissingExtraError, match="the package Stemmer is not installed; it comes with the extra `eval`"):
        LexicalTokens()
    assert BM25(["a"], ["red house"]).search(["house"], 1) == [["a"]]
