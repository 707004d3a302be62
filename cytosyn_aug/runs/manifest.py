"""Reader of the rows of a run, finished or not, in parts of bounded size and in the order of work.

Of a finished run they are in `manifest.parquet`; of one that is at work, or was stopped, in the
receipts of its finished units, beside what an earlier round left. Nothing is locked, so that a
reader never keeps a run from ending.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from cytosyn_aug.runs.folder import RECEIPTS_NAME, RUN_NAME, WORK_NAME, parse_run
from cytosyn_aug.runs.receipts import (
    MANIFEST_NAME,
    ROW_SCHEMA,
    DamagedError,
    damage_named,
    manifest_damage,
    open_rows,
)

_BATCH_ROWS = 32_768
_PLAIN = pa.schema(
    [(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in ROW_SCHEMA]
)


class Manifest(NamedTuple):
    """A run and where its rows are.

    Attributes:
        folder: OUT.
        identity: What makes it this run: recipe, input, model; JSON.
        software: Versions it was begun with.
        context: Where input and references lay; empty of runs of earlier versions.
        receipts: Files of finished units that are not in the manifest yet, in order.
        is_finished: Whether nothing is left to do.
    """

    folder: Path
    identity: dict[str, Any]  # Any: JSON
    software: dict[str, str]
    context: dict[str, Any]  # Any: JSON
    receipts: tuple[Path, ...]
    is_finished: bool

    @property
    def num_tiles(self) -> int:
        """Tiles of the input."""
        return int(self.identity["input"]["num_tiles"])

    @property
    def num_units(self) -> int:
        """Work units of the run."""
        return -(-self.num_tiles // int(self.identity["unit_tiles"]))

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield all rows, some ten thousand at a time.

        A damaged receipt counts as absent: its unit is done again.

        Args:
            columns: Which of `ROW_SCHEMA`; coded ones come as strings.

        Raises:
            FileNotFoundError: The run went on meanwhile; open it again.
            ValueError: The manifest is damaged.
        """
        fresh = pa.array([int(file.stem) for file in self.receipts], pa.int32())
        wanted = list(dict.fromkeys([*columns, "unit"]))
        manifest = self.folder / MANIFEST_NAME
        if manifest.is_file():
            advice = manifest_damage(self.folder)
            with damage_named(manifest, advice), open_rows(manifest) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                    table = _plain(pa.Table.from_batches([batch]))
                    if len(fresh):
                        table = table.filter(pc.invert(pc.is_in(table["unit"], fresh)))
                    yield table.select(list(columns))
        for receipt in self.receipts:
            with (
                suppress(DamagedError),
                damage_named(receipt, "its unit is done again"),
                open_rows(receipt) as file,
            ):
                yield _plain(file.read(columns=wanted)).select(list(columns))


def open_manifest(folder: Path | str) -> Manifest:
    """Open a run's folder for reading.

    Raises:
        FileNotFoundError: It holds no run.
        ValueError: Its `run.json` is damaged or of another version.
    """
    folder = Path(folder)
    file = folder / RUN_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {RUN_NAME}, expected the OUT of augment, normalize or sample, or a "
            f"run of cache (CACHE/runs/...); give one of those{_runs_below(folder)}"
        )
    try:
        run = parse_run(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; start the run anew with --overwrite") from error
    work = folder / WORK_NAME
    receipts = tuple(sorted((work / RECEIPTS_NAME).glob("*.parquet")))
    is_finished = (folder / MANIFEST_NAME).is_file() and not work.is_dir()
    software, context = dict(run.get("software", {})), dict(run.get("context", {}))
    return Manifest(folder, run["identity"], software, context, receipts, is_finished)


def _plain(table: pa.Table) -> pa.Table:
    """Return plain columns, and empty ones that a run of an earlier version lacks."""
    table = table.cast(pa.schema([_PLAIN.field(name) for name in table.column_names]))
    for column in _PLAIN:
        if column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(len(table), column.type))
    return table


def _runs_below(folder: Path) -> str:
    runs = sorted(file.parent for file in folder.glob(f"runs/*/{RUN_NAME}"))
    return f", such as {runs[0]}" if runs else ""
