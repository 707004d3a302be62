"""Filling: a cached value is the computed one, and the network sees misses only."""

import errno
import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import SIZE, synthetic_tiles

from cytosyn_aug import (
    ConditionedResample,
    LatentCache,
    StainNormalize,
    StainReference,
    StainTransfer,
    StainViews,
    records,
)
from cytosyn_aug.filling import (
    derive_seed,
    encode_cached,
    features_cached,
    fill_moments,
    fill_variants,
    moments_spec,
    variants_spec,
)
from cytosyn_aug.images import tile_key


@pytest.fixture
def cache(generator, tmp_path):
    return LatentCache.open(tmp_path, moments_spec(generator))


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
    exact = LatentCache.open(tmp_path / "exact", moments_spec(generator, dtype="float32"))
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
    fill_moments(generator, more, cache)
    assert seen == [2, 2]


def test_a_cache_that_is_only_read_is_not_written(generator, cache, tiles):
    encode_cached(generator, tiles, cache, writes=False)
    cache.flush()
    assert len(cache) == 0


def test_filling_counts_what_was_missing_and_resumes(generator, cache, tiles):
    assert fill_moments(generator, tiles[:3], cache) == 3
    cache.flush()
    assert fill_moments(generator, tiles, LatentCache.open(cache.folder)) == 1


def test_a_full_disk_stops_filling_and_the_rest_is_filled_later(generator, cache, tiles):
    fill_moments(generator, tiles[:2], cache)
    cache.flush()

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "write_tensors", full)
        fill_moments(generator, tiles[2:], cache)
        with pytest.raises(OSError, match="2 records were not cached"):
            cache.flush()
    again = LatentCache.open(cache.folder)
    assert fill_moments(generator, tiles, again) == 2


def test_transforms_take_cached_features(generator, cache, tiles):
    features = partial(features_cached, generator, cache=cache)
    reference = StainReference.fit(generator, synthetic_tiles(3, seed=5))
    for make in (
        partial(ConditionedResample, generator, p=1.0, steps=2),
        partial(StainTransfer, generator, [reference], p=1.0),
        partial(StainNormalize, generator, reference),
        lambda features: lambda x: StainViews(generator, [reference], features=features)(x)[0],
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
    monkeypatch.setattr(generator, "features", None)
    normalize = StainNormalize(generator, reference, features=features)
    assert not torch.equal(normalize(tiles), tiles)


def test_another_model_is_refused_naming_both(generator, cache, tiles, monkeypatch):
    monkeypatch.setattr(generator, "digest", "fedcba9876543210")
    for function in (encode_cached, features_cached, fill_moments):
        with pytest.raises(ValueError, match=rf"{cache.spec.model_digest}.*fedcba9876543210"):
            function(generator, tiles, cache)


def test_the_dtype_of_the_networks_is_part_of_the_recipe(generator, cache, tiles, monkeypatch):
    spec = moments_spec(generator)
    assert json.loads(spec.recipe)["networks"] == "torch.float32"
    monkeypatch.setattr(generator, "dtype", torch.bfloat16)
    assert moments_spec(generator).digest != spec.digest
    with pytest.raises(ValueError, match=r"networks in torch.float32.*computes in torch.bfloat16"):
        encode_cached(generator, tiles, cache)


@pytest.mark.parametrize(
    ("contents", "message"), [((), "expected 'moments'"), (("pixels",), "expected 'moments'")]
)
def test_unknown_contents_are_refused(generator, contents, message):
    with pytest.raises(ValueError, match=message):
        moments_spec(generator, contents)


def test_moments_are_not_looked_for_where_only_features_are(generator, tmp_path, tiles):
    cache = LatentCache.open(tmp_path / "features", moments_spec(generator, ["features"]))
    with pytest.raises(ValueError, match="holds cls, thumbnail, asked for is moments"):
        encode_cached(generator, tiles, cache)


def test_features_need_an_encoder(generator, monkeypatch):
    monkeypatch.setattr(generator, "encoder", None)
    with pytest.raises(ValueError, match="no encoder"):
        moments_spec(generator)
    assert moments_spec(generator, ["moments"]).names == ("moments", "thumbnail")


def test_a_variants_seed_depends_on_tile_number_and_base(generator, tmp_path, tiles):
    spec = variants_spec(generator, "images", num_variants=2, recipe={"edit": "seeded"})
    seeds = []

    def edit(images, drawn):
        seeds.append(drawn)
        return images

    with LatentCache.open(tmp_path / "variants", spec) as cache:
        fill_variants(generator, tiles, cache, [edit, edit], seed=3)
    assert len({*seeds[0], *seeds[1]}) == 8
    assert derive_seed("ab" * 32, 0, 0) == 943043470627561455


def test_variants_are_made_once_and_flagged_where_nothing_changed(generator, tmp_path, tiles):
    spec = variants_spec(generator, "images", num_variants=1, recipe="darker")
    tiles[1] = 0

    def darker(images, _seeds):
        return images // 2

    with LatentCache.open(tmp_path / "variants", spec) as cache:
        assert fill_variants(generator, tiles, cache, [darker]) == 4
        assert fill_variants(generator, tiles, cache, [darker]) == 0
    found = cache.get([tile_key(tile) for tile in tiles])
    assert torch.equal(found.fields["images"], tiles // 2)
    assert found.fields["is_edited"].tolist() == [1, 0, 1, 1]


def test_edits_must_fit_the_cache(generator, tmp_path, cache, tiles):
    spec = variants_spec(generator, "images", num_variants=2, recipe={})
    variants = LatentCache.open(tmp_path / "variants", spec)
    with pytest.raises(ValueError, match="1 edits for 2 variants"):
        fill_variants(generator, tiles, variants, [lambda images, _: images])
    with pytest.raises(ValueError, match=r"gave \[4, 3, 8, 8\] for"):
        fill_variants(generator, tiles, variants, [lambda images, _: images[..., :8, :8]] * 2)
    with pytest.raises(ValueError, match="make it with variants_spec"):
        fill_variants(generator, tiles, cache, [lambda images, _: images])
    with pytest.raises(ValueError, match="expected 'latents' or 'images'"):
        variants_spec(generator, "pixels", num_variants=1, recipe={})


def test_specifications_differ_by_recipe(generator):
    specs = [variants_spec(generator, "latents", num_variants=1, recipe=r) for r in ("a", "b")]
    assert specs[0].digest != specs[1].digest
    assert replace(specs[0], recipe=specs[1].recipe) == specs[1]
    assert synthetic_tiles(1).shape[-1] == SIZE == specs[0].tile.size_px
