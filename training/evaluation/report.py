"""An evaluation as files: JSON for machines, Markdown for readers, one plot per extractor.

It refuses to compute: every number comes from `training.evaluation.scores` and
`training.evaluation.card_numbers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cytosyn_aug.model.checkpoint import write_atomically
from training.evaluation.scores import GENERATED, ROUND_TRIPS, Judgement, gap_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_READING = """\
How to read this. *Frechet* is in all dimensions (`-` with fewer tiles than dimensions, biased
upwards below ten tiles per dimension); *projected* is in leading components of the training tiles,
and comparable within one extractor and equal numbers of tiles. No distance means anything without
the rows of real against real. *Cosine* is between a made tile and its source, *chance* between two
different real tiles; an extractor that is also the model's condition flatters it. *Ratio* is the
median distance to the nearest training tile over that of held-out real tiles, and *closer* the
share nearer than 99 of 100 held-out tiles; real tiles of the training slides show what sharing a
slide does. *FLD* is about 0 for tiles as good as training tiles, and may be below for tiles made
from held-out tiles, which know the answer: judge those made from training tiles. *FLD gap* is
negative where training tiles are likelier than held-out ones; compare with the gap of real tiles of
the training slides, because the sets may show different tissue.
"""


def write_report(
    folder: Path,
    numbers: Mapping[str, object],
    config: Mapping[str, object],
    judgements: Sequence[Judgement],
) -> dict[str, object]:
    """Write `numbers.json` and, if anything was judged, `report.md` and plots.

    Args:
        folder: An existing folder.
        numbers: Digest, numbers of the model card, description of the tiles.
        config: How the evaluation was asked for, as plain values.
        judgements: One an extractor.

    Returns:
        The content of `numbers.json`.
    """
    content = dict(numbers) | {"config": dict(config)}
    if judgements:
        content["judgements"] = {j.name: judgement_json(j) for j in judgements}
        for judgement in judgements:
            write_plot(folder / f"{judgement.name}.png", judgement)
        text = report_markdown(content, judgements)
        write_atomically(folder / "report.md", text.encode())
    write_atomically(folder / "numbers.json", json.dumps(content, indent=2).encode())
    return content


def judgement_json(judgement: Judgement) -> dict[str, object]:
    """Return the numbers of one extractor as plain values."""
    return {
        "provenance": judgement.provenance,
        "num_features": judgement.num_features,
        "scores": {k: asdict(v) for k, v in judgement.scores.items()},
        "floors": {k: asdict(v) for k, v in judgement.floors.items()},
        "gap": {
            k: {
                metric: dict(zip(("held_out", "training_slides", "gap"), row, strict=True))
                for metric, row in gap_rows(*pair).items()
            }
            for k, pair in judgement.gap.items()
        },
        "nearness": {k: v._asdict() for k, v in judgement.nearness.items()},
        "likelihood": {k: v._asdict() for k, v in judgement.likelihood.items()},
    }


def report_markdown(content: Mapping[str, object], judgements: Sequence[Judgement]) -> str:
    """Return the report as Markdown."""
    lines = [f"# Evaluation of model {content['digest']}", "", _READING]
    lines += ["## Tiles and settings", ""]
    for part in ("tiles", "config"):
        lines += ["```json", json.dumps(content[part], indent=1), "```", ""]
    tiles = cast("dict[str, dict[str, object]]", content["tiles"])
    seen = "has seen" if tiles["training_slides"]["seen_in_training"] else "has not seen"
    for judgement in judgements:
        lines += _section(judgement, f"the model {seen} the latter's tiles")
    flat = {k: v for k, v in content.items() if isinstance(v, float)}
    lines += ["## Numbers of the model card", ""]
    lines += markdown_table(("what", "value"), ([k, number_text(v)] for k, v in flat.items()))
    return "\n".join(lines) + "\n"


def write_plot(file: Path, judgement: Judgement) -> None:
    """Draw distances, manifolds, cosines and nearness of one extractor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever backend is set
    figure.suptitle(f"{judgement.name} ({judgement.num_features} features)")
    (distances, manifolds), (cosines, nearness) = figure.subplots(2, 2)
    _draw_distances(distances, judgement)
    _draw_manifolds(manifolds, judgement)
    _draw_cosines(cosines, judgement)
    _draw_nearness(nearness, judgement)
    figure.savefig(file, dpi=100)


def _draw_distances(axes: Axes, judgement: Judgement) -> None:
    rows = judgement.scores | judgement.floors
    names = [name.replace(" against ", "\nagainst ") for name in rows]
    axes.barh(names, [s.frechet_projected for s in rows.values()], color=_colours(judgement))
    number = next(iter(rows.values())).num_components
    axes.set(xlabel=f"Frechet distance, {number} components; grey: real against real")
    axes.invert_yaxis()


