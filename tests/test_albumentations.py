"""The albumentations adapter, in a real DataLoader."""

import numpy as np
import pytest
import torch
from conftest import SIZE, synthetic_tiles
from torch.utils.data import DataLoader, Dataset

from cytosyn_aug import EditRecipe, LatentCache, StainReference, fill_variants, variants_spec

alb = pytest.importorskip("albumentations", reason="the albumentations adapter is not tested")
caa = pytest.importorskip("cytosyn_aug.albumentations")

FAST = EditRecipe(steps=2)


@pytest.fixture(scope="module")
def reference(generator):
    return StainReference.fit(generator, synthetic_tiles(3, seed=5))


@pytest.fixture
def image():
    return synthetic_tiles(1)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_types_out_are_types_in(generator, reference, image, dtype):
    image = image if dtype is np.uint8 else (image / 255).astype(np.float32)
    for transform in (
        caa.StainTransfer(generator, [reference], p=1.0, recipe=FAST),
        caa.StainNormalize(generator, reference, recipe=FAST),
        caa.ConditionedResample(generator, p=1.0, steps=2),
    ):
        out = alb.Compose([transform])(image=image)["image"]
        assert (out.shape, out.dtype) == (image.shape, image.dtype)
        assert not np.array_equal(out, image)


def test_it_gives_what_torchvision_gives(generator, reference, image):
    from cytosyn_aug import StainNormalize

    ours = StainNormalize(generator, reference, recipe=FAST)
    want = ours(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    got = caa.StainNormalize(generator, reference, recipe=FAST)(image=image)["image"]
    np.testing.assert_array_equal(got, want)


def test_masks_pass_or_are_refused(generator, reference, image):
    mask = np.ones((SIZE, SIZE), np.uint8)
    transfer = alb.Compose([caa.StainTransfer(generator, [reference], p=1.0, recipe=FAST)])
    np.testing.assert_array_equal(transfer(image=image, mask=mask)["mask"], mask)
    resample = alb.Compose([caa.ConditionedResample(generator, p=1.0, steps=2)])
    with pytest.raises(ValueError, match="moves structure"):
        resample(image=image, mask=mask)


def test_grey_scale_is_refused(generator, reference):
    transform = caa.StainNormalize(generator, reference)
    with pytest.raises(ValueError, match=r"expected \[H, W, 3\]"):
        transform(image=np.zeros((SIZE, SIZE), np.uint8))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_cached_images_are_looked_up_and_latents_refused(generator, image, tmp_path, dtype):
    caches = []
    for payload in ("images", "latents"):
        spec = variants_spec(generator, payload, num_variants=1, recipe="inverse")
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


def test_two_workers_draw_different_seeds_in_every_epoch(generator, image):
    transform = caa.ConditionedResample(generator, p=1.0, steps=2)
    loader = DataLoader(Seeds(transform, image), num_workers=2, batch_size=1)
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
