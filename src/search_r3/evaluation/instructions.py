"""Which instruction a query is encoded with in an evaluation: its own, none, or one that is given.

Without more said a query has its own: of its collection (`instruction`), or of its task of mteb.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Literal

from ..data.collection import Collection
from ..extras import extra

OWN, NONE = "own", "none"
INSTRUCTIONS = ("instruction", "document_instruction")
"""What the settings of a system in results call the choice for its queries, and the instruction of its documents."""
LABEL_LENGTH = 40
"""Characters of an instruction that are shown in the name of a system."""


def choose(choice: str, own: str, of_task: str = "") -> str:
    """The instruction of one query.

    Args:
        choice: `own`, `none`, or an instruction for the queries that have none of their own.
        own: that of the query; empty where it has none.
        of_task: that of its task, for queries without their own.

    Example:
        >>> choose("own", "", "Find a page."), choose("none", "Find it."), choose("Find code.", "", "Find a page.")
        ('Find a page.', '', 'Find code.')
    """
    if choice == NONE:
        return ""
    return own or (of_task if choice == OWN else choice).strip()


def choices(collection: Collection, split: str) -> tuple[str, ...]:
    """What an evaluation measures where nothing is asked for: `own`, and `none` where it is another question.

    Where instructions change (p-MRR), without them there is nothing to measure.
    """
    instructed = any(collection.queries[query_id].instruction for query_id in collection.split(split))
    return (OWN, NONE) if instructed and not collection.changed else (OWN,)


def task_instruction(metadata: Any, side: Literal["query", "document"]) -> str:
    """The prompt of a task of mteb, as mteb's own wrappers take it; one without a side is for queries.

    Args:
        metadata: of the task (`mteb.TaskMetadata`).
        side: whose prompt.

    Returns:
        The task's, else for queries the general one of its type; empty where there is none.
    """
    prompt = metadata.prompt
    if isinstance(prompt, Mapping):
        return str(prompt.get(side) or "").strip()
    if side == "document":
        return ""
    if not prompt:
        with extra("mteb"):
            from mteb.abstasks.abstask import get_abstask_prompt

        prompt = get_abstask_prompt(metadata.name)
    return str(prompt).strip()


def short(choice: str) -> str:
    """The beginning of an instruction, on one line and without the signs of tables and of rich's markup.

    Example:
        >>> short("Find a [page]"), short("Given a question, retrieve passages that answer the question")
        ('Find a page', 'Given a question, retrieve passages that...')
    """
    plain = " ".join(re.sub(r"[\s\[\]|`]+", " ", choice).split())
    return plain if len(plain) <= LABEL_LENGTH else f"{plain[:LABEL_LENGTH].rstrip()}..."


def label(choice: str) -> str:
    """What follows the name of a system; nothing for `own`.

    Example:
        >>> label("own"), label("none"), label("Find code.")
        ('', ' (none)', ' (Find code.)')
    """
    return "" if choice == OWN else f" ({short(choice)})"


def file_label(choice: str) -> str:
    """A short name for the folders of an instruction, of its beginning and a hash of all of it.

    Example:
        >>> file_label("own"), file_label("Find code.")
        ('own', 'Find-code-f7b5b0ae')
    """
    if choice in (OWN, NONE):
        return choice
    plain = re.sub(r"[^A-Za-z0-9]+", "-", choice)[:LABEL_LENGTH].strip("-")
    return f"{plain}-{hashlib.sha256(choice.encode()).hexdigest()[:8]}"
