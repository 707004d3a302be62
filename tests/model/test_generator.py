import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cytosyn_aug import (
    EditRecipe,
    LatentCache,
    StainReference,
    encodings_spec,
    features_cached,
)
from cytosyn_aug.model.checkpoint import EMBEDDED_MODEL, load_model
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.solvers import bind_student, flow_map, sample_noise
from cytosyn_aug.transforms.redraw import redraw
from tests.support.synthetic import SIZE, random_parts, synthetic_tiles


def test_moments_have_the_latent_shape_and_positive_spread(generator, tiles):
    moments = generator.encode(tiles)
    assert moments.mean.shape == (4, *generator.latent_shape)
    assert (moments.std > 0).all()


def test_features_are_rows_of_the_batch(generator, tiles):
    together = generator.features(tiles)
    alone = generator.features(tiles[1:2])
    torch.testing.assert_close(together.cls[1:2], alone.cls, atol=1e-5, rtol=1e-4)
    assert together.patches.shape == (4, (SIZE // 14) ** 2, 24)


@pytest.mark.parametrize("sampler", ["student", "ab2", "euler_maruyama"])
def test_a_sample_is_a_function_of_its_seed_in_any_batch(student_folder, sampler):
    small = TileGenerator.from_pretrained(student_folder, batch_size=2)
    large = TileGenerator.from_pretrained(student_folder, batch_size=8)
    kwargs = {"per_condition": 5, "steps": 3, "sampler": sampler}
    a, b = small.sample(**kwargs, seed=10), large.sample(**kwargs, seed=10)
    assert (a.int() - b.int()).abs().max() <= 1  # kernels round differently by batch shape
    shifted = large.sample(**kwargs, seed=11)
    assert (a[1:].int() - shifted[:-1].int()).abs().max() <= 1
    assert not torch.equal(a[0], a[1])


def test_tiles_of_one_condition_follow_each_other(generator):
    cls = torch.randn(2, 24)
    both = generator.sample(cls, per_condition=2, steps=2, seed=0)
    first = generator.sample(cls[:1], per_condition=2, steps=2, seed=0)
    assert both.shape == (4, 3, SIZE, SIZE)
    assert (both[:2].int() - first.int()).abs().max() <= 1


def test_guidance_changes_the_tile_and_one_does_not(generator):
    cls = torch.randn(1, 24)
    plain = generator.sample(cls, steps=3)
    assert torch.equal(plain, generator.sample(cls, steps=3, guidance_scale=1.0))
    assert not torch.equal(plain, generator.sample(cls, steps=3, guidance_scale=4.0))


def test_without_a_condition_the_null_condition_is_used(generator):
    assert torch.equal(
        generator.sample(per_condition=2, steps=2),
        generator.sample(torch.zeros(1, 24), per_condition=2, steps=2),
    )


@pytest.fixture(scope="module")
def taught(student_folder):
    return TileGenerator.from_pretrained(student_folder)


def test_a_student_samples_in_four_jumps_unless_told_otherwise(taught):
    cls = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    usual = taught.sample(cls, seed=3)
    assert torch.equal(usual, taught.sample(cls, seed=3, sampler="student", steps=4))
    noise = sample_noise([3, 4], taught.latent_shape)
    average = bind_student(taught.student, cls, 1.0)
    by_hand = flow_map(average, noise, [1.0, 24 / 25, 8 / 9, 8 / 11, 0.0])
    apart = usual.int() - taught.decode(by_hand).int()
    assert apart.abs().max() <= 1  # all steps are modulated in one product, which rounds otherwise
    assert taught.sample(cls, steps=1).shape == usual.shape


def test_the_transformer_of_a_model_with_a_student_samples_as_without(taught, generator):
    assert torch.equal(taught.sample(sampler="ab2"), generator.sample())


def test_a_student_folds_guidance_in(taught):
    cls = torch.randn(1, 24)
    plain = taught.sample(cls)
    assert torch.equal(plain, taught.sample(cls, guidance_scale=1.0, guidance_high=0.75))
    assert not torch.equal(plain, taught.sample(cls, guidance_scale=3.0))


@pytest.mark.parametrize(
    "kwargs", [{"guidance_scale": 3.5}, {"guidance_scale": 0.5}, {"guidance_high": 1.0}]
)
def test_guidance_that_a_student_was_not_taught_is_refused(taught, kwargs):
    with pytest.raises(ValueError, match=r"taught 1 to 3.0 in 0.0 to 0.75"):
        taught.sample(**kwargs)
    assert taught.sample(**kwargs, sampler="ab2", steps=2).shape[0] == 1


def test_a_model_without_a_student_says_so(generator):
    with pytest.raises(ValueError, match="holds no student"):
        generator.sample(sampler="student")


def test_bfloat16_networks_stay_close_to_float32(model_folder, tiles):
    exact = TileGenerator.from_pretrained(model_folder).encode(tiles).mean
    short = TileGenerator.from_pretrained(model_folder, dtype=torch.bfloat16).encode(tiles).mean
    assert short.dtype == torch.float32
    # bfloat16 keeps 8 bits: about 1 % after a dozen layers.
    assert (exact - short).norm() / exact.norm() < 0.05


def test_nothing_changes_under_autocast(generator, tiles):
    def compute():
        latents = generator.whiten(generator.encode(tiles).mean)
        cls = generator.features(tiles).cls
        reference = StainReference.fit(generator, tiles)
        return (
            latents, cls, generator.decode(latents), generator.sample(cls, steps=2),
            redraw(generator, tiles, EditRecipe(steps=2), [1, 2, 3, 4]).images,
            reference.cls, *reference.moments,
        )  # fmt: skip

    with torch.autocast("cpu", torch.bfloat16):
        inside = compute()
        assert torch.is_autocast_enabled("cpu")
    for a, b in zip(inside, compute(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.fixture
def count_graphs(monkeypatch):
    """Compile without a compiler, and count what would have been compiled."""
    counter = CompileCounterWithBackend("eager")
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: original(f, backend=counter, **kw))
    torch._dynamo.reset()
    return counter


@pytest.mark.slow
def test_compiled_networks_are_few_graphs_and_compute_the_same(student_folder, tiles, count_graphs):
    plain, compiled = (
        TileGenerator.from_pretrained(student_folder, batch_size=3) for _ in range(2)
    )
    compiled.compile()
    few = {"sampler": "ab2", "steps": 5}
    odd = tiles.contiguous(memory_format=torch.channels_last)[::2]
    uses = [
        (lambda g: g.sample(per_condition=5, guidance_scale=2.0, **few), 3),  # 3 and 6 rows
        (lambda g: g.sample(per_condition=3, **few), 3),
        (lambda g: g.sample(torch.ones(4, 24), **few), 3),
        (lambda g: g.sample(per_condition=2, sampler="euler_maruyama", steps=4), 3),
        (lambda g: g.sample(per_condition=4), 4),  # the student
        (lambda g: redraw(g, tiles, EditRecipe(steps=3), [1, 2, 3, 4]).images, 4),
        (lambda g: redraw(g, odd, EditRecipe(steps=2), [1, 2]).images, 4),
    ]  # fmt: skip
    for use, num_graphs in uses:
        assert (use(plain).int() - use(compiled).int()).abs().max() <= 1
        assert count_graphs.frame_count == num_graphs


@pytest.mark.slow
def test_a_compiled_model_goes_on_when_memory_runs_out_again_and_again(model_folder, count_graphs):
    generator = TileGenerator.from_pretrained(model_folder, batch_size=32)
    generator.compile()
    expected = generator.sample(per_condition=1, steps=4, guidance_scale=2.0, seed=3)
    for size in (16, 8, 4, 2, 1):
        generator.batches.size = size
        found = generator.sample(per_condition=1, steps=4, guidance_scale=2.0, seed=3)
        assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, SIZE, SIZE), TypeError, "expected uint8"),
        (torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), ValueError, r"expected \[B, 3"),
        (torch.zeros(1, 1, SIZE, SIZE, dtype=torch.uint8), ValueError, r"expected \[B, 3"),
        (torch.zeros(0, 3, SIZE, SIZE, dtype=torch.uint8), ValueError, "empty batch"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ValueError, "re-tile the slide"),
    ],
)
def test_bad_images_get_one_clear_error(generator, images, error, message):
    for use in (generator.encode, generator.features):
        with pytest.raises(error, match=message):
            use(images)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"cls": torch.zeros(1, 7)}, "expected .N, 24."),
        ({"cls": torch.zeros(0, 24)}, "N >= 1"),
        ({"cls": torch.full((1, 24), float("nan"))}, "not finite"),
        ({"per_condition": 0}, "per_condition is 0"),
        ({"steps": 1}, "steps is 1"),
        ({"sampler": "magic"}, "sampler is 'magic'"),
    ],
)
def test_bad_arguments_of_sample_are_named(generator, kwargs, message):
    with pytest.raises(ValueError, match=message):
        generator.sample(**kwargs)