def _draw_manifolds(axes: Axes, judgement: Judgement) -> None:
    rows = judgement.scores | judgement.floors
    parts = ("precision", "recall", "density", "coverage")
    width, highest = 1 / (len(rows) + 1), 1.0
    for k, (colour, (name, scores)) in enumerate(
        zip(_colours(judgement), rows.items(), strict=True)
    ):
        heights = [getattr(scores, part) for part in parts]
        highest = max(highest, *heights)
        axes.bar(
            [i + k * width for i in range(len(parts))], heights, width, label=name, color=colour
        )
    axes.set_xticks([i + (len(rows) - 1) * width / 2 for i in range(len(parts))], parts)
    axes.set_ylim(0, 1.5 * highest)
    axes.legend(fontsize="small", loc="upper left", ncols=2)


def _draw_cosines(axes: Axes, judgement: Judgement) -> None:
    for name, values in judgement.cosines.items():
        axes.hist(values.numpy(), bins=40, alpha=0.6, label=name)
    chance = judgement.scores[GENERATED].cosine_unrelated
    axes.axvline(chance, color="0.4", linestyle="--", label="two real tiles, mean")
    axes.set(xlabel="cosine to the source tile", ylabel="tiles")
    axes.legend(fontsize="small")


def _draw_nearness(axes: Axes, judgement: Judgement) -> None:
    for name, values in judgement.distances.items():
        ordered = values.sort().values.numpy()
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes.plot(ordered, shares, label=name, linestyle="--" if "real" in name else "-")
    axes.set(xlabel="distance to the nearest training tile (sd)", ylabel="share of tiles")
    axes.legend(fontsize="small", loc="lower right")


def _colours(judgement: Judgement) -> list[str]:
    """Return a colour for each made set and a grey for each floor."""
    greys = [str(0.4 + 0.2 * k) for k in range(len(judgement.floors))]
    return [f"C{k}" for k in range(len(judgement.scores))] + greys


def _section(judgement: Judgement, seen: str) -> list[str]:
    name = judgement.name
    provenance = ", ".join(f"{k} {v}" for k, v in judgement.provenance.items())
    return [
        f"## {name}",
        "",
        f"{judgement.num_features} features; {provenance}.",
        "",
        f"![{name}]({name}.png)",
        "",
        "Against real tiles of held-out slides, then real against real:",
        "",
        *_scoremarkdown_table(judgement),
        "Nearness to training tiles, and feature likelihood divergence:",
        "",
        *_nearnessmarkdown_table(judgement),
        f"![nearest](nearest_{name}.png)",
        "",
        "*Generated tiles that come nearest to training tiles, over those tiles.*",
        "",
        f"Held-out slides against slides that were trained on; {seen}:",
        "",
        *_gapmarkdown_table(judgement),
    ]


def _scoremarkdown_table(judgement: Judgement) -> list[str]:
    columns = {
        "against": "num_real",
        "Frechet": "frechet",
        "projected": "frechet_projected",
        "KID": "kernel",
        "precision": "precision",
        "recall": "recall",
        "density": "density",
        "coverage": "coverage",
        "cosine": "cosine",
        "chance": "cosine_unrelated",
    }
    rows = judgement.scores | judgement.floors
    cells = (
        [
            f"{name} ({scores.num_fake})",
            *(number_text(getattr(scores, c)) for c in columns.values()),
        ]
        for name, scores in rows.items()
    )
    return markdown_table(("tiles", *columns), cells)


def _nearnessmarkdown_table(judgement: Judgement) -> list[str]:
    titles = ("tiles", "distance", "held-out real", "ratio", "closer", "FLD", "FLD gap")
    cells = (
        [name, *map(number_text, (*near, *judgement.likelihood[name]))]
        for name, near in judgement.nearness.items()
    )
    return markdown_table(titles, cells)


def _gapmarkdown_table(judgement: Judgement) -> list[str]:
    sets = (GENERATED, ROUND_TRIPS)
    parts = ("held out", "trained on", "gap")
    titles = ("metric", *(f"{name}, {part}" for name in sets for part in parts))
    tables = [gap_rows(*judgement.gap[name]) for name in sets]
    cells = (
        [metric, *(number_text(value) for table in tables for value in table[metric])]
        for metric in tables[0]
    )
    return markdown_table(titles, cells)


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, and an empty one."""
    ruled = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(row) + " |" for row in ruled] + [""]


def number_text(value: object) -> str:
    """Return a number for a reader, four digits of a float; "-" for None."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
