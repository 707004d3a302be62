"""The evaluate stage on a random model and synthetic tiles, and what it refuses to start."""

import json

import pytest
import torch
from PIL import Image

from tests.support.synthetic import SIZE, synthetic_tiles
from training.data.batches import TileSet
from training.evaluation import card_numbers as card
from training.evaluation import evaluate as stage
from training.evaluation.card_numbers import check_tiles
from training.evaluation.evaluate import Evaluation, evaluate
from training.evaluation.scores import half_floors

NUM_HELD_OUT, NUM_TRAINING = 12, 40


def write_tiles(folder, num, form="png", **options):
    for slide in range(2):
        (folder / f"slide{slide}").mkdir(parents=True)
        for k, tile in enumerate(synthetic_tiles(num // 2, seed=slide)):
            picture = Image.fromarray(tile.permute(1, 2, 0).numpy())
            picture.save(folder / f"slide{slide}" / f"{k:02d}.{form}", **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiles(root / "val", NUM_HELD_OUT)
    write_tiles(root / "train", NUM_TRAINING)
    return root


@pytest.fixture(scope="module")
def result(generator, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:  # for time only
        for name, small in (("COMPONENTS", 4), ("SOURCES", 2), ("VARIATIONS", 2)):
            patch.setattr(card, f"NUM_{name}", small)
        return out, evaluate(generator, data, out, Evaluation(extractors=("tiny",), steps=2))


@pytest.mark.slow
def test_an_evaluation_is_written_as_json_markdown_and_pictures(result):
    out, content = result
    assert json.loads((out / "numbers.json").read_text()) == json.loads(json.dumps(content))
    assert {"psnr_db", "median_rank", "frechet_own", "variation_apart"} <= content.keys()
    for name, least_px in (("tiny", 799), ("nearest_tiny", 200), ("samples", 200)):
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > least_px
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20  # something is drawn
    text = (out / "report.md").read_text()
    assert "the model has seen the latter's tiles" in text
    scores = content["judgements"]["tiny"]["scores"]["generated"]
    assert f"| generated (12) | 12 | - | {scores['frechet_projected']:.4g} |" in text


@pytest.mark.slow
def test_the_report_says_what_the_tiles_were(result):
    _, content = result
    tiles = content["tiles"]
    assert tiles["held_out"] == {"tiles": NUM_HELD_OUT, "slides": 2}
    assert tiles["training_slides"] == {
        "tiles": NUM_HELD_OUT,
        "slides": 2,
        "seen_in_training": True,
    }
    assert tiles["bank"] == {"tiles": NUM_TRAINING - NUM_HELD_OUT}
    assert tiles["codecs"]["held out"] == {"png": NUM_HELD_OUT}
    assert tiles["codecs"]["generated and round trips"] == "memory"
    assert content["judgements"]["tiny"]["provenance"]["weights"]


@pytest.mark.slow
def test_an_evaluation_goes_on_from_what_it_has_made(generator, data, result, monkeypatch):
    out, content = result
    lost = min((out / "kept").glob("tiny-*"))
    lost.unlink()
    for name, small in (("COMPONENTS", 4), ("SOURCES", 2), ("VARIATIONS", 2)):
        monkeypatch.setattr(card, f"NUM_{name}", small)
    for name in ("_regenerate", "_reproduce"):
        monkeypatch.setattr(stage, name, forbidden)
    (out / "numbers.json").unlink()
    again = evaluate(generator, data, out, Evaluation(extractors=("tiny",), steps=2))
    assert json.dumps(again) == json.dumps(content)  # as text, because NaN is not itself
    assert lost.exists()
    other = Evaluation(extractors=("tiny",), steps=3)
    with pytest.raises(AssertionError, match="tiles were made"):
        evaluate(generator, data, out, other)


@pytest.mark.slow
def test_real_tiles_that_repeat_training_tiles_are_found(result):
    """Synthetic slides repeat: the first tiles of each are held-out and training tiles at once."""
    near = result[1]["judgements"]["tiny"]["nearness"]["generated"]
    assert near["real"] < 0.1 * near["fake"]


def forbidden(*_, **__):
    raise AssertionError("tiles were made")


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(stage, "generate_tiles", forbidden)
    monkeypatch.setattr(card, "NUM_COMPONENTS", 4)


@pytest.mark.usefixtures("no_work")
def test_mixed_codecs_are_refused_before_the_first_tile_is_made(generator, data, tmp_path):
    root = tmp_path / "data"
    write_tiles(root / "val", NUM_HELD_OUT, "webp", quality=88)
    write_tiles(root / "train", NUM_TRAINING, "webp", quality=88)
    with pytest.raises(ValueError, match=r"webp lossy \(lossy\), memory \(lossless\)"):
        evaluate(generator, root, tmp_path / "out", Evaluation(extractors=("tiny",)))
    stated = (Evaluation(extractors=("tiny",), codec="webp:88"),
              Evaluation(extractors=("tiny",), mixed_codecs="a test"))  # fmt: skip
    for config in stated:
        with pytest.raises(AssertionError, match="tiles were made"):
            evaluate(generator, root, tmp_path / "out", config)


@pytest.mark.usefixtures("no_work")
def test_absent_weights_are_named_before_the_first_tile_is_made(generator, data, tmp_path):
    config = Evaluation(extractors=("tiny", "inception"))
    with pytest.raises(ValueError, match="extractor inception"):
        evaluate(generator, data, tmp_path, config)


@pytest.mark.usefixtures("no_work")
def test_too_few_training_tiles_are_refused_before_the_first_tile_is_made(
    generator, data, tmp_path
):
    config = Evaluation(extractors=("tiny",), num_training_tiles=8)
    with pytest.raises(ValueError, match="got 20 training tiles for 12 held-out ones"):
        evaluate(generator, data, tmp_path, config)


def test_tiles_of_training_slides_and_the_bank_share_no_tile(data):
    config = Evaluation(num_training_tiles=1000)
    real, bank = stage._training_tiles(data / ".", SIZE, NUM_HELD_OUT, config)
    assert (len(real), len(bank)) == (NUM_HELD_OUT, NUM_TRAINING - NUM_HELD_OUT)
    assert not (real.images[:, None] == bank[None]).flatten(2).all(2).any()
    assert real.slide_index.unique().tolist() == [0, 1]


def test_unseen_tiles_take_the_place_of_a_share_of_the_training_tiles(data, tmp_path):
    write_tiles(tmp_path / "unseen", 40)
    config = Evaluation(unseen=tmp_path / "unseen")
    real, bank = stage._training_tiles(data, SIZE, NUM_HELD_OUT, config)
    assert (len(real), len(bank)) == (NUM_HELD_OUT, NUM_TRAINING)


def test_slides_with_too_few_tiles_for_the_card_are_named():
    images = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    index = torch.tensor([0] * 16 + [1] * 4)
    with pytest.raises(ValueError, match="16 of a, 4 of b"):
        check_tiles(TileSet(images, ("a", "b"), index))
    with pytest.raises(ValueError, match="two or more slides"):
        check_tiles(TileSet(images, ("a",), torch.zeros(20, dtype=torch.long)))


def test_halves_of_the_slides_share_no_slide():
    """Slides far apart: their halves are far apart, while halves of the tiles are not."""
    torch.manual_seed(0)
    slide_index = torch.arange(160) // 40
    features = torch.randn(160, 4, dtype=torch.float64) + 10 * (slide_index % 2)[:, None]
    floors = half_floors(features, slide_index, torch.eye(4, dtype=torch.float64))
    assert floors["half of the tiles against the other"].frechet < 1
    assert floors["half of the slides against the other"].frechet > 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tiles": 2}, "num_tiles is 2"),
        ({"steps": 0}, "steps is 0"),
        ({"codec": "png:3"}, "codec is 'png:3'"),
        ({"extractors": ("uni=a", "uni=b")}, "expected each name once"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**arguments)
