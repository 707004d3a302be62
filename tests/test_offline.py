"""Whole data sets: what comes out, how a run resumes and is shared, and how it ends."""

import io
import tarfile

import numpy as np
import pytest
import torch

import cytosyn_aug
from cytosyn_aug import offline
from cytosyn_aug.cache.encodings import features_cached
from cytosyn_aug.cache.store import LatentCache
from cytosyn_aug.images import tile_key
from cytosyn_aug.transforms.cached_variants import CachedVariants
from tests.support.offline_runs import QUIET, augment, digest, read, rows
from tests.support.synthetic import SIZE, synthetic_tiles
from tests.support.synthetic import save_tile as save


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


def test_several_folders_are_one_reference(tree, tmp_path, small, laboratories):
    from cytosyn_aug import StainReference

    outs = [tmp_path / "folders", tmp_path / "fitted"]
    fitted = StainReference.fit(small, laboratories)
    for out, reference in zip(outs, (laboratories, fitted), strict=True):
        offline.normalize(tree, out, small, reference=reference, work=QUIET)
    found, expected = (rows(out) for out in outs)
    assert {row["reference"] for row in found} == {"a+b"}
    for row, other in zip(found, expected, strict=True):
        assert torch.equal(read(outs[0] / row["output"]), read(outs[1] / other["output"]))
    save(tmp_path / "b" / "0.png", synthetic_tiles(1)[0])
    others = [laboratories[0], tmp_path / "b"]
    with pytest.raises(ValueError, match=r"holds another run.*\n  references: "):
        offline.normalize(tree, outs[0], small, reference=others, work=QUIET)
    fitted.save(tmp_path / "lab.json")
    several = [laboratories[0], tmp_path / "lab.json"]
    with pytest.raises(ValueError, match=r"lab\.json.*give a saved one alone"):
        offline.normalize(tree, tmp_path / "out", small, reference=several, work=QUIET)


def test_a_slide_is_changed_by_its_own_statistics(tree, tmp_path, small, laboratories):
    from cytosyn_aug import StainNormalize, StainReference

    out = tmp_path / "out"
    settings = {"reference": laboratories[0], "stain_source": "slide", "work": QUIET}
    summary = offline.normalize(tree, out, small, **settings)
    assert summary.notes == ("1 of 10 tiles do not say their slide; their own stain is used",)
    reference = StainReference.fit(small, laboratories[0])
    of_slide = [r for r in rows(out) if r["slide"] == "slide1"]
    tiles = torch.stack([read(tree / r["source"]) for r in of_slide])
    transform = StainNormalize(small, reference, source=StainReference.fit(small, tiles))
    for row, expected in zip(of_slide, transform(tiles).int(), strict=True):
        assert (read(out / row["output"]).int() - expected).abs().max() <= 1


def test_the_stain_of_slides_that_no_tile_names_is_refused(tmp_path, small, laboratories):
    save(tmp_path / "in" / "tumour" / "one.png", synthetic_tiles(1)[0])
    (tmp_path / "in" / "slide_1_2_mask.png").touch()  # of no tile, and so says nothing
    settings = {"reference": laboratories[0], "stain_source": "slide", "work": QUIET}
    with pytest.raises(ValueError, match="no tile says its slide"):
        offline.normalize(tmp_path / "in", tmp_path / "out", small, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["macenko", "reinhard", "transport"])
def test_classical_methods_do_what_their_transforms_do(tree, tmp_path, small, laboratories, method):
    kinds = {
        "macenko": (cytosyn_aug.MacenkoNormalize, cytosyn_aug.MacenkoReference),
        "reinhard": (cytosyn_aug.ReinhardNormalize, cytosyn_aug.ReinhardReference),
        "transport": (cytosyn_aug.DensityTransport, cytosyn_aug.DensityReference),
    }
    transform, kind = kinds[method]
    reference = kind.fit(laboratories[0])
    reference.save(tmp_path / "lab.json")
    out = tmp_path / "out"
    settings = {"reference": tmp_path / "lab.json", "method": method, "work": QUIET}
    summary = offline.normalize(tree, out, small, **settings)
    assert summary.counts == {"blank": 1, "edited": 9}
    for row in rows(out):
        expected = transform(reference)(read(tree / row["source"]))
        assert torch.equal(read(out / row["output"]), expected)
    offline.normalize(tree, tmp_path / "by_slide", small, stain_source="slide", **settings)
    tiles = {r["source"]: read(tree / r["source"]) for r in rows(out) if r["slide"] == "slide2"}
    by_slide = transform(reference, source=kind.fit(torch.stack(list(tiles.values()))))
    for name, tile in tiles.items():
        assert torch.equal(read(tmp_path / "by_slide" / name), by_slide(tile))
    idle = offline.normalize(tree, tmp_path / "idle", small, strength=0.0, **settings)
    assert idle.counts == summary.counts  # unchanged is not blank
    settings["method"] = "reinhard" if method == "macenko" else "macenko"
    with pytest.raises(ValueError, match="holds cytosyn_aug"):
        offline.normalize(tree, tmp_path / "other", small, **settings)


