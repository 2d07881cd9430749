from __future__ import annotations

from benchmarks.smol_kinship import Kinship, Story

ASK = " How is {} related to {}?"
TOLD: list[Story] = [
    ("Ann is here." + ASK.format("Ann", "Lee"), ["brother", "sister"], "sister"),
    ("Sue is here." + ASK.format("Sue", "Lee"), ["wife", "mother"], "mother-in-law"),
    ("Bob is here." + ASK.format("Bob", "Sue"), ["daughter", "brother"], "son"),
    ("Lee is here." + ASK.format("Lee", "Bob"), ["father", "son"], "brother"),
    ("Tom is here." + ASK.format("Tom", "Bob"), ["sister", "son"], "nephew"),
    ("Eve is here." + ASK.format("Eve", "Bob"), ["sister", "daughter"], "niece"),
]
KIN = Kinship(TOLD)


def test_each_person_stands_where_a_sentence_says_so() -> None:
    text = "Bob saw his sister Ann. Sue is the mother of Ann and Eve. Eve is Lee's daughter."
    story: Story = (text + ASK.format("Eve", "Bob"), ["sister", "daughter"], "niece")
    # Sue, Ann and Eve are women who all stand near: only Ann is said to be a sister.
    assert KIN.trace(story) == "Bob's sister is Ann. Ann's daughter is Eve, so Eve is Bob's niece."


def test_a_person_is_of_the_relation_s_sex() -> None:
    text = "Bob, Lee and his sister Ann met. Tom visited his mother Ann and her brother Lee."
    story: Story = (text + ASK.format("Tom", "Bob"), ["sister", "son"], "nephew")
    assert KIN.people(*story[:2]) == ["Bob", "Ann", "Tom"]
    assert KIN.people(story[0], ["brother", "son"]) == ["Bob", "Lee", "Tom"]


def test_a_story_that_leaves_it_open_has_no_trace() -> None:
    text = "Bob met his sisters Ann and Sue. Tom is the son of Ann or Sue."
    assert KIN.people(text + ASK.format("Tom", "Bob"), ["sister", "son"]) == []
    assert KIN.trace(("Bob met Ann. Tom is Ann's son." + ASK.format("Tom", "Bob"), ["sister", "son"], "nephew")) == ""
    assert KIN.trace(("Bob has a sister.", ["sister", "son"], "nephew")) == ""


def test_steps_without_a_name_of_their_own_are_passed_over() -> None:
    text = "Sue's husband is Bob. Bob has a brother, Lee. Lee's mother is Eve."
    story: Story = (text + ASK.format("Eve", "Sue"), ["husband", "brother", "mother"], "mother-in-law")
    expected = "Sue's husband is Bob. Bob's brother is Lee. Lee's mother is Eve, so Eve is Sue's mother-in-law."
    assert KIN.trace(story) == expected


def test_a_chain_that_makes_something_else_has_no_trace() -> None:
    text = "Bob's sister is Ann. Ann's son is Tom."
    assert KIN.trace((text + ASK.format("Tom", "Bob"), ["sister", "son"], "uncle")) == ""
