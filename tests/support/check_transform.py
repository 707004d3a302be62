"""The contract that every transform passes, whatever it does to tiles.

`check_transform(transform, tiles)` asserts all of it; `transform` must edit every tissue tile, so
give it p=1. A transform that returns several versions of a sample (a tuple) passes with each.
"""

import copy
import pickle

import PIL.Image
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

LAYOUTS = {
    "single": lambda x: x[0],
    "batch of one": lambda x: x[:1],
    "batch": lambda x: x,
    "two leading dimensions": lambda x: x.unflatten(0, (2, -1)),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "flipped view": lambda x: x.transpose(-1, -2),
    "every second tile": lambda x: x[::2],
}
DTYPES = {
    "uint8": lambda x: x,
    "float32": lambda x: x / 255,
    "float16": lambda x: (x / 255).half(),
    "bfloat16": lambda x: (x / 255).bfloat16(),
    "float64": lambda x: x.double() / 255,
}


def check_transform(transform, tiles):
    """Assert the contract; `tiles` are uint8 [4, 3, H, W], every one with tissue."""
    check_types(transform, tiles)
    check_samples(transform, tiles)
    check_randomness(transform, tiles)
    check_tiles_that_stay(transform, tiles)
    check_float_range(transform, tiles)
    check_autocast(transform, tiles)
    check_default_dtype(transform, tiles)
    check_default_device(transform, tiles)
    check_pickle(transform, tiles)


def versions(out, transform):
    """Return the versions of a sample: one, unless the transform makes views."""
    return out if hasattr(transform, "views") else (out,)


def is_itself(out, image, transform):
    """Return whether an image came back as it was; of a plain tensor, views are `Image`."""
    return out is image or (
        hasattr(transform, "views")
        and type(out) is tv_tensors.Image
        and out.data_ptr() == image.data_ptr()
        and torch.equal(out, image)
    )


def check_types(transform, tiles):
    plain = tv_tensors.Image if hasattr(transform, "views") else torch.Tensor
    for layout, arrange in LAYOUTS.items():
        for name, convert in DTYPES.items():
            image = arrange(convert(tiles))
            before = image.clone()
            for out in versions(transform(image), transform):
                place = (type(transform).__name__, layout, name)
                assert type(out) is plain, place
                assert (out.shape, out.dtype) == (image.shape, image.dtype), place
                assert out.device == image.device, place
                assert not torch.equal(out, image), f"{place}: not edited at all"
                assert image.dtype == torch.uint8 or 0 <= out.min() <= out.max() <= 1, place
            assert torch.equal(image, before), f"{place}: the input was written to"
    wrapped = tv_tensors.Image(tiles)
    for out in versions(transform(wrapped), transform):
        assert type(out) is tv_tensors.Image
        assert (out.shape, out.dtype) == (tiles.shape, tiles.dtype)
    picture = PIL.Image.fromarray(tiles[0].permute(1, 2, 0).numpy())
    for out in versions(transform(picture), transform):
        assert isinstance(out, PIL.Image.Image)
        assert (out.size, out.mode) == (picture.size, "RGB")


def check_samples(transform, tiles):
    """Images anywhere in a sample are edited alike; all else is the very same object."""
    rest = {
        "label": torch.tensor(3),
        "features": torch.randn(4),
        "more": [object(), None, "text"],
    }
    side = tiles.shape[-1]
    if transform.keeps_structure:
        rest["mask"] = tv_tensors.Mask(torch.ones(side, side, dtype=torch.uint8))
        rest["boxes"] = tv_tensors.BoundingBoxes(
            [[1, 2, 3, 4]], format="XYXY", canvas_size=(side, side)
        )
        rest["points"] = tv_tensors.KeyPoints([[1, 2]], canvas_size=(side, side))
    sample = (rest, {"image": tv_tensors.Image(tiles[0]), "again": tv_tensors.Image(tiles[0])})
    for kept, edited in versions(transform(sample), transform):
        assert kept["more"] == rest["more"]
        for name in rest.keys() - {"more"}:
            assert kept[name] is rest[name], name
        assert torch.equal(edited["image"], edited["again"])
        assert not torch.equal(edited["image"], tiles[0])
    # Labels of a batch are a plain tensor beside another one.
    labels = torch.arange(4)
    for images, kept in versions(transform((tiles, labels)), transform):
        assert kept is labels
        assert images.shape == tiles.shape
    with_scalars = transform({"label": torch.tensor(1), "image": tiles[0]})
    for out in versions(with_scalars, transform):
        assert out["image"].shape == tiles[0].shape