def test_a_tile_that_the_networks_fail_on_is_named_and_not_written(tmp_path, small, monkeypatch):
    real = type(small).decode_pixels

    def decode_pixels(self, latents, **settings):
        pixels = real(self, latents, **settings)
        pixels[0, 0, 0, 0] = torch.nan
        return pixels

    monkeypatch.setattr(type(small), "decode_pixels", decode_pixels)
    summary = offline.sample(tmp_path / "out", small, n=8, steps=2, work=QUIET)
    assert summary.counts == {"failed": 2, "generated": 6}
    assert "not finite" in summary.failed[0][1]
    assert len(list((tmp_path / "out").rglob("*.png"))) == 6


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


def test_tar_shards_come_back_with_all_that_lay_beside_their_tiles(
    tree, tmp_path, small, laboratories
):
    def members(folder):
        found = {}
        for file in sorted(folder.glob("*.tar")):
            with tarfile.open(file) as tar:
                found |= {m.name: tar.extractfile(m).read() for m in tar}
        return {name: found[name] for name in found if not name.endswith((".webp", ".png"))}

    image = sorted((tree / "tumour").glob("*_1.png"))[0]
    source = tmp_path / "0.tar"
    with tarfile.open(source, "w") as tar:
        for ending in ("png", "cls", "mask.npy", "json"):
            content = image.read_bytes() if ending == "png" else ending.encode()
            info = tarfile.TarInfo(f"case.1_10_1.{ending}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    first, second = tmp_path / "first", tmp_path / "second"
    settings = {"reference": laboratories[0], "format": "tar", "work": QUIET}
    offline.normalize(source, first, small, **settings)
    expected = {f"case%2E1_10_1.{kind}": kind.encode() for kind in ("cls", "json", "mask.npy")}
    assert members(first) == expected
    offline.normalize(first / "shard-000000.tar", second, small, **settings)
    assert members(second) == expected
    assert [row["slide"] for row in rows(second)] == ["case.1"]


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
    assert offline.cache(tree, folder, small, unit_tiles=3, compact=True, work=QUIET).is_complete
    assert len(LatentCache.open(folder)) == 10
    assert len(list((folder / "shards").iterdir())) == 1


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


def test_results_out_of_bounds_are_left_out_named_and_the_same_after_a_resume(
    tree, tmp_path, small
):
    settings = {"mode": "resample", "steps": 2, "allow_geometry_change": True, "work": QUIET}
    offline.augment(tree, tmp_path / "free", small, **settings)
    free = {row["source"]: row for row in rows(tmp_path / "free")}
    found = sorted(row["similarity"] for row in free.values() if row["status"] == "edited")
    low, high = found[2] - 1e-6, found[-3] + 1e-6
    settings |= {"min_similarity": low, "max_similarity": high, "unit_tiles": 4}
    summary = offline.augment(tree, tmp_path / "out", small, **settings)
    assert summary.counts == {"blank": 1, "edited": 5, "rejected": 4}
    assert offline.augment(tree, tmp_path / "out", small, **settings).counts == summary.counts
    for row in rows(tmp_path / "out"):
        same = free[row["source"]]
        if row["status"] == "rejected":
            assert not row["output"]
            assert not (tmp_path / "out" / same["output"]).exists()
            assert row["similarity"] == same["similarity"]
            assert not low <= row["similarity"] <= high
            assert ("min_" if row["similarity"] < low else "max_") in row["reason"]
        else:
            assert torch.equal(
                read(tmp_path / "out" / row["output"]), read(tmp_path / "free" / same["output"])
            )


def test_bounds_that_mean_nothing_are_refused(tree, tmp_path, small, laboratories):
    with pytest.raises(ValueError, match="moves nothing"):
        augment(tree, tmp_path / "out", small, laboratories, max_similarity=0.9)
    settings = {"mode": "resample", "allow_geometry_change": True, "work": QUIET}
    with pytest.raises(ValueError, match="needs all variants"):
        offline.augment(
            tree, tmp_path / "out", small, format="images", max_similarity=0.9, **settings
        )
    with pytest.raises(ValueError, match="expected -1 <="):
        offline.augment(
            tree, tmp_path / "out", small, min_similarity=0.9, max_similarity=0.5, **settings
        )
    assert not (tmp_path / "out").exists()


def test_variants_that_would_repeat_themselves_are_refused(tree, tmp_path, small, laboratories):
    with pytest.raises(ValueError, match="or they would be alike; got"):
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
