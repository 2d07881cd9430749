"""Shards of a corpus: each is encoded into a folder of its own, and a manifest makes one index of all.

They are cut where the blocks of an unbroken encoding begin, so that each document is in the batch that it would be in
there, and has the vector with the same bytes. `INDEX/shard-00001-of-00004` is an index of its documents; the manifest
in `INDEX` names the vectors of all shards, which stay where they are, and says which shard holds each row.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock

from ...errors import ConfigError, VectorIndexError
from .. import storage
from ..index import descending
from .identity import difference_of
from .survey import Span, Survey, span_of

_NAME = re.compile(r"shard-(\d{5})-of-(\d{5})")


class Shard(NamedTuple):
    """One of the parts that a corpus is cut into; `number` counts from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that `I/N` names.

        Example:
            >>> Shard.parse("1/4")
            Shard(number=1, of=4)

        Raises:
            ConfigError: it names none.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        shard = cls(int(match[1]), int(match[2])) if match else cls(0, 0)
        if not 1 <= shard.number <= shard.of <= 99_999:
            raise ConfigError(f"no shard {text!r}: expected I/N with I from 1 to N, as 1/4, 2/4, 3/4, 4/4")
        return shard

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"shard-{self.number:05}-of-{self.of:05}"

    def span(self, survey: Survey) -> Span:
        """Its documents: whole blocks, as many as every other shard has, or one more.

        Raises:
            ConfigError: there are more shards than blocks.
        """
        blocks, size = len(survey.digests), survey.block_size
        if self.of > blocks:
            raise ConfigError(
                f"{self.of} shards, but the corpus has {blocks} blocks of {size} documents, which are not cut; "
                f"use at most {blocks} shards"
            )
        first, end = (blocks * number // self.of * size for number in (self.number - 1, self.number))
        return span_of(survey, first, end)

    def facts(self, span: Span, survey: Survey) -> dict[str, Any]:
        """What its manifest says beside what that of an index says."""
        cut = {"number": self.number, "of": self.of, "first": span.first, "block_size": survey.block_size}
        return {"documents": len(span), "shard": cut | {"corpus": len(survey.doc_ids)}}


def shards_in(folder: Path) -> dict[Shard, bool]:
    """The shards that were begun in a folder, and whether each is finished."""
    names = [_NAME.fullmatch(path.name) for path in sorted(folder.glob("shard-*"))]
    shards = [Shard(int(name[1]), int(name[2])) for name in names if name]
    return {shard: (folder / shard.folder / storage.MANIFEST).exists() for shard in shards}


def check_cut(folder: Path, shard: Shard | None) -> None:
    """Refuse a shard of a corpus that is encoded otherwise, and all of them as a whole while some are not finished.

    Raises:
        VectorIndexError: the folder holds other shards, or no shards; or some are missing where none is asked for.
    """
    shards = shards_in(folder)
    if shard is None:
        of = max(shards).of
        missing = [Shard(number, of) for number in range(1, of + 1)]
        missing = [one for one in missing if not shards.get(one)]
        if missing:
            names = ", ".join(f"{one.number}/{one.of}" for one in missing[:8]) + (", ..." if missing[8:] else "")
            raise VectorIndexError(
                f"{folder} holds {of - len(missing)} of {of} shards; encode the others with --shard: {names}"
            )
    elif others := [one for one in shards if one.of != shard.of]:
        raise VectorIndexError(
            f"{folder} holds shards of {others[0].of}, not of {shard.of}; nothing in it was changed: go on with "
            "those, or choose another folder"
        )
    elif (folder / storage.UNFINISHED).exists():
        raise VectorIndexError(
            f"{folder} holds an encoding that is not cut into shards; nothing in it was changed: go on without "
            "--shard, or choose another folder"
        )


def merge_shards(folder: Path) -> bool:
    """Make one index of the shards, where all are finished; whether it is there.

    Several processes may ask for it at once, each after its own shard.

    Raises:
        VectorIndexError: the shards do not belong together, one is damaged, or the disk refuses.
    """
    shards = shards_in(folder)
    of = max(shards).of
    if not all(shards.get(Shard(number, of)) for number in range(1, of + 1)):
        return False
    with FileLock(folder / ".merge.lock"):
        if not (folder / storage.MANIFEST).exists():
            _merge(folder, [Shard(number, of) for number in range(1, of + 1)])
    return True


def _merge(folder: Path, shards: list[Shard]) -> None:
    manifests, paths, probes = [], [], []
    for shard in shards:
        with storage.readable(folder / shard.folder):
            manifest, files = storage.read_manifest(folder / shard.folder)
            probes.append(storage.read_array(files["probe.npy"], (1, manifest["dimension"]), "float32"))
        manifests.append(manifest)
        paths.append(files)
    first = 0
    for shard, manifest, probe in zip(shards, manifests, probes, strict=True):
        same_cut = {**manifest, "shard": manifests[0]["shard"]}
        difference = difference_of(same_cut, manifests[0], probe, probes[0])
        if not difference and manifest["shard"]["first"] != first:
            difference = f"in blocks of {manifest['shard']['block_size']}, not of {manifests[0]['shard']['block_size']}"
        if difference:
            raise VectorIndexError(
                f"{folder / shard.folder} and {shards[0].folder} are no shards of one index: it was encoded "
                f"{difference}; remove one of them and encode it again"
            )
        first += manifest["documents"]
    doc_ids, owners = [], []
    for number, (shard, manifest, files) in enumerate(zip(shards, manifests, paths, strict=True)):
        with storage.readable(folder / shard.folder):
            doc_ids += list(storage.read_doc_ids(files, manifest["documents"]))
        owners.append(np.full(manifest["documents"], number, dtype=np.int32))
    order = descending(doc_ids)
    labels = storage.label_writers([doc_ids[row] for row in order], np.zeros(len(order), dtype=np.int64))
    writers: dict[str, storage.FileWriter | Path] = {
        storage.shard_file(number): files["vectors.npy"] for number, files in enumerate(paths)
    }
    owner = torch.from_numpy(np.concatenate(owners)[order])
    writers |= {"shards.npy": storage.write_array(owner, len(owner))}
    writers |= {"probe.npy": storage.write_array(torch.from_numpy(probes[0]), 1), **labels}
    facts = {key: value for key, value in manifests[0].items() if key not in ("format", "files", "shard")}
    facts |= {"documents": len(order), "shards": [manifest["documents"] for manifest in manifests]}
    storage.save_state(folder, writers, facts)
