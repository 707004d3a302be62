"""The albumentations adapter, in a real DataLoader."""

import importlib
import json
import pickle
import shutil
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cytosyn_aug import (
    DensityReference,
    EditRecipe,
    FeatureTable,
    LatentCache,
    MacenkoReference,
    Ramp,
    ReinhardReference,
    StainReference,
    fill_variants,
    variants_spec,
)
from tests.support.python_process import start_python
from tests.support.synthetic import SIZE, synthetic_tiles

alb = pytest.importorskip("albumentations", reason="the albumentations adapter is not tested")
caa = pytest.importorskip("cytosyn_aug.albumentations")

FAST = EditRecipe(steps=2)


@pytest.fixture(scope="module")
def reference(generator):
    return StainReference.fit(generator, synthetic_tiles(3, seed=5))


@pytest.fixture
def image():
    return synthetic_tiles(1)[0].permute(1, 2, 0).numpy()


@pytest.fixture(scope="module")
def variants(generator, tmp_path_factory):
    """Return a cache of the image's inverse, and of a blank one that no edit changed."""
    spec = variants_spec(generator, "images", [lambda images, _: images], recipe="inverse")
    tiles = torch.cat([synthetic_tiles(1), torch.full((1, 3, SIZE, SIZE), 243, dtype=torch.uint8)])
    with LatentCache.open(tmp_path_factory.mktemp("variants"), spec) as cache:
        fill_variants(generator, tiles[:1], cache, [lambda images, _: 255 - images])
        fill_variants(generator, tiles[1:], cache, [lambda images, _: images])
    return cache


def make_all(generator, reference, variants):
    """Return every transform, editing every image."""
    tiles = synthetic_tiles(3, seed=5)
    return {
        "transfer": caa.StainTransfer(generator, [reference], p=1.0, recipe=FAST),
        "normalize": caa.StainNormalize(generator, reference, recipe=FAST),
        "resample": caa.ConditionedResample(generator, p=1.0, steps=2),
        "macenko": caa.MacenkoNormalize(MacenkoReference.fit(tiles)),
        "reinhard": caa.ReinhardNormalize(ReinhardReference.fit(tiles)),
        "transport": caa.DensityTransport(DensityReference.fit(tiles)),
        "cached": caa.CachedVariants(variants, p=1.0),
    }


NAMES = ["transfer", "normalize", "resample", "macenko", "reinhard", "transport", "cached"]


@pytest.fixture(params=NAMES)
def transform(request, generator, reference, variants):
    return make_all(generator, reference, variants)[request.param]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_types_out_are_types_in(transform, image, dtype):
    image = image if dtype is np.uint8 else (image / 255).astype(np.float32)
    out = alb.Compose([transform])(image=image)["image"]
    assert (out.shape, out.dtype) == (image.shape, image.dtype)
    assert not np.array_equal(out, image)


def test_it_gives_what_torchvision_gives(transform, image):
    torch.manual_seed(0)
    got = transform(image=image)
    torch.manual_seed(0)
    torch.rand((), dtype=torch.float64)  # for p
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    want = transform.inner(tensor).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(got["image"], want)


def test_manual_seed_repeats(transform, image):
    out = []
    for _ in range(2):
        torch.manual_seed(4)
        out.append(transform(image=image)["image"])
    np.testing.assert_array_equal(*out)


def test_blank_images_come_back(transform):
    blank = np.full((SIZE, SIZE, 3), 243, np.uint8)
    np.testing.assert_array_equal(transform(image=blank)["image"], blank)


def test_it_is_written_as_json_and_read_again(transform, image):
    content = json.loads(json.dumps(alb.to_dict(alb.Compose([transform]))))
    again = alb.from_dict(content)
    results = []
    for pipeline in (alb.Compose([transform]), again):
        torch.manual_seed(2)
        results.append(pipeline(image=image)["image"])
    np.testing.assert_array_equal(*results)
    assert alb.to_dict(again) == content


