"""Counts, histograms and extremes of all rows of a run, in one pass and in constant memory.

Along with them a sample is taken. It is of the results whose tiles have the
smallest keys: a key is the SHA-256 of a tile's pixels, so this is as good as drawing them, is the
same for everyone who asks, and does not depend on order, units or machines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cytosyn_aug.runs.listing import corner
from cytosyn_aug.runs.manifest import Manifest

SAMPLE_ROWS = 1024
NUM_WORST = 6
_NUM_EXTREME = 8 * NUM_WORST  # variants of one tile tend to be extreme together
MAX_NAMED = 100
_MAX_REASONS = 1000
_DONE = ("edited", "generated", "cached")
_COLUMNS = (
    "source",
    "variant",
    "status",
    "reason",
    "label",
    "slide",
    "x",
    "y",
    "mpp",
    "output",
    "key",
    "seed",
    "reference",
    "strength",
    "similarity",
    "colour_distance",
    "recipe",
)
ManifestRow = Mapping[str, Any]  # Any: cells of a manifest


class Histogram:
    """Counts of values in bins of one width; values outside count in the outermost bins.

    Args:
        low: Left edge of the first bin.
        high: Right edge of the last one.
        num_bins: How many.
    """

    def __init__(self, low: float, high: float, num_bins: int) -> None:
        self.low, self.high = low, high
        self.counts = np.zeros(num_bins)

    def add(self, values: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Count values [N], each as much as its weight."""
        num_bins = len(self.counts)
        position = (np.asarray(values) - self.low) * (num_bins / (self.high - self.low))
        # A hair to the right: 0.7 is 0.69999 in float32, and bins have round edges.
        bins = np.clip(np.floor(position + 1e-4), 0, num_bins - 1).astype(np.intp)
        self.counts += np.bincount(bins, weights, num_bins)

    @property
    def centres(self) -> np.ndarray:
        """Middles of the bins."""
        width = (self.high - self.low) / len(self.counts)
        return self.low + (np.arange(len(self.counts)) + 0.5) * width

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self.counts.sum())

    def quantile(self, share: float) -> float | None:
        """Return the value that this share lies below, to a bin; None if nothing was counted."""
        if not self.total:
            return None
        index = int(np.searchsorted(self.counts.cumsum(), share * self.total))
        return float(self.centres[min(index, len(self.counts) - 1)])


@dataclass
class Group:
    """Results of one reference or slide: how many, and the sums of what is known of them."""

    num_results: int = 0
    distance: float = 0.0
    num_distances: int = 0
    similarity: float = 0.0
    num_similarities: int = 0

    @property
    def mean_distance(self) -> float | None:
        """Mean distance in CIE Lab from source to result."""
        return self.distance / self.num_distances if self.num_distances else None

    @property
    def mean_similarity(self) -> float | None:
        """Mean cosine similarity to the source."""
        return self.similarity / self.num_similarities if self.num_similarities else None


