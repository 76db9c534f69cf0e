"""Missing tables: which rows of a data set lack which modality, seeded, nested in the ratio, free of the ids' order.

A table is made once for a split and says so in its header; the table of another set is refused. Nothing here needs
torch.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polymodal.errors import UserError, did_you_mean
from polymodal.files import write_json
from polymodal.paths import require_dir, require_files

from missing_modal.patterns import IMAGE_TEXT, Pattern, all_masks, from_mask, mask_name, to_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from missing_modal.data.base import MissingConfig, Sample

__all__ = [
    "SCHEMA_VERSION",
    "MissingTable",
    "canonical_kind",
    "combine",
    "draw_masks",
    "draw_table",
    "load_table",
    "missing_table",
    "natural_mask",
    "row_ids",
    "save_table",
    "table_for",
    "table_name",
]

SCHEMA = "missing_modal.table"
SCHEMA_VERSION = 1
CUSTOM = "custom"
"""kind of a table that no generator made: the official files, a user's own"""
_REMEDY = "write the table anew (mm-data), or give the one that belongs to this data"


@dataclass(frozen=True)
class MissingTable:
    """A table with its header.

    Args:
        masks: row id -> pattern, as a bit mask over ``modalities``.
        dataset: name of the data set.
        split: train, val or test.
        modalities: in the order of the model.
        kind: what goes missing (``canonical_kind``), or ``custom`` where no generator made it.
        ratio: share of the rows that lack something, 0..1.
        seed: of the draw; None for a custom table.
        weights: kind ``any``: weight by pattern name; empty means uniform.
    """

    masks: dict[str, int]
    dataset: str
    split: str
    modalities: tuple[str, ...] = IMAGE_TEXT
    kind: str = CUSTOM
    ratio: float = 0.0
    seed: int | None = None
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def patterns(self) -> dict[str, Pattern]:
        """Row id -> code 0, 1, 2 (image and text), or the set of the names that are present."""
        return {row: from_mask(mask, self.modalities) for row, mask in self.masks.items()}

    def counts(self) -> dict[str, int]:
        """Rows of each pattern by name, the complete one first; patterns without a row have 0."""
        found = Counter(self.masks.values())
        return {mask_name(mask, self.modalities): found[mask] for mask in all_masks(self.modalities)}


def canonical_kind(kind: str, modalities: Sequence[str] = IMAGE_TEXT) -> str:
    """The one spelling of a kind, which enters the seed of the draw.

    Args:
        kind: ``none``; ``both`` (two modalities, half of the incomplete rows each); ``any`` (a pattern a row);
            ``only:NAME`` or ``NAME``: NAME alone goes missing, as ``text`` and ``image`` in the official tables.
        modalities: in the order of the model.

    Raises:
        UserError: unknown, or it does not fit the number of modalities.
    """
    name = kind.removeprefix("only:")
    if name in modalities and (len(modalities) > 1):
        return name if tuple(modalities) == IMAGE_TEXT else f"only:{name}"
    known = ["none"] + ["both"] * (len(modalities) == 2) + ["any"] * (len(modalities) > 1)
    if kind in known:
        return kind
    if len(modalities) > 1:
        known += list(modalities) if tuple(modalities) == IMAGE_TEXT else [f"only:{m}" for m in modalities]
    hint = did_you_mean(kind, known)
    raise UserError(f"missing kind {kind!r} with {', '.join(modalities)}; {hint}expected one of {', '.join(known)}")


def _generator(seed: int, dataset: str, split: str, kind: str) -> np.random.Generator:
    """The generator of DCP 4.3, a function of the names."""
    name = zlib.crc32(f"{dataset}|{split}|{kind}".encode())
    return np.random.default_rng(np.random.SeedSequence([seed, name]))


def _check(ratio: float, seed: int) -> None:
    if not 0 <= ratio <= 1:
        raise UserError(
            f"missing ratio {ratio}; expected a share from 0 to 1, 0.7 takes something from 70 % of the rows"
        )
    if seed < 0:
        raise UserError(f"missing seed {seed}; expected 0 or more")


