"""Schedules, what they read from samples, and which references are drawn."""

import warnings
from collections import Counter

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from cytosyn_aug import (
    CachedVariants,
    ConditionedResample,
    DensityReference,
    DensityTransport,
    EditRecipe,
    LatentCache,
    MacenkoNormalize,
    MacenkoReference,
    Ramp,
    ReinhardNormalize,
    ReinhardReference,
    StainReference,
    StainTransfer,
    StainViews,
    fill_variants,
    variants_spec,
)
from cytosyn_aug.stain.density import pool_moments, tissue_moments
from cytosyn_aug.transforms.draws import draw_references, group_by_laboratory
from tests.support.synthetic import SIZE, synthetic_tiles

FAST = EditRecipe(steps=2)
CLASSICAL = {
    "macenko": (MacenkoNormalize, MacenkoReference),
    "reinhard": (ReinhardNormalize, ReinhardReference),
    "transport": (DensityTransport, DensityReference),
}


def paler(tiles, share):
    return (255 - (255 - tiles.float()) * share).round().to(torch.uint8)


@pytest.fixture(scope="module")
def references(generator):
    """Laboratory a with three slides, b and c with one each, ever paler."""
    tiles = synthetic_tiles(3, seed=5)
    return [
        StainReference.fit(generator, paler(tiles, share), laboratory=name)
        for name, share in (("a", 1.0), ("a", 0.98), ("a", 0.96), ("b", 0.8), ("c", 0.6))
    ]


def test_a_ramp_is_linear_and_then_stays():
    ramp = Ramp(0.2, 1.0, 5)
    assert [round(ramp.at(k), 10) for k in range(7)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.2, 0.0, 3), "start of a Ramp is 1.2"),
        ((0.0, -1, 3), "end of a Ramp is -1"),
        ((0.0, 1.0, 1), "num_epochs of a Ramp is 1"),
    ],
)
def test_bad_ramps_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ramp(*arguments)


def test_probability_and_strength_follow_the_epoch(generator, references, tiles):
    transform = StainTransfer(
        generator, references, p=Ramp(0.0, 1.0, 3), strength=Ramp(1.0, 0.5, 3)
    )
    found = []
    many = tiles.repeat(100, 1, 1, 1)
    for epoch in range(3):
        transform.set_epoch(epoch)
        params = transform.make_params([many])
        found.append((sum(params["chosen"]) / 400, params["strengths"][0]))
    assert found[0] == (0.0, 1.0)
    assert 0.4 < found[1][0] < 0.6
    assert found[1][1] == 0.75
    assert found[2] == (1.0, 0.5)


def test_an_epoch_before_the_first_is_refused(generator, references):
    with pytest.raises(ValueError, match="epoch is -1"):
        StainTransfer(generator, references).set_epoch(-1)


class Strengths(Dataset):
    """The strength that workers see."""

    def __init__(self, transform, image):
        self.transform, self.image = transform, image

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.transform.make_params([self.image])["strengths"][0]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_the_epoch_reaches_workers_that_persist(context):
    reference = MacenkoReference.fit(synthetic_tiles(2))
    transform = MacenkoNormalize(reference, strength=Ramp(0.0, 1.0, 3))
    loader = DataLoader(
        Strengths(transform, synthetic_tiles(1)),
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context=context,
    )
    seen = []
    for epoch in range(3):
        transform.set_epoch(epoch)
        seen.append(sorted({x.item() for x in loader}))
    assert seen == [[0.0], [0.5], [1.0]]


@pytest.mark.parametrize(
    "sample",
    [
        lambda x: (x, torch.tensor([0, 1, 0, 1])),
        lambda x: (x, [0, 1, 0, 1]),
        lambda x: {"image": x, "label": np.array([0, 1, 0, 1])},
        lambda x: (x, {"label": [0, 1, 0, 1]}),
        lambda x: (x, torch.tensor([[0], [1], [0], [1]])),
        lambda x: {"image": x, "label": np.array([[0], [1], [0], [1]])},
        lambda x: {"label": [0, 1, 0, 1], "image": x, "mask": torch.zeros(4, SIZE, SIZE)},
    ],
    ids=["tensor last", "list last", "key", "nested key", "column", "column by key", "beside mask"],
)
def test_p_by_class_reads_the_label(generator, references, tiles, sample):
    transform = StainTransfer(generator, references, p={0: 0.0, 1: 1.0}, recipe=FAST)
    out = transform(sample(tiles))
    out = out["image"] if isinstance(out, dict) else out[0]
    assert [not torch.equal(a, b) for a, b in zip(out, tiles, strict=True)] == [0, 1, 0, 1]


