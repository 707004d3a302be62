"""Slides to slides, as a run: resumed, shared and recorded as those of tiles are.

    OUT/<path of the slide>.ome.tif
    OUT/manifest.parquet             one row a slide

A work unit is a slide, which is written whole or not at all. What its file says of itself, such as
its seams, is not repeated in the manifest; see `cytosyn_aug.slides.normalize`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cytosyn_aug.config import Method, TileSpec
from cytosyn_aug.io.files import check_inside
from cytosyn_aug.io.slide import Slide, SlideError
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.runs.folder import RunFolder, Unit
from cytosyn_aug.runs.inputs import list_whole_slides
from cytosyn_aug.runs.listing import Item, Listing
from cytosyn_aug.runs.pipeline import Row
from cytosyn_aug.runs.plan import check_apart, settings_digest
from cytosyn_aug.runs.references import Given, describe_references, open_references
from cytosyn_aug.runs.unit_work import Run
from cytosyn_aug.slides.normalize import normalize_in_steps, try_slide
from cytosyn_aug.slides.recipe import SLIDES_COMMAND, SlideRecipe, SlideReport
from cytosyn_aug.slides.view import SlideView
from cytosyn_aug.stain.methods import AnyReference

_TRIAL_SLIDES = 3
_MAX_NAMED = 20
_SUFFIX = ".ome.tif"


def plan_slides(
    source: Path | str,
    out: Path | str,
    generator: TileGenerator | None,
    reference: Given,
    method: Method,
    recipe: SlideRecipe,
) -> Run:
    """Return the run that `cytosyn_aug.offline.normalize_slides` does."""
    check_apart(source, out)
    if method != "cytosyn":
        generator = None  # one that is given all the same makes no other run
    references, identities = open_references([reference], generator, method)
    listing = list_whole_slides(source, mpp=recipe.slide_mpp)
    settings: dict[str, Any] = {  # Any: JSON
        "command": SLIDES_COMMAND,
        "recipe": {"method": method} | asdict(recipe),
        "references": identities,
        "model": _model(generator),
    }
    (name, opened), *_ = references.items()
    digest = None if generator is None else generator.digest
    task = SlideTask(
        listing=listing,
        generator=generator,
        reference=opened,
        reference_name=name,
        recipe=recipe,
        constants=MappingProxyType(
            {
                "recipe": settings_digest(settings),
                "model": digest,
            }
        ),
    )
    tile = TileSpec() if generator is None else generator.tile
    return Run(
        folder=Path(out),
        identity=settings | {"input": listing.identity(), "unit_tiles": 1},
        context={
            "input": str(Path(source).absolute()),
            "tile": asdict(tile),
            "references": describe_references([reference], references),
        },
        listing=listing,
        unit_items=1,
        generator=generator,
        task=task,
        noun="slide",
    )


@dataclass(frozen=True, kw_only=True)
class SlideTask:
    """A `cytosyn_aug.runs.unit_work.Task` over slides.

    Attributes:
        listing: The slides.
        generator: The model, for a `StainReference`.
        reference: Where to go.
        reference_name: What it is called.
        recipe: How; the scale that the listing has for a slide goes before its `slide_mpp`.
        constants: Cells that are the same in every row of the manifest.
    """

    listing: Listing
    generator: TileGenerator | None
    reference: AnyReference
    reference_name: str
    recipe: SlideRecipe
    constants: Mapping[str, Any]  # Any: cells

    def job(self, folder: RunFolder, readers: int, writers: int, *, is_shared: bool) -> SlideJob:
        """See `Task`; each of `readers` threads reads, recolours and compresses blocks."""
        return SlideJob(self, readers)

    def needed_bytes(self, units: Sequence[Unit]) -> int:
        """Return 0: for each slide there is a look at the disk before it is written."""
        return 0

    def estimate(self, units: Sequence[Unit], readers: int) -> dict[str, Any]:  # Any: JSON
        """See `Task`; all slides are opened, some tried, the others judged by their files' size."""
        problems, usable = [], []
        for unit in units:
            item = self.item(unit)
            try:
                self._check(item)
                usable.append(item)
            except SlideError as error:
                problems.append(f"{item.name} {_reason(error, item)}")
        num_bytes, seconds, tried = 0, 0.0, 0
        for item in _spread(usable, _TRIAL_SLIDES):
            try:
                found = try_slide(
                    self.file(item),
                    self.reference,
                    generator=self.generator,
                    recipe=self.recipe_of(item),
                    num_threads=readers,
                )
            except SlideError as error:
                problems.append(f"{item.name} {_reason(error, item)}")
                continue
            num_bytes, seconds, tried = num_bytes + found[0], seconds + found[1], tried + item.size
        total = sum(item.size for item in usable)
        share = total / tried if tried else 0.0
        return {
            "unusable": len(problems),
            "problems": problems[:_MAX_NAMED],
            "slides_to_do": len(units),
            "input_bytes": total,
            "output_bytes": round(num_bytes * share),
            "hours": round(seconds * share / 3600, 3),
        }

    def _check(self, item: Item) -> None:
        """Make sure that a slide can be opened and has what is asked for."""
        if item.error:
            raise SlideError(item.error)
        recipe = self.recipe_of(item)
        with Slide(self.file(item), recipe.slide_mpp) as slide:
            SlideView.of(slide, recipe.region, recipe.mpp)

    def item(self, unit: Unit) -> Item:
        """Return the slide of a unit."""
        return self.listing.items(unit.start, unit.stop)[0]

    def file(self, item: Item) -> Path:
        """Return where a slide is."""
        return self.listing.root / item.name

    def recipe_of(self, item: Item) -> SlideRecipe:
        """Return how a slide is normalised."""
        return self.recipe if item.mpp is None else replace(self.recipe, slide_mpp=item.mpp)


