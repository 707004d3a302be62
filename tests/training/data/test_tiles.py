"""The tile stage as a whole: what it takes, what it leaves, and what stopping it costs."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cytosyn_aug.config import TileSpec
from cytosyn_aug.io.image_files import decode_tile
from cytosyn_aug.io.slide import Slide
from cytosyn_aug.io.tissue import TissueConfig
from training.command_line import main
from training.data import tiles
from training.data.batches import StoredTiles, load_tiles
from training.data.cutting import TileRecipe, take
from training.data.shards import TileStore
from training.data.sources import list_slide_sources
from training.data.tile_folders import list_tiles
from training.data.tiles import make_tiles
from training.recipes import smoke_tile

ROOT = Path(__file__).parents[3]
RECIPE = TileRecipe(
    tile=TileSpec(size_px=64),  # 128 px of the synthetic slides
    tissue=TissueConfig(mask_mpp=2.0),
    split_shares=(("train", 0.5), ("val", 0.5)),
)


def cut(folder, out, recipe=RECIPE, num_workers=0, **options):
    return make_tiles(list_slide_sources(folder, **options), recipe, out, num_workers=num_workers)


def rows(out):
    return pq.read_table(out / "tiles.parquet").to_pylist()


def slide_rows(out):
    with (out / "slides.csv").open(newline="") as stream:
        return {row["slide"]: row for row in csv.DictReader(stream)}


def tree(out):
    """Hash of every file by name; of temporary files too, which must not be left."""
    return {
        str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(out.rglob("*"))
        if f.is_file()
    }


@pytest.fixture
def slides(synthetic_slide):
    """Three slides of two to nine tiles; their folder."""
    for k, grid in enumerate(["###\n###\n###", "##.\n#..", "....\n.##."]):
        file = synthetic_slide(f"s{k}.svs", grid, seed=k)
    return file.parent


def test_the_tiles_of_a_hand_drawn_slide(synthetic_slide, tmp_path):
    """Tissue is taken; glass, pen and blur are not, and the uneven rim is not reached."""
    grid = ".....\n.###.\n.#p#.\n.##..\n....b"
    file = synthetic_slide(grid=grid)
    summary = cut(file.parent, tmp_path / "out")
    expected = [
        (column * 128, row * 128)
        for row, line in enumerate(grid.split())
        for column, kind in enumerate(line)
        if kind == "#"
    ]
    found = rows(tmp_path / "out")
    assert [(r["x_level0"], r["y_level0"]) for r in found] == expected
    assert {(r["extent_level0"], r["level"], r["mpp"]) for r in found} == {(128, 0, 0.5)}
    assert summary == (1, 7, ())
    slide = slide_rows(tmp_path / "out")["slide"]
    assert (slide["mpp"], slide["mpp_source"], slide["num_blurred"]) == ("0.25", "properties", "1")


def test_the_table_is_enough_to_cut_every_tile_again(slides, tmp_path):
    cut(slides, tmp_path / "out")
    store = TileStore(tmp_path / "out")
    for index, row in enumerate(rows(tmp_path / "out")):
        with Slide(slides / f"{row['slide']}.svs") as slide:
            reading = slide.plan(RECIPE.tile)
            tile = slide.read_tile(row["x_level0"], row["y_level0"], reading)
        assert decode_tile(store.read_bytes(index)).tobytes() == tile.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_processes(slides, tmp_path, num_workers):
    cut(slides, tmp_path / "here")
    cut(slides, tmp_path / "there", num_workers=num_workers)
    assert tree(tmp_path / "here") == tree(tmp_path / "there")


def run_elsewhere(slides, out, *, before="", num_workers=0):
    """Run the stage in a process of its own, without torch, after some code."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from training.data.cutting import TileRecipe\n"
        "from training.data.sources import list_slide_sources\n"
        "from training.data.tiles import make_tiles\n"
        "from cytosyn_aug.config import TileSpec; from cytosyn_aug.io.tissue import TissueConfig\n"
        f"{before}\n"
        "if __name__ == '__main__':\n"
        "    recipe = TileRecipe(tile=TileSpec(size_px=64), tissue=TissueConfig(mask_mpp=2.0),\n"
        "        split_shares=(('train', 0.5), ('val', 0.5)))\n"
        f"    listing = list_slide_sources(Path({str(slides)!r}))\n"
        f"    make_tiles(listing, recipe, Path({str(out)!r}), num_workers={num_workers})\n"
        "    sys.exit('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


KILL = """
calls = 0
def killing(function):
    def call(*arguments):
        global calls
        calls += 1
        if calls == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
os.fsync, os.rename, os.replace = killing(os.fsync), killing(os.rename), killing(os.replace)
"""