def test_p_by_class_may_change_with_the_epoch(tiles):
    reference = MacenkoReference.fit(tiles)
    transform = MacenkoNormalize(reference, p={"tumour": Ramp(0.0, 1.0, 2), "stroma": 0.0})
    chosen = []
    for epoch in range(2):
        transform.set_epoch(epoch)
        sample = (tiles[0], "tumour")
        metadata = transform.read_metadata(sample, [tiles[0]])
        chosen += transform.make_params([tiles[0]], metadata)["chosen"]
    assert chosen == [False, True]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda x: x, "the sample carries no label"),
        (lambda x: (x, torch.tensor([0, 1, 2, 7])), "the sample has 2, 7; give p"),
        (lambda x: (x, [0, 1]), "4 tiles and 2 values last in the sample, where its label is;"),
        (lambda x: {"image": x, "label": [0, 1]}, "4 tiles and 2 values under 'label';"),
        (lambda x: (x, torch.eye(4)), r"4 values for a tile.*argmax.*class indices"),
        (lambda x: {"image": x, "label": np.eye(2)[[0, 1, 0, 1]]}, "2 values for a tile.*argmax"),
        (lambda x: (x[0], torch.tensor([0, 1])), "1 tiles and 2 values.*argmax"),
        (lambda x: (x[0], 1, torch.zeros(SIZE, SIZE)), rf"1 tiles and {SIZE} values.*by key"),
        (lambda x: (x, 1, torch.zeros(4, SIZE)), rf"{SIZE} values for a tile.*by key"),
        (lambda x: (x[0], 1, tv_tensors.Mask(torch.zeros(SIZE, SIZE))), "carries no label"),
        (lambda x: (x[0], 1, PIL.Image.new("L", (SIZE, SIZE))), "carries no label"),
        (lambda x: {"image": x[0], "label": {"a": 1}}, "a dict under 'label'"),
    ],
)
def test_labels_that_do_not_serve_are_named(generator, references, tiles, sample, message):
    with pytest.raises(ValueError, match=message):
        StainTransfer(generator, references, p={0: 0.0, 1: 1.0})(sample(tiles))


@pytest.mark.parametrize(
    ("p", "message"), [({}, "empty mapping"), ({"x": 2.0}, "p of class 'x' is 2.0")]
)
def test_bad_probabilities_are_named(generator, references, p, message):
    with pytest.raises(ValueError, match=message):
        StainTransfer(generator, references, p=p)


def test_laboratories_are_drawn_alike_however_many_slides_they_have(generator, references):
    transform = StainTransfer(generator, references, p=1.0)
    torch.manual_seed(0)
    tiles = synthetic_tiles(1).expand(3000, -1, -1, -1)
    drawn = Counter(transform.make_params([tiles])["references"])
    by_laboratory = [drawn[0] + drawn[1] + drawn[2], drawn[3], drawn[4]]
    # 1000 each; five standard deviations are 130.
    assert all(870 < n < 1130 for n in by_laboratory)
    assert min(drawn[k] for k in range(3)) > 230


def test_references_without_a_name_are_laboratories_of_their_own():
    assert group_by_laboratory(["", "a", "", "a"]) == [[0], [1, 3], [2]]


def test_no_reference_repeats_before_all_were_drawn():
    groups = [[0, 1, 2], [3], [4]]
    for seed in range(20):
        drawn = draw_references(groups, 7, torch.Generator().manual_seed(seed))
        assert {0 if k < 3 else k for k in drawn[:3]} == {0, 3, 4}
        assert sorted(drawn[:5]) == [0, 1, 2, 3, 4]


