"""Folder of a run, which any number of processes fill, killed at any moment.

    OUT/run.json          what the run is: recipe, input, model; another run is refused
    OUT/manifest.parquet  one row per result, written when every unit is there
    OUT/.work/            receipts of finished units, locks and unfinished files; gone at the end

Work is cut into units of a fixed number of tiles, the same ones for every process. A process takes
a unit by locking it, which the system undoes however the process ends; its receipt, the rows of the
manifest, is written after everything it vouches for. Units with failed tiles are tried again by the
next run, and so are those whose files have changed, or whose results or receipts are gone or, of
receipts, damaged. No torch here.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from cytosyn_aug.io.files import refuse_links, remove_leftovers, write_atomically
from cytosyn_aug.runs.receipts import (
    MANIFEST_NAME,
    DamagedError,
    Results,
    UnitManifest,
    read_receipt,
    write_manifest,
    write_receipt,
)

FORMAT_VERSION = 1
RUN_NAME = "run.json"
WORK_NAME = ".work"
RECEIPTS_NAME = "receipts"
_KIND = "cytosyn_aug run"
_NOTHING: Mapping[str, Any] = MappingProxyType({})  # Any: JSON


class Unit(NamedTuple):
    """A range of a listing: its number, rows from `start` up to `stop`, and their digest."""

    number: int
    start: int
    stop: int
    digest: str


class RunFolder:
    """The output folder of one run.

    Attributes:
        folder: OUT.
        work: Where unfinished files are.
    """

    def __init__(self, folder: Path, handle: BinaryIO) -> None:
        self.folder, self.work = folder, folder / WORK_NAME
        self._handle = handle
        self._began = time.time_ns()

    @cached_property
    def _manifest(self) -> UnitManifest:
        return UnitManifest(self.folder / MANIFEST_NAME)  # large, and workers have no use for it

    def to_do(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units that are not there, or not whole, in their order.

        Warns of those that were there and are not whole any more.

        Raises:
            ValueError: The manifest is damaged.
        """
        results = Results(self.folder)
        faults = [self._fault(unit, results) for unit in units]
        reasons = [fault for fault in faults if fault]
        if reasons:
            number = len(reasons)
            which = "1 finished unit is" if number == 1 else f"{number} finished units are"
            warnings.warn(f"{self.folder}: {which} done again, because {reasons[0]}", stacklevel=2)
        return [unit for unit, fault in zip(units, faults, strict=True) if fault is not None]

    def prepare(self) -> None:
        """Make the folders that units need.

        Raises:
            ValueError: A link stands where unfinished files go.
        """
        folders = [self.work / name for name in (RECEIPTS_NAME, "locks", "files")]
        refuse_links([self.work, *folders])
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def claim(self, unit: Unit) -> Iterator[bool]:
        """Hold a unit; False if another process has it, or has done it meanwhile."""
        with (self.work / "locks" / f"{unit.number:07d}").open("ab") as stream:
            yield _lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB) and not self._is_new(unit)

    def write_receipt(self, unit: Unit, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record that a unit is done, with its rows in order."""
        write_receipt(self._receipt(unit), unit.digest, rows)

    def finish(self, units: Sequence[Unit]) -> bool:
        """Write the manifest if every unit is there and no process is at work.

        Whoever ends last does it. Returns False if that is not this process.
        """
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        if not _lock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        if any(self._table(unit) is None for unit in units):
            return False
        if self.work.exists():
            digests = {unit.number: unit.digest for unit in units}
            write_manifest(self.folder / MANIFEST_NAME, self.rows(units), digests)
            shutil.rmtree(self.work)
            remove_leftovers(self.folder)
        return True

    def rows(self, units: Sequence[Unit]) -> Iterator[pa.Table]:
        """Yield the rows of units that are there."""
        for unit in units:
            table = self._table(unit)
            if table is not None:
                yield table

    def _receipt(self, unit: Unit) -> Path:
        return self.work / RECEIPTS_NAME / f"{unit.number:07d}.parquet"

    def _table(self, unit: Unit) -> pa.Table | None:
        """Return the rows of a unit as it is now, None if it is not there."""
        file = self._receipt(unit)
        if not file.is_file():
            return self._manifest.rows(unit.number, unit.digest)
        try:  # of this round, so that it alone decides
            return read_receipt(file, unit.digest)
        except DamagedError:
            return None

    def _fault(self, unit: Unit, results: Results) -> str | None:
        """Return None if a unit is whole, or why not, "" if that needs no saying."""
        file = self._receipt(unit)
        if not file.is_file():
            return self._manifest.fault(unit.number, unit.digest)
        try:
            table = read_receipt(file, unit.digest)
        except DamagedError:
            return f"{file.name} is damaged"
        if table is None or "failed" in table["status"].to_pylist():
            return ""
        gone = results.gone(table["output"].to_pylist() + table["mask"].to_pylist())
        return f"{gone} is gone" if gone else None

    def _is_new(self, unit: Unit) -> bool:
        """Return whether a receipt was written since this process began."""
        try:
            is_new = self._receipt(unit).stat().st_mtime_ns > self._began
        except FileNotFoundError:
            return False
        return is_new or self._fault(unit, Results(self.folder)) is None


@contextmanager
def open_run(
    folder: Path,
    identity: Mapping[str, Any],
    software: Mapping[str, Any],
    *,
    overwrite: bool,
    context: Mapping[str, Any] = _NOTHING,
) -> Iterator[RunFolder]:
    """Open a run's folder, or begin one.

    Args:
        folder: OUT; created if missing.
        identity: What makes it this run, as JSON holds it.
        software: Versions, recorded but not compared.
        overwrite: Remove whatever is there first.
        context: What a report needs, such as where the input lies; recorded but not compared.

    Raises:
        ValueError: It is another run's, with the differences, or is not empty and nobody's.
        BlockingIOError: It is to be overwritten and another process is writing it.
        OSError: It cannot be written or locked.
    """
    identity = json.loads(json.dumps(identity))
    file = folder / RUN_NAME
    if overwrite and file.is_file():
        _clear(folder)
    if not file.is_file():
        check_free(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{error.strerror}; give a folder that can be made and written"
        raise OSError(error.errno, reason, str(folder)) from error
    if not file.is_file():
        content = {
            "kind": _KIND,
            "format_version": FORMAT_VERSION,
            "identity": identity,
            "software": dict(software),
            "context": dict(context),
        }
        _create(file, json.dumps(content, indent=1).encode())
    with file.open("r+b") as handle:
        _lock(handle, fcntl.LOCK_SH)  # waits for a process that writes the manifest
        if not file.is_file() or not os.path.samestat(os.fstat(handle.fileno()), file.stat()):
            raise BlockingIOError(f"{folder} was overwritten by another process just now")
        _compare(folder, handle, identity)
        yield RunFolder(folder, handle)


def check_free(folder: Path) -> None:
    """Make sure that a folder without a run is one that a run may begin in.

    Raises:
        ValueError: It is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to write")
    entries = folder.iterdir() if folder.exists() else ()
    foreign = [f.name for f in entries if not f.name.endswith(".tmp")]
    if foreign and not (folder / RUN_NAME).is_file():  # of a process that began it just now
        raise ValueError(
            f"{folder} is not empty ({sorted(foreign)[0]} ...) and holds no run of this package; "
            "choose another folder"
        )


def differences(was: Any, now: Any, path: str = "") -> Iterator[str]:  # Any: JSON
    """Yield `where: was -> is now` for all that differs between two JSON values."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was | now):
            below = f"{path}.{key}" if path else key
            yield from differences(was.get(key, "absent"), now.get(key, "absent"), below)
    elif was != now:
        whole = ("present" if isinstance(value, dict) else value for value in (was, now))
        yield f"{path}: {' -> '.join(map(str, whole))}"


def parse_run(content: bytes) -> dict[str, Any]:  # Any: JSON
    """Return what `run.json` says.

    Raises:
        ValueError: It is damaged or of another version.
    """
    try:
        run = json.loads(content)
        is_ours = run["kind"] == _KIND and run["format_version"] == FORMAT_VERSION
        is_ours = is_ours and isinstance(run["identity"], dict)
    except (ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise ValueError(f"{RUN_NAME} is damaged or of another version")
    return dict(run)


def _compare(folder: Path, handle: BinaryIO, identity: Mapping[str, Any]) -> None:
    try:
        recorded = parse_run(handle.read())["identity"]
    except ValueError as error:
        raise ValueError(
            f"{folder / RUN_NAME} is damaged or of another version; choose another folder, or "
            "start anew with --overwrite"
        ) from error
    different = list(differences(recorded, identity))
    if different:
        shown = "\n  ".join(different[:8])
        more = f"\n  and {len(different) - 8} more" if len(different) > 8 else ""
        raise ValueError(
            f"{folder} holds another run; was -> is now:\n  {shown}{more}\n"
            "Choose another folder, restore what changed, or start anew with --overwrite"
        )


def _create(file: Path, content: bytes) -> None:
    """Write a file unless another process does first; what is there then is compared."""
    mine = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    write_atomically(mine, content)
    try:
        os.link(mine, file)  # fails if the name is taken, unlike a rename
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not file.exists():
            mine.replace(file)
    finally:
        mine.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove a run and all its folder holds, `run.json` last."""
    with (folder / RUN_NAME).open("r+b") as handle:
        if not _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise BlockingIOError(f"{folder} is being written by another process; wait for it")
        for entry in folder.iterdir():
            if entry.name == RUN_NAME:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (folder / RUN_NAME).unlink()


def _lock(stream: BinaryIO, how: int) -> bool:
    try:
        fcntl.flock(stream, how)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: its file system does not lock files; write to another one",
            str(stream.name),
        ) from error
    return True
