"""Work on whole slides: a run of them is resumed, shared and recorded as one of tiles is.

    OUT/<path of the slide>.ome.tif
    OUT/manifest.parquet             one row per slide

A work unit is a slide, which is written whole or not at all. What its file says of itself, such as
its seams, is not repeated in the manifest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from cytosyn_aug.io.files import check_inside
from cytosyn_aug.io.slide import Slide, SlideError
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.runs.folder import RunFolder, Unit
from cytosyn_aug.runs.listing import Item, Listing
from cytosyn_aug.runs.pipeline import Row
from cytosyn_aug.slides.normalize import SlideNormalization, try_slide
from cytosyn_aug.slides.recipe import SlideRecipe, SlideReport
from cytosyn_aug.slides.view import SlideView
from cytosyn_aug.stain.methods import AnyReference

_TRIAL_SLIDES = 3
_MAX_NAMED = 20
_SUFFIX = ".ome.tif"


@dataclass(frozen=True, kw_only=True)
class SlideWork:
    """What is done to every slide of a listing; it has the methods of `TileWork`.

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

    noun: ClassVar[Literal["slide"]] = "slide"

    def execute(
        self, units: Iterable[Unit], folder: RunFolder, *, readers: int = 4, writers: int = 1
    ) -> Generator[tuple[Unit, float], None, None]:
        """Do units, skipping those that other processes hold; yield after each block.

        Args:
            units: Which, in this order.
            folder: Where receipts go.
            readers: Threads that read, recolour and compress blocks.
            writers: Ignored: one thread writes a slide.

        Yields:
            The unit at hand, and how much more of its slide is done.
        """
        for unit in units:
            with folder.claim(unit) as is_mine:
                if not is_mine:
                    continue
                done = 0.0
                with closing(self._normalize(unit, folder, readers)) as steps:
                    for number, total in steps:
                        yield unit, number / total - done
                        done = number / total
                yield unit, 1.0 - done

    def give_up(self, unit: Unit, folder: RunFolder, reason: str) -> None:
        """Name a slide as failed, unless another process holds it or has done it."""
        with folder.claim(unit) as is_mine:
            if is_mine:
                self._fail(unit, folder, reason)

    def _normalize(
        self, unit: Unit, folder: RunFolder, num_threads: int
    ) -> Generator[tuple[int, int], None, None]:
        """Write a slide and its receipt; yield how many blocks are done, and of how many."""
        item = self.item(unit)
        if item.error:
            self._fail(unit, folder, item.error)
            return
        out = _result(folder, item)
        check_inside(out.parent, folder.folder)
        try:
            normalization = SlideNormalization(
                self.file(item),
                out,
                self.reference,
                generator=self.generator,
                recipe=self.recipe_of(item),
                overwrite=True,  # without a receipt it is of a run that was killed between the two
            )
            yield from normalization.write(num_threads)
        except SlideError as error:
            self._fail(unit, folder, _reason(error, item))
            return
        report = normalization.report()
        cells = self._cells(unit, item) | {
            "status": "edited" if report.status == "normalized" else "blank",
            "reason": "; ".join([*report.notes, *_damage(report)]),
            "output": out.relative_to(folder.folder).as_posix(),
            "key": report.source_digest,
            "variant": 0,
            "reference": self.reference_name,
            "strength": self.recipe.strength,
        }
        folder.write_receipt(unit, [cells])

    def _fail(self, unit: Unit, folder: RunFolder, reason: str) -> None:
        """Name a slide as failed, and remove what an earlier run made of it."""
        item = self.item(unit)
        out = _result(folder, item)
        if item.stem and out.parent.is_dir():
            check_inside(out.parent, folder.folder)
            out.unlink(missing_ok=True)
        failed = {"variant": -1, "status": "failed", "reason": reason}
        folder.write_receipt(unit, [self._cells(unit, item) | failed])

    def _cells(self, unit: Unit, item: Item) -> Row:
        return {
            **self.constants,
            "source": item.name,
            "label": item.label,
            "slide": item.slide,
            "mpp": item.mpp,
            "unit": unit.number,
        }

    def needed_bytes(self, units: Sequence[Unit]) -> int:
        """Return 0: for each slide there is a look at the disk before it is written."""
        return 0

    def estimate(self, units: Sequence[Unit], readers: int) -> dict[str, Any]:  # Any: JSON
        """Return what units would be: problems, bytes and hours.

        All slides are opened, three are tried, and the others judged by the size of their files.
        """
        problems, usable = [], []
        for unit in units:
            item = self.item(unit)
            try:
                self._check(item)
                usable.append(item)
            except SlideError as error:
                problems.append(f"{item.name} {_reason(error, item)}")
        num_bytes, seconds, tried = 0, 0.0, 0
        for item in _evenly_spaced(usable, _TRIAL_SLIDES):
            try:
                slide_bytes, slide_seconds = try_slide(
                    self.file(item),
                    self.reference,
                    generator=self.generator,
                    recipe=self.recipe_of(item),
                    num_threads=readers,
                )
            except SlideError as error:
                problems.append(f"{item.name} {_reason(error, item)}")
                continue
            num_bytes, seconds = num_bytes + slide_bytes, seconds + slide_seconds
            tried += item.size
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

    def shared(self) -> SlideWork:
        """Return the same work for several threads of one process."""
        return self

    def item(self, unit: Unit) -> Item:
        """Return the slide of a unit."""
        return self.listing.items(unit.start, unit.stop)[0]

    def file(self, item: Item) -> Path:
        """Return where a slide is."""
        return self.listing.root / item.name

    def recipe_of(self, item: Item) -> SlideRecipe:
        """Return how a slide is normalised."""
        return self.recipe if item.mpp is None else replace(self.recipe, slide_mpp=item.mpp)


def _evenly_spaced(items: Sequence[Item], number: int) -> list[Item]:
    """Return so many items, or all there are, evenly spaced."""
    number = min(number, len(items))
    return [items[k * len(items) // number] for k in range(number)]


def _result(folder: RunFolder, item: Item) -> Path:
    return folder.folder / f"{item.stem}{_SUFFIX}"


def _reason(error: SlideError, item: Item) -> str:
    return str(error).removeprefix(f"{Path(item.name).name} ")


def _damage(report: SlideReport) -> list[str]:
    return [f"damaged at x={x} y={y}, left black" for x, y in report.damaged]
