"""CachedVariants: look-up only, in workers, and a miss says why it is one."""

import io
import os
import pickle
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors

from cytosyn_aug import CachedVariants, LatentCache, Ramp
from cytosyn_aug.cache.diagnosis import explain_miss
from cytosyn_aug.cache.encodings import encodings_spec
from cytosyn_aug.cache.spec import SHARD_FOLDER
from cytosyn_aug.images import open_tiles, tile_key
from cytosyn_aug.transforms.variants import fill_variants, variants_spec
from tests.support.check_transform import check_transform
from tests.support.synthetic import SIZE, synthetic_tiles

EDITS = [lambda images, _: images // 2, lambda images, _: 255 - images]
NUM = 6


def make_cache(folder, generator, payload, tiles, edits=EDITS, **settings):
    spec = variants_spec(generator, payload, edits, recipe="half, inverse", **settings)
    with LatentCache.open(folder, spec) as cache:
        fill_variants(generator, tiles, cache, edits)
    return LatentCache.open(folder)


@pytest.fixture(scope="module")
def tiles():
    return synthetic_tiles(NUM)


@pytest.fixture(scope="module")
def images_cache(generator, tiles, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("images"), generator, "images", tiles)


@pytest.fixture(scope="module")
def latents_cache(generator, tiles, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("latents"), generator, "latents", tiles)


def except_blank(edit):
    return lambda images, seeds: torch.where(
        (images == images[:, :, :1, :1]).flatten(1).all(1)[:, None, None, None],
        images,
        edit(images, seeds),
    )


def test_it_passes_the_contract_of_all_transforms(generator, tmp_path, tiles):
    blank = torch.stack([torch.full_like(tiles[0], level) for level in (243, 255)])
    given = torch.cat([tiles[:4], tiles[:4].transpose(2, 3), blank])
    edits = [except_blank(edit) for edit in EDITS]
    cache = make_cache(tmp_path, generator, "images", given, edits, keeps_structure=True)
    check_transform(CachedVariants(cache, p=1.0), tiles[:4])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[0],
        lambda x: x,
        lambda x: x[0].float() / 255,
        lambda x: x.view(2, 3, *x.shape[1:]),
        lambda x: tv_tensors.Image(x),
        lambda x: PIL.Image.fromarray(x[0].permute(1, 2, 0).numpy()),
    ],
    ids=["uint8", "batch", "float", "nested batch", "tv_tensor", "PIL"],
)
def test_types_out_are_types_in(images_cache, tiles, make):
    image = make(tiles)
    out = CachedVariants(images_cache, p=1.0)(image)
    assert type(out) is type(image)
    if isinstance(image, PIL.Image.Image):
        assert (out.size, out.mode) == (image.size, image.mode)
        assert out.tobytes() != image.tobytes()
    else:
        assert (out.shape, out.dtype) == (image.shape, image.dtype)
        assert not torch.equal(out, image)


