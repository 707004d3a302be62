"""Contracts of the transforms: types out = types in, per-sample draws, masks, blank tiles."""

import re
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from cytosyn_aug import (
    ConditionedResample,
    DensityReference,
    DensityTransport,
    EditRecipe,
    MacenkoNormalize,
    MacenkoReference,
    Ramp,
    ReinhardNormalize,
    ReinhardReference,
    ReplayBank,
    StainNormalize,
    StainReference,
    StainViews,
)
from cytosyn_aug import StainTransfer as Transfer
from cytosyn_aug.images import tile_key
from cytosyn_aug.model.generator import TileGenerator
from tests.support.check_transform import check_transform
from tests.support.synthetic import SIZE, synthetic_tiles

FAST = EditRecipe(steps=2)
CLASSICAL = {
    "macenko": (MacenkoNormalize, MacenkoReference),
    "reinhard": (ReinhardNormalize, ReinhardReference),
    "transport": (DensityTransport, DensityReference),
}


@pytest.fixture(scope="module")
def references(generator):
    dark = synthetic_tiles(3, seed=5)
    pale = (255 - (255 - dark.float()) * 0.7).round().to(torch.uint8)
    return [StainReference.fit(generator, x) for x in (dark, pale)]


@pytest.fixture
def transfer(generator, references):
    return Transfer(generator, references, p=1.0, recipe=FAST)


@pytest.fixture(params=["transfer", "redraw", "normalize", "resample", "views", *CLASSICAL])
def transform(request, generator, references):
    match request.param:
        case "transfer":
            return Transfer(generator, references, p=1.0, recipe=FAST)
        case "redraw":
            return Transfer(generator, references, p=1.0, recipe=FAST, preserve="none")
        case "normalize":
            return StainNormalize(generator, references[0], recipe=FAST)
        case "resample":
            return ConditionedResample(generator, p=1.0, steps=2)
        case "views":
            return StainViews(generator, references, recipe=FAST)
        case name:
            normalise, reference = CLASSICAL[name]
            return normalise(reference.fit(synthetic_tiles(3, seed=5)))


def test_every_transform_keeps_the_contract(transform, tiles):
    check_transform(transform, tiles)


def test_manual_seed_repeats_and_other_seeds_differ(generator, references, tiles):
    transform = ConditionedResample(generator, p=1.0, steps=2)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(transform(tiles))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_tile_is_edited_alike_in_any_batch(generator, references, tiles):
    normalize = StainNormalize(generator, references[0], recipe=FAST)
    together = normalize(tiles).int()
    alone = torch.stack([normalize(t) for t in tiles]).int()
    # Kernels round differently by batch shape: one grey level is the contract.
    assert (together - alone).abs().max() <= 1


def test_p_draws_per_sample(generator, references):
    tiles = synthetic_tiles(1).expand(64, 3, SIZE, SIZE)
    transform = ConditionedResample(generator, p=0.5, steps=2)
    torch.manual_seed(0)
    changed = (transform(tiles) != tiles).flatten(1).any(1)
    assert 16 < changed.sum() < 48


def test_normalising_draws_by_p_and_nothing_else(generator, references, tiles):
    many = synthetic_tiles(1).expand(64, 3, SIZE, SIZE)
    some = StainNormalize(generator, references[0], recipe=FAST, p=0.5, seed=7)
    torch.manual_seed(0)
    params = some.make_params([many])
    assert 16 < sum(params["chosen"]) < 48
    assert set(params["seeds"]) == {7}
    all_of_them = StainNormalize(generator, references[0], recipe=FAST)
    torch.manual_seed(1)
    params = some.make_params([tiles])
    made = some.transform(tiles, params)
    for k, is_chosen in enumerate(params["chosen"]):
        expected = all_of_them(tiles[k]) if is_chosen else tiles[k]
        assert (made[k].int() - expected.int()).abs().max() <= 1
    state = torch.get_rng_state()
    all_of_them(tiles)
    assert torch.equal(torch.get_rng_state(), state)


def test_p_of_zero_returns_the_very_object(generator, references, tiles):
    assert Transfer(generator, references, p=0.0)(tiles) is tiles