def test_all_arguments_are_written(generator, reference):
    p = {0: Ramp(0.0, 1.0, 3), "x": 0.2}
    transform = caa.StainTransfer(
        generator,
        [reference],
        source=reference,
        strength=Ramp(0.1, 0.9, 4),
        mpp=0.4,
        p=p,
        mode="slide",
        seed=5,
        recipe=EditRecipe(steps=3, probe_share=0.25),
    )
    again = alb.from_dict(json.loads(json.dumps(alb.to_dict(transform)))).inner
    ours = transform.inner
    for name in ("strength", "mpp", "p", "mode", "seed", "recipe", "sampling", "preserve"):
        assert getattr(again, name) == getattr(ours, name), name
    assert again.generator is ours.generator
    assert torch.equal(again.source.cls, ours.source.cls)
    assert again.p == p


@pytest.mark.slow
def test_another_process_reads_it_without_this_ones_model(generator, reference, image, tmp_path):
    transform = caa.StainNormalize(generator, reference, recipe=FAST)
    alb.save(transform, str(tmp_path / "pipeline.json"))
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "want.npy", transform(image=image)["image"])
    code = (
        "import sys, numpy as np, albumentations as A, cytosyn_aug.albumentations\n"
        "transform = A.load('pipeline.json')\n"
        "got = transform(image=np.load('image.npy'))['image']\n"
        "np.testing.assert_array_equal(got, np.load('want.npy'))\n"
    )
    (tmp_path / "read.py").write_text(code)
    done = start_python("read.py", folder=tmp_path)
    done.join()
    assert done.exitcode == 0, (tmp_path / "stderr").read_text()


def test_features_are_replayed_but_cannot_be_saved(generator, reference, image):
    tile = torch.from_numpy(image).permute(2, 0, 1)[None]
    table = FeatureTable(tile, generator.features(tile).cls, width=24)
    for transform in (
        caa.ConditionedResample(generator, features=table, p=1.0, steps=2),
        caa.StainTransfer(generator, [reference], features=table, p=1.0),
        caa.StainNormalize(generator, reference, features=table),
    ):
        with pytest.raises(TypeError, match="FeatureTable is not JSON serializable"):
            json.dumps(alb.to_dict(transform))
        first = alb.ReplayCompose([transform])(image=image)
        again = alb.ReplayCompose.replay(first["replay"], image=image)["image"]
        np.testing.assert_array_equal(again, first["image"])