class SlideJob:
    """Slides one after the other; see `cytosyn_aug.runs.unit_work.UnitJob`.

    Args:
        task: What is done.
        num_threads: That read, recolour and compress.
    """

    def __init__(self, task: SlideTask, num_threads: int) -> None:
        self._task, self._num_threads = task, num_threads

    def do(
        self, units: Sequence[Unit], folder: RunFolder
    ) -> Generator[tuple[Unit, float], None, None]:
        """See `UnitJob`; counts parts of a slide."""
        for unit in units:
            with folder.claim(unit) as is_mine:
                if not is_mine:
                    continue
                done = 0.0
                with closing(self._normalize(unit, folder)) as steps:
                    for number, total in steps:
                        yield unit, number / total - done
                        done = number / total
                yield unit, 1.0 - done

    def give_up(self, unit: Unit, folder: RunFolder, reason: str) -> None:
        """See `UnitJob`."""
        with folder.claim(unit) as is_mine:
            if is_mine:
                self._fail(unit, folder, reason)

    def _normalize(self, unit: Unit, folder: RunFolder) -> Generator[tuple[int, int], None, None]:
        """Write a slide and its receipt; yield how many blocks are done, and of how many."""
        task, item = self._task, self._task.item(unit)
        if item.error:
            self._fail(unit, folder, item.error)
            return
        out = _result(folder, item)
        check_inside(out.parent, folder.folder)
        try:
            report = yield from normalize_in_steps(
                task.file(item),
                out,
                task.reference,
                generator=task.generator,
                recipe=task.recipe_of(item),
                overwrite=True,  # without a receipt it is of a run that was killed between the two
                num_threads=self._num_threads,
            )
        except SlideError as error:
            self._fail(unit, folder, _reason(error, item))
            return
        cells = self._cells(unit, item) | {
            "status": "edited" if report.status == "normalized" else "blank",
            "reason": "; ".join([*report.notes, *_damage(report)]),
            "output": out.relative_to(folder.folder).as_posix(),
            "key": report.source_digest,
            "variant": 0,
            "reference": task.reference_name,
            "strength": task.recipe.strength,
        }
        folder.write_receipt(unit, [cells])

    def _fail(self, unit: Unit, folder: RunFolder, reason: str) -> None:
        """Name a slide as failed, and remove what an earlier run made of it."""
        item = self._task.item(unit)
        out = _result(folder, item)
        if item.stem and out.parent.is_dir():
            check_inside(out.parent, folder.folder)
            out.unlink(missing_ok=True)
        failed = {"variant": -1, "status": "failed", "reason": reason}
        folder.write_receipt(unit, [self._cells(unit, item) | failed])

    def _cells(self, unit: Unit, item: Item) -> Row:
        return {
            **self._task.constants,
            "source": item.name,
            "label": item.label,
            "slide": item.slide,
            "mpp": item.mpp,
            "unit": unit.number,
        }


def _spread(items: Sequence[Item], number: int) -> list[Item]:
    """Return so many items, or all there are, evenly spaced."""
    number = min(number, len(items))
    return [items[k * len(items) // number] for k in range(number)]


def _result(folder: RunFolder, item: Item) -> Path:
    return folder.folder / f"{item.stem}{_SUFFIX}"


def _reason(error: SlideError, item: Item) -> str:
    return str(error).removeprefix(f"{Path(item.name).name} ")


def _damage(report: SlideReport) -> list[str]:
    return [f"damaged at x={x} y={y}, left black" for x, y in report.damaged]


def _model(generator: TileGenerator | None) -> dict[str, Any] | None:  # Any: JSON
    if generator is None:
        return None
    return {
        "digest": generator.digest,
        "dtype": str(generator.dtype),
        "batch_size": generator.batch_size,
    }