def test_references_are_drawn_per_sample(generator, references):
    tiles = synthetic_tiles(1).expand(12, 3, SIZE, SIZE)
    transform = Transfer(generator, references, p=1.0, recipe=FAST)
    torch.manual_seed(0)
    drawn = transform.make_params([tiles])["references"]
    assert set(drawn) == {0, 1}


def test_color_moves_no_structure(transfer, tiles):
    """The change is one affine map of density, faded by density: a function of the colour."""
    out = transfer(tiles[:1])[0].flatten(1).T
    colours = {}
    for before, after in zip(tiles[0].flatten(1).T.tolist(), out.tolist(), strict=True):
        assert colours.setdefault(tuple(before), tuple(after)) == tuple(after)


def test_glass_pixels_of_a_tissue_tile_stay(transfer, tiles):
    glass = (tiles > 250).all(1, keepdim=True).expand_as(tiles)
    assert glass.any()
    assert torch.equal(transfer(tiles)[glass], tiles[glass])


def test_strength_zero_changes_nothing_and_one_half_goes_part_of_the_way(
    generator, references, tiles
):
    moved = []
    for strength in (0.0, 0.5, 1.0):
        transform = StainNormalize(generator, references[1], strength=strength, recipe=FAST)
        moved.append((transform(tiles).float() - tiles.float()).abs().mean().item())
    assert moved[0] == 0
    assert 0 < moved[1] < moved[2]


def test_networks_run_only_where_they_have_a_say(generator, references, tiles, monkeypatch):
    asked = []
    original = generator.cls_features
    monkeypatch.setattr(generator, "cls_features", lambda x: asked.append(len(x)) or original(x))
    pixels_only = EditRecipe(probe_share=0.0)
    assert not torch.equal(Transfer(generator, references, p=1.0, recipe=pixels_only)(tiles), tiles)
    for preserve in ("color", "none"):
        weak = Transfer(generator, references, p=1.0, strength=0.0, preserve=preserve)
        assert weak(tiles) is tiles
    views = StainViews(generator, references, strength=0.0)(tiles)
    assert all(view.data_ptr() == tiles.data_ptr() for view in views)
    assert asked == []
    torch.manual_seed(0)
    free = ConditionedResample(generator, p=1.0, steps=2)(tiles)
    assert asked == [4]  # of the old tiles; nobody asks how alike the new ones are
    torch.manual_seed(0)
    bounded = ConditionedResample(generator, p=1.0, steps=2, max_similarity=0.9999)(tiles)
    assert asked == [4, 4, 4]
    assert torch.equal(free, bounded)


def test_masks_boxes_and_labels_pass_by_identity(transfer, tiles):
    mask = tv_tensors.Mask(torch.ones(SIZE, SIZE, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format="XYXY", canvas_size=(SIZE, SIZE))
    image, sample = transfer(tv_tensors.Image(tiles[0]), {"m": mask, "b": boxes, "y": 7})
    assert sample["m"] is mask
    assert sample["b"] is boxes
    assert sample["y"] == 7
    assert not torch.equal(image, tiles[0])


@pytest.mark.parametrize("kind", ["resample", "none"])
def test_what_moves_structure_refuses_masks_unless_told(generator, references, tiles, kind):
    def make(allow):
        if kind == "resample":
            return ConditionedResample(generator, p=1.0, steps=2, allow_geometry_change=allow)
        return Transfer(
            generator, references, p=1.0, preserve="none", recipe=FAST, allow_geometry_change=allow
        )

    mask = tv_tensors.Mask(torch.ones(SIZE, SIZE, dtype=torch.uint8))
    with pytest.raises(ValueError, match="moves structure"):
        make(False)(tv_tensors.Image(tiles[0]), mask)
    assert make(True)(tv_tensors.Image(tiles[0]), mask)[1] is mask


def test_larger_images_are_recoloured_at_their_own_size(transfer):
    large = synthetic_tiles(2, size=160)
    out = transfer(large)
    assert out.shape == large.shape
    assert not torch.equal(out, large)


def test_images_at_another_scale_are_read_at_the_models(generator, references):
    fine = synthetic_tiles(1, size=2 * SIZE)
    out = Transfer(generator, references, p=1.0, mpp=0.25, recipe=FAST)(fine)
    assert out.shape == fine.shape


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 64, 64, dtype=torch.uint8), "image is 64x64 px at 0.5 microns"),
        (torch.full((3, SIZE, SIZE), 200.0), "divide by 255"),
        (torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8), "channels come last"),
        (torch.full((3, SIZE, SIZE), float("nan")), r"expected \[0, 1\]"),
        (torch.zeros(1, SIZE, SIZE, dtype=torch.uint8), "repeat grey-scale channels"),
        (torch.zeros(4, SIZE, SIZE, dtype=torch.uint8), "drop alpha"),
        (torch.zeros(0, 3, SIZE, SIZE, dtype=torch.uint8), "empty batch"),
        (PIL.Image.new("L", (SIZE, SIZE)), "mode L, expected RGB"),
        (PIL.Image.new("RGBA", (SIZE, SIZE)), "mode RGBA, expected RGB"),
        (PIL.Image.new("I;16", (SIZE, SIZE)), "mode I;16, expected RGB"),
    ],
)
def test_bad_images_get_one_clear_error(transfer, image, message):
    with pytest.raises(ValueError, match=message):
        transfer(image)


