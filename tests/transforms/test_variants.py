"""Filling: a cached value is the computed one, and the network sees misses only."""

import errno
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cytosyn_aug import (
    ConditionedResample,
    EditRecipe,
    LatentCache,
    MacenkoNormalize,
    MacenkoReference,
    Ramp,
    StainNormalize,
    StainReference,
    StainTransfer,
    StainViews,
)
from cytosyn_aug.cache import records
from cytosyn_aug.cache.encodings import (
    encode_cached,
    encodings_spec,
    features_cached,
    fill_encodings,
)
from cytosyn_aug.images import tile_key
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.transforms.variants import derive_seed, fill_variants, variants_spec
from tests.support.synthetic import SIZE, random_parts, synthetic_tiles

BOTH = ["moments", "features"]


@pytest.fixture
def cache(generator, tmp_path):
    return LatentCache.open(tmp_path, encodings_spec(generator, BOTH))


@pytest.fixture
def seen(generator, monkeypatch):
    """Return how many tiles each call of the autoencoder's encoder saw."""
    counts, real = [], generator.encode

    def encode(images):
        counts.append(len(images))
        return real(images)

    monkeypatch.setattr(generator, "encode", encode)
    return counts


def test_cached_moments_are_those_of_the_model_to_rounding(generator, cache, tiles):
    expected = generator.encode(tiles)
    for _ in range(2):
        moments = encode_cached(generator, tiles, cache)
        for found, wanted in zip(moments, expected, strict=True):
            assert found.dtype == torch.float32
            # Half a unit in the last place of float16, above its smallest normal number.
            torch.testing.assert_close(found, wanted, rtol=2**-11, atol=2**-24)


def test_a_hit_equals_the_miss_before_it(generator, cache, tiles):
    first, second = (encode_cached(generator, tiles, cache) for _ in range(2))
    cache.flush()
    third = encode_cached(generator, tiles, LatentCache.open(cache.folder))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_float32_moments_are_exact(generator, tmp_path, tiles):
    exact = LatentCache.open(tmp_path / "exact", encodings_spec(generator, BOTH, dtype="float32"))
    assert torch.equal(encode_cached(generator, tiles, exact).std, generator.encode(tiles).std)


def test_features_are_exact(generator, cache, tiles):
    expected = generator.features(tiles).cls
    for _ in range(2):
        assert torch.equal(features_cached(generator, tiles, cache), expected)


def test_only_misses_are_encoded_each_once_in_one_batch(generator, cache, tiles, seen):
    encode_cached(generator, tiles[:2], cache)
    more = torch.cat([tiles, tiles.flip(0)])
    moments = encode_cached(generator, more, cache)
    assert seen == [2, 2]
    assert torch.equal(moments.mean[:4], moments.mean[4:].flip(0))
    features_cached(generator, more, cache)
    fill_encodings(generator, more, cache)
    assert seen == [2, 2]


def test_a_cache_that_is_only_read_is_not_written(generator, cache, tiles):
    encode_cached(generator, tiles, cache, writes=False)
    cache.flush()
    assert len(cache) == 0


def test_filling_counts_what_was_missing_and_resumes(generator, cache, tiles):
    assert fill_encodings(generator, tiles[:3], cache).num_filled == 3
    cache.flush()
    assert fill_encodings(generator, tiles, LatentCache.open(cache.folder)).num_filled == 1


def test_a_full_disk_stops_filling_and_the_rest_is_filled_later(generator, cache, tiles):
    fill_encodings(generator, tiles[:2], cache)
    cache.flush()

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "write_tensors", full)
        fill_encodings(generator, tiles[2:], cache)
        with pytest.raises(OSError, match="2 records were not cached"):
            cache.flush()
    again = LatentCache.open(cache.folder)
    assert fill_encodings(generator, tiles, again).num_filled == 2


