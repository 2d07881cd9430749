"""Mode auto over an engine thread: all queries at once, then those that think; or as the model itself decides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ..model.encoder import SearchR3
from ..model.modes.auto import choose, gate_of
from ..model.modes.first import decides
from ..model.modes.gate import Choice
from .engine import EngineThread
from .filters import Filter
from .jobs import Outcome, joined
from .search import top_scores
from .store import Store


def who_thinks(model: SearchR3, direct: Outcome, store: Store | None, where: Filter | None = None) -> Choice:
    """What the gate says of queries in direct mode; of a store it reads the best scores of what is searched.

    Raises:
        ModelError: there is no gate.
    """
    whole = np.stack([one.vector if one.whole is None else one.whole for one in direct.texts])
    scores = None if store is None else partial(top_scores, store, where=where)
    return choose(model.backbone, whole, model.truncate_dim, scores, None)


def encode_auto(
    engine: EngineThread, texts: Sequence[str], store: Store | None, where: Filter | None = None, **options: Any
) -> Outcome:
    """Queries in mode auto over the documents that `where` leaves; `options` are those of `EngineThread.submit`.

    Raises:
        ModelError: there is no gate.
    """
    if decides(engine.model.backbone):
        return engine.submit(texts, "auto", **options).result()
    gate_of(engine.model.backbone)
    of_direct = {name: value for name, value in options.items() if name != "max_new_tokens"}
    direct = engine.submit(texts, "direct", **of_direct).result()
    choice = who_thinks(engine.model, direct, store, where)
    places = np.flatnonzero(choice.thinks).tolist()
    thinkers = [texts[place] for place in places]
    return joined(direct, engine.submit(thinkers, "reason", **options).result() if places else None, choice)