@pytest.mark.parametrize("value", [-0.01, 1.001, float("inf")])
def test_float_images_out_of_range_are_refused_by_all(transform, value):
    image = torch.full((3, SIZE, SIZE), 0.5)
    image[0, 3, 3] = value
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        transform(image)


def test_images_are_checked_whether_drawn_or_not(generator, references):
    def never(image, message, resamples=False):
        transform = (
            ConditionedResample(generator, p=0.0)
            if resamples
            else Transfer(generator, references, p=0.0)
        )
        with pytest.raises((TypeError, ValueError), match=message):
            transform(image)

    tile = synthetic_tiles(1)[0]
    never(tile.float(), r"expected \[0, 1\]")
    never(torch.full((3, SIZE, SIZE), torch.nan), r"expected \[0, 1\]")
    never(tile.to(torch.int16), "expected uint8 or float")
    never(tile[:, :50, :50], "re-tile larger")
    never(PIL.Image.new("RGB", (50, 50)), "re-tile larger")
    never(PIL.Image.new("L", (SIZE, SIZE)), "expected RGB")
    never(tile.repeat(1, 2, 2), "re-tile the slide", resamples=True)
    classical = MacenkoNormalize(MacenkoReference.fit(synthetic_tiles(3, seed=5)), p=0.0)
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        classical(tile.float())


