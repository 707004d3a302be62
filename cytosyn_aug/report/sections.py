"""The sections of a report on a run that are pictures and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cytosyn_aug.report.html import (
    Html,
    code,
    escaped,
    figure,
    flattened,
    group,
    heading,
    joined,
    missing,
    paragraph,
    picture,
    shortened,
    table,
)
from cytosyn_aug.report.pictures import Picture
from cytosyn_aug.report.run_data import NUM_PAIRS, Facts, spread
from cytosyn_aug.report.tallies import MAX_NAMED, NUM_WORST, Group, Row, tile_name

_MAX_GROUPS = 20
_MAX_REASONS = 10
_STATUSES = {
    "failed": "Could not be read or edited; nothing stands for them in the output.",
    "rejected": "Left out of the output by a rule.",
    "blank": "Too little tissue to tell a stain (under 2 % of the tile); copied unchanged.",
}


def before_and_after(facts: Facts) -> Html:
    """Return pairs from as many slides and references as there are."""
    rows = _distinct(facts.tally.sample, len(facts.tally.sample))
    rows = spread(rows, NUM_PAIRS, lambda row: (row["reference"], row["slide"]))
    if not rows:
        return Html()
    if not facts.pictures.has_sources:
        lead, parts = "Drawn evenly from all results.", [_single(facts, row) for row in rows]
        return joined([paragraph(lead, "lead"), group(parts, "grid single")])
    lead = "Left the source, right the result; drawn from all slides and references, not chosen."
    return joined([paragraph(lead, "lead"), _pairs(facts, rows)])


def content_by_reference(facts: Facts) -> Html:
    """Return the matrix of contents and references."""
    names = facts.shown_references
    if not facts.matrix:
        return Html()
    table_rows = [[Html(), *(_reference_cell(facts, name) for name in names)]]
    for cells in facts.matrix:
        row = next(iter(cells.values()))
        source = _shown(facts.pictures.before(row), f"source {_tile(row)}")
        title = Html(f"<small>{shortened(_tile(row), 28)}</small>")
        results = (_matrix_cell(facts, cells.get(name), name) for name in names)
        table_rows.append([joined([source, title]), *results])
    if len(names) == 1:  # one column would be mostly empty paper
        table_rows = [list(column) for column in zip(*table_rows, strict=True)]
    lead = (
        "Tiles of as many slides as there are, each restained to the references that its variants "
        "went to; and a tile of each reference."
    )
    more = len(facts.tally.references) - len(names)
    if more > 0:
        lead += f" {more} more references are not shown."
    header, *rest = table_rows
    kind = f"matrix columns-{len(header)}"
    return joined([paragraph(lead, "lead"), table(header, rest, kind)])


def worst_cases(facts: Facts) -> Html:
    """Return the results that a reader should look at first."""
    scored = sorted(facts.measures.scored, key=lambda x: (x.structure, x.row["key"]))
    scores = {_name(x.row): x.structure for x in scored}
    of_all = f"of all {facts.tally.num_done:,} results"
    largest = "Colour: the largest change"
    if not facts.keeps_structure:
        largest = "Delta E, of colour and of structure that was drawn anew: the largest"
    parts = []
    for title, rows in (
        (f"Structure: the least kept, of {len(scored)} measured", [x.row for x in scored]),
        (f"Similarity: the least, {of_all}", facts.tally.least_similar),
        (f"{largest}, {of_all}", facts.tally.most_changed),
    ):
        if rows:
            worst = _distinct(rows, NUM_WORST)
            parts += [heading(title), _pairs(facts, worst, scores)]
    return joined(parts)


def left_out(facts: Facts) -> Html:
    """Name what was not edited, and why."""
    tally = facts.tally
    parts: list[Html] = []
    for status in sorted(tally.named, key=lambda name: (name not in _STATUSES, name != "failed")):
        number, named = tally.statuses[status], tally.named[status]
        parts.append(heading(f"{number:,} {status}"))
        parts.append(paragraph(_STATUSES.get(status, ""), "lead"))
        reasons = [
            (f"{count:,}", reason)
            for (of, reason), count in tally.reasons.most_common()
            if of == status and count > 1
        ]
        if reasons and number > len(reasons) > 1:
            parts.append(table(["rows", "reason"], reasons[:_MAX_REASONS]))
        rows = [(name, reason or "too little tissue") for name, reason in named.items()]
        parts.append(table(["tile", "reason"], rows))
        if number > len(named):
            which = (
                f"The first {MAX_NAMED} tiles are" if len(named) == MAX_NAMED else "Each tile is"
            )
            text = f"{which} named, once for all variants; all rows are in manifest.parquet."
            parts.append(paragraph(text, "lead"))
    return joined(parts)


def seams(facts: Facts) -> Html:
    """Return whether colour steps between neighbouring tiles."""
    if not facts.seams:
        return Html()
    lead = (
        "Mean step of tissue colour across the borders of neighbouring tiles, over that inside of "
        "tiles: about 1 for tissue that was never cut, more where each tile was changed alone. "
        "Measured on neighbours around the middle of each slide."
    )
    rows = [
        (shortened(x.slide), str(x.num_tiles), _ratio(x.before), _ratio(x.after))
        for x in facts.seams
    ]
    return joined([paragraph(lead, "lead"), table(["slide", "tiles", "before", "after"], rows)])


def groups(facts: Facts) -> Html:
    """Return numbers of references and slides."""
    parts = []
    for title, found in (("reference", facts.tally.references), ("slide", facts.tally.slides)):
        if found:
            parts.append(_group_table(title, found))
            others = facts.tally.num_done - sum(group.num_results for group in found.values())
            if others:
                parts.append(
                    paragraph(f"Results that do not say their {title}: {others:,}.", "lead")
                )
    return joined(parts)


def settings(facts: Facts, version: str) -> Html:
    """Return all that makes the run this one."""
    manifest = facts.manifest
    rows = [("digest of recipe, references and model", facts.tally.recipe)]
    rows += list(flattened(manifest.identity))
    rows += [(f"version of {name}", number) for name, number in manifest.software.items()]
    rows.append(("input lay at", manifest.context.get("input") or "not recorded"))
    for entry in manifest.context.get("references", []):
        place = entry["place"] or "given as an object"
        rows.append((f"reference {entry['name']} lay at", place))
    rows.append(("report by", f"cytosyn_aug {version}"))
    lead = (
        "What decides the bytes of a run, as run.json has it, and where things lay; the seed of "
        "each result is in manifest.parquet."
    )
    cells = [(name, code(value)) for name, value in rows]
    return joined([paragraph(lead, "lead"), table(["setting", "value"], cells)])


def _pairs(
    facts: Facts, rows: Iterable[Row], scores: Mapping[tuple[str, int], float] | None = None
) -> Html:
    return group([_pair(facts, row, (scores or {}).get(_name(row))) for row in rows], "grid")


def _pair(facts: Facts, row: Row, score: float | None) -> Html:
    before = _shown(facts.pictures.before(row), f"source {_tile(row)}")
    after = _shown(facts.pictures.after(row), f"result of {_tile(row)}")
    return figure(group([before, after], "pair"), _caption(row, score))


def _single(facts: Facts, row: Row) -> Html:
    return figure(_shown(facts.pictures.after(row), f"result {_tile(row)}"), _caption(row))


def _shown(found: Picture, alt: str) -> Html:
    return missing(found.problem) if found.pixels is None else picture(found.pixels, alt)


def _caption(row: Row, score: float | None = None) -> Html:
    told = [f"to {row['reference']}"] if row["reference"] else []
    if row.get("strength") is not None and row["strength"] != 1:
        told.append(f"strength {row['strength']:.2f}")
    told += _numbers(row)
    if score is not None:
        told.append(f"structure {score:.3f}")
    return joined([Html(f"<b>{shortened(_tile(row))}</b><br>"), ", ".join(told)])


def _numbers(row: Row) -> list[str]:
    numbers = []
    if row["colour_distance"] is not None:
        numbers.append(f"Delta E {row['colour_distance']:.1f}")
    if row["similarity"] is not None:
        numbers.append(f"similarity {row['similarity']:.3f}")
    return numbers


def _reference_cell(facts: Facts, name: str) -> Html:
    reference = facts.reference(name)
    title = Html(f"<div>{shortened(name, 24)}</div>")
    if reference is None or reference.tile is None:
        return joined([title, missing(reference.problem if reference else "not recorded")])
    return joined([title, picture(reference.tile, f"a tile of reference {name}")])


def _matrix_cell(facts: Facts, row: Row | None, name: str) -> Html:
    if row is None:
        return missing("no variant of this tile went here")
    alt = f"{_tile(row)} restained to {name}"
    text = Html(f"<small>{escaped(', '.join(_numbers(row)))}</small>")
    return joined([_shown(facts.pictures.after(row), alt), text])


def _group_table(title: str, found: Mapping[str, Group]) -> Html:
    names = sorted(found, key=lambda name: (-found[name].num_results, name))
    rows = []
    for name in names[:_MAX_GROUPS]:
        distance, similarity = found[name].mean_distance, found[name].mean_similarity
        numbers = (
            None if distance is None else f"{distance:.1f}",
            None if similarity is None else f"{similarity:.3f}",
        )
        rows.append((shortened(name), f"{found[name].num_results:,}", *numbers))
    parts = [table([title, "results", "mean Delta E", "mean similarity"], rows)]
    if len(names) > _MAX_GROUPS:
        parts.append(paragraph(f"and {len(names) - _MAX_GROUPS:,} more", "lead"))
    return joined(parts)


def _distinct(rows: Iterable[Row], most: int) -> list[Row]:
    """Return the first row of each source."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(_place(row), row)
    return list(first.values())[:most]


def _tile(row: Row) -> str:
    return tile_name(row["source"], row["x"], row["y"])


def _place(row: Row) -> str:
    return f"{row['source']} {row['x']} {row['y']}"


def _name(row: Row) -> tuple[str, int]:
    return _place(row), row["variant"]


def _ratio(value: float | None) -> str:
    return "too few neighbours with tissue" if value is None else f"{value:.2f}"