def test_a_model_without_encoder_says_so():
    parts = random_parts()._replace(encoder=None)
    with pytest.raises(ValueError, match="without an encoder"):
        TileGenerator(parts).features(synthetic_tiles(1))


def test_values_that_are_not_finite_do_not_become_black_tiles(model_folder):
    generator = TileGenerator(load_model(model_folder))
    generator.vae.decoder.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"torch.float32 gave .* not finite; load"):
        generator.sample(steps=2)


def test_the_embedded_model_fits_into_32_mb():
    """Weights, card and pictures, in units of 2^20 bytes."""
    total = sum(file.stat().st_size for file in EMBEDDED_MODEL.rglob("*") if file.is_file())
    assert total < 32 * 2**20


def test_a_default_device_of_the_callers_changes_nothing(model_folder, tiles, tmp_path):
    expected = TileGenerator.from_pretrained(model_folder).sample(per_condition=2, steps=2, seed=0)
    torch.set_default_device("meta")  # stands for a GPU, and has no numbers to give
    try:
        generator = TileGenerator.from_pretrained(model_folder)
        found = generator.sample(per_condition=2, steps=2, seed=0)
        cache = LatentCache.open(tmp_path, encodings_spec(generator, ["features"]))
        features = features_cached(generator, tiles, cache)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected)
    assert torch.equal(features, generator.cls_features(tiles))