def test_what_may_be_a_mask_is_named(generator, references, tiles):
    transform = Transfer(generator, references, p=1.0, recipe=FAST)
    for mask in (torch.ones(1, SIZE, SIZE), PIL.Image.new("L", (SIZE, SIZE))):
        with pytest.raises(ValueError, match=r"tv_tensors\.Mask"):
            transform({"mask": mask, "image": tiles[0]} if isinstance(mask, torch.Tensor)
                      else (PIL.Image.new("RGB", (SIZE, SIZE)), mask))  # fmt: skip
    resample = ConditionedResample(generator, p=0.0)
    for mask in (torch.ones(SIZE, SIZE), torch.ones(3, SIZE, SIZE, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"(?s)moves structure.*tv_tensors\.Mask"):
            resample((tiles[0], mask))
        ConditionedResample(generator, p=0.0, allow_geometry_change=True)((tiles[0], mask))
    resample((tiles, torch.arange(4), torch.ones(4, 24)))


def test_an_image_that_may_be_another_tensor_of_the_sample_says_so(generator, transfer, tiles):
    sample = {"features": torch.zeros(4, 3, 7, 7), "image": tiles}
    for transform in (transfer, ConditionedResample(generator)):
        with pytest.raises(ValueError, match=r"7x7 px.*first plain tensor.*tv_tensors\.Image"):
            transform(sample)


def test_a_call_without_a_sample_says_so(transfer):
    with pytest.raises(TypeError, match="got no sample"):
        transfer()


def test_of_a_list_of_plain_tensors_only_the_first_is_edited(transfer, tiles):
    """torchvision's rule, as the documentation says; images in tv_tensors are all edited."""
    out = transfer(list(tiles))
    assert [torch.equal(a, b) for a, b in zip(out, tiles, strict=True)] == [False, *[True] * 3]
    wrapped = transfer([tv_tensors.Image(tile) for tile in tiles])
    assert not any(torch.equal(a, b) for a, b in zip(wrapped, tiles, strict=True))


def test_videos_are_refused_beside_images_and_alone(generator, transfer, tiles):
    video = tv_tensors.Video(tiles)
    for sample in (video, {"video": video, "image": tiles}, (tv_tensors.Image(tiles[0]), video)):
        for transform in (transfer, ConditionedResample(generator, p=0.0)):
            with pytest.raises(TypeError, match=r"carries a tv_tensors\.Video.*tv_tensors\.Image"):
                transform(sample)


def test_images_of_mixed_sizes_are_edited_each(transfer, tiles):
    large = synthetic_tiles(1, size=160)[0]
    sample = [tv_tensors.Image(tiles[0]), tv_tensors.Image(large)]
    a, b = transfer(sample)
    assert (a.shape, b.shape) == (tiles[0].shape, large.shape)
    assert not torch.equal(a, tiles[0])
    assert not torch.equal(b, large)


def test_batches_of_mixed_sizes_are_refused(transfer, tiles):
    sample = [tv_tensors.Image(tiles), tv_tensors.Image(tiles[:2])]
    with pytest.raises(ValueError, match=r"differ in batch size: \[2, 4\]"):
        transfer(sample)


def test_a_sample_without_an_image_is_refused(transfer):
    with pytest.raises(TypeError, match="got no image among"):
        transfer({"label": torch.tensor(1), "name": "a"})


def test_tiles_that_were_not_chosen_keep_their_bits(generator, references):
    tiles = torch.rand(32, 3, SIZE, SIZE)
    torch.manual_seed(0)
    out = Transfer(generator, references, p=0.5)(tiles)
    is_same = (out == tiles).flatten(1).all(1)
    assert 4 < is_same.sum() < 28
    assert ((out - tiles).abs().flatten(1).amax(1)[~is_same] > 1e-3).all()


def test_sixteen_bit_tensors_are_refused(transfer):
    with pytest.raises(TypeError, match=r"uint8 or float in \[0, 1\]"):
        transfer(torch.zeros(3, SIZE, SIZE, dtype=torch.int32))


def test_resampling_refuses_other_sizes(generator):
    with pytest.raises(ValueError, match="the model expects 112 px"):
        ConditionedResample(generator, p=1.0)(synthetic_tiles(1, size=160))


def test_raw_decode_refuses_other_sizes(generator, references):
    transform = Transfer(generator, references, p=1.0, preserve="none", recipe=FAST)
    with pytest.raises(ValueError, match="the model expects 112 px"):
        transform(synthetic_tiles(1, size=160))


def test_a_reference_of_another_model_is_refused(generator, references):
    from dataclasses import replace

    other = replace(references[0], model_digest="0" * 16)
    with pytest.raises(ValueError, match="fitted with model 0000000000000000"):
        Transfer(generator, [other])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.5}, "p is 1.5"),
        ({"strength": -0.1}, "strength is -0.1"),
        ({"preserve": "everything"}, "expected 'color' or 'none'"),
        ({"mpp": 4.0}, "mpp is 4.0"),
    ],
)
def test_bad_arguments_are_named(generator, references, arguments, message):
    with pytest.raises(ValueError, match=message):
        Transfer(generator, references, **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"guidance_scale": 99.0}, "guidance is 99.0 .* taught 1 to 3.0"),
    ],
)
def test_what_no_tile_could_be_drawn_with_is_refused_at_once(student_folder, settings, message):
    generator = TileGenerator.from_pretrained(student_folder)
    with pytest.raises(ValueError, match=message):
        ConditionedResample(generator, **settings)


def test_only_what_draws_refuses_a_recipe_that_cannot_be_drawn_with(student_folder):
    generator = TileGenerator.from_pretrained(student_folder)
    reference = StainReference.fit(generator, synthetic_tiles(2))
    recipe = EditRecipe(guidance_scale=99.0)
    with pytest.raises(ValueError, match="taught 1 to 3"):
        StainNormalize(generator, reference, preserve="none", recipe=recipe)
    StainNormalize(generator, reference, recipe=recipe)