def check_randomness(transform, tiles):
    """manual_seed repeats; drawing and computing are apart, and computing is pure."""
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(transform(tiles))
    assert_equal(*results)
    torch.manual_seed(3)
    params = transform.make_params([tiles])
    drawn = copy.deepcopy(params)
    state = torch.get_rng_state()
    first, second = (transform.transform(tiles, params) for _ in range(2))
    assert_equal(first, second)
    assert_equal(first, results[0])
    assert params == drawn, "transform wrote to its parameters"
    assert torch.equal(torch.get_rng_state(), state), "transform drew something"


def check_tiles_that_stay(transform, tiles):
    """Blank tiles keep their bits, alone and beside tissue; all-blank batches are themselves."""
    for level in (255, 243):
        blank = torch.full_like(tiles, level)
        for name, convert in DTYPES.items():
            image = convert(blank)
            for out in versions(transform(image), transform):
                assert is_itself(out, image, transform), (level, name)
            mixed = convert(torch.cat([tiles[:1], blank[:1]]))
            for out in versions(transform(mixed), transform):
                assert torch.equal(out[1], mixed[1]), (level, name)
                assert not torch.equal(out[0], mixed[0]), (level, name)


def check_float_range(transform, tiles):
    """Before and after ToDtype it does the same, to a grey level of rounding."""
    to_float = v2.ToDtype(torch.float32, scale=True)
    torch.manual_seed(5)
    before = versions(transform(tiles), transform)
    torch.manual_seed(5)
    after = versions(transform(to_float(tiles)), transform)
    for a, b in zip(before, after, strict=True):
        assert (to_float(a) - b).abs().max() <= 1.001 / 255  # float32 has no 1 / 255


def check_autocast(transform, tiles):
    """A training step under autocast gets the very tiles that it gets without."""
    results = []
    for is_enabled in (False, True):
        torch.manual_seed(6)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            drawn = transform(tiles)
            params = transform.make_params([tiles])
            results.append((drawn, transform.transform(tiles, params)))
    assert_equal(*results)


def check_default_dtype(transform, tiles):
    """What a user has set as torch's default type changes nothing."""
    results = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(8)
        torch.set_default_dtype(dtype)
        try:
            results.append(transform(tiles))
        finally:
            torch.set_default_dtype(torch.float32)
    assert_equal(*results[:2])
    assert_equal(*results[1:])


def check_default_device(transform, tiles):
    """Nor does the device he has set; meta stands for a GPU, and has no numbers to give."""
    results = []
    for device in ("cpu", "meta"):
        torch.manual_seed(8)
        torch.set_default_device(device)
        try:
            results.append(transform(tiles))
            pickle.loads(pickle.dumps(transform))
        finally:
            torch.set_default_device(None)
    assert_equal(*results)


def check_pickle(transform, tiles):
    """A pickle is small, and does what the original does."""
    packed = pickle.dumps(transform)
    assert len(packed) < 300_000, f"{len(packed)} bytes: are weights in it?"
    results = []
    for each in (transform, pickle.loads(packed)):
        torch.manual_seed(7)
        results.append(each(tiles))
    assert_equal(*results)


def assert_equal(a, b):
    if isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b)