def test_tiles_become_one_of_their_variants_drawn_per_tile(images_cache, tiles):
    transform = CachedVariants(images_cache)
    torch.manual_seed(0)
    kinds = set()
    for _ in range(8):
        for before, after in zip(tiles, transform(tiles), strict=True):
            candidates = (before, before // 2, 255 - before)
            kinds.add([torch.equal(after, c) for c in candidates].index(True))
    assert kinds == {0, 1, 2}
    drawn = transform.make_params([tiles])
    assert torch.equal(transform.transform(tiles, drawn), transform.transform(tiles, drawn))


def test_p_by_class_and_by_epoch(images_cache, tiles):
    transform = CachedVariants(images_cache, p={"a": 1.0, "b": Ramp(0.0, 1.0, 2)})

    def is_edited():
        return [
            not torch.equal(transform({"image": tiles[0], "label": label})["image"], tiles[0])
            for label in "ab"
        ]

    assert is_edited() == [True, False]
    transform.set_epoch(1)
    assert is_edited() == [True, True]


def test_bytes_are_looked_up_without_a_copy(tiles):
    assert open_tiles(tiles).tiles.data_ptr() == tiles.data_ptr()


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("payload", ["images", "latents"])
def test_images_are_checked_whether_drawn_or_not(images_cache, latents_cache, tiles, payload, p):
    transform = CachedVariants(images_cache if payload == "images" else latents_cache, p=p)
    overshot = torch.full((3, SIZE, SIZE), 0.5)
    overshot[0, 3, 3] = 1.001
    for image, message in (
        (tiles[0].float(), r"expected \[0, 1\]"),
        (overshot, r"expected \[0, 1\]"),
        (torch.full((3, SIZE, SIZE), torch.nan), r"expected \[0, 1\]"),
        (tiles[0].int(), "expected uint8 or float"),
        (tiles[0, :1], "repeat grey-scale channels"),
        (PIL.Image.new("L", (SIZE, SIZE)), "mode L, expected RGB"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            transform(image)


def test_p_of_zero_returns_the_very_object(images_cache, tiles):
    assert CachedVariants(images_cache, p=0.0)(tiles) is tiles


def test_tiles_that_no_edit_changed_come_back_as_they_are(generator, tmp_path, tiles):
    blank = torch.full_like(tiles[:1], 243)
    edits = [lambda images, _: torch.where(images == 243, images, images // 2)]
    for payload in ("images", "latents"):
        cache = make_cache(tmp_path / payload, generator, payload, blank, edits)
        out = CachedVariants(cache, p=1.0)(blank)
        if payload == "latents":
            assert not out.is_variant.any()
            out = out.image
        assert torch.equal(out, blank)


class Tiles(Dataset):
    def __init__(self, tiles, transform):
        self.tiles, self.transform = tiles, transform

    def __len__(self):
        return len(self.tiles)

    def __getitem__(self, index):
        return self.transform(self.tiles[index]), index


@pytest.mark.parametrize("is_pickled", [False, True])
def test_workers_look_images_up(images_cache, tiles, is_pickled):
    transform = CachedVariants(images_cache, p=1.0)
    if is_pickled:  # as a spawned worker gets it
        transform = pickle.loads(pickle.dumps(transform))
    loader = DataLoader(Tiles(tiles, transform), batch_size=2, num_workers=2)
    for images, index in loader:
        before = tiles[index]
        is_half = (images == before // 2).flatten(1).all(1)
        is_inverse = (images == 255 - before).flatten(1).all(1)
        assert (is_half | is_inverse).all()


@pytest.mark.parametrize("is_float", [False, True])
def test_latents_of_workers_are_decoded_after_collation(
    generator, latents_cache, tiles, is_float, monkeypatch
):
    transform = CachedVariants(latents_cache)
    given = tiles.float() / 255 if is_float else tiles
    torch.manual_seed(1)
    ((batch, index),) = DataLoader(Tiles(given, transform), batch_size=NUM, num_workers=1)
    assert batch.is_variant.any()
    assert not batch.is_variant.all()
    decoded_batches, real = [], generator.decode_pixels

    def decode(latents, **options):
        decoded_batches.append(len(latents))
        return real(latents, **options)

    monkeypatch.setattr(generator, "decode_pixels", decode)
    images = transform.decode(generator, batch)
    assert (images.shape, images.dtype) == (given.shape, given.dtype)
    assert decoded_batches == [int(batch.is_variant.sum())]
    for row, tile in enumerate(given[index]):
        if not batch.is_variant[row]:
            assert torch.equal(images[row], tile)
            continue
        edits = [edit(tiles[index[row]][None], None) for edit in EDITS]
        expected = [generator.decode(generator.whiten(generator.encode(e).mean))[0] for e in edits]
        levels = images[row] * 255 if is_float else images[row].float()
        # Latents were rounded to float16.
        assert min((levels - e.float()).abs().max() for e in expected) <= 2


def test_only_chosen_samples_are_looked_up_and_reach_the_network(
    generator, latents_cache, tiles, monkeypatch
):
    transform = CachedVariants(latents_cache, p={"a": 1.0, "b": 0.0})
    looked_up, drawn = [], []
    find, decode = latents_cache.get, generator.decode_pixels

    def get(keys, variants):
        looked_up.extend(keys)
        return find(keys, variants)

    def decode_pixels(latents, **options):
        drawn.append(latents)
        return decode(latents, **options)

    monkeypatch.setattr(latents_cache, "get", get)
    monkeypatch.setattr(generator, "decode_pixels", decode_pixels)
    monkeypatch.setattr(generator, "encode", None)
    monkeypatch.setattr(generator, "cls_features", None)
    batch = transform({"image": tiles, "label": list("abbaab")})["image"]
    transform.decode(generator, batch)
    chosen = [0, 3, 4]
    assert looked_up == [tile_key(tiles[row]) for row in chosen]
    assert torch.equal(torch.cat(drawn), batch.latents[chosen].float())


def test_latents_of_a_single_image_are_of_a_single_image(generator, latents_cache, tiles):
    image = PIL.Image.fromarray(tiles[0].permute(1, 2, 0).numpy())
    transform = CachedVariants(latents_cache, p=1.0)
    record = transform(image)
    assert torch.equal(record.image, tiles[0])
    assert record.latents.shape == generator.latent_shape
    assert record.is_variant.shape == ()
    assert transform.decode(generator, record).shape == tiles[0].shape


@pytest.mark.parametrize("is_float", [False, True])
def test_tiles_whose_variant_cannot_be_decoded_stay_and_are_counted(
    generator, latents_cache, tiles, monkeypatch, is_float
):
    transform = CachedVariants(latents_cache, p=1.0)
    batch = transform(tiles.float() / 255 if is_float else tiles)
    expected = transform.decode(generator, batch)
    real = generator.decode_pixels

    def decode(latents, **options):
        pixels = real(latents, **options)
        pixels[1] = torch.inf
        return pixels

    monkeypatch.setattr(generator, "decode_pixels", decode)
    with pytest.warns(RuntimeWarning, match=tile_key(tiles[1])[:16]):
        images = transform.decode(generator, batch)
    assert torch.equal(images[1], batch.image[1])
    others = torch.arange(len(images)) != 1
    assert torch.equal(images[others], expected[others])
    assert transform.num_failed == 1


def test_decoding_with_another_model_is_refused(generator, latents_cache, tiles, monkeypatch):
    transform = CachedVariants(latents_cache, p=1.0)
    batch = transform(tiles)
    monkeypatch.setattr(generator, "digest", "fedcba9876543210")
    with pytest.raises(ValueError, match="this generator is fedcba9876543210"):
        transform.decode(generator, batch)


def test_decoding_anything_but_its_records_is_refused(generator, latents_cache, tiles):
    transform = CachedVariants(latents_cache, p=1.0)
    record = transform(tiles)
    for wrong in ({"image": record}, [record], tuple(record), tiles):
        with pytest.raises(TypeError, match=f"got a {type(wrong).__name__}, expected a Latent"):
            transform.decode(generator, wrong)


def recompressed(tile):
    stream = io.BytesIO()
    PIL.Image.fromarray(tile.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=85)
    return torch.from_numpy(np.array(PIL.Image.open(stream))).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, 4:-4, 4:-4], rf"104x104 px and the cache is of {SIZE} px.*cropped"),
        (lambda x: x.flip(2), "turned or mirrored; look it up before flips"),
        (lambda x: torch.rot90(x, 1, (1, 2)), "turned or mirrored"),
        (lambda x: (x.int() + torch.randint(-2, 3, x.shape)).clip(0, 255).byte(), "decoded by an"),
        (recompressed, "decoded by another library or compressed again"),
        (lambda x: x // 2, "never filled in, or cropped and resized or recoloured"),
    ],
    ids=["crop", "flip", "turn", "decoder", "JPEG", "colour"],
)
def test_a_miss_says_why_it_is_one(images_cache, tiles, change, message):
    with pytest.raises(ValueError, match=message) as info:
        CachedVariants(images_cache, p=1.0)(change(tiles[0]))
    assert "1 of 1 tiles are not in the cache" in str(info.value)


def test_a_miss_of_one_variant_says_which_are_there(generator, tmp_path, tiles):
    cache = make_cache(tmp_path, generator, "images", tiles)
    assert "call cache.refresh()" in explain_miss(cache, tiles[0], 1)

    def interrupted(_images, _seeds):
        raise KeyboardInterrupt

    edits = [EDITS[0], interrupted]
    spec = variants_spec(generator, "images", edits, recipe="interrupted")
    with (
        pytest.raises(KeyboardInterrupt),
        LatentCache.open(tmp_path / "part", spec) as part,
    ):
        fill_variants(generator, tiles, part, edits)
    assert "variants [0] are there; filling was interrupted" in explain_miss(part, tiles[0], 1)


def test_a_damaged_variant_is_named(generator, tmp_path, tiles):
    cache = make_cache(tmp_path, generator, "images", tiles[:1], EDITS[:1])
    (file,) = (tmp_path / SHARD_FOLDER).iterdir()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    with (
        pytest.warns(UserWarning, match="differs from what was written"),
        pytest.raises(ValueError, match=r"record 0 .*differs from what was written"),
    ):
        CachedVariants(cache, p=1.0)(tiles[0])


def test_keep_leaves_missing_tiles_warns_once_and_counts(images_cache, tiles):
    transform = CachedVariants(images_cache, p=1.0, on_miss="keep")
    mixed = torch.stack([tiles[0], tiles[1].flip(2), tiles[2].flip(2)])
    with pytest.warns(UserWarning, match="2 of 3 tiles are not in the cache.*tile 1, variant"):
        out = transform(mixed)
    assert [torch.equal(a, b) for a, b in zip(out, mixed, strict=True)] == [False, True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform(mixed)
    assert transform.num_missed == 4


def test_missing_tiles_of_all_workers_are_counted(images_cache, tiles):
    transform = CachedVariants(images_cache, p=1.0, on_miss="keep")
    loader = DataLoader(Tiles(tiles.flip(3), transform), batch_size=2, num_workers=2)
    assert torch.equal(torch.cat([images for images, _ in loader]), tiles.flip(3))
    assert transform.num_missed == NUM


def test_masks_need_variants_that_keep_structure(generator, images_cache, tmp_path, tiles):
    mask = tv_tensors.Mask(torch.ones(SIZE, SIZE, dtype=torch.uint8))
    sample = (tv_tensors.Image(tiles[0]), mask)
    with pytest.raises(ValueError, match="moves structure"):
        CachedVariants(images_cache)(*sample)
    keeping = make_cache(tmp_path, generator, "images", tiles, keeps_structure=True)
    for transform in (
        CachedVariants(keeping),
        CachedVariants(images_cache, allow_geometry_change=True),
    ):
        assert transform(*sample)[1] is mask


def test_caches_of_something_else_and_bad_arguments_are_refused(generator, images_cache, tmp_path):
    moments = LatentCache.open(tmp_path, encodings_spec(generator, ["moments", "features"]))
    with pytest.raises(ValueError, match="holds moments, cls, thumbnail, expected variants"):
        CachedVariants(moments)
    with pytest.raises(ValueError, match="on_miss is 'ignore'"):
        CachedVariants(images_cache, on_miss="ignore")
    with pytest.raises(ValueError, match=r"p is 1\.5"):
        CachedVariants(images_cache, p=1.5)
