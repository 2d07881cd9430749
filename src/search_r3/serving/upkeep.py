"""Whether a store is whole, and copies of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import StoreError
from ..files import atomic_directory
from .rows import chunk_of, revision_of_rows, row_digest
from .store import Store


def verify(store: Store) -> list[str]:
    """Read all that a store holds; what is wrong with it, a line each, none where all is well.

    Every text, place and metadata is compared with the hash that was written with its document, so a document of
    which a part is missing or damaged is found. Of vectors, what is no unit vector is found.
    """
    problems, digests, revisions = [], dict[str, list[str]](), dict[str, set[str]]()
    ids, count, odd, texts = set[str](), 0, 0, 0
    try:
        for batch in store.batches():
            for row in batch.to_pylist():
                chunk = chunk_of(row)
                ids.add(chunk.doc_id)
                digests.setdefault(chunk.parent_id, []).append(row_digest(chunk))
                revisions.setdefault(chunk.parent_id, set()).add(row["revision"])
                texts += chunk.full_text != row["full_text"]
            size = store.info.fingerprint.dimension
            norms = np.linalg.norm(batch["vector"].flatten().to_numpy(zero_copy_only=False).reshape(-1, size), axis=1)
            odd += int((~(np.abs(norms - 1) < 1e-3)).sum())
            count += batch.num_rows
    except StoreError as error:
        return [
            f"{error}; earlier versions may be whole: in Python, Store.open(...).versions() and .rollback(VERSION), or "
            "restore a backup"
        ]
    half = [name for name in digests if revisions[name] != {revision_of_rows(digests[name])}]
    if half:
        problems.append(f"{len(half):,} documents are not what was written (first: {half[0]!r}); delete and index them")
    if len(ids) != count:
        problems.append(f"{count - len(ids):,} chunks have the id of another; index the documents into a new store")
    if texts or odd:
        problems.append(
            f"{texts:,} encoded texts and {odd:,} vectors are damaged; index the documents into a new store"
        )
    for name, rows in store.indexed().items():
        if rows != count:
            problems.append(f"the index {name} knows {rows:,} of {count:,} chunks; search-r3 store compact mends it")
    return problems


def copy_store(store: Store, address: str | Path) -> Store:
    """Write all documents of a store into a new one, which is whole or not there; writers wait meanwhile.

    A backup is such a copy: it can be opened and asked, and is restored by copying it back.

    Raises:
        StoreError: something is there already, it cannot be written, or what was written is not what was read.
    """
    info = store.info
    facts = {name: getattr(info, name) for name in ("model", "revision", "prompts", "chunk_tokens", "chunk_overlap")}
    if "://" in str(address):
        return _copy(store, str(address), facts)
    target = Path(address).expanduser()
    if target.exists():
        raise StoreError(f"{target} exists; nothing is overwritten: move it away, or choose another place")
    with atomic_directory(target) as scratch:
        _copy(store, scratch, facts)
    return Store.open(target)


def _copy(store: Store, address: str | Path, facts: dict[str, object]) -> Store:
    with store.unchanged():
        count = len(store)
        copy = Store.create(address, store.info.fingerprint, batches=store.batches(), **facts)
    copy.compact()
    problems = verify(copy) + ["chunks are missing"] * (len(copy) < count)
    if problems:
        raise StoreError(f"the copy at {address} is not whole: {'; '.join(problems)}; try again")
    return copy
