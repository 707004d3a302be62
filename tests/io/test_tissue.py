import colorsys
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cytosyn_aug.io.tissue import (
    TissueConfig,
    TissueMask,
    load_mask,
    pen_pixels,
    reason_to_reject,
    tile_quality,
    tissue_pixels,
)
from tests.support.synthetic import slide_picture

CONFIG = TissueConfig()


def patch(colour, side=40, glass=30):
    """A square of one colour on glass."""
    image = np.full((side + 2 * glass,) * 2 + (3,), 243, np.uint8)
    image[glass:-glass, glass:-glass] = colour
    return image


@pytest.mark.parametrize(
    ("colour", "is_tissue"),
    [
        ((120, 70, 150), True),  # haematoxylin
        ((220, 130, 180), True),  # eosin
        ((235, 222, 232), True),  # pale, fatty
        ((242, 112, 233), True),  # strong eosin
        ((160, 20, 150), True),  # strong both
        ((255, 0, 255), True),  # as much as can be
        ((243, 243, 243), False),  # glass
        ((120, 120, 120), False),  # dust, tissue folds' shadow
        ((20, 20, 25), False),  # black pen
        ((30, 60, 170), False),  # blue pen
        ((30, 110, 60), False),  # green pen
        ((200, 30, 40), False),  # red pen
        ((200, 170, 60), False),  # yellow rim of the cover slip
    ],
)
def test_stained_tissue_is_found_and_glass_dust_and_pens_are_not(colour, is_tissue):
    inside = tissue_pixels(patch(colour), CONFIG)[40:60, 40:60]
    assert inside.all() if is_tissue else not inside.any()


def test_the_majority_vote_is_a_median_of_saturation():
    """The claim in the code, against PIL's median filter."""
    rng = np.random.default_rng(0)
    saturation = rng.integers(0, 20, (60, 60)).astype(np.uint8)
    image = np.stack(
        [np.full_like(saturation, 255), 255 - saturation, np.full_like(saturation, 255)], 2
    )
    median = np.asarray(Image.fromarray(saturation).filter(ImageFilter.MedianFilter(7)))
    plain = TissueConfig(close_px=0, pen_margin_px=0)
    ours = tissue_pixels(image, plain)
    inner = np.s_[4:-4, 4:-4]  # borders are extended differently
    assert (ours == (median > 8))[inner].mean() > 0.999


def test_specks_vanish_and_narrow_gaps_close():
    image = patch((120, 70, 150))
    image[5:8, 5:8] = (120, 70, 150)
    image[48:50, :] = 243
    mask = tissue_pixels(image, CONFIG)
    assert not mask[:15, :15].any()
    assert mask[48:50, 40:60].all()


def test_pen_marks_take_their_margin_with_them():
    image = np.full((60, 60, 3), (186, 112, 170), np.uint8)
    image[:, 30:] = (30, 110, 60)
    assert pen_pixels(image)[:, 30:].all()
    mask = tissue_pixels(image, CONFIG)
    assert not mask[:, 27:].any()
    assert mask[:, :24].all()


def test_the_share_of_a_tile_is_counted_by_hand():
    mask = np.zeros((4, 4), bool)
    mask[0, :2] = mask[1, 0] = True
    positions = np.array([[0, 0], [20, 0], [20, 20], [60, 60]])
    fractions = TissueMask(mask, (10.0, 10.0)).fractions(positions, 20)
    assert fractions.tolist() == [0.75, 0, 0, 0]


def test_blank_and_blurred_tiles_are_told_from_tissue():
    tissue, blurred, glass, pen = (slide_picture(kind, 64) for kind in "#b.p")
    reasons = [reason_to_reject(tile_quality(t), CONFIG) for t in (tissue, blurred, glass, pen)]
    assert reasons == [None, "blurred", "blank", "blank"]


def test_a_stained_pixel_has_the_hue_saturation_and_value_of_the_rule():
    """Against a hue that is computed: 180 to 360 degrees, saturation from 8, value above 103."""
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    image[:32] = 240 - image[:32] // 12  # nearly grey: the limit of saturation
    expected = 0
    for red, green, blue in image[::2, ::2].reshape(-1, 3).tolist():
        hue, _, value = colorsys.rgb_to_hsv(red, green, blue)
        saturation = (max(red, green, blue) - min(red, green, blue)) / max(red, green, blue, 1)
        expected += (hue >= 0.5 or red >= green == blue) and saturation >= 1 / 32 and value > 103
    assert tile_quality(image).stained == expected / 32**2


def test_sharpness_is_the_variance_of_the_laplacian():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    g = image[..., 1].astype(float)
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    assert tile_quality(image).sharpness == pytest.approx(laplacian.var(), rel=1e-4)


def test_a_png_mask_of_any_scale_is_read(tmp_path):
    file = tmp_path / "a.png"
    mask = np.zeros((40, 80), np.uint8)
    mask[:20, :40] = 7
    Image.fromarray(mask).save(file)
    found = load_mask(file, 800, 400, 100.0)
    expected = np.zeros((4, 8), bool)
    expected[:2, :4] = True
    assert (found.is_tissue == expected).all()
    assert found.pixel_level0 == (100, 100)


def test_geojson_polygons_with_holes_are_drawn(tmp_path):
    def square(a, b):
        return [[a, a], [b, a], [b, b], [a, b], [a, a]]

    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [square(100, 800), square(300, 600)]},
    }
    file = tmp_path / "a.geojson"
    for content in ([feature], {"type": "FeatureCollection", "features": [feature]}):
        file.write_text(json.dumps(content))
        mask = load_mask(file, 1000, 1000, 10.0).is_tissue
        assert mask[20, 20]
        assert not mask[45, 45]
        assert not mask[5, 5]
        assert mask.mean() == pytest.approx(0.49 - 0.09, abs=0.02)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"not a png", "not a readable PNG"),
        ("a.geojson", b"{", "not GeoJSON with polygons"),
        ("a.geojson", b'{"type": "Point"}', "geometry Point, expected Polygon"),
        ("a.geojson", b"[[1, 2]]", "not GeoJSON"),
        ("a.svg", b"", r"expected \.png or \.geojson"),
    ],
)
def test_a_bad_mask_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_mask(tmp_path / name, 100, 100, 10.0)


def test_a_mask_of_another_slide_is_refused_by_its_shape(tmp_path):
    Image.fromarray(np.ones((10, 30), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"30x10 px, 3\.000 times as wide as high"):
        load_mask(tmp_path / "a.png", 1000, 1000, 10.0)
