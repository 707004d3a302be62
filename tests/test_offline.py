"""Whole data sets: what comes out, how a run resumes and is shared, and how it ends."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SIZE, synthetic_tiles
from PIL import Image

from cytosyn_aug import offline
from cytosyn_aug.cache import LatentCache
from cytosyn_aug.checkpoint import load_model
from cytosyn_aug.cli import main
from cytosyn_aug.filling import features_cached
from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.images import tile_key
from cytosyn_aug.running import Work
from cytosyn_aug.variants import CachedVariants

QUIET = Work(progress=False)


def save(file, tile):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()).save(file)
    return file


def read(file):
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def digest(folder):
    """Return every file below a folder with the hash of its bytes."""
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def rows(out):
    return pq.read_table(out / "manifest.parquet").to_pylist()


@pytest.fixture(scope="module")
def small(model_folder):
    """The random model with batches of four."""
    return TileGenerator(load_model(model_folder), batch_size=4)


@pytest.fixture(scope="module")
def laboratories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laboratories")
    for name, seed in (("a", 7), ("b", 8)):
        for k, tile in enumerate(synthetic_tiles(3, seed=seed)):
            save(folder / name / f"{k}.png", 255 - tile // 2)
    return [folder / "a", folder / "b"]


@pytest.fixture
def tree(tmp_path):
    """Ten tiles of two classes, one of them with a mask and one of them blank."""
    folder = tmp_path / "in"
    for k, tile in enumerate(synthetic_tiles(9)):
        save(folder / ("tumour" if k % 2 else "stroma") / f"slide{k % 3}_{k * 10}_{k}.png", tile)
    save(folder / "stroma" / "blank.png", torch.full((3, SIZE, SIZE), 250, dtype=torch.uint8))
    Image.new("L", (SIZE, SIZE), 1).save(folder / "tumour" / "slide1_10_1_mask.png")
    return folder


def augment(tree, out, small, laboratories, **changes):
    settings = {"references": laboratories, "variants": 2, "unit_tiles": 3, "work": QUIET}
    return offline.augment(tree, out, small, **settings | changes)


def test_augment_mirrors_the_tree_and_says_how(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    summary = augment(tree, out, small, laboratories)
    assert summary.is_complete
    assert summary.counts == {"blank": 2, "edited": 18}
    found = rows(out)
    assert [r["source"] for r in found] == sorted(r["source"] for r in found)
    files = {f for f in digest(out) if "/" in f}
    assert files == {r["output"] for r in found} | {r["mask"] for r in found if r["mask"]}
    row = next(r for r in found if r["source"] == "tumour/slide1_10_1.png" and r["variant"] == 1)
    assert row["output"] == "tumour/slide1_10_1_v1.png"
    assert (row["label"], row["slide"], row["x"], row["y"]) == ("tumour", "slide1", 10, 1)
    assert row["mask"] == "tumour/slide1_10_1_v1_mask.png"
    source = tree / "tumour" / "slide1_10_1_mask.png"
    assert (out / row["mask"]).read_bytes() == source.read_bytes()
    assert row["key"] == tile_key(read(tree / row["source"]))
    assert row["model"] == small.digest
    assert row["colour_distance"] > 1
    assert -1 <= row["similarity"] < 1
    pair = [r["reference"] for r in found if r["source"] == row["source"]]
    assert sorted(pair) == ["a", "b"]  # variants take the references in turn
    blank = next(r for r in found if r["status"] == "blank")
    assert torch.equal(read(out / blank["output"]), read(tree / blank["source"]))


def test_a_tile_is_what_the_transform_makes_of_it(tree, tmp_path, small, laboratories):
    from cytosyn_aug import StainNormalize, StainReference

    out = tmp_path / "out"
    offline.normalize(tree, out, small, reference=laboratories[0], work=QUIET)
    transform = StainNormalize(small, StainReference.fit(small, laboratories[0]))
    for row in rows(out):
        expected = transform(read(tree / row["source"])).int()
        assert row["output"] == row["source"]
        # Batches of another shape round differently.
        assert (read(out / row["output"]).int() - expected).abs().max() <= 1


@pytest.mark.parametrize("format", ["png", "webp", "tar", "images"])
def test_formats_hold_the_same_pixels(tree, tmp_path, small, laboratories, format):
    augment(tree, tmp_path / "png", small, laboratories)
    out = tmp_path / "out"
    augment(tree, out, small, laboratories, format=format)
    expected = {r["key"]: read(tmp_path / "png" / r["output"]) for r in rows(tmp_path / "png")}
    last = {r["key"]: r for r in rows(out)}
    for key, row in last.items():
        if format == "images":
            found = LatentCache.open(out).get([key], [row["variant"]]).fields["images"][0]
        elif format == "tar":
            import tarfile

            shard, member = row["output"].split("/", 1)
            with tarfile.open(out / shard) as tar:
                found = read(tar.extractfile(member))
                assert (
                    tar.extractfile(member.replace(".webp", ".cls")).read().decode()
                    == (row["label"])
                )
        else:
            assert row["output"].endswith(format)
            found = read(out / row["output"])
        assert torch.equal(found, expected[key])


def test_cached_latents_are_read_by_cached_variants(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories, format="latents")
    look_up = CachedVariants(LatentCache.open(out), p=1.0)
    tiles = torch.stack([read(tree / r["source"]) for r in rows(out) if r["variant"] == 0])
    found = look_up(tiles)
    assert found.is_variant.sum() == 9  # the blank one stays
    assert look_up.decode(small, found).shape == tiles.shape


def test_cache_holds_what_the_encoder_gives(tree, tmp_path, small):
    folder = tmp_path / "cache"
    summary = offline.cache(tree, folder, small, unit_tiles=3, work=QUIET)
    assert summary.counts == {"cached": 10}
    cache = LatentCache.open(folder)
    assert len(cache) == 10
    tiles = torch.stack([read(tree / r["source"]) for r in rows(summary.out)])
    found = features_cached(small, tiles, cache, writes=False)
    assert torch.allclose(found, small.features(tiles).cls, atol=1e-5)
    assert offline.cache(tree, folder, small, unit_tiles=3, work=QUIET).is_complete
    assert len(LatentCache.open(folder)) == 10


def test_sample_takes_conditions_in_turn(tmp_path, small):
    features = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    summary = offline.sample(
        tmp_path / "out", small, n=7, conditions=tmp_path / "features.npy", steps=2, work=QUIET
    )
    assert summary.counts == {"generated": 7}
    images = [read(tmp_path / "out" / r["output"]) for r in rows(tmp_path / "out")]
    assert len({tile_key(image) for image in images}) == 7
    again = offline.sample(
        tmp_path / "two", small, n=7, conditions=features, steps=2, unit_tiles=2, work=QUIET
    )
    assert again.is_complete
    for row, image in zip(rows(tmp_path / "two"), images, strict=True):
        assert torch.equal(read(tmp_path / "two" / row["output"]), image)


def test_shards_together_are_the_whole(tree, tmp_path, small, laboratories):
    augment(tree, tmp_path / "whole", small, laboratories)
    out = tmp_path / "out"
    first = augment(tree, out, small, laboratories, work=replace(QUIET, shard=(0, 2)))
    assert not first.is_complete
    assert not (out / "manifest.parquet").exists()
    second = augment(tree, out, small, laboratories, work=replace(QUIET, shard=(1, 2)))
    assert second.is_complete
    assert digest(out) == digest(tmp_path / "whole")


def test_a_rerun_does_nothing_and_changes_nothing(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories)
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()}
    assert augment(tree, out, small, laboratories).counts == {"blank": 2, "edited": 18}
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()} == before


def test_dry_run_writes_nothing_and_counts(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    work = replace(QUIET, dry_run=True)
    estimate = augment(tree, out, small, laboratories, work=work).estimate
    assert not out.exists()
    assert (estimate["tiles_to_do"], estimate["results"], estimate["units"]) == (10, 20, 4)
    assert estimate["tiles_with_masks"] == 1
    assert estimate["tiles_per_s"] > 0
    augment(tree, out, small, laboratories, work=replace(QUIET, shard=(0, 2)))
    before = digest(out)
    assert augment(tree, out, small, laboratories, work=work).estimate["units_to_do"] == 2
    assert digest(out) == before


def test_another_recipe_is_refused_with_the_difference(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    augment(tree, out, small, laboratories)
    with pytest.raises(ValueError, match=r"recipe\.seed: 0 -> 1"):
        augment(tree, out, small, laboratories, seed=1)
    save(tree / "new.png", synthetic_tiles(1, seed=9)[0])
    with pytest.raises(ValueError, match=r"input\.num_tiles: 10 -> 11"):
        augment(tree, out, small, laboratories)
    summary = augment(tree, out, small, laboratories, work=replace(QUIET, overwrite=True))
    assert summary.counts["edited"] == 20
    augment(tree, tmp_path / "fresh", small, laboratories)
    assert digest(out) == digest(tmp_path / "fresh")


def test_a_folder_of_something_else_is_refused(tree, tmp_path, small, laboratories):
    out = tmp_path / "out"
    (out / "thesis").mkdir(parents=True)
    for work in (QUIET, replace(QUIET, overwrite=True)):
        with pytest.raises(ValueError, match="not empty"):
            augment(tree, out, small, laboratories, work=work)


def test_masks_are_refused_where_structure_moves(tree, tmp_path, small, laboratories):
    with pytest.raises(ValueError, match="1 tiles have masks"):
        augment(tree, tmp_path / "out", small, laboratories, preserve="none")
    with pytest.raises(ValueError, match="1 tiles have masks"):
        offline.augment(tree, tmp_path / "out", small, mode="resample", work=QUIET)
    assert not (tmp_path / "out").exists()
    summary = offline.augment(
        tree,
        tmp_path / "out",
        small,
        mode="resample",
        steps=2,
        allow_geometry_change=True,
        work=QUIET,
    )
    assert summary.counts == {"blank": 1, "edited": 9}
    assert not any(row["mask"] for row in rows(tmp_path / "out"))


def test_variants_that_would_repeat_themselves_are_refused(tree, tmp_path, small, laboratories):
    with pytest.raises(ValueError, match="would repeat themselves"):
        augment(tree, tmp_path / "out", small, laboratories, variants=3)
    summary = augment(tree, tmp_path / "out", small, laboratories, variants=3, strength=(0.5, 1.0))
    assert summary.counts["edited"] == 27
    strengths = {r["strength"] for r in rows(tmp_path / "out")}
    assert len(strengths) == 30
    assert 0.5 <= min(strengths) < max(strengths) <= 1


def test_larger_tiles_keep_their_size(tmp_path, small, laboratories):
    for k, size in enumerate((SIZE, 150, SIZE, 201)):
        save(tmp_path / "in" / f"{k}.png", synthetic_tiles(1, seed=k, size=size)[0])
    summary = augment(tmp_path / "in", tmp_path / "out", small, laboratories)
    assert summary.counts == {"edited": 8}
    for row in rows(tmp_path / "out"):
        source, made = tmp_path / "in" / row["source"], tmp_path / "out" / row["output"]
        assert read(source).shape == read(made).shape


def test_torchvision_finds_the_same_classes_in_out(tree, tmp_path, small, laboratories):
    from torchvision.datasets import ImageFolder

    augment(tree, tmp_path / "out", small, laboratories)
    before, after = ImageFolder(tree), ImageFolder(tmp_path / "out")
    assert before.classes == after.classes


def command(tree, out, model_folder, laboratories, *more):
    return [
        "augment",
        *(str(tree), str(out), "--model", str(model_folder), "--batch-size", "2"),
        *("--variants", "2", "--unit-tiles", "3", "--references", *map(str, laboratories)),
        *more,
    ]


def test_killed_anywhere_and_run_again_it_is_the_same(tree, tmp_path, model_folder, laboratories):
    assert main(command(tree, tmp_path / "whole", model_folder, laboratories)) == 0
    out = tmp_path / "out"
    words = command(tree, out, model_folder, laboratories)
    draw = random.Random(os.getpid())
    for _ in range(2):
        before = len(list(out.rglob("*")))
        process = subprocess.Popen([sys.executable, "-m", "cytosyn_aug.cli", *words])
        while len(list(out.rglob("*"))) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(words) == 0
    assert digest(out) == digest(tmp_path / "whole")
    assert not (out / ".work").exists()


class Killed(BaseException):
    """What stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("format", ["png", "tar"])