@pytest.mark.slow
def test_killed_over_and_over_it_reaches_the_same_bytes(slides, tmp_path):
    """Each run dies at its thirteenth flush or rename; publishing alone is twelve."""
    cut(slides, tmp_path / "undisturbed")
    deaths = 0
    while (done := run_elsewhere(slides, tmp_path / "out", before=KILL.format(at=13))).wait():
        assert done.returncode == -signal.SIGKILL, done.stderr.read()
        assert deaths == 0 or not (tmp_path / "out" / "dataset.json").exists()
        deaths += 1
        assert deaths < 40
    assert deaths >= 3
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def cut_in_a_fork(slides, out, *, before):
    """Run the stage after some code in a copy of this process; return how that ended."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = 1
    try:
        exec(before, {"os": os, "signal": signal})
        cut(slides, out)
        code = 0
    finally:
        os._exit(code)


@pytest.mark.slow
def test_killed_at_every_flush_and_rename_a_rerun_reaches_the_same_bytes(slides, tmp_path):
    cut(slides, tmp_path / "undisturbed")
    expected, at, code = tree(tmp_path / "undisturbed"), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        at += 1
        out = tmp_path / f"out{at}"
        code = cut_in_a_fork(slides, out, before=KILL.format(at=at))
        cut(slides, out)
        assert tree(out) == expected, at
    assert code == 0
    assert at > 60


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_processes_end_with_a_killed_parent_and_a_rerun_completes(synthetic_slide, tmp_path):
    for k in range(3):
        folder = synthetic_slide(f"s{k}.svs", "##########\n" * 10, seed=k).parent
    parent = run_elsewhere(folder, tmp_path / "out", num_workers=2)
    while not list((tmp_path / "out").glob("work/scans/*.json")):
        assert parent.poll() is None, parent.stderr.read()
        time.sleep(0.02)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.kill()
    parent.wait()
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.05)
    cut(folder, tmp_path / "out")
    cut(folder, tmp_path / "undisturbed")
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_a_finished_run_does_nothing_when_run_again(slides, tmp_path, monkeypatch):
    cut(slides, tmp_path / "out")
    before = tree(tmp_path / "out")
    monkeypatch.setattr(tiles, "cut", None)
    monkeypatch.setattr(tiles, "scan", None)
    cut(slides, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_tile_processes_load_no_torch(slides, tmp_path):
    done = run_elsewhere(slides, tmp_path / "out")
    assert done.wait() == 0, done.stderr.read()


def test_a_changed_recipe_is_refused_with_the_difference(slides, tmp_path):
    cut(slides, tmp_path / "out")
    other = replace(RECIPE, seed=1, tissue=TissueConfig(mask_mpp=2.0, min_tissue=0.7))
    with pytest.raises(ValueError, match=r"(?s)recipe\.seed: 0 -> 1\n.*min_tissue: 0\.5 -> 0\.7"):
        cut(slides, tmp_path / "out", other)


def test_added_slides_and_other_decoders_are_refused(
    slides, synthetic_slide, tmp_path, monkeypatch
):
    cut(slides, tmp_path / "out")
    monkeypatch.setattr("PIL.__version__", "1.2")
    synthetic_slide("new.svs")
    with pytest.raises(ValueError, match=r"(?s)slides\.new: absent -> present.*pillow: .* -> 1\.2"):
        cut(slides, tmp_path / "out")


def test_two_runs_at_once_are_refused(slides, tmp_path):
    (tmp_path / "out" / "work").mkdir(parents=True)
    with tiles._sole_owner(tmp_path / "out"), pytest.raises(ValueError, match="by another run"):
        cut(slides, tmp_path / "out")


def test_a_folder_of_something_else_is_refused(slides, tmp_path):
    with pytest.raises(ValueError, match="is not empty and not of the tile stage"):
        cut(slides, tmp_path)


def test_a_full_disk_leaves_no_part_of_a_shard_and_a_rerun_completes(slides, tmp_path):
    """A limit on the size of files stands for the disk: the same error at the same place."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))"
    done = run_elsewhere(slides, tmp_path / "out", before=limit)
    assert done.wait() == 1
    assert "File too large after" in (message := done.stderr.read())
    assert "s0.tar" in message
    left = tree(tmp_path / "out")
    assert "dataset.json" not in left
    assert not [name for name in left if name.endswith((".tmp", ".tar"))]
    cut(slides, tmp_path / "out")
    cut(slides, tmp_path / "undisturbed")
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_too_small_a_disk_is_refused_before_cutting(slides, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(ValueError, match=r"about 91,750 bytes are needed .* 10,000 are free"):
        cut(slides, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_missing_or_shortened_shard_is_cut_again(slides, tmp_path):
    cut(slides, tmp_path / "out")
    before = tree(tmp_path / "out")
    first, second, _ = sorted((tmp_path / "out").rglob("*.tar"))
    first.unlink()
    second.write_bytes(b"")
    cut(slides, tmp_path / "out")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["receipts/s0.json", "scans/s0.json"])
def test_what_is_unreadable_vouches_for_nothing(slides, tmp_path, name):
    cut(slides, tmp_path / "out")
    before = tree(tmp_path / "out")
    (tmp_path / "out" / "work" / name).write_text("{")
    cut(slides, tmp_path / "out")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["../elsewhere", "work", "unseen", ""])