def test_given_features_are_used_instead_of_the_encoder(generator, reference, image, monkeypatch):
    tile = torch.from_numpy(image).permute(2, 0, 1)[None]
    table = FeatureTable(tile, generator.features(tile).cls, width=24)

    def edit(features):
        transfer = caa.StainTransfer(generator, [reference], p=1.0, features=features)
        normalize = caa.StainNormalize(generator, reference, features=features)
        return [alb.Compose([each])(image=image)["image"] for each in (transfer, normalize)]

    expected = edit(None)
    monkeypatch.setattr(generator, "cls_features", None)  # whoever asks, fails
    for got, want in zip(edit(table), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_pipeline_refuses_a_cache_that_was_made_anew(generator, image, tmp_path):
    folder = tmp_path / "cache"
    spec = variants_spec(generator, "images", [abs], recipe="first")
    content = alb.to_dict(caa.CachedVariants(LatentCache.open(folder, spec)))
    shutil.rmtree(folder)
    LatentCache.open(folder, variants_spec(generator, "images", [abs], recipe="second"))
    with pytest.raises(ValueError, match=f"written with one of {spec.digest}.*make the pipeline"):
        alb.from_dict(content)


def test_a_missing_image_is_kept_and_counted(variants, image):
    transform = caa.CachedVariants(variants, p=1.0, on_miss="keep")
    turned = np.ascontiguousarray(image[::-1])
    with pytest.warns(UserWarning, match="turned or mirrored"):
        np.testing.assert_array_equal(transform(image=turned)["image"], turned)
    assert transform.num_missed == 1


def test_replay_gives_the_same_from_json(transform, image):
    pipeline = alb.ReplayCompose([transform, alb.HorizontalFlip(p=0.5)])
    first = pipeline(image=image)
    saved = json.loads(json.dumps(first["replay"]))
    torch.manual_seed(99)
    np.testing.assert_array_equal(
        alb.ReplayCompose.replay(saved, image=image)["image"], first["image"]
    )


def test_replay_remembers_that_nothing_was_applied(generator, reference, image):
    transform = caa.StainTransfer(generator, [reference], p=0.0, recipe=FAST)
    first = alb.ReplayCompose([transform])(image=image)
    again = alb.ReplayCompose.replay(first["replay"], image=image)
    np.testing.assert_array_equal(again["image"], image)


def test_additional_images_are_edited_alike(transform, image):
    pipeline = alb.Compose([transform], additional_targets={"image2": "image"})
    out = pipeline(image=image, image2=image.copy())
    np.testing.assert_array_equal(out["image"], out["image2"])
    assert not np.array_equal(out["image"], image)


def test_a_stack_of_images_is_edited_alike(transform, image):
    out = alb.Compose([transform])(images=np.stack([image, image]))["images"]
    np.testing.assert_array_equal(out[0], out[1])
    assert not np.array_equal(out[0], image)


def test_additional_masks_are_refused_where_masks_are(generator, image):
    mask = np.ones((SIZE, SIZE), np.uint8)
    pipeline = alb.Compose(
        [caa.ConditionedResample(generator, p=1.0, steps=2)], additional_targets={"nuclei": "mask"}
    )
    with pytest.raises(ValueError, match=r"carries \['nuclei'\]"):
        pipeline(image=image, nuclei=mask)


@pytest.mark.filterwarnings("ignore:Got processor for")  # of 2.0.8: no transform needs them
def test_boxes_and_points_pass(generator, reference, image):
    transfer = caa.StainTransfer(generator, [reference], p=1.0, recipe=FAST)
    pipeline = alb.Compose(
        [transfer],
        bbox_params=alb.BboxParams(format="pascal_voc", label_fields=["labels"]),
        keypoint_params=alb.KeypointParams(format="xy"),
    )
    out = pipeline(image=image, bboxes=[[1, 2, 30, 40]], labels=[7], keypoints=[[5, 6]])
    np.testing.assert_allclose(out["bboxes"], [[1, 2, 30, 40]], atol=1e-4)
    np.testing.assert_allclose(out["keypoints"], [[5, 6]], atol=1e-4)
    assert out["labels"] == [7]


def test_p_by_class_and_by_epoch(generator, reference, image):
    transform = caa.StainTransfer(
        generator, [reference], p={"a": 1.0, "b": Ramp(0.0, 1.0, 2)}, recipe=FAST
    )
    pipeline = alb.Compose([transform])

    def is_edited(label):
        return not np.array_equal(pipeline(image=image, label=label)["image"], image)

    assert is_edited("a")
    assert not is_edited("b")
    transform.set_epoch(1)
    assert is_edited("b")
    with pytest.raises(ValueError, match="the sample carries no label"):
        pipeline(image=image)


def test_p_follows_a_ramp(generator, reference, image):
    transform = caa.StainNormalize(generator, reference, p=Ramp(0.0, 1.0, 2))
    assert not any(transform.should_apply() for _ in range(50))
    transform.set_epoch(1)
    assert all(transform.should_apply() for _ in range(50))


def test_slides_are_drawn_alike(generator, reference, image):
    others = [reference, StainReference.fit(generator, synthetic_tiles(3, seed=8))]
    transform = caa.StainTransfer(generator, others, p=1.0, mode="slide", recipe=FAST)
    pipeline = alb.Compose([transform])
    a, b = (pipeline(image=image, slide="one")["image"] for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_the_classical_ones_draw_by_slide_too(image):
    reference = MacenkoReference.fit(synthetic_tiles(2, seed=5))
    transform = caa.MacenkoNormalize(reference, p=0.5, mode="slide", seed=1)
    transform.set_epoch(0)
    is_edited = [
        [(transform(image=image, slide=slide)["image"] != image).any() for _ in range(3)]
        for slide in range(12)
    ]
    assert all(len(set(tiles)) == 1 for tiles in is_edited)
    assert len({tiles[0] for tiles in is_edited}) == 2


def test_a_strict_pipeline_takes_what_draws_go_by(generator, reference, image):
    transfer = caa.StainTransfer(generator, [reference], p={"a": 1.0}, mode="slide", recipe=FAST)
    pipeline = alb.Compose([alb.OneOf([transfer], p=1.0)], strict=True)
    out = pipeline(image=image, label="a", slide="one", laboratory="b")
    assert not np.array_equal(out["image"], image)
    assert (out["label"], out["slide"], out["laboratory"]) == ("a", "one", "b")
    with pytest.raises(ValueError, match="Key patient is not in available keys"):
        pipeline(image=image, label="a", slide="one", patient="c")


def test_failures_and_rejections_are_counted(generator, image):
    transform = caa.ConditionedResample(generator, p=1.0, steps=2, min_similarity=0.9999)
    transform(image=image)
    assert (transform.num_rejected, transform.num_failed) == (1, 0)


def test_it_pickles_without_weights(transform, image):
    packed = pickle.dumps(alb.Compose([transform]))
    assert len(packed) < 300_000
    np.testing.assert_array_equal(
        *(_edited(p, image) for p in (alb.Compose([transform]), pickle.loads(packed)))
    )


def _edited(pipeline, image):
    torch.manual_seed(6)
    return pipeline(image=image)["image"]


@pytest.mark.parametrize("version", ["2.5.1", "1.4.24", "2.0.9", "2.0.14", "2.0.20"])
def test_another_albumentations_gets_one_clear_error(version, monkeypatch):
    monkeypatch.setattr(alb, "__version__", version)
    monkeypatch.delitem(sys.modules, "cytosyn_aug.albumentations")
    with pytest.raises(ImportError, match=rf"found albumentations {version}, expected 2\.0\.8"):
        importlib.import_module("cytosyn_aug.albumentations")


def test_masks_pass_or_are_refused(generator, reference, image):
    mask = np.ones((SIZE, SIZE), np.uint8)
    transfer = alb.Compose([caa.StainTransfer(generator, [reference], p=1.0, recipe=FAST)])
    np.testing.assert_array_equal(transfer(image=image, mask=mask)["mask"], mask)
    resample = alb.Compose([caa.ConditionedResample(generator, p=1.0, steps=2)])
    with pytest.raises(ValueError, match="moves structure"):
        resample(image=image, mask=mask)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("error")
def test_arrays_that_cannot_be_written_serve(generator, reference, variants, image, name):
    transform = make_all(generator, reference, variants)[name]
    frozen = np.asarray(PIL.Image.fromarray(image))  # as a memory map of files also is
    assert not frozen.flags.writeable
    torch.manual_seed(0)
    want = transform(image=image)["image"]
    torch.manual_seed(0)
    np.testing.assert_array_equal(transform(image=frozen)["image"], want)
    np.testing.assert_array_equal(frozen, image)


def never(generator, reference, variants):
    """Return the transforms that refuse samples, editing none."""
    return {
        "transfer": caa.StainTransfer(generator, [reference], p=0.0),
        "resample": caa.ConditionedResample(generator, p=0.0),
        "reinhard": caa.ReinhardNormalize(ReinhardReference.fit(synthetic_tiles(3)), p=0.0),
        "cached": caa.CachedVariants(variants, p=0.0),
    }


@pytest.mark.parametrize("name", ["transfer", "resample", "reinhard", "cached"])
def test_images_are_checked_whether_drawn_or_not(generator, reference, variants, image, name):
    pipeline = alb.Compose([never(generator, reference, variants)[name]])
    np.testing.assert_array_equal(pipeline(image=image)["image"], image)
    bad = image.astype(np.float32)
    for given in (
        {"image": bad},
        {"images": np.stack([image / np.float32(255), bad])},
        {"volume": np.stack([image / np.float32(255), bad])},
    ):
        with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
            pipeline(**given)
    with pytest.raises(TypeError, match="expected uint8 or float"):
        pipeline(image=image.astype(np.int32))
    with pytest.raises(ValueError, match=r"expected \[H, W, 3\]"):
        pipeline(image=image[..., :1])
    two = alb.Compose(pipeline.transforms, additional_targets={"image2": "image"})
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        two(image=image, image2=bad)


@pytest.mark.parametrize("name", ["resample", "cached"])
def test_masks_are_refused_whether_drawn_or_not(generator, reference, variants, image, name):
    pipeline = alb.Compose([never(generator, reference, variants)[name]])
    with pytest.raises(ValueError, match=r"moves structure.*carries \['mask'\]"):
        pipeline(image=image, mask=image[..., 0])


def test_sizes_and_missing_facts_are_refused_whether_drawn_or_not(generator, reference, image):
    transfer = caa.StainTransfer(generator, [reference], p=0.0)
    with pytest.raises(ValueError, match="re-tile larger"):
        transfer(image=image[:50, :50])
    named = StainReference.fit(generator, synthetic_tiles(3, seed=5), laboratory="a")
    excluding = caa.StainTransfer(generator, [named], p=0.0, sampling="own_excluded")
    with pytest.raises(ValueError, match="the sample says no laboratory"):
        excluding(image=image)


def test_a_sample_without_an_image_is_refused(generator, image):
    transform = caa.ConditionedResample(generator, p=0.0)
    with pytest.raises(TypeError, match=r"got no image among \['label'\]"):
        transform(label=3)
    with pytest.raises(TypeError, match=r"got an image of Image, expected a numpy array"):
        transform(image=PIL.Image.fromarray(image))


def test_a_replay_is_checked_too_and_asks_for_nothing_it_was_drawn_by(generator, image):
    names = [StainReference.fit(generator, synthetic_tiles(3, seed=5), laboratory=k) for k in "ab"]
    slide = caa.StainTransfer(generator, names, p={"a": 1.0}, mode="slide", recipe=FAST)
    first = alb.ReplayCompose([slide])(image=image, slide="x", label="a")
    again = alb.ReplayCompose.replay(first["replay"], image=image)["image"]
    np.testing.assert_array_equal(again, first["image"])
    resample = alb.ReplayCompose([caa.ConditionedResample(generator, p=0.0)])(image=image)
    with pytest.raises(ValueError, match="moves structure"):
        alb.ReplayCompose.replay(resample["replay"], image=image, mask=image[..., 0])


@pytest.mark.parametrize("p", [1.5, -1, "x", {"a": 2.0}, {}])
def test_bad_probabilities_are_refused(generator, reference, variants, p):
    with pytest.raises(ValueError, match=r"^p (is|of)"):
        caa.StainTransfer(generator, [reference], p=p)
    with pytest.raises(ValueError, match=r"^p (is|of)"):
        caa.StainNormalize(generator, reference, p=p)
    with pytest.raises(ValueError, match=r"^p (is|of)"):
        caa.CachedVariants(variants, p=p)


def test_what_is_no_reference_is_named(generator, reference):
    macenko = MacenkoReference.fit(synthetic_tiles(1))
    for wrong in (reference, {"a": reference}, "lab.json", [[reference]], [macenko]):
        with pytest.raises(TypeError, match=r"^references.* StainReference"):
            caa.StainTransfer(generator, wrong)
    with pytest.raises(TypeError, match=r"^source is a MacenkoReference, expected a StainRef"):
        caa.StainTransfer(generator, iter([reference]), source=macenko)
    with pytest.raises(TypeError, match=r"^reference is a list, expected a StainReference"):
        caa.StainNormalize(generator, [reference])
    with pytest.raises(TypeError, match=r"^reference is a StainReference.* takes a MacenkoRef"):
        caa.MacenkoNormalize(reference)


def test_normalising_draws_by_class(generator, reference, image):
    transform = caa.StainNormalize(generator, reference, p={"tumour": 1.0, "stroma": 0.0})
    pipeline = alb.Compose([transform])
    for label, is_edited in (("tumour", True), ("stroma", False)):
        out = pipeline(image=image, label=label)["image"]
        assert np.array_equal(out, image) != is_edited


@pytest.mark.parametrize(
    "p",
    [
        {"kind": 0.5, "b": 1.0},
        {np.int64(3): 0.5},
        {("slide", 1): 0.25, "kind": Ramp(0.0, 1.0, 3)},
        {True: np.float64(0.5)},
    ],
)
def test_classes_of_any_name_are_written_and_read(generator, reference, p):
    transform = caa.StainTransfer(generator, [reference], p=p)
    assert transform.inner.p == p
    again = alb.from_dict(json.loads(json.dumps(alb.to_dict(transform))))
    assert again.inner.p == p


def test_what_is_shown_is_short(generator, reference, tiles):
    table = FeatureTable(tiles, generator.features(tiles).cls, width=24)
    transform = caa.StainTransfer(generator, [reference] * 3, p=0.4, features=table)
    for shown in (repr(transform), repr(alb.Compose([transform]))):
        assert len(shown) < 1000
        assert "StainTransfer(p=0.4, generator=<TileGenerator>, references=[3]" in shown
        assert "features=<FeatureTable>" in shown


def test_a_written_reference_is_small_and_the_same(generator, image):
    many = StainReference.fit(generator, synthetic_tiles(40, seed=5))
    transform = caa.StainNormalize(generator, many, source=many)
    content = json.dumps(alb.to_dict(transform))
    assert len(content) < 5000 < len(json.dumps(many.to_dict()))
    got = transform(image=image)["image"].astype(int)
    want = transform.inner.__class__(generator, many, source=many)(
        torch.from_numpy(image).permute(2, 0, 1)
    )
    assert np.abs(got - want.permute(1, 2, 0).numpy()).max() <= 1
    again = many.pooled().pooled()
    assert torch.equal(again.cls, many.pooled().cls)
    for a, b in zip(again.moments, many.pooled().moments, strict=True):
        assert torch.equal(a, b)


def test_the_seed_of_compose_is_not_theirs(generator, image):
    # torch's generator is, which DataLoader seeds in every worker; README says so.
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        pipeline = alb.Compose([caa.ConditionedResample(generator, steps=2, p=0.5)], seed=5)
        drawn.append([pipeline.transforms[0].should_apply() for _ in range(40)])
    assert drawn[0] == drawn[1] != drawn[2]


def test_grey_scale_is_refused(generator, reference):
    transform = caa.StainNormalize(generator, reference)
    with pytest.raises(ValueError, match=r"expected \[H, W, 3\]"):
        transform(image=np.zeros((SIZE, SIZE), np.uint8))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_cached_images_are_looked_up_and_latents_refused(generator, image, tmp_path, dtype):
    caches = []
    for payload in ("images", "latents"):
        spec = variants_spec(generator, payload, [abs], recipe="inverse")
        with LatentCache.open(tmp_path / payload, spec) as cache:
            tile = torch.from_numpy(image).permute(2, 0, 1)[None]
            fill_variants(generator, tile, cache, [lambda images, _: 255 - images])
        caches.append(cache)
    given = image if dtype is np.uint8 else (image / 255).astype(np.float32)
    out = alb.Compose([caa.CachedVariants(caches[0], p=1.0)])(image=given)["image"]
    assert out.dtype == dtype
    levels = out if dtype is np.uint8 else np.rint(out * 255)
    np.testing.assert_array_equal(levels, 255 - image)
    with pytest.raises(ValueError, match="which albumentations cannot carry"):
        caa.CachedVariants(caches[1])


class Seeds(Dataset):
    """The seeds that a transform draws, where a data set would return images."""

    def __init__(self, transform, image):
        self.transform, self.image = transform, image

    def __len__(self):
        return 4

    def __getitem__(self, index):
        drawn = self.transform.get_params_dependent_on_data({}, {"image": self.image})
        edited = alb.Compose([self.transform])(image=self.image)["image"]
        return drawn["seeds"][0], edited


@pytest.mark.parametrize("persists", [False, True])
def test_two_workers_draw_different_seeds_in_every_epoch(generator, image, persists):
    transform = caa.ConditionedResample(generator, p=1.0, steps=2)
    loader = DataLoader(Seeds(transform, image), num_workers=2, persistent_workers=persists)
    torch.manual_seed(0)
    epochs = [[seed.item() for seed, _ in loader] for _ in range(2)]
    assert len({*epochs[0], *epochs[1]}) == 8


def test_p_is_drawn_with_torchs_generator(generator, image):
    transform = caa.ConditionedResample(generator, p=0.5, steps=2)
    torch.manual_seed(0)
    drawn = [transform.should_apply() for _ in range(200)]
    assert 70 < sum(drawn) < 130
    torch.manual_seed(0)
    assert drawn == [transform.should_apply() for _ in range(200)]