def test_a_transformer_takes_any_guidance_but_not_any_steps(generator):
    ConditionedResample(generator, guidance_scale=99.0)
    with pytest.raises(ValueError, match="steps is 1, expected at least 2 with 'ab2'"):
        ConditionedResample(generator, steps=1)


def test_checking_what_is_drawn_with_loads_no_weights(student_folder):
    handle = TileGenerator.from_pretrained(student_folder, batch_size=3).handle()
    generator = TileGenerator.from_handle(handle)
    ConditionedResample(generator, guidance_scale=99.0)
    assert not generator.is_loaded


def test_the_similarity_gates_return_and_count_rejected_tiles(generator, tiles):
    for bounds in ({"min_similarity": 0.9999}, {"max_similarity": -0.9999}):
        transform = ConditionedResample(generator, p=1.0, steps=2, **bounds)
        assert torch.equal(transform(tiles), tiles)
        assert transform.num_rejected == len(tiles)
        assert transform.num_failed == 0


@pytest.mark.parametrize(("folder", "steps"), [("model_folder", 16), ("student_folder", 4)])
def test_resampling_takes_as_many_steps_as_the_networks_need(request, tiles, folder, steps):
    generator = TileGenerator.from_pretrained(request.getfixturevalue(folder))
    results = []
    for given in (None, steps):
        torch.manual_seed(0)
        results.append(ConditionedResample(generator, p=1.0, steps=given)(tiles))
    assert torch.equal(*results)


def test_rejected_tiles_are_counted_in_workers_too(generator, tiles):
    transform = ConditionedResample(generator, p=1.0, steps=2, min_similarity=0.9999)
    data = [(tile, 0) for tile in tiles]
    list(DataLoader(Edited(data, transform), num_workers=2))
    assert transform.num_rejected == len(tiles)


class Edited(Dataset):
    """A data set that transforms its samples."""

    def __init__(self, samples, transform):
        self.samples, self.transform = samples, transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.transform(self.samples[index])


def test_black_stays_black(transfer, tiles):
    padded = tiles.clone()
    padded[..., :56] = 0
    edited = transfer(padded)
    assert torch.equal(edited[..., :56], padded[..., :56])
    assert not torch.equal(edited[..., 56:], padded[..., 56:])
    assert transfer(torch.zeros_like(tiles)).max() == 0


def test_a_compiled_training_step_is_not_compiled_anew_for_other_draws(
    generator, references, tiles
):
    transform = Transfer(generator, references, p=0.5, recipe=FAST)
    weight = torch.tensor(0.5, requires_grad=True)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()

    @torch.compile(backend=counter)
    def step(images):
        return (weight * transform(images).float()).mean()

    for seed in range(4):
        torch.manual_seed(seed)
        loss = step(tiles)
        loss.backward()
        torch.manual_seed(seed)
        assert loss.item() == pytest.approx(0.5 * transform(tiles).float().mean().item())
    assert counter.frame_count == 1