def test_a_split_that_cannot_name_a_folder_is_refused(name):
    with pytest.raises(ValueError, match="cannot name a folder"):
        replace(RECIPE, split_shares=((name, 1.0),))


def test_a_larger_set_includes_a_smaller_one(slides, tmp_path):
    found = []
    for num in (5, 9, 14):
        cut(slides, tmp_path / f"{num}", replace(RECIPE, num_tiles=num))
        tiles_of = {(r["slide"], r["x_level0"], r["y_level0"]) for r in rows(tmp_path / f"{num}")}
        assert len(tiles_of) == num
        found.append(tiles_of)
    assert found[0] < found[1] < found[2]


def test_rejected_candidates_are_replaced_and_failed_ones_are_not():
    order, bad = np.array([4, 1, 3, 0, 2, 5]), {1}
    asked = []
    take(order, 3, lambda k: asked.append(k) or k not in bad)
    assert asked == [1, 3, 4, 0]  # the best three row by row, then one for the rejected


def test_an_imported_mask_decides_where_tissue_is(slides, tmp_path):
    (tmp_path / "masks").mkdir()
    mask = np.zeros((3, 3), np.uint8)
    mask[1, 2] = 1
    Image.fromarray(mask).save(tmp_path / "masks" / "s0.png")
    square = [[0, 0], [128, 0], [128, 128], [0, 128], [0, 0]]
    shape = {"type": "Polygon", "coordinates": [square]}
    (tmp_path / "masks" / "s1.geojson").write_text(json.dumps(shape))
    (tmp_path / "masks" / "s2.png").write_bytes(b"broken")
    summary = cut(slides, tmp_path / "out", masks=tmp_path / "masks")
    found = {(r["slide"], r["x_level0"], r["y_level0"]) for r in rows(tmp_path / "out")}
    assert found == {("s0", 256, 128), ("s1", 0, 0)}
    assert [name for name, _ in summary.failures] == ["s2"]


def test_a_copy_of_a_slide_in_another_split_is_a_leak(slides, tmp_path):
    shutil.copy(slides / "s0.svs", slides / "copy.svs")
    table = tmp_path / "slides.csv"
    table.write_text("slide,split\ns0,train\ns1,train\ns2,train\ncopy,val\n")
    with pytest.raises(ValueError, match="one slide under several names is in train and val"):
        cut(slides, tmp_path / "out", table=table)
    table.write_text("slide,split\ns0,train\ns1,train\ns2,val\ncopy,train\n")  # corrected
    assert cut(slides, tmp_path / "out", table=table).num_slides == 4


def test_a_download_that_differs_from_its_manifest_fails(slides, tmp_path):
    manifest = tmp_path / "manifest.txt"
    lines = ["id\tfilename\tmd5\tsize"]
    for k, wrong in enumerate(("", "size", "md5")):
        content = (slides / f"s{k}.svs").read_bytes()
        md5 = "0" * 32 if wrong == "md5" else hashlib.md5(content).hexdigest()
        lines.append(f"id{k}\ts{k}.svs\t{md5}\t{len(content) + (wrong == 'size')}")
    manifest.write_text("\n".join(lines))
    listing = list_slide_sources(slides, manifest=manifest)
    summary = make_tiles(listing, RECIPE, tmp_path / "out", num_workers=0, check_md5=True)
    (_, size), (_, md5) = summary.failures
    assert "its manifest says" in size
    assert "another MD5" in md5
    assert summary.num_slides == 1


