"""Page of the report on a run: the order of its sections, and what a reader should know first."""

from __future__ import annotations

from typing import Literal, NamedTuple

from cytosyn_aug.report import figures, sections
from cytosyn_aug.report.rendering import render_page
from cytosyn_aug.report.run_data import RunData

# Below these scores a reader should look; LOG.md has those of real runs.
LEAST_STRUCTURE = 0.8
_LEAST_USUAL_STRUCTURE = 0.9


class Finding(NamedTuple):
    """What a reader should know first; kinds are classes of the style sheet."""

    text: str
    kind: Literal["bad", "good", ""] = ""


def run_page(run: RunData) -> str:
    """Return the page of a run."""
    identity = run.manifest.identity
    return render_page(
        f"{identity['command']}: {run.manifest.folder.resolve().name}",
        [
            (
                "Before and after" if run.pictures.has_sources else "Generated tiles",
                sections.before_and_after(run),
            ),
            ("Content by reference", sections.content_by_reference(run)),
            ("Colour", figures.colour(run)),
            ("Structure", figures.structure(run)),
            ("Similarity and change of colour", figures.similarity(run)),
            ("Worst cases", sections.worst_cases(run)),
            ("Blank, rejected and failed", sections.left_out(run)),
            ("Seams", sections.seams(run)),
            ("References and slides", sections.groups(run)),
            ("Throughput", figures.throughput(run)),
            ("Settings", sections.settings(run)),
        ],
        "run/page.html.j2",
        summary=_summary(run),
        cards=_cards(run),
        findings=findings(run),
    )


def findings(run: RunData) -> list[Finding]:
    """Return what a reader should know first, the worst first; or that nothing stands out."""
    tally, manifest, measures = run.tally, run.manifest, run.measures
    bad: list[str] = []
    notes: list[str] = []
    if tally.statuses["failed"]:
        bad.append(f"{tally.statuses['failed']:,} failed; they are named below with their reasons.")
    rejected, num_done = tally.statuses["rejected"], tally.num_done
    if tally.num_rows and not num_done:
        bad.append("No tile was changed; what became of them is named below.")
    elif rejected > num_done:
        notes.append(f"More was rejected than kept: {rejected:,} of {rejected + num_done:,}.")
    if not manifest.is_finished:
        notes.append(
            f"Not finished: {tally.num_rows:,} rows so far, of {manifest.num_units:,} work units "
            f"of {manifest.num_tiles:,} tiles. The same command goes on with the rest."
        )
    least, usual = measures.structure_quantile(0.0), measures.structure_quantile(0.05)
    if least is not None and usual is not None and is_moved(least, usual):
        bad.append(
            f"Structure is kept less well than usual: 5 % of results are below {usual:.2f}, the "
            f"least is {least:.2f}. Look at the worst cases."
        )
    for name in tally.references:
        distances = figures.gap(run, name)
        if distances is not None and distances[1] > distances[0]:
            bad.append(
                f"Results are farther from reference {name} than their sources: Lab distance "
                f"{distances[0]:.1f} before, {distances[1]:.1f} after."
            )
    notes += [
        f"{count} of the sampled: {text}." for text, count in measures.problems.most_common(5)
    ]
    shown = [Finding(text, "bad") for text in bad] + [Finding(text) for text in notes]
    return shown or [Finding("Nothing stands out.", "good")]


def is_moved(least: float, usual: float) -> bool:
    """Return whether structure scores are lower than those of colour changes.

    Args:
        least: The least score.
        usual: What 5 % of scores are below.
    """
    return least < LEAST_STRUCTURE or usual < _LEAST_USUAL_STRUCTURE


def _summary(run: RunData) -> str:
    manifest = run.manifest
    state = "finished" if manifest.is_finished else "not finished"
    form = manifest.identity.get("format", "")
    return (
        f"A run of cytosyn-aug {manifest.identity['command']}, {state}: {manifest.num_tiles:,} "
        f"tiles, {run.tally.num_rows:,} rows{f', as {form}' if form else ''}. Not a medical "
        "device."
    )


def _cards(run: RunData) -> list[tuple[str, str]]:
    """Return numbers, each with its name."""
    tally = run.tally
    order = sorted(tally.statuses.items(), key=lambda pair: (-pair[1], pair[0]))
    cards = [(f"{count:,}", status) for status, count in order]
    if tally.references:
        cards.append((str(len(tally.references)), "references"))
    if tally.slides:
        cards.append((f"{len(tally.slides):,}", "slides"))
    for value, digits, name in (
        (tally.distance.quantile(0.5), 1, "median Delta E to the source"),
        (tally.similarity.quantile(0.5), 3, "median similarity"),
        (run.measures.structure_quantile(0.5), 3, "median structure score"),
        (None if run.throughput is None else run.throughput.results_per_s, 1, "results per second"),
    ):
        if value is not None:
            cards.append((f"{value:.{digits}f}", name))
    return cards
