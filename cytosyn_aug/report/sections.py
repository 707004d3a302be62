"""Sections of the report on a run that are pictures and tables.

Each function returns a section rendered by the template of its name in `templates/run/`, or nothing
where a run has nothing to show of the kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from markupsafe import Markup

from cytosyn_aug.report.pictures import TileImage
from cytosyn_aug.report.rendering import EmbeddedImage, embed, flattened, own_version, render
from cytosyn_aug.report.run_data import NUM_PAIRS, RunData, round_robin
from cytosyn_aug.report.tallies import MAX_NAMED, NUM_WORST, Group, ManifestRow, tile_name

_MAX_GROUPS = 20
_MAX_REASONS = 10
_STATUSES = {
    "failed": "Could not be read or edited; nothing stands for them in the output.",
    "rejected": "Left out of the output by a rule.",
    "blank": "Too little tissue to tell a stain (under 2 % of the tile); copied unchanged.",
}


class ShownResult(NamedTuple):
    """A source and its result, as a page shows them.

    Attributes:
        tile: What tells the tile from others.
        before: The source.
        after: The result.
        caption: Reference, strength and scores.
    """

    tile: str
    before: EmbeddedImage
    after: EmbeddedImage
    caption: str


class MatrixCell(NamedTuple):
    """A cell of the matrix of contents and references.

    Attributes:
        image: What it shows.
        alt: Read out instead of the image.
        reference: Name above the image, of a reference.
        tile: Name below the image, of a source.
        numbers: Scores below the image, of a result.
    """

    image: EmbeddedImage
    alt: str = ""
    reference: str = ""
    tile: str = ""
    numbers: str = ""


class LeftOut(NamedTuple):
    """Tiles of one status that were not edited.

    Attributes:
        status: Status in the manifest.
        number: Rows with this status.
        meaning: What the status means.
        reasons: Most frequent reasons, with their number of rows; empty where one is given for all.
        named: Tiles, each with its reason.
        has_more: Whether there are more rows than tiles are named.
        is_cut: Whether there are more tiles than are named.
    """

    status: str
    number: int
    meaning: str
    reasons: list[tuple[str, str]]
    named: list[tuple[str, str]]
    has_more: bool
    is_cut: bool


def before_and_after(run: RunData) -> Markup:
    """Return pairs from as many slides and references as there are."""
    rows = _distinct(run.tally.sample, len(run.tally.sample))
    rows = round_robin(rows, NUM_PAIRS, lambda row: (row["reference"], row["slide"]))
    if not rows:
        return Markup()
    return render(
        "run/before_and_after.html.j2",
        has_sources=run.pictures.has_sources,
        results=[_result(run, row) for row in rows],
    )


def content_by_reference(run: RunData) -> Markup:
    """Return the matrix of contents and references."""
    names = run.shown_references
    if not run.matrix:
        return Markup()
    matrix: list[list[MatrixCell | None]] = [[None, *(_reference(run, name) for name in names)]]
    for results in run.matrix:
        row = next(iter(results.values()))
        source = MatrixCell(
            _embedded(run.pictures.before(row)), f"source {_tile(row)}", tile=_tile(row)
        )
        matrix.append([source, *(_restained(run, results.get(name), name) for name in names)])
    if len(names) == 1:  # one column would be mostly empty paper
        matrix = [list(column) for column in zip(*matrix, strict=True)]
    return render(
        "run/content_by_reference.html.j2",
        header=matrix[0],
        rows=matrix[1:],
        num_more=len(run.tally.references) - len(names),
    )


def worst_cases(run: RunData) -> Markup:
    """Return the results that a reader should look at first."""
    scored = sorted(run.measures.scored, key=lambda x: (x.structure, x.row["key"]))
    scores = {_result_id(x.row): x.structure for x in scored}
    of_all = f"of all {run.tally.num_done:,} results"
    largest = "Colour: the largest change"
    if not run.keeps_structure:
        largest = "Delta E, of colour and of structure that was drawn anew: the largest"
    lists = [
        (title, [_result(run, row, scores) for row in _distinct(rows, NUM_WORST)])
        for title, rows in (
            (f"Structure: the least kept, of {len(scored)} measured", [x.row for x in scored]),
            (f"Similarity: the least, {of_all}", run.tally.least_similar),
            (f"{largest}, {of_all}", run.tally.most_changed),
        )
        if rows
    ]
    return render("run/worst_cases.html.j2", lists=lists) if lists else Markup()


def left_out(run: RunData) -> Markup:
    """Name what was not edited, and why."""
    tally, entries = run.tally, []
    for status in sorted(tally.named, key=lambda name: (name not in _STATUSES, name != "failed")):
        number, named = tally.statuses[status], tally.named[status]
        reasons = [
            (f"{count:,}", reason)
            for (of, reason), count in tally.reasons.most_common()
            if of == status and count > 1
        ]
        entries.append(
            LeftOut(
                status=status,
                number=number,
                meaning=_STATUSES.get(status, ""),
                reasons=reasons[:_MAX_REASONS] if number > len(reasons) > 1 else [],
                named=[(name, reason or "too little tissue") for name, reason in named.items()],
                has_more=number > len(named),
                is_cut=len(named) == MAX_NAMED,
            )
        )
    return render("run/left_out.html.j2", entries=entries) if entries else Markup()


def seams(run: RunData) -> Markup:
    """Return whether colour steps between neighbouring tiles."""
    if not run.seams:
        return Markup()
    rows = [(x.slide, x.num_tiles, _ratio(x.before), _ratio(x.after)) for x in run.seams]
    return render("run/seams.html.j2", rows=rows)


def groups(run: RunData) -> Markup:
    """Return numbers of references and slides."""
    kinds = {"reference": run.tally.references, "slide": run.tally.slides}
    tables = []
    for kind, by_name in kinds.items():
        names = sorted(by_name, key=lambda name: (-by_name[name].num_results, name))
        num_others = run.tally.num_done - sum(group.num_results for group in by_name.values())
        if by_name:
            rows = [_group_row(name, by_name[name]) for name in names[:_MAX_GROUPS]]
            tables.append((kind, rows, len(names) - len(rows), num_others))
    return render("run/groups.html.j2", tables=tables) if tables else Markup()


def settings(run: RunData) -> Markup:
    """Return all that makes the run this one."""
    manifest = run.manifest
    pairs = [("digest of recipe, references and model", run.tally.recipe)]
    pairs += list(flattened(manifest.identity))
    pairs += [(f"version of {name}", number) for name, number in manifest.software.items()]
    pairs.append(("input lay at", manifest.context.get("input") or "not recorded"))
    for entry in manifest.context.get("references", []):
        place = entry["place"] or "given as an object"
        pairs.append((f"reference {entry['name']} lay at", place))
    pairs.append(("report by", f"cytosyn_aug {own_version()}"))
    return render("run/settings.html.j2", pairs=pairs)


def _result(
    run: RunData, row: ManifestRow, scores: Mapping[tuple[str, int], float] | None = None
) -> ShownResult:
    caption = [f"to {row['reference']}"] if row["reference"] else []
    if row.get("strength") is not None and row["strength"] != 1:
        caption.append(f"strength {row['strength']:.2f}")
    caption += _numbers(row)
    score = (scores or {}).get(_result_id(row))
    if score is not None:
        caption.append(f"structure {score:.3f}")
    before, after = _embedded(run.pictures.before(row)), _embedded(run.pictures.after(row))
    return ShownResult(_tile(row), before, after, ", ".join(caption))


def _embedded(picture: TileImage) -> EmbeddedImage:
    return embed(picture.pixels, picture.problem)


def _numbers(row: ManifestRow) -> list[str]:
    numbers = []
    if row["colour_distance"] is not None:
        numbers.append(f"Delta E {row['colour_distance']:.1f}")
    if row["similarity"] is not None:
        numbers.append(f"similarity {row['similarity']:.3f}")
    return numbers


def _reference(run: RunData, name: str) -> MatrixCell:
    reference = run.reference(name)
    if reference is None:
        return MatrixCell(embed(None, "not recorded"), reference=name)
    image = embed(reference.tile, reference.problem)
    return MatrixCell(image, f"a tile of reference {name}", reference=name)


def _restained(run: RunData, row: ManifestRow | None, name: str) -> MatrixCell:
    if row is None:
        return MatrixCell(embed(None, "no variant of this tile went here"))
    return MatrixCell(
        _embedded(run.pictures.after(row)),
        f"{_tile(row)} restained to {name}",
        numbers=", ".join(_numbers(row)),
    )


def _group_row(name: str, group: Group) -> tuple[str | None, ...]:
    distance, similarity = group.mean_distance, group.mean_similarity
    return (
        name,
        f"{group.num_results:,}",
        None if distance is None else f"{distance:.1f}",
        None if similarity is None else f"{similarity:.3f}",
    )


def _distinct(rows: Iterable[ManifestRow], most: int) -> list[ManifestRow]:
    """Return the first row of each source."""
    first: dict[str, ManifestRow] = {}
    for row in rows:
        first.setdefault(_place(row), row)
    return list(first.values())[:most]


def _tile(row: ManifestRow) -> str:
    return tile_name(row["source"], row["x"], row["y"])


def _place(row: ManifestRow) -> str:
    return f"{row['source']} {row['x']} {row['y']}"


def _result_id(row: ManifestRow) -> tuple[str, int]:
    return _place(row), row["variant"]


def _ratio(value: float | None) -> str:
    return "too few neighbours with tissue" if value is None else f"{value:.2f}"