@pytest.fixture
def given_tiles(tmp_path):
    """Tiles cut elsewhere, with splits, provenance and four that cannot be used; their folder."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "given"
    for name in ("train/a/0_0.webp", "train/a/64_0.png", "train/b/5_7.jpg", "val/c/0_0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, lossless=True)
    (folder / "slides.csv").write_text("slide,patient,licence\na,p,MIT\nb,p,MIT\nc,q,MIT\n")
    (folder / "tiles.csv").write_text("file,x_level0,tissue_fraction\ntrain/a/0_0.webp,9,0.75\n")
    return folder


def test_given_tiles_keep_their_pixels_splits_and_provenance(given_tiles, tmp_path):
    out = tmp_path / "out"
    summary = make_tiles(list_tiles(given_tiles), RECIPE, out, num_workers=0)
    assert summary == (3, 4, ())
    for split in ("train", "val"):
        ours, theirs = load_tiles(out / split, 64), load_tiles(given_tiles / split, 64)
        assert torch.equal(ours.images, theirs.images)
        assert ours.slides == theirs.slides
        assert torch.equal(ours.slide_index, theirs.slide_index)
    first = rows(out)[0]
    assert (first["source"], first["patient"]) == ("train/a/0_0.webp", "p")
    assert (first["x_level0"], first["tissue"]) == (9, 0.75)
    for name in ("slides.csv", "tiles.csv"):
        assert (out / "provenance" / name).read_bytes() == (given_tiles / name).read_bytes()


def test_an_unusable_given_tile_fails_by_name_and_is_not_replaced(given_tiles, tmp_path):
    picture = Image.open(given_tiles / "train/a/64_0.png")
    picture.resize((65, 64)).save(given_tiles / "train/a/1_1.png")
    picture.convert("CMYK").save(given_tiles / "train/a/2_2.jpg")
    (given_tiles / "train/a/3_3.png").write_bytes(b"text")
    (given_tiles / "train/a/4_4.png").write_bytes((given_tiles / "val/c/0_0.png").read_bytes()[:99])
    summary = make_tiles(list_tiles(given_tiles), RECIPE, tmp_path / "out", num_workers=0)
    assert summary.num_tiles == 4
    messages = " ".join(reason for _, reason in summary.failures)
    for part in ("1_1.png is 65x64 px", "has mode CMYK", "3_3.png cannot", "4_4.png cannot"):
        assert part in messages


def test_a_fault_in_the_table_of_given_tiles_costs_their_slide(given_tiles, tmp_path):
    (given_tiles / "slides.csv").write_text("slide,mpp\nb,much\n")
    summary = make_tiles(list_tiles(given_tiles), RECIPE, tmp_path / "out", num_workers=0)
    assert summary.num_slides == 2
    assert [(name, "has mpp 'much'" in reason) for name, reason in summary.failures] == [
        ("b", True)
    ]


def test_a_larger_set_than_memory_is_read_by_a_data_loader(given_tiles, tmp_path):
    make_tiles(list_tiles(given_tiles), RECIPE, tmp_path / "out", num_workers=0)
    expected = load_tiles(tmp_path / "out" / "train", 64)
    stored = StoredTiles(TileStore(tmp_path / "out", "train"))
    loader = torch.utils.data.DataLoader(stored, batch_size=2, num_workers=2)
    images, slides = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(images, expected.images)
    assert torch.equal(slides, expected.slide_index)


def test_tiles_of_another_size_are_refused_for_training(given_tiles, tmp_path):
    make_tiles(list_tiles(given_tiles), RECIPE, tmp_path / "out", num_workers=0)
    with pytest.raises(ValueError, match=r"64 px at 0\.5 microns/pixel, expected 224 px"):
        load_tiles(tmp_path / "out" / "train")
    (tmp_path / "out" / "dataset.json").unlink()
    with pytest.raises(ValueError, match="did not finish"):
        load_tiles(tmp_path / "out" / "train", 64)


def test_the_command_says_with_its_exit_code_what_came_of_it(synthetic_slide, tmp_path, capsys):
    out, folder = tmp_path / "out", synthetic_slide(grid="##\n##", side=500).parent
    arguments = [
        "tile",
        "--slides",
        str(folder),
        "--out",
        str(out),
        "--workers",
        "0",
        "--recipe",
        "smoke",
    ]
    assert main([*arguments, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["slides"], plan["recipe"]["num_tiles"]) == (1, smoke_tile().num_tiles)
    assert plan["estimate"]["output_bytes"] > 80_000
    assert not out.exists()
    assert main(arguments) == 0
    assert "4 tiles of 1 slides" in capsys.readouterr().out
    assert main(["tile", "--out", str(out), "--verify"]) == 0
    assert main([*arguments[:-1], "no_such"]) == 2
    assert main(["tile", "--slides", str(folder), "--out", str(folder / "out")]) == 2
    (folder / "text.svs").write_text("hello")
    assert main([*arguments[:4], str(tmp_path / "out2"), *arguments[5:]]) == 1
    assert "failed: text: text.svs" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk_is_named_and_nothing_partial_stays(slides, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=72k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        blind = "import shutil; shutil.disk_usage = lambda _, real=shutil.disk_usage: real('/')"
        done = run_elsewhere(slides, disk / "out", before=blind)
        assert done.wait() == 1
        assert "No space left on device" in done.stderr.read()
        assert not [name for name in tree(disk / "out") if name.endswith(".tmp")]
        assert not (disk / "out" / "dataset.json").exists()
        for shard in (disk / "out").rglob("*.tar"):
            assert shard.read_bytes()[-1024:] == bytes(1024)
    finally:
        subprocess.run(["umount", disk], check=True)
