"""What rankings can be restricted to, for tests that hold one ranking against another."""

from __future__ import annotations

from collections.abc import Sequence

from search_r3.data.restrictions import Restrictions


def every_limit(ids: Sequence[str]) -> list[Restrictions]:
    """Nothing, documents left out, pools, both, and restrictions that leave nothing; of at least 50 documents."""
    return [
        Restrictions(),
        Restrictions(left_out=frozenset(ids[::3])),
        Restrictions(left_out=frozenset({"d05", "not here"})),
        Restrictions(pool=frozenset(ids[10:50:2])),
        Restrictions(pool=frozenset(ids[:30]), left_out=frozenset(ids[:30:4])),
        Restrictions(pool=frozenset()),
        Restrictions(left_out=frozenset(ids)),
    ]