def test_one_draw_of_many_references_reads_only_what_it_takes():
    class Slides(list):
        reads = 0

        def __getitem__(self, k):
            Slides.reads += 1
            return super().__getitem__(k)

        def __iter__(self):
            raise AssertionError("shuffled as a whole")

    groups = [Slides(range(10 * k, 10 * k + 10)) for k in range(50)]
    drawn = Counter()
    for seed in range(1000):
        found = draw_references(groups, 2, torch.Generator().manual_seed(seed))
        assert found[0] // 10 != found[1] // 10
        drawn.update(k // 10 for k in found)
    assert Slides.reads == 2000
    assert set(drawn) == set(range(50))
    assert 15 < min(drawn.values()) <= max(drawn.values()) < 75  # 40 each, by chance


def test_own_excluded_never_draws_the_own_laboratory(generator, references, tiles):
    transform = StainTransfer(generator, references, p=1.0, sampling="own_excluded", recipe=FAST)
    sample = {"image": tiles, "laboratory": ["a", "b", "c", "elsewhere"]}
    allowed = [{3, 4}, {0, 1, 2, 4}, {0, 1, 2, 3}, {0, 1, 2, 3, 4}]
    for _ in range(20):
        metadata = transform.read_metadata(sample, [tiles])
        drawn = transform.make_params([tiles], metadata)["references"]
        assert all(k in these for k, these in zip(drawn, allowed, strict=True))
    assert transform(sample)["laboratory"] == sample["laboratory"]
    with pytest.raises(ValueError, match="the sample says no laboratory"):
        transform(tiles)
    with pytest.raises(ValueError, match="was not told which"):
        transform.make_params([tiles])


def test_own_excluded_needs_names_and_another_laboratory(generator, references, tiles):
    unnamed = StainReference.fit(generator, tiles)
    with pytest.raises(ValueError, match=r"references \[1\] name no laboratory"):
        StainTransfer(generator, [references[0], unnamed], sampling="own_excluded")
    transform = StainTransfer(generator, references[:3], sampling="own_excluded")
    with pytest.raises(ValueError, match="all references are of laboratory 'a'"):
        transform({"image": tiles, "laboratory": "a"})


def test_farthest_takes_the_reference_that_differs_most(generator, references):
    pale, dark = paler(synthetic_tiles(1), 0.55), synthetic_tiles(1)
    transform = StainTransfer(generator, references, p=1.0, sampling="farthest")
    drawn = transform.make_params([torch.cat([pale, dark])])["references"]
    means = torch.stack([pool_moments(r.moments).mean[0] for r in references])
    for tile, k in zip((pale, dark), drawn, strict=True):
        distance = (means - tissue_moments(tile).mean).norm(dim=1)
        assert k == int(distance.argmax())
    assert drawn[0] != drawn[1]


def test_slide_mode_gives_all_tiles_of_a_slide_the_same_and_epochs_another(
    generator, references, tiles
):
    transform = StainTransfer(generator, references, p=0.5, mode="slide", seed=3)
    names = [f"slide {k}" for k in range(40)]

    def draw(epoch, slide):
        transform.set_epoch(epoch)
        torch.manual_seed(epoch + len(slide))  # torch's generator has no say
        sample = {"image": tiles, "slide": slide}
        params = transform.make_params([tiles], transform.read_metadata(sample, [tiles]))
        assert all(len(set(values)) == 1 for values in params.values())
        return params["chosen"][0], params["references"][0]

    first = [draw(0, name) for name in names]
    assert first == [draw(0, name) for name in names]
    assert first != [draw(1, name) for name in names]
    assert 10 < sum(is_chosen for is_chosen, _ in first) < 30
    assert {k for _, k in first} == {0, 1, 2, 3, 4}


def test_slide_mode_reads_one_name_a_tile(generator, references, tiles):
    transform = StainTransfer(generator, references, p=1.0, mode="slide", recipe=FAST)
    sample = {"image": tiles, "slide": ["x", "y", "x", "y"]}
    metadata = transform.read_metadata(sample, [tiles])
    seeds = transform.make_params([tiles], metadata)["seeds"]
    assert seeds[0] == seeds[2] != seeds[1] == seeds[3]
    assert not torch.equal(transform(sample)["image"], tiles)
    with pytest.raises(ValueError, match="the sample says no slide"):
        transform(tiles)
    with pytest.raises(ValueError, match="was not told which"):
        transform.make_params([tiles])


@pytest.fixture(params=["resample", "cached", *CLASSICAL])
def by_slide(request, generator, tiles, tmp_path):
    """Every other transform that draws by slide."""
    if request.param == "resample":
        return ConditionedResample(generator, p=0.5, mode="slide")
    if request.param == "cached":
        edits = [lambda images, seeds, k=k: images // k for k in (2, 3, 4)]
        cache = LatentCache.open(tmp_path, variants_spec(generator, "images", edits, recipe="x"))
        fill_variants(generator, tiles, cache, edits)
        return CachedVariants(cache, p=0.5, mode="slide")
    transform, reference = CLASSICAL[request.param]
    return transform(reference.fit(synthetic_tiles(2, seed=5)), p=0.5, mode="slide")


def test_every_transform_edits_slides_as_a_whole_or_not_at_all(by_slide, tiles):
    with pytest.raises(ValueError, match="the sample says no slide"):
        by_slide(tiles)
    by_slide.set_epoch(0)
    drawn, noises = [], set()
    for k in range(40):
        metadata = by_slide.read_metadata({"image": tiles, "slide": f"slide {k}"}, [tiles])
        params = by_slide.make_params([tiles], metadata)
        noises.add(len(set(params.pop("seeds"))))
        assert all(len(set(values)) == 1 for values in params.values())
        drawn.append(params)
        # Resampled tiles of a slide must not share their noise.
        torch.manual_seed(k)
        again = by_slide.make_params([tiles], metadata)
        again.pop("seeds")
        assert again == params
    assert 10 < sum(params["chosen"][0] for params in drawn) < 30
    if "variants" in drawn[0]:
        assert {params["variants"][0] for params in drawn} == {0, 1, 2}
    assert noises == ({len(tiles)} if isinstance(by_slide, ConditionedResample) else {1})


def test_slide_mode_without_epochs_says_once_that_it_repeats(generator, references, tiles):
    transform = StainTransfer(generator, references, mode="slide", recipe=FAST)
    sample = {"image": tiles[0], "slide": "x"}
    with pytest.warns(UserWarning, match=r"set_epoch.*never called"):
        transform(sample)
    told = StainTransfer(generator, references, mode="slide", recipe=FAST)
    told.set_epoch(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform(sample)
        told(sample)


def test_slide_mode_reads_names_however_they_are_stored(generator, references, tiles):
    transform = StainTransfer(generator, references, mode="slide")
    seeds = set()
    for name in ("A", np.str_("A"), ["A"] * 4, [np.str_("A")] * 4, np.array(["A"] * 4)):
        sample = {"image": tiles, "slide": name}
        seeds |= set(
            transform.make_params([tiles], transform.read_metadata(sample, [tiles]))["seeds"]
        )
    assert len(seeds) == 1


def test_a_laboratory_that_no_reference_names_is_named_once(generator, references, tiles):
    transform = StainTransfer(generator, references, p=0.0, sampling="own_excluded")
    with pytest.warns(UserWarning, match=r"laboratory 'A ',.*'a', 'b', 'c'.* nothing is left out"):
        transform({"image": tiles, "laboratory": ["a", "A ", "B", "b"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transform({"image": tiles, "laboratory": "A "})


def test_probabilities_and_labels_of_numpy_and_torch_serve(generator, references, tiles):
    transform = StainTransfer(generator, references, p=np.float32(0.5), strength=np.float32(0.5))
    assert isinstance(transform.p, float)
    by_class = StainTransfer(generator, references, p={0: 0.0, 1: 1.0}, recipe=FAST)
    images = by_class((tiles, [torch.tensor(0), torch.tensor(1)] * 2))[0]
    assert (images != tiles).flatten(1).any(1).tolist() == [False, True] * 2


class Slides(Dataset):
    def __init__(self, transform, tiles):
        self.transform, self.tiles = transform, tiles

    def __len__(self):
        return 8

    def __getitem__(self, index):
        sample = {"image": self.tiles[index % 4], "slide": f"slide {index % 2}"}
        metadata = self.transform.read_metadata(sample, [sample["image"]])
        return self.transform.make_params([sample["image"]], metadata)["seeds"][0]


def test_slide_mode_agrees_across_workers(generator, references, tiles):
    transform = StainTransfer(generator, references, mode="slide")
    seeds = [x.item() for x in DataLoader(Slides(transform, tiles), num_workers=2, batch_size=1)]
    assert len(set(seeds[0::2])) == len(set(seeds[1::2])) == 1
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling": "nearest"}, "expected 'uniform', 'farthest' or 'own_excluded'"),
        ({"mode": "patient"}, "expected 'tile' or 'slide'"),
        ({"mode": "slide", "sampling": "farthest"}, "needs source"),
    ],
)
def test_bad_draws_are_named(generator, references, arguments, message):
    with pytest.raises(ValueError, match=message):
        StainTransfer(generator, references, **arguments)


def test_views_go_to_different_laboratories_and_share_the_rest(generator, references, tiles):
    views = StainViews(generator, references, views=3, recipe=FAST)
    drawn = views.make_params([tiles])["references"]
    names = [[references[k].laboratory for k in row] for row in drawn]
    assert all(sorted(row) == ["a", "b", "c"] for row in names)
    sample = {"image": tiles, "label": torch.arange(4)}
    out = views(sample)
    assert len(out) == 3
    assert all(view["label"] is sample["label"] for view in out)
    assert not torch.equal(out[0]["image"], out[1]["image"])


def test_views_are_what_stain_transfer_gives_and_the_first_may_be_the_original(
    generator, references, tiles
):
    views = StainViews(generator, references[3:], views=3, has_original=True, recipe=FAST)
    torch.manual_seed(0)
    first, second, third = views(tiles)
    assert torch.equal(first, tiles)
    torch.manual_seed(0)
    params = views.make_params([tiles])
    one = StainTransfer(generator, references[3:], p=1.0, recipe=FAST)
    for k, view in enumerate((second, third)):
        single = params | {"references": [row[k] for row in params["references"]]}
        assert torch.equal(one.transform(tiles, single), view)


def test_the_farthest_views_are_of_different_laboratories_too(generator, references, tiles):
    pale = StainReference.fit(generator, paler(tiles, 0.5))
    views = StainViews(
        generator, references, views=5, source=pale, sampling="farthest", recipe=FAST
    )
    for drawn in views.make_params([tiles])["references"]:  # by distance 0, 1, 2, 3, 4
        assert drawn == [0, 3, 4, 1, 2]


@pytest.mark.parametrize("arrange", [lambda x: x, lambda x: x[0], lambda x: {"image": x[0]}])
def test_what_follows_in_a_compose_does_the_same_to_all_views(
    generator, references, tiles, arrange
):
    views = StainViews(generator, references, has_original=True, recipe=FAST)
    after = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.ToDtype(torch.float32, scale=True)])
    torch.manual_seed(0)
    made = views(arrange(tiles))
    torch.manual_seed(0)
    for before, out in zip(made, v2.Compose([views, after])(arrange(tiles)), strict=True):
        if isinstance(before, dict):
            before, out = before["image"], out["image"]
        torch.testing.assert_close(out.as_subclass(torch.Tensor), before.flip(-1) / 255)


def test_views_collate_to_one_batch_a_view(generator, references, tiles):
    views = StainViews(generator, references, recipe=FAST)
    batch = next(iter(DataLoader([views((t, 1)) for t in tiles], batch_size=4)))
    (first, labels), (second, _) = batch
    assert first.shape == second.shape == tiles.shape
    assert type(first) is type(second) is torch.Tensor
    assert labels.tolist() == [1] * 4


def test_views_that_would_be_alike_are_refused(generator, references, tiles):
    with pytest.raises(ValueError, match=r"3 restained views .* 2 references"):
        StainViews(generator, references[:2], views=3)
    StainViews(generator, references[:2], views=3, has_original=True)
    views = StainViews(generator, references[:4], views=2, sampling="own_excluded", recipe=FAST)
    with pytest.raises(ValueError, match=r"2 .* 1 reference.* of other laboratories than 'a'"):
        views({"image": tiles[0], "laboratory": "a"})
    first, second = views({"image": tiles[0], "laboratory": "b"})
    assert not torch.equal(first["image"], second["image"])


@pytest.mark.parametrize("make", [StainTransfer, StainViews])
def test_references_come_from_any_iterable_once(generator, references, make):
    """What reads a generator twice finds nothing, and would draw from nothing without end."""
    assert make(generator, iter(references)).references == references
    with pytest.raises(ValueError, match="references is empty"):
        make(generator, iter([]))


def test_one_view_is_refused(generator, references):
    with pytest.raises(ValueError, match="views is 1"):
        StainViews(generator, references, views=1)