@dataclass
class Tally:
    """What rows add up to.

    Attributes:
        statuses: Rows by status.
        reasons: Rows by status and reason, at most a thousand of the latter.
        named: By status, the first hundred tiles with a variant that was not edited, and the reason
            of the first such variant.
        similarity: Of results that were kept.
        rejected_similarity: Of those that were not.
        distance: Distance in CIE Lab of results from their sources.
        references: By name.
        slides: By name, of the results.
        sample: Results, see above; columns of the manifest, ordered by key and variant.
        least_similar: Results with the least similarity, the least first.
        most_changed: Results with the largest colour distance, the largest first.
        recipe: Digest of recipe, references and model.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    named: dict[str, dict[str, str]] = field(default_factory=dict)
    similarity: Histogram = field(default_factory=lambda: Histogram(-1.0, 1.0, 400))
    rejected_similarity: Histogram = field(default_factory=lambda: Histogram(-1.0, 1.0, 400))
    distance: Histogram = field(default_factory=lambda: Histogram(0.0, 100.0, 1000))
    references: dict[str, Group] = field(default_factory=dict)
    slides: dict[str, Group] = field(default_factory=dict)
    sample: list[ManifestRow] = field(default_factory=list)
    least_similar: list[ManifestRow] = field(default_factory=list)
    most_changed: list[ManifestRow] = field(default_factory=list)
    recipe: str = ""

    @property
    def num_rows(self) -> int:
        """All rows."""
        return sum(self.statuses.values())

    @property
    def num_done(self) -> int:
        """Rows of results that differ from their source."""
        return sum(self.statuses[status] for status in _DONE)


class _Order(NamedTuple):
    """What makes a row come first: a column, then what tells rows apart."""

    column: str
    is_ascending: bool
    num_rows: int

    def first(self, table: pa.Table) -> pa.Table:
        direction = "ascending" if self.is_ascending else "descending"
        keys = [(self.column, direction)]
        keys += [(n, "ascending") for n in ("key", "variant", "source") if n != self.column]
        indices = pc.select_k_unstable(table, k=min(self.num_rows, len(table)), sort_keys=keys)
        return table.take(indices)


_SAMPLE = _Order("key", True, SAMPLE_ROWS)
_LEAST_SIMILAR = _Order("similarity", True, _NUM_EXTREME)
_MOST_CHANGED = _Order("colour_distance", False, _NUM_EXTREME)


def tally_rows(manifest: Manifest) -> Tally:
    """Read all rows of a run once.

    Raises:
        FileNotFoundError: The run went on meanwhile; open it again.
    """
    tally = Tally()
    first: dict[_Order, pa.Table] = {}
    for part in manifest.parts(_COLUMNS):
        _count(tally, part)
        done = part.filter(pc.is_in(part["status"], pa.array(_DONE)))
        for order in (_SAMPLE, _LEAST_SIMILAR, _MOST_CHANGED):
            known = done.filter(pc.is_valid(done[order.column]))
            before = [first[order]] if order in first else []
            first[order] = order.first(pa.concat_tables([*before, known]).combine_chunks())
    if first:
        tally.sample = first[_SAMPLE].to_pylist()
        tally.least_similar = first[_LEAST_SIMILAR].to_pylist()
        tally.most_changed = first[_MOST_CHANGED].to_pylist()
    return tally


def tile_name(source: str, x: int | None, y: int | None) -> str:
    """Return what tells a tile from others: its source, and its place where that does not say it.

    Args:
        source: Its path, or that of its slide.
        x: Column of its corner, None if not known.
        y: Row of pixels of its corner.
    """
    is_said = x is None or corner(source)[1:] == (x, y)
    return source if is_said else f"{source} at {x}, {y}"


def _count(tally: Tally, part: pa.Table) -> None:
    for pair in pc.value_counts(part["status"]).to_pylist():
        tally.statuses[pair["values"]] += pair["counts"]
    is_done = pc.is_in(part["status"], pa.array(_DONE))
    done, others = part.filter(is_done), part.filter(pc.invert(is_done))
    tally.similarity.add(_numbers(done["similarity"]))
    rejected = others.filter(pc.equal(others["status"], "rejected"))
    tally.rejected_similarity.add(_numbers(rejected["similarity"]))
    tally.distance.add(_numbers(done["colour_distance"]))
    _group(tally.references, done, "reference")
    _group(tally.slides, done, "slide")
    _name(tally, others)
    if len(part):
        tally.recipe = part["recipe"][0].as_py() or ""


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    numbers = column.drop_null().to_numpy()
    return numbers[np.isfinite(numbers)].astype(np.float64)


def _group(groups: dict[str, Group], done: pa.Table, column: str) -> None:
    measures = [("colour_distance", "sum"), ("colour_distance", "count")]
    measures += [("similarity", "sum"), ("similarity", "count")]
    sums = done.group_by(column).aggregate([([], "count_all"), *measures])
    for row in sums.to_pylist():
        if not row[column]:
            continue
        group = groups.setdefault(row[column], Group())
        group.num_results += row["count_all"]
        group.distance += row["colour_distance_sum"] or 0.0
        group.num_distances += row["colour_distance_count"]
        group.similarity += row["similarity_sum"] or 0.0
        group.num_similarities += row["similarity_count"]


def _name(tally: Tally, others: pa.Table) -> None:
    """Count reasons, and name the first tiles that were not edited."""
    columns = (others[name].to_pylist() for name in ("status", "source", "x", "y", "reason"))
    for status, source, x, y, reason in zip(*columns, strict=True):
        named = tally.named.setdefault(status, {})
        if len(named) < MAX_NAMED:
            named.setdefault(tile_name(source, x, y), reason or "")
        if (status, reason) in tally.reasons or len(tally.reasons) < _MAX_REASONS:
            tally.reasons[status, reason or ""] += 1