@pytest.fixture
def failing(model_folder, monkeypatch):
    """A generator of its own, whose named network gives NaN for the second tile of a batch."""
    generator = TileGenerator.from_pretrained(model_folder)

    def fail(name):
        network = getattr(generator, name)
        method = "forward_modulated" if name == "transformer" else "forward"
        forward = getattr(network, method)

        def broken(*arguments, **options):
            out = forward(*arguments, **options)
            for x in out if isinstance(out, tuple) else (out,):
                x[1] = float("nan")
            return out

        monkeypatch.setattr(network, method, broken)
        return generator

    return fail


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("encoder", lambda g, r: StainNormalize(g, r, recipe=FAST)),
        ("transformer", lambda g, r: StainNormalize(g, r, recipe=FAST, preserve="none")),
        ("transformer", lambda g, r: ConditionedResample(g, p=1.0, steps=2)),
        ("encoder", lambda g, r: ConditionedResample(g, p=1.0, steps=2)),
        ("encoder", lambda g, r: StainViews(g, [r], recipe=FAST, has_original=True)),
    ],
    ids=["colour", "redraw", "resample", "features", "views"],
)
def test_a_tile_the_network_fails_on_comes_back_counted_and_named(
    failing, references, tiles, name, make
):
    generator = failing(name)
    transform = make(generator, references[0])
    with pytest.warns(RuntimeWarning, match=f"tile {tile_key(tiles[1])[:16]}"):
        out = transform(tiles)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform(tiles)
    assert transform.num_failed == 2
    out = out[1] if isinstance(out, tuple) else out
    assert torch.equal(out[1], tiles[1])
    assert all(not torch.equal(out[k], tiles[k]) for k in (0, 2, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda g, r, f: Transfer(g, references=r, p=1.0, recipe=FAST, features=f),
        lambda g, r, f: ConditionedResample(g, p=1.0, steps=2, features=f),
        lambda g, r, f: ConditionedResample(g, p=1.0, steps=2, features=f, max_similarity=0.9999),
    ],
    ids=["restained", "resampled", "bounded"],
)
def test_a_tile_whose_given_features_are_not_finite_comes_back_and_is_counted(
    generator, references, tiles, make
):
    def features(images):
        cls = generator.features(images).cls.clone()
        cls[1] = torch.nan
        return cls

    transform = make(generator, references, features)
    with pytest.warns(RuntimeWarning, match=f"tile {tile_key(tiles[1])[:16]}"):
        out = transform(tiles)
    assert transform.num_failed == 1
    assert [torch.equal(a, b) for a, b in zip(out, tiles, strict=True)] == [
        k == 1 for k in range(len(tiles))
    ]


def test_a_gpu_in_a_forked_worker_gets_one_message_that_names_both_ways(model_folder, tiles):
    generator = TileGenerator.from_pretrained(model_folder)
    transform = ConditionedResample(generator, p=1.0, steps=2)
    generator.device = torch.device("cuda:0")  # says so; no GPU is needed to refuse one
    loader = DataLoader(Edited(list(tiles), transform), num_workers=1)
    with pytest.raises(RuntimeError, match=r"(?s)on cuda:0.*after collation.*CachedVariants"):
        next(iter(loader))


@pytest.mark.slow
def test_every_use_of_a_gpu_in_a_forked_worker_gets_that_message(model_folder, tiles):
    """In one worker, because ending one takes five seconds."""
    generator = TileGenerator.from_pretrained(model_folder)
    generator.device = torch.device("cuda:0")

    def replay(x):
        bank = ReplayBank(generator, lambda i, s: 255 - i, num_tiles=1, p=1.0)
        return bank(x[None], torch.tensor([0]))

    uses = {
        "features": lambda x: generator.features(x[None]),
        "cls_features": lambda x: generator.cls_features(x[None]),
        "encode": lambda x: generator.encode(x[None]),
        "sample": lambda x: generator.sample(per_condition=1, steps=2),
        "decode": lambda x: generator.decode(torch.zeros(1, *generator.latent_shape)),
        "replay": replay,
    }

    def messages(x):
        found = {}
        for name, use in uses.items():
            try:
                use(x)
                found[name] = "no message"
            except RuntimeError as error:
                found[name] = str(error)
        return found

    loader = DataLoader(Edited(list(tiles[:1]), messages), num_workers=1)
    found = next(iter(loader))
    assert found.keys() == uses.keys()
    for name, (message,) in found.items():
        assert re.search(r"(?s)on cuda:0.*after collation.*CachedVariants", message), name


def test_its_text_shows_settings_and_no_tensors(generator, references):
    text = repr(Transfer(generator, references, p=Ramp(0.0, 0.5, 3), mode="slide"))
    assert "p=Ramp(start=0.0, end=0.5, num_epochs=3)" in text
    assert "references=2" in text
    assert "tensor" not in text
    assert "training" not in text


def test_it_composes_with_torchvision(transfer, tiles):
    pipeline = v2.Compose([v2.RandomHorizontalFlip(), transfer, v2.ToDtype(torch.float32, True)])
    out = pipeline(tv_tensors.Image(tiles))
    assert out.dtype == torch.float32
    assert out.max() <= 1


def test_results_can_enter_a_users_backward_pass(transfer, tiles):
    weight = torch.ones(1, requires_grad=True)
    (transfer(tiles.float() / 255) * weight).sum().backward()
    assert np.isfinite(weight.grad.item())