def test_transforms_take_cached_features(generator, cache, tiles):
    features = partial(features_cached, generator, cache=cache)
    reference = StainReference.fit(generator, synthetic_tiles(3, seed=5))
    both = [reference, StainReference.fit(generator, synthetic_tiles(3, seed=6))]
    for make in (
        partial(ConditionedResample, generator, p=1.0, steps=2),
        partial(StainTransfer, generator, [reference], p=1.0),
        partial(StainNormalize, generator, reference),
        lambda features: lambda x: StainViews(generator, both, features=features)(x)[0],
    ):
        results = []
        for given in (None, features, features):
            torch.manual_seed(0)
            results.append(make(features=given)(tiles))
        assert not torch.equal(results[0], tiles)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_restaining_with_cached_features_runs_no_encoder(generator, cache, tiles, monkeypatch):
    reference = StainReference.fit(generator, synthetic_tiles(3, seed=5))
    features = partial(features_cached, generator, cache=cache)
    features(tiles)
    monkeypatch.setattr(generator, "cls_features", None)
    normalize = StainNormalize(generator, reference, features=features)
    assert not torch.equal(normalize(tiles), tiles)


def test_another_model_is_refused_naming_both(generator, cache, tiles, monkeypatch):
    monkeypatch.setattr(generator, "digest", "fedcba9876543210")
    for function in (encode_cached, features_cached, fill_encodings):
        with pytest.raises(ValueError, match=rf"{cache.spec.model_digest}.*fedcba9876543210"):
            function(generator, tiles, cache)


def test_the_dtype_of_the_networks_is_part_of_the_recipe(generator, cache, tiles, monkeypatch):
    spec = encodings_spec(generator, BOTH)
    assert json.loads(spec.recipe)["networks"] == "torch.float32"
    monkeypatch.setattr(generator, "dtype", torch.bfloat16)
    assert encodings_spec(generator, BOTH).digest != spec.digest
    with pytest.raises(ValueError, match=r"networks in torch.float32.*computes in torch.bfloat16"):
        encode_cached(generator, tiles, cache)


@pytest.mark.parametrize(
    ("contents", "message"), [((), "expected 'moments'"), (("pixels",), "expected 'moments'")]
)
def test_unknown_contents_are_refused(generator, contents, message):
    with pytest.raises(ValueError, match=message):
        encodings_spec(generator, contents)


def test_a_cache_of_features_runs_no_autoencoder(generator, tmp_path, tiles, seen):
    cache = LatentCache.open(tmp_path, encodings_spec(generator, ["features"]))
    features_cached(generator, tiles, cache)
    assert seen == []


def test_moments_are_not_looked_for_where_only_features_are(generator, tmp_path, tiles):
    cache = LatentCache.open(tmp_path / "features", encodings_spec(generator, ["features"]))
    with pytest.raises(ValueError, match="holds cls, thumbnail, asked for is moments"):
        encode_cached(generator, tiles, cache)


def test_features_need_an_encoder():
    generator = TileGenerator(random_parts()._replace(encoder=None))
    with pytest.raises(ValueError, match="no encoder"):
        encodings_spec(generator, BOTH)
    assert encodings_spec(generator, ["moments"]).names == ("moments", "thumbnail")


def test_a_variants_seed_depends_on_tile_number_and_base(generator, tmp_path, tiles):
    seeds = []

    def edit(images, drawn):
        seeds.append(drawn)
        return images

    spec = variants_spec(generator, "images", [edit, edit], seed=3, recipe={"edit": "seeded"})
    with LatentCache.open(tmp_path / "variants", spec) as cache:
        fill_variants(generator, tiles, cache, [edit, edit])
    assert seeds[1][0] == derive_seed(tile_key(tiles[0]), 1, 3)
    assert len({*seeds[0], *seeds[1]}) == 8
    assert derive_seed("ab" * 32, 0, 0) == 943043470627561455


