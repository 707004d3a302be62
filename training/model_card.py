"""The model card: README.md of a model folder, with a plot of how its parts were trained.

What can be known is written down from the parts, from the runs they come from and from
evaluations; what only people know (data, licence, limits) comes from a Markdown file of theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from cytosyn_aug.io.files import write_atomically
from cytosyn_aug.model.checkpoint import ModelParts
from training.evaluation.report import markdown_table, number_text
from training.plan import tile_flop

CARD_NAME = "README.md"
CURVES_NAME = "training.png"
NUMBERS_NAME = "numbers.json"  # in the folder of an evaluation
_NUM_CURVE_POINTS = 6
# What each number of an evaluation is, in the order of the table.
_MEASURED = {
    "psnr_db": "autoencoder, mean PSNR of a tile (dB)",
    "pooled_psnr_db": "autoencoder, PSNR of 8x8-pooled colour (dB)",
    "small_decoder_psnr_db": "small decoder, mean PSNR of a tile (dB)",
    "median_rank": "median rank of the source among 100 real tiles",
    "round_trip_median_rank": "the same of round trips, the floor of any transformer",
    "frechet_own": "Frechet distance to the source's slide, 16 components of AlexNet",
    "round_trip_frechet_own": "the same of round trips",
    "frechet_between": "Frechet distance between real slides",
    "variation_apart": "five variations of a tile, LPIPS from each other, median",
    "variation_apart_least": "the same, least",
    "variation_from_source": "variations, LPIPS from their source",
    "nearest_real": "real tiles, LPIPS to the nearest other real tile",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CardSources:
    """What a model card is written from.

    Attributes:
        notes: Markdown that opens the card, with front matter if any; "" for none.
        runs: Run folder of each part, in the order of training; folders without a run are left out.
        reports: Folders that the evaluate stage wrote, by the name of their column.
    """

    notes: str = ""
    runs: Mapping[str, Path] = field(default_factory=dict)
    reports: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for report in self.reports.values():
            if not (report / NUMBERS_NAME).is_file():
                raise ValueError(
                    f"{report} has no {NUMBERS_NAME}; pass a folder that evaluate wrote"
                )


def write_model_card(folder: Path, parts: ModelParts, sources: CardSources) -> None:
    """Write README.md, and training.png if any run is known, into a model folder.

    Args:
        folder: The model folder.
        parts: Its networks and digest.
        sources: What is known beside them.

    Raises:
        ValueError: The first report is of another model.
    """
    numbers = {name: _read_numbers(report) for name, report in sources.reports.items()}
    runs = {name: run for name, run in sources.runs.items() if (run / "reports.jsonl").is_file()}
    sections = [sources.notes.rstrip() or f"# {folder.name}", _parts_section(parts)]
    if runs:
        _draw_curves(folder / CURVES_NAME, runs)
        sections.append(_training_section(runs))
    if numbers:
        sections.append(_measured_section(numbers, parts.digest))
    write_atomically(folder / CARD_NAME, ("\n\n".join(sections) + "\n").encode())


def parts_text(parts: ModelParts) -> list[str]:
    """Return the lines of a table of the networks, their sizes and costs."""
    costs = tile_flop(parts)
    rows = []
    for name, network in _networks(parts).items():
        count = sum(p.numel() for p in network.parameters())
        rows.append((f"`{name}/`", type(network).__name__, f"{count:,}", _flop_text(name, costs)))
    return markdown_table(("part", "class", "parameters", "GFLOP per tile"), rows)


def _parts_section(parts: ModelParts) -> str:
    lines = [
        "## Parts",
        "",
        *parts_text(parts),
        f"Tiles: {parts.tile.describe()}. GFLOP are 2 x multiply-add.",
        f"Digest of the weights: `{parts.digest}`.",
    ]
    return "\n".join(lines)


def _networks(parts: ModelParts) -> dict[str, nn.Module]:
    named = zip(parts._fields, parts, strict=True)
    return {name: part for name, part in named if isinstance(part, nn.Module)}


def _flop_text(name: str, costs: Mapping[str, float]) -> str:
    """Return what a tile costs in a part."""
    what = {
        "vae": "encode {encode:.1f}, decode {decode:.1f}",
        "transformer": "{forward:.1f} a forward",
        "student": "{forward:.1f} a forward",
        "encoder": "{features:.1f}",
        "decoder": "{small_decode:.1f}",
    }
    return what.get(name, "-").format(**{k: v / 1e9 for k, v in costs.items()})


def _training_section(runs: Mapping[str, Path]) -> str:
    sections = [
        "## Training",
        "Recipes are those of `training/recipes.py` in this release; `python -m training --help`.",
        f"![curves of the runs]({CURVES_NAME})",
    ]
    for name, run in runs.items():
        reports = _read_lines(run / "reports.jsonl")
        recipe = json.loads((run / "recipe.json").read_text())
        batch = recipe["batch_size"]
        sections.append(
            f"### {name}\n\n{reports[-1]['step']:,} of {recipe['loop']['num_steps']:,} steps of "
            f"{batch}. On held-out tiles:"
        )
        sections.append(_curve_table(reports))
        plain = json.dumps(recipe)
        sections.append(f"<details><summary>recipe</summary>\n\n`{plain}`\n\n</details>")
    return "\n\n".join(sections)


def _curve_table(reports: Sequence[Mapping[str, float]]) -> str:
    last = len(reports) - 1
    count = min(_NUM_CURVE_POINTS, len(reports))
    chosen = sorted({round(k * last / max(count - 1, 1)) for k in range(count)})
    names = [name for name in reports[-1] if name != "step"]
    rows = [
        (name.replace("_", " "), *(number_text(reports[k].get(name)) for k in chosen))
        for name in names
    ]
    titles = ("step", *(f"{reports[k]['step']:,}" for k in chosen))
    return "\n".join(markdown_table(titles, rows))


def _measured_section(numbers: Mapping[str, Mapping[str, Any]], digest: str) -> str:
    own = next(iter(numbers.values()))
    if own["digest"] != digest:
        raise ValueError(
            f"the first report is of model {own['digest']}, the exported one is {digest}; evaluate "
            "the exported model and pass that report first"
        )
    rows: list[tuple[str, ...]] = []
    for key, what in _MEASURED.items():
        if any(key in found for found in numbers.values()):
            rows.append((what, *(number_text(found.get(key)) for found in numbers.values())))
    rows.append(("digest of the weights", *(f"`{found['digest']}`" for found in numbers.values())))
    return (
        "## Measured\n\n`python -m training evaluate`, on tiles of held-out slides; AlexNet, which "
        "no stage was trained with, judges.\n\n"
        + "\n".join(markdown_table(("what", *numbers), rows))
    )


def _draw_curves(file: Path, runs: Mapping[str, Path]) -> None:
    """Draw each run's loss, and below it the first number of its reports."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(runs), 5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, whatever backend is set
    columns = figure.subplots(2, len(runs), squeeze=False).T
    for (upper, lower), (name, run) in zip(columns, runs.items(), strict=True):
        curves = _read_lines(run / "curves.jsonl")
        upper.plot([row["step"] for row in curves], [row["loss"] for row in curves], linewidth=1)
        upper.set(title=name, ylabel="training loss")
        reports = _read_lines(run / "reports.jsonl")
        number = next(key for key in reports[-1] if key != "step")
        lower.plot([row["step"] for row in reports], [row[number] for row in reports], marker=".")
        lower.ticklabel_format(useOffset=False)
        lower.set(xlabel="step", ylabel=number.replace("_", " "))
    figure.savefig(file, dpi=80)


def _read_numbers(report: Path) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((report / NUMBERS_NAME).read_text())
    return numbers


def _read_lines(file: Path) -> list[dict[str, float]]:
    """Return the rows of a curve; where a resumed run repeats a step, the later one counts."""
    rows = {row["step"]: row for row in map(json.loads, file.read_text().splitlines())}
    return [rows[step] for step in sorted(rows)]