def _cumulative(
    weights: Mapping[str, float] | None, modalities: Sequence[str]
) -> tuple[list[int], NDArray[np.float64]]:
    """Incomplete patterns, and their cumulative shares."""
    masks = all_masks(modalities)[1:]
    if not weights:
        shares = np.ones(len(masks))
    else:
        by_mask = {to_mask(name, modalities): float(value) for name, value in weights.items()}
        unfit = [value for value in by_mask.values() if not (value >= 0 and np.isfinite(value))]
        if masks and (
            unfit or len(by_mask) < len(weights) or not set(by_mask) <= set(masks) or not sum(by_mask.values())
        ):
            known = ", ".join(mask_name(mask, modalities) for mask in masks)
            raise UserError(
                f"missing weights {dict(weights)}; expected weights >= 0, not all 0, for incomplete patterns: {known}"
            )
        shares = np.array([by_mask.get(mask, 0.0) for mask in masks])
    total = np.cumsum(shares)
    return masks, total / total[-1]


def draw_masks(
    count: int,
    kind: str,
    ratio: float,
    seed: int,
    dataset: str,
    split: str,
    modalities: Sequence[str] = IMAGE_TEXT,
    weights: Mapping[str, float] | None = None,
) -> NDArray[np.int64]:
    """Patterns by place in the sorted ids: what ``missing_table`` returns, as an array.

    A permutation pi of the places is a function of (seed, dataset, split, kind) alone, and int(N * ratio) of its first
    places lack something: a larger ratio only adds to a smaller one. int() truncates as in the official code, so that
    int(100 * 0.29) = 28.

    Args:
        count: N rows.
        kind: see ``canonical_kind``; ``both``: the k-th place of pi (from 0) lacks the first modality (image) iff
            int((k + 1) / 2) > int(k / 2), else the second; ``any``: place k draws its pattern from the same generator
            after pi, independent of the ratio.
        ratio: share of rows that lack something, 0..1.
        seed: root seed >= 0.
        dataset: name.
        split: name.
        modalities: in the order of the model.
        weights: kind ``any``: weight by pattern name, uniform by default.

    Returns:
        (N,) int64 bit masks.

    Raises:
        UserError: unknown kind, ratio outside 0..1, negative seed, weights that fit no pattern.

    Source:
        DCP (arXiv 2410.06558), our specification 4.3.
    """
    kind = canonical_kind(kind, modalities)
    _check(ratio, seed)
    full = 2 ** len(modalities) - 1
    masks = np.full(count, full, dtype=np.int64)
    if kind == "none":
        return masks
    rng = _generator(seed, dataset, split, kind)
    order = rng.permutation(count)
    taken = int(count * ratio)
    if kind == "any":
        choices, shares = _cumulative(weights, modalities)
        drawn = np.searchsorted(shares, rng.random(count), side="right")
        masks[order[:taken]] = np.array(choices, dtype=np.int64)[drawn[:taken]]
        return masks
    if kind == "both":
        place = np.arange(taken)
        lacking = np.where((place + 1) // 2 > place // 2, 0, 1)
    else:
        lacking = np.full(taken, list(modalities).index(kind.removeprefix("only:")))
    masks[order[:taken]] = full & ~(np.int64(1) << lacking)
    return masks


def _sorted_ids(ids: Iterable[str]) -> list[str]:
    ordered = sorted(ids)
    twice = next((a for a, b in pairwise(ordered) if a == b), None)
    if twice is not None:
        raise UserError(f"row {twice} occurs twice; a missing table has one entry a row")
    return ordered


def draw_table(
    ids: Iterable[str],
    kind: str,
    ratio: float,
    seed: int,
    dataset: str,
    split: str,
    modalities: Sequence[str] = IMAGE_TEXT,
    weights: Mapping[str, float] | None = None,
) -> MissingTable:
    """``missing_table`` with its header, ready to be saved. Arguments and errors are the same."""
    ordered = _sorted_ids(ids)
    masks = draw_masks(len(ordered), kind, ratio, seed, dataset, split, modalities, weights)
    return MissingTable(
        masks=dict(zip(ordered, masks.tolist(), strict=True)),
        dataset=dataset,
        split=split,
        modalities=tuple(modalities),
        kind=canonical_kind(kind, modalities),
        ratio=float(ratio),
        seed=seed,
        weights=dict(weights or {}),
    )


def missing_table(
    ids: Iterable[str],
    kind: str,
    ratio: float,
    seed: int,
    dataset: str,
    split: str,
    modalities: Sequence[str] = IMAGE_TEXT,
    weights: Mapping[str, float] | None = None,
) -> dict[str, Pattern]:
    """Which rows lack what: reproducible, nested in the ratio, the same for any order of the ids.

    ``kind="image", ratio=0.7`` takes the image from 70 % of the rows and leaves 30 % complete; ``both`` takes the image
    from 35 %, the text from 35 %. Ratio 0 gives the all-complete table.

    Args:
        ids: distinct row ids, in any order.
        kind: ``text``, ``image``, ``both``, ``any``, ``only:NAME``, ``none`` (``canonical_kind``).
        ratio: share of rows that lack something, 0..1.
        seed: root seed >= 0.
        dataset: name of the data set.
        split: train, val or test.
        modalities: in the order of the model.
        weights: kind ``any``: weight by pattern name, uniform by default.

    Returns:
        Row id -> pattern: code 0 complete, 1 text missing, 2 image missing for image and text; beyond these the set of
        the names that are present.

    Raises:
        UserError: an id twice, an unknown kind, ratio outside 0..1, a negative seed, weights that fit no pattern.

    Source:
        DCP (arXiv 2410.06558), our specification 4.3.

    >>> missing_table(["a", "b", "c", "d"], "both", 0.5, 0, "toy", "train")
    {'a': 0, 'b': 2, 'c': 0, 'd': 1}
    """
    return draw_table(ids, kind, ratio, seed, dataset, split, modalities, weights).patterns


def natural_mask(inputs: Mapping[str, Any], modalities: Sequence[str]) -> int:
    """Bit mask of what a sample really has: everything that is not None (``Sample.inputs``)."""
    return sum(1 << number for number, name in enumerate(modalities) if inputs.get(name) is not None)


def combine(natural: int, table: int) -> int:
    """Pattern of a sample that really has ``natural`` where the table leaves ``table``; both are bit masks.

    The table only removes. Where it would take the last modality, the sample stays as it is: an empty row cannot be
    classified, and taking another modality in its place would change the table.
    """
    return natural & table or natural


def row_ids(samples: Iterable[Sample]) -> list[str]:
    """Distinct rows of the samples in their order: several plots of a film are one row."""
    return list(dict.fromkeys(sample.table_id for sample in samples))


# ------------------------------------------------------------------ files


def _sha256(value: Any) -> str:
    """sha256 of a JSON value in one fixed spelling."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _entries(table: MissingTable) -> dict[str, int | str]:
    """Pattern of each row as it stands in the file: a code, or names joined by ``+``."""
    if table.modalities == IMAGE_TEXT:
        return {row: int(from_mask(mask)) for row, mask in sorted(table.masks.items())}  # type: ignore[arg-type]
    return {row: mask_name(mask, table.modalities) for row, mask in sorted(table.masks.items())}


def save_table(path: Path, table: MissingTable) -> None:
    """Write a table as JSON: header, sha256 of the ids, sha256 of header and patterns, {id: pattern}.

    Raises:
        UserError: the file cannot be written.
    """
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "dataset": table.dataset,
        "split": table.split,
        "modalities": list(table.modalities),
        "kind": table.kind,
        "ratio": table.ratio,
        "seed": table.seed,
        "weights": table.weights,
        "rows": len(table.masks),
        "counts": table.counts(),
        "ids_sha256": _sha256(sorted(table.masks)),
        "patterns": _entries(table),
    }
    write_json(path, {**record, "sha256": _sha256(record)})


def _read(path: Path) -> dict[str, Any]:
    """A table file whose checksum holds."""
    require_files(path.parent, [path.name], "missing table", _REMEDY)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        schema, version = record["schema"], record["schema_version"]
        if schema != SCHEMA or not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"schema {schema!r}, version {version!r}")
        if version > SCHEMA_VERSION:
            raise UserError(
                f"missing table {path}: schema version {version} is newer than {SCHEMA_VERSION}; update missing_modal"
            )
        said = record.pop("sha256")
        if said != _sha256(record):
            raise ValueError("its checksum does not hold: it was changed after it was written")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"missing table {path} is damaged ({error}); {_REMEDY}") from error
    return dict(record)


def _differs(path: Path, what: str, found: Any, wanted: Any) -> UserError:
    return UserError(f"missing table {path}: its {what} is {found}, this data's is {wanted}; {_REMEDY}")


def load_table(
    path: Path, ids: Iterable[str], dataset: str, split: str, modalities: Sequence[str] = IMAGE_TEXT
) -> MissingTable:
    """Read a table for these rows: JSON, or the official ``.pt`` (its entries follow the order of ``ids``).

    Args:
        path: the file.
        ids: rows of the split, in the order of the data set.
        dataset: name of the data set.
        split: train, val or test.
        modalities: in the order of the model.

    Raises:
        UserError: missing or damaged file, newer schema, the table of another data set, split or set of ids, or of
            other modalities.
    """
    rows = list(ids)
    ordered = _sorted_ids(rows)
    if path.suffix == ".pt":
        from missing_modal.official_tables import read_official

        return read_official(path, rows, dataset, split, modalities)
    record = _read(path)
    for what, wanted in (("dataset", dataset), ("split", split), ("modalities", list(modalities))):
        if record.get(what) != wanted:
            raise _differs(path, what, record.get(what), wanted)
    try:
        entries: dict[str, int | str] = record["patterns"]
        masks = {row: to_mask(pattern, modalities) for row, pattern in entries.items()}
        header: dict[str, Any] = {
            "kind": str(record["kind"]),
            "ratio": float(record["ratio"]),
            "seed": None if record["seed"] is None else int(record["seed"]),
            "weights": {str(name): float(value) for name, value in record["weights"].items()},
        }
        said = record["ids_sha256"]
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"missing table {path} is damaged ({error}); {_REMEDY}") from error
    if sorted(masks) != ordered or said != _sha256(ordered):
        other = sorted(set(ordered) ^ set(masks))
        example = f", e.g. {other[0]} is in one only" if other else ""
        raise UserError(
            f"missing table {path}: {len(masks)} other rows than the {len(ordered)} here{example}; {_REMEDY}"
        )
    return MissingTable(masks, dataset, split, tuple(modalities), **header)


def table_name(dataset: str, split: str, kind: str, ratio: float, seed: int | None = None) -> str:
    """File name of a table: ours with its seed (``.json``), or the official one without (``.pt``).

    >>> table_name("mmimdb", "train", "both", 0.7)
    'mmimdb_train_missing_both_07.pt'
    >>> table_name("mmimdb", "train", "both", 0.7, seed=3)
    'mmimdb_train_missing_both_07_seed3.json'
    """
    stem = f"{dataset}_{split}_missing_{kind.replace(':', '-')}_{str(float(ratio)).replace('.', '')}"
    return f"{stem}.pt" if seed is None else f"{stem}_seed{seed}.json"


def _find(folder: Path, config: MissingConfig, kind: str, ratio: float, dataset: str, split: str) -> Path:
    """The file of a split in a folder of tables."""
    require_dir(
        folder, "folder of missing tables", "give the folder with --missing.tables, or leave it out to draw them"
    )
    names = [table_name(dataset, split, kind, ratio, config.seed), f"{split}.json"]
    # The official files call the validation split of two of the three data sets dev.
    for alias in (split, *(("dev",) if split == "val" else ())):
        names += [table_name(dataset, alias, kind, ratio), f"{alias}.pt"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"no missing table for {split} in {folder}; expected one of {', '.join(dict.fromkeys(names))}")


def table_for(
    config: MissingConfig, ids: Iterable[str], dataset: str, split: str, modalities: Sequence[str] = IMAGE_TEXT
) -> MissingTable:
    """The table of a split as the settings say: read from the folder ``config.tables``, else drawn.

    Args:
        config: ``test_kind`` and ``test_ratio`` hold in val and test where given.
        ids: rows of the split, in the order of the data set.
        dataset: name of the data set.
        split: train, val or test.
        modalities: in the order of the model.

    Raises:
        UserError: as ``draw_table`` and ``load_table``; a file whose kind, ratio or seed are not those of the settings.
    """
    testing = split != "train"
    kind = canonical_kind(config.test_kind if testing and config.test_kind else config.kind, modalities)
    ratio = config.test_ratio if testing and config.test_ratio is not None else config.ratio
    if config.tables is None:
        return draw_table(ids, kind, ratio, config.seed, dataset, split, modalities, config.weights)
    path = _find(config.tables, config, kind, ratio, dataset, split)
    table = load_table(path, ids, dataset, split, modalities)
    if table.kind == CUSTOM:
        return table
    for what, found, wanted in (
        ("kind", table.kind, kind),
        ("ratio", table.ratio, float(ratio)),
        ("seed", table.seed, config.seed),
        ("weights", table.weights, config.weights if kind == "any" else table.weights),
    ):
        if found != wanted:
            raise UserError(
                f"missing table {path}: its {what} is {found}, the settings say {wanted};"
                f" set missing.{what} (test_{what} for val and test) to {found}, or give another folder"
            )
    return table