def test_variants_are_made_once_and_flagged_where_nothing_changed(generator, tmp_path, tiles):
    tiles[1] = 0

    def darker(images, _seeds):
        return images // 2

    spec = variants_spec(generator, "images", [darker], recipe="darker")
    with LatentCache.open(tmp_path / "variants", spec) as cache:
        assert fill_variants(generator, tiles, cache, [darker]).num_filled == 4
        assert fill_variants(generator, tiles, cache, [darker]).num_filled == 0
    found = cache.get([tile_key(tile) for tile in tiles])
    assert torch.equal(found.fields["images"], tiles // 2)
    assert found.fields["is_edited"].tolist() == [1, 0, 1, 1]


def test_edits_must_fit_the_cache(generator, tmp_path, cache, tiles):
    spec = variants_spec(generator, "images", [abs] * 2, recipe={})
    variants = LatentCache.open(tmp_path / "variants", spec)
    with pytest.raises(ValueError, match="1 edits for 2 variants"):
        fill_variants(generator, tiles, variants, [lambda images, _: images])
    with pytest.raises(ValueError, match=r"gave \[4, 3, 8, 8\] for"):
        fill_variants(generator, tiles, variants, [lambda images, _: images[..., :8, :8]] * 2)
    with pytest.raises(ValueError, match="make it with variants_spec"):
        fill_variants(generator, tiles, cache, [lambda images, _: images])
    with pytest.raises(ValueError, match="expected 'latents' or 'images'"):
        variants_spec(generator, "pixels", [abs], recipe={})


def test_specifications_differ_by_recipe(generator):
    specs = [variants_spec(generator, "latents", [abs], recipe=r) for r in ("a", "b")]
    assert specs[0].digest != specs[1].digest
    assert replace(specs[0], recipe=specs[1].recipe) == specs[1]
    assert synthetic_tiles(1).shape[-1] == SIZE == specs[0].tile.size_px


class Restained(Dataset):
    def __init__(self, transform, tiles):
        self.transform, self.tiles = transform, tiles

    def __len__(self):
        return len(self.tiles)

    def __getitem__(self, index):
        return self.transform(self.tiles[index])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_features_that_workers_and_the_main_process_computed_are_kept(generator, cache, tiles):
    reference = StainReference.fit(generator, synthetic_tiles(3, seed=5))
    features = partial(features_cached, generator, cache=cache)
    transfer = StainTransfer(generator, [reference], p=1.0, features=features)
    more = synthetic_tiles(4, seed=9)
    transfer(tiles)
    list(DataLoader(Restained(transfer, more), num_workers=2))
    folder = cache.folder
    cache.refresh()
    assert cache.get([tile_key(tile) for tile in more]).is_found.all()
    cache.flush()
    assert len(LatentCache.open(folder)) == 8


def test_a_read_only_cache_of_features_says_so_at_the_first_miss(
    generator, cache, tiles, monkeypatch
):
    features_cached(generator, tiles[:1], cache)
    cache.flush()
    real = Path.open

    def read_only(self, mode="r", **options):
        if "w" in mode:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        return real(self, mode, **options)

    monkeypatch.setattr(Path, "open", read_only)
    handle = LatentCache.open(cache.folder)
    features_cached(generator, tiles[:1], handle)
    with pytest.raises(OSError, match=r"Read-only file system: nothing can.*writes=False"):
        features_cached(generator, tiles, handle)
    expected = generator.features(tiles).cls
    assert torch.equal(features_cached(generator, tiles, handle, writes=False), expected)


# Tiles that are blank, and tiles that networks fail on


def failing(real, is_bad):
    """Return a function of images whose results are NaN where `is_bad` says so of a tile."""

    def compute(images):
        results = real(images)
        for row, image in enumerate(images):
            if is_bad(image):
                for tensor in results if isinstance(results, tuple) else [results]:
                    tensor[row] = torch.nan
        return results

    return compute


def is_tile(tile):
    return lambda image: torch.equal(image, tile)


@pytest.mark.parametrize("payload", ["images", "latents"])
def test_blank_tiles_are_not_edited(generator, tmp_path, tiles, payload):
    tiles[2] = 243
    given = []

    def draw(images, seeds):
        given.append(len(images))
        if payload == "images":
            return 255 - images
        return torch.ones(len(images), *generator.latent_shape)

    spec = variants_spec(generator, payload, [draw], recipe="latents whatever the tile")
    with LatentCache.open(tmp_path, spec) as cache:
        assert fill_variants(generator, tiles, cache, [draw]) == (4, 0)
    assert given == [3]
    found = cache.get([tile_key(tile) for tile in tiles]).fields
    assert found["is_edited"].tolist() == [1, 1, 0, 1]
    assert torch.equal(
        found[payload][2], tiles[2] if payload == "images" else found[payload][2] * 0
    )


@pytest.mark.parametrize("kind", ["latents", "encoder"])
def test_a_failing_tile_is_named_and_not_cached(generator, tmp_path, tiles, monkeypatch, kind):
    def draw(images, seeds):
        if kind == "encoder":
            return 255 - images
        rows = [torch.nan if torch.equal(image, tiles[1]) else 1.0 for image in images]
        return torch.tensor(rows)[:, None, None, None].expand(-1, *generator.latent_shape)

    if kind == "encoder":
        broken = failing(generator.encode, is_tile(255 - tiles[1]))
        monkeypatch.setattr(generator, "encode", broken)
    spec = variants_spec(generator, "latents", [draw], recipe="fails on one")
    with (
        LatentCache.open(tmp_path, spec) as cache,
        pytest.warns(RuntimeWarning, match=rf"for 1 tiles.*{tile_key(tiles[1])[:16]}"),
    ):
        assert fill_variants(generator, tiles, cache, [draw]) == (3, 1)
    is_found = cache.get([tile_key(tile) for tile in tiles]).is_found
    assert is_found.tolist() == [True, False, True, True]
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() if kind == "encoder" else pytest.warns(RuntimeWarning):
        again = fill_variants(generator, tiles, cache, [draw])
    assert again == ((1, 0) if kind == "encoder" else (0, 1))


def test_tiles_that_a_transform_failed_on_are_not_cached_but_refused_ones_are(
    generator, tmp_path, tiles, references, monkeypatch
):
    edits = [ConditionedResample(generator, steps=2, min_similarity=1.0)]  # refuses the others
    broken = failing(generator.cls_features, is_tile(tiles[1]))
    monkeypatch.setattr(generator, "cls_features", broken)
    with (
        opened(generator, tmp_path, edits) as cache,
        pytest.warns(RuntimeWarning, match="for 1 tiles"),
    ):
        assert fill_variants(generator, tiles, cache, edits) == (3, 1)
    found = cache.get([tile_key(tile) for tile in tiles])
    assert found.is_found.tolist() == [True, False, True, True]
    assert not found.fields["is_edited"].any()


def test_features_that_are_not_finite_are_returned_counted_and_not_cached(
    generator, tmp_path, tiles, references, monkeypatch
):
    cache = LatentCache.open(tmp_path, encodings_spec(generator, BOTH))
    expected = StainNormalize(generator, references[0])(tiles)
    broken = failing(generator.cls_features, is_tile(tiles[1]))
    monkeypatch.setattr(generator, "cls_features", broken)
    features = partial(features_cached, generator, cache=cache)
    for make in (
        partial(StainTransfer, generator, references[:1], p=1.0),
        partial(ConditionedResample, generator, p=1.0, steps=2),
    ):
        transform = make(features=features)
        with pytest.warns(RuntimeWarning, match=tile_key(tiles[1])[:16]):
            out = transform(tiles)
        is_same = (out == tiles).flatten(1).all(1).tolist()
        assert is_same == [False, True, False, False]
        assert transform.num_failed == 1
        if isinstance(transform, StainTransfer):
            assert torch.equal(out[2:], expected[2:])
    with pytest.warns(RuntimeWarning, match="for 1 tiles"):
        assert fill_encodings(generator, tiles, cache) == (0, 1)
    assert cache.get([tile_key(tile) for tile in tiles]).is_found.tolist() == [
        True, False, True, True,
    ]  # fmt: skip


# Transforms as edits


@pytest.fixture
def references(generator):
    first = synthetic_tiles(3, seed=5)
    return [
        StainReference.fit(generator, first, laboratory="a"),
        StainReference.fit(generator, 255 - (255 - first) // 2, laboratory="b"),
    ]


def opened(generator, folder, edits, **settings):
    return LatentCache.open(folder, variants_spec(generator, "images", edits, **settings))


def test_transforms_are_edits_and_say_what_they_keep(generator, tmp_path, tiles, references):
    edits = [StainNormalize(generator, reference) for reference in references]
    with opened(generator, tmp_path, edits) as cache:
        fill_variants(generator, tiles, cache, edits)
    assert cache.spec.num_variants == 2
    assert cache.spec.keeps_structure
    for variant, edit in enumerate(edits):
        found = cache.get([tile_key(tile) for tile in tiles], [variant] * 4)
        assert torch.equal(found.fields["images"], edit(tiles))
    moving = [*edits, ConditionedResample(generator)]
    assert not variants_spec(generator, "images", moving).keeps_structure


def change(generator, references):
    """Return edits and how the message names what they have other than the first."""
    make = partial(StainNormalize, generator)
    macenko = MacenkoReference.fit(synthetic_tiles(3))
    return [
        ([make(references[0])], ""),
        ([make(references[1])], r"edits\[0\]\.references\[0\]\.laboratory a for b"),
        ([make(references[0], strength=0.5)], r"edits\[0\]\.strength 1\.0 for 0\.5"),
        ([make(references[0], seed=4)], r"edits\[0\]\.seed 0 for 4"),
        ([make(references[0], source=references[1])], r"edits\[0\]\.source None for"),
        ([make(references[0], recipe=EditRecipe(probe_share=0.1))], r"probe_share 0\.5 for 0\.1"),
        ([MacenkoNormalize(macenko)], r"kind cytosyn_aug\.StainNormalize for cytosyn_aug\.Macenko"),
        ([lambda images, _: images], r"kind cytosyn_aug\.StainNormalize for function"),
    ]


def test_filling_with_other_edits_is_refused_naming_the_difference(
    generator, tmp_path, tiles, references
):
    (edits, _), *others = change(generator, references)
    cache = opened(generator, tmp_path / "edits", edits, recipe="so that a function may be given")
    fill_variants(generator, tiles[:1], cache, edits)
    for other, message in others:
        with pytest.raises(ValueError, match=message):
            fill_variants(generator, tiles, cache, other)
        with pytest.raises(ValueError, match=message):
            opened(generator, cache.folder, other, recipe="so that a function may be given")
    assert (
        fill_variants(generator, tiles, cache, change(generator, references)[0][0]).num_filled == 3
    )


def test_opening_with_another_seed_is_refused(generator, tmp_path, references):
    edits = [StainNormalize(generator, references[0])]
    opened(generator, tmp_path, edits, seed=1)
    with pytest.raises(ValueError, match=r"recipe\.seed 1 for 2"):
        opened(generator, tmp_path, edits, seed=2)


def test_a_refitted_reference_of_equal_tiles_is_the_same(generator, references):
    again = StainReference.fit(generator, synthetic_tiles(3, seed=5), laboratory="a")
    specs = [
        variants_spec(generator, "images", [StainNormalize(generator, reference)])
        for reference in (references[0], again)
    ]
    assert specs[0] == specs[1]
    assert len(specs[0].recipe) < 1000  # it is in every shard, so no tensors


def test_transforms_draw_by_tile_and_variant_alone(generator, tmp_path, tiles, references):
    edits = [StainTransfer(generator, references, p=0.1)] * 2
    edits.append(ConditionedResample(generator, p={"tumour": 0.3}, steps=2))
    found = []
    for number, parts in enumerate(([tiles], [tiles[3:], tiles[:3].flip(0)])):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        with opened(generator, tmp_path / str(number), edits) as cache:
            for part in parts:
                fill_variants(generator, part, cache, edits)
        assert torch.equal(torch.get_rng_state(), state)
        keys = [tile_key(tile) for tile in tiles for _ in edits]
        found.append(cache.get(keys, [0, 1, 2] * 4).fields)
    assert found[0]["is_edited"].all()
    difference = found[0]["images"].int() - found[1]["images"].int()
    assert difference.abs().max() <= 1  # batches of another size round otherwise
    restained = found[0]["images"].view(4, 3, *tiles.shape[1:])[:, :2]
    assert not torch.equal(restained[:, 0], restained[:, 1])


def test_functions_need_a_recipe_and_unnamed_settings_too(generator, references, tiles):
    make = partial(variants_spec, generator, "images")
    with pytest.raises(TypeError, match="edit 0 is a function"):
        make([abs])
    with_features = StainNormalize(generator, references[0], features=abs)
    with pytest.raises(TypeError, match="features of edit 0, a StainNormalize, has no name"):
        make([with_features])
    described = json.loads(make([with_features], recipe="features of the encoder").recipe)
    assert described["edits"][0]["features"]["kind"] == "unnamed"
    with pytest.raises(ValueError, match="draws by slide"):
        make([StainTransfer(generator, references, mode="slide")])
    with pytest.raises(ValueError, match=r"strength of edit 0.*is a Ramp"):
        make([StainTransfer(generator, references, strength=Ramp(0.0, 1.0, 3))])
    with pytest.raises(ValueError, match="edits is empty"):
        make([])