def test_ended_at_any_write_and_run_again_it_is_the_same(
    tree, tmp_path, small, laboratories, monkeypatch, format
):
    augment(tree, tmp_path / "whole", small, laboratories, format=format)
    out = tmp_path / "out"
    real, left = os.fsync, [0]

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        real(descriptor)

    for number in (0, 1, 2, 3, 5, 8, 13, 21):
        left[0] = number
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(os, "fsync", fsync)
            augment(tree, out, small, laboratories, format=format)
    assert augment(tree, out, small, laboratories, format=format).is_complete
    assert digest(out) == digest(tmp_path / "whole")


def test_two_processes_share_one_run(tree, tmp_path, model_folder, laboratories):
    assert main(command(tree, tmp_path / "whole", model_folder, laboratories)) == 0
    out = tmp_path / "out"
    words = command(tree, out, model_folder, laboratories)
    processes = [
        subprocess.Popen([sys.executable, "-m", "cytosyn_aug.cli", *words]) for _ in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert digest(out) == digest(tmp_path / "whole")


def test_exit_codes_and_messages(tree, tmp_path, model_folder, laboratories, capsys):
    out = tmp_path / "out"
    words = command(tree, out, model_folder, laboratories)
    (tree / "stroma" / "bro\nken.png").write_bytes(b"nothing")
    assert main(words) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: 2 blank, 18 edited, 1 failed")
    assert "failed: stroma/bro\\nken.png is damaged or no image" in printed.err
    assert main([*words, "--seed", "5"]) == 2
    assert "recipe.seed: 0 -> 5" in capsys.readouterr().err
    assert main(["augment", str(tmp_path / "absent"), str(out)]) == 2
    assert main([*words, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["units_to_do"] == 1  # the failed one
    save(tree / "stroma" / "bro\nken.png", synthetic_tiles(1, seed=5)[0])
    assert main(words) == 0


def test_slurm_prints_an_array_of_shards(capsys):
    words = ["augment", "my tiles", "out", "--references", "lab"]
    assert main(["slurm", "--shards", "3", "--gpus", "0", "--", *words]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-2\n" in script
    line = "cytosyn-aug augment 'my tiles' out --references lab"
    assert f'{line} --shard "$SLURM_ARRAY_TASK_ID/3" --quiet\n' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert main(["slurm", "--shards", "3", "--", *words, "--shard", "0/2"]) == 2
    assert main(["slurm", "--shards", "3", "--", "info"]) == 2
