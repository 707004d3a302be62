"""Every stage from the command line, on synthetic tiles: train, resume, export, evaluate."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cytosyn_aug.images import pixels_to_images
from cytosyn_aug.model.checkpoint import load_model
from cytosyn_aug.model.generator import TileGenerator
from tests.support.synthetic import synthetic_tiles
from training.command_line import main
from training.data.batches import TileSet, load_tiles
from training.engine.weights import stage_weights
from training.evaluation import card_numbers as card
from training.recipes import smoke_encoder, smoke_sit
from training.stages.encoder import EncoderStage, _Teacher
from training.stages.latent_space import LatentSpace, mean_token
from training.stages.latents import StoredViews
from training.stages.losses import alignment
from training.stages.sit import SitStage

TILES_PER_SLIDE = 6  # each passes VGG, and some AlexNet


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiles")
    for split, slides in (("train", 2), ("val", 2)):
        for slide in range(slides):
            folder = root / split / f"slide{slide}"
            folder.mkdir(parents=True)
            for k, tile in enumerate(synthetic_tiles(TILES_PER_SLIDE, seed=slide, size=224)):
                Image.fromarray(tile.permute(1, 2, 0).numpy()).save(folder / f"{k:02d}.png")
    return root


def run(*arguments):
    assert main([*map(str, arguments)]) == 0


def refusal(capsys, *arguments):
    """Return what a command says that cannot be done."""
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    smoke = ("--recipe", "smoke", "--data", data)
    run("vae", *smoke, "--out", root / "vae")
    run("encoder", *smoke, "--out", root / "encoder")
    parts = ("--vae", root / "vae", "--encoder", root / "encoder")
    run("latents", *smoke, "--out", root / "latents", *parts)
    parts += ("--latents", root / "latents")
    run("sit", *smoke, "--out", root / "sit", *parts)
    run("export", "--recipe", "smoke", "--out", root / "model", "--sit", root / "sit", *parts)
    run("distil", *smoke, "--out", root / "distil", "--teacher", root / "sit", *parts)
    run("export", "--recipe", "smoke", "--out", root / "with_student", "--sit", root / "sit",
        "--student", root / "distil", *parts)  # fmt: skip
    return root


@pytest.mark.slow
def test_the_exported_model_generates(runs):
    generator = TileGenerator.from_pretrained(runs / "model")
    assert generator.sample(steps=2).shape == (1, 3, 224, 224)


@pytest.mark.slow
def test_a_model_exported_with_a_student_generates_with_it(runs):
    plain = TileGenerator.from_pretrained(runs / "model")
    generator = TileGenerator.from_pretrained(runs / "with_student")
    assert generator.digest != plain.digest
    jumped = generator.sample(seed=1)
    assert torch.equal(jumped, generator.sample(seed=1, sampler="student", steps=4))
    assert torch.equal(generator.sample(sampler="ab2"), plain.sample())
    averaged = stage_weights(runs / "distil", "distil")["student.final_layer.linear.weight"]
    stored = stage_weights(runs / "with_student", "distil")["student.final_layer.linear.weight"]
    assert torch.equal(averaged.half().float(), stored)


@pytest.mark.slow
def test_a_student_is_distilled_from_a_model_folder_alone(runs, data, tmp_path):
    """As its own teacher, autoencoder, encoder and starting point."""
    model = runs / "with_student"
    parts = ("--recipe", "smoke", "--data", data, "--vae", model, "--encoder", model)
    run("latents", *parts, "--out", tmp_path / "latents")
    run("distil", *parts, "--latents", tmp_path / "latents", "--out", tmp_path / "distil",
        "--minutes", "0", "--teacher", model, "--warm-start", model)  # fmt: skip
    state = torch.load(tmp_path / "distil" / "checkpoint.pt", weights_only=True)["average"]
    rough = {"rtol": 0.0, "atol": 0.02}  # one step of the warm-up, and half precision
    for name, value in stage_weights(model, "distil").items():
        torch.testing.assert_close(state[name], value, **rough)


@pytest.mark.slow
def test_the_latents_of_the_training_tiles_are_white(runs, data):
    """The exported statistics whiten what the exported autoencoder encodes."""
    generator = TileGenerator.from_pretrained(runs / "model")
    tiles = torch.cat([synthetic_tiles(TILES_PER_SLIDE, seed=s, size=224) for s in range(2)])
    moments = generator.encode(tiles)
    torch.manual_seed(0)
    white = generator.whiten(moments.mean + moments.std * torch.randn_like(moments.std))
    # The statistics come from four restained views of these tiles, hence only nearly.
    assert white.std((0, 2, 3)).sub(1).abs().max() < 0.2


@pytest.mark.slow
def test_every_stage_wrote_curves_reports_and_pictures(runs):
    for name in ("vae", "encoder", "sit", "distil"):
        report = json.loads((runs / name / "reports.jsonl").read_text().splitlines()[-1])
        assert report["step"] == 2
    assert (runs / "sit" / "samples_000002.png").exists()


@pytest.mark.slow
def test_a_run_of_the_decoder_half_leaves_the_encoder_alone(runs, data, tmp_path):
    smoke = ("--recipe", "smoke_sharp", "--data", data)
    run("vae", *smoke, "--out", tmp_path, "--warm-start", runs / "vae")
    before, after = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["average"]
        for folder in (runs / "vae", tmp_path)
    )
    changed = {k.split(".")[0] for k, v in before.items() if not torch.equal(v, after[k])}
    assert changed == {"decoder", "post_quant_conv"}


@pytest.mark.slow
def test_a_small_decoder_is_trained_exported_and_used_where_steps_are_few(runs, data, tmp_path):
    run("decoder", "--recipe", "smoke", "--data", data, "--vae", runs / "vae",
        "--out", tmp_path / "decoder")  # fmt: skip
    report = json.loads((tmp_path / "decoder" / "reports.jsonl").read_text())
    assert {"psnr_db", "psnr_lost_db"} <= report.keys()
    parts = ("--vae", runs / "vae", "--encoder", runs / "encoder", "--sit", runs / "sit")
    run("export", "--recipe", "smoke", *parts, "--decoder", tmp_path / "decoder",
        "--out", tmp_path / "model")  # fmt: skip
    generator = TileGenerator.from_pretrained(tmp_path / "model")
    latents = torch.randn(1, *generator.latent_shape)
    small, own = (generator.decode(latents, is_few_step=x) for x in (True, False))
    assert not torch.equal(small, own)
    raw = generator.transformer.unwhiten(latents)
    expected = pixels_to_images(generator.decoder(raw))
    assert torch.equal(small, expected)


@pytest.fixture
def quick_teacher(monkeypatch):
    """Let the tiles themselves teach the encoder; VGG does in `runs`."""

    def maps(_, images):
        small = F.pixel_unshuffle(F.adaptive_avg_pool2d(images / 255, 32), 2)
        return [small.flatten(2).transpose(1, 2)] * 2

    monkeypatch.setattr(_Teacher, "_maps", maps)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_teacher")
@pytest.mark.parametrize("stage", ["vae", "encoder", "sit"])
def test_a_run_starts_from_a_model_folder(runs, data, tmp_path, stage):
    """Without the run folders of before; latent statistics come from the new views."""
    smoke = ("--recipe", "smoke", "--data", data)
    parts = ("--vae", runs / "model", "--encoder", runs / "model")
    if stage == "sit":
        run("latents", *smoke, *parts, "--out", tmp_path / "latents")
        parts += ("--latents", tmp_path / "latents")
    out = tmp_path / "run"
    run(stage, *smoke, *parts, "--out", out, "--warm-start", runs / "model", "--minutes", "0")
    first = torch.load(out / "checkpoint.pt", weights_only=True)
    assert first["step"] == 1
    shipped = stage_weights(runs / "model", stage)
    rough = {"rtol": 0.0, "atol": 0.02}  # one step of the warm-up, and half precision
    for name, value in shipped.items():
        torch.testing.assert_close(first["average"][name], value, **rough)


@pytest.mark.slow
def test_a_warm_start_keeps_the_latent_statistics_of_its_own_views(runs, data, tmp_path):
    old = torch.load(runs / "sit" / "checkpoint.pt", weights_only=True)
    old["average"]["bn.running_mean"].fill_(99.0)
    (tmp_path / "old").mkdir()
    torch.save(old, tmp_path / "old" / "checkpoint.pt")
    parts = ("--vae", runs / "vae", "--encoder", runs / "encoder", "--latents", runs / "latents")
    run("sit", "--recipe", "smoke", "--data", data, *parts, "--minutes", "0",
        "--out", tmp_path / "new", "--warm-start", tmp_path / "old")  # fmt: skip
    new = torch.load(tmp_path / "new" / "checkpoint.pt", weights_only=True)
    assert new["average"]["bn.running_mean"].abs().max() < 50


def test_alignment_is_to_tokens_without_their_common_part():
    """A constant added to all tokens of the encoder changes nothing."""
    patches = torch.randn(70, 9, 5, generator=torch.Generator().manual_seed(0))
    common = torch.tensor([3.0, -40.0, 0.5, 0.0, 7.0])
    centred = patches - mean_token(patches)
    torch.testing.assert_close(centred.mean((0, 1)), torch.zeros(5), rtol=0, atol=1e-5)
    shifted = patches + common
    torch.testing.assert_close(shifted - mean_token(shifted), centred, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("quick_teacher")
def test_the_encoder_names_the_tiles_it_shuffled(data, tmp_path):
    tiles = load_tiles(data / "train")
    few = TileSet(tiles.images[:6], tiles.slides, tiles.slide_index[:6], tiles.names[:6])
    stage = EncoderStage(smoke_encoder(), few, few, torch.device("cpu"), tmp_path)
    named = [tiles.names.index(name) for name in stage.batches.names(0)]
    seen = stage.train_views.images[stage.batches.index(0)]
    assert torch.equal(seen, tiles.images[named])


@pytest.mark.slow
def test_the_transformer_is_aligned_to_centred_tokens(runs, data, monkeypatch):
    seen = []

    def watch(projected, target):
        seen.append(target)
        return alignment(projected, target)

    monkeypatch.setattr("training.stages.sit.alignment", watch)
    parts = load_model(runs / "model")
    views = StoredViews(runs / "latents")
    space = LatentSpace(parts.vae, parts.encoder)
    stage = SitStage(smoke_sit(), views, load_tiles(data / "val"), space)
    stage.losses(0, slice(None), stage.read(0, slice(None)))
    whole = views.take(torch.arange(len(views)))["patches"].float()
    assert seen[0].mean((0, 1)).norm() < 0.2 * whole.mean((0, 1)).norm()


@pytest.mark.slow
def test_an_end_to_end_run_starts_from_parts_and_is_exported(runs, data, tmp_path):
    parts = ("--vae", runs / "vae", "--encoder", runs / "encoder", "--sit", runs / "model")
    run("repae", "--recipe", "smoke", "--data", data, *parts, "--out", tmp_path / "repae")
    end_to_end = ("--vae", tmp_path / "repae", "--sit", tmp_path / "repae")
    run("export", "--recipe", "smoke", *end_to_end, "--encoder", runs / "encoder",
        "--out", tmp_path / "model")  # fmt: skip
    average = torch.load(tmp_path / "repae" / "checkpoint.pt", weights_only=True)["average"]
    exported = load_model(tmp_path / "model")
    name = "final_layer.linear.weight"
    stored = average[f"transformer.{name}"].half().float()
    assert torch.equal(exported.transformer.state_dict()[name], stored)
    stored = average["vae.decoder.conv_out.weight"].half().float()
    assert torch.equal(exported.vae.decoder.conv_out.weight, stored)
    assert not torch.equal(
        exported.transformer.bn.running_mean, load_model(runs / "model").transformer.bn.running_mean
    )


@pytest.mark.slow
def test_several_autoencoders_are_averaged(runs, data, tmp_path):
    run("vae", "--recipe", "smoke_sharp", "--data", data, "--out", tmp_path / "sharp",
        "--warm-start", runs / "vae")  # fmt: skip
    run("export", "--recipe", "smoke", "--out", tmp_path / "model", "--sit", runs / "sit",
        "--encoder", runs / "encoder", "--vae", runs / "vae", tmp_path / "sharp")  # fmt: skip
    a, b, mean = (
        stage_weights(folder, "vae")["decoder.conv_out.weight"]
        for folder in (runs / "vae", tmp_path / "sharp", tmp_path / "model")
    )
    assert not torch.equal(a, b)
    torch.testing.assert_close(mean, (a + b) / 2, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def report(runs, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:  # for time only
        for name, small in (("COMPONENTS", 4), ("SOURCES", 2), ("VARIATIONS", 2)):
            patch.setattr(card, f"NUM_{name}", small)
        run("evaluate", "--data", data, "--model", runs / "model", "--out", out)
    return out


@pytest.mark.slow
def test_evaluation_writes_numbers_and_samples(report):
    numbers = json.loads((report / "numbers.json").read_text())
    assert {"psnr_db", "median_rank", "frechet_own", "variation_apart"} <= numbers.keys()
    assert (report / "samples.png").exists()


@pytest.mark.slow
def test_the_card_holds_notes_parts_curves_and_numbers_side_by_side(runs, report, tmp_path, capsys):
    (tmp_path / "notes.md").write_text("---\nlicense: mit\n---\n\n# a model of noise\n")
    export = (
        "export", "--recipe", "smoke", "--vae", runs / "vae", "--encoder", runs / "encoder",
        "--sit", runs / "sit", "--notes", tmp_path / "notes.md",
    )  # fmt: skip
    folder, now = tmp_path / "model", f"now={report}"
    run(*export, "--out", folder, "--report", now, f"before={report}")
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\n---\n\n# a model of noise\n\n## Parts\n")
    assert "| `vae/` | AutoencoderKL |" in text
    assert "| psnr db | " in text
    assert "### encoder\n\n2 of 2 steps of 2." in text
    numbers = json.loads((report / "numbers.json").read_text())
    psnr = f"{numbers['psnr_db']:.4g}"
    assert f"| autoencoder, mean PSNR of a tile (dB) | {psnr} | {psnr} |" in text
    with Image.open(folder / "training.png") as curves:
        assert curves.size == (3 * 256, 400)
    other = (*export, "--student", runs / "distil", "--out", tmp_path / "other", "--report")
    assert "evaluate the exported model" in refusal(capsys, *other, now)
    assert "no numbers.json" in refusal(capsys, *other, f"now={runs}")


@pytest.mark.slow
def test_a_dry_run_of_export_and_evaluate_counts_and_writes_nothing(runs, data, tmp_path, capsys):
    parts = ("--vae", runs / "vae", "--encoder", runs / "encoder", "--sit", runs / "sit")
    run("export", "--recipe", "smoke", *parts, "--out", tmp_path / "model", "--dry-run")
    assert "| `transformer/` | SiT |" in capsys.readouterr().out
    run("evaluate", "--data", data, "--model", runs / "model", "--out", tmp_path / "report",
        "--extractors", "own", "--steps", "3", "--dry-run")  # fmt: skip
    found = capsys.readouterr().out
    assert "real tiles   24, each" in found  # 12 held out, as many of training slides
    assert "generated    64 in 3 passes" in found
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_data_it_began_with(runs, data, tmp_path, capsys):
    shutil.copytree(runs / "vae", tmp_path / "vae")
    arguments = ("vae", "--recipe", "smoke", "--out", tmp_path / "vae", "--data")
    moved = shutil.copytree(data, tmp_path / "moved")
    run(*arguments, moved)
    next((moved / "train").rglob("*.png")).unlink()
    assert "another recipe (was, now): {'data'" in refusal(capsys, *arguments, moved)


@pytest.mark.slow
def test_a_run_that_is_not_finished_says_so_and_a_signal_ends_the_command_otherwise(
    runs, data, tmp_path, capsys, monkeypatch
):
    arguments = ("vae", "--recipe", "smoke", "--data", data, "--out")
    run(*arguments, tmp_path / "vae", "--minutes", "0")
    assert "saved at step 1 of 2; run this again" in capsys.readouterr().out
    monkeypatch.setattr("training.engine.loop.train", lambda *_, **__: 1)
    assert main([*map(str, arguments), str(tmp_path / "vae")]) == 143


def test_a_dry_comparison_of_restaining_names_the_methods(data, capsys):
    run("restaining", "--data", data / "val", "--only", "share 0", "--dry-run")
    assert "probe share 0.5, slide" in capsys.readouterr().out.splitlines()


def test_an_unknown_recipe_is_named(data, tmp_path, capsys):
    arguments = ("vae", "--recipe", "huge", "--data", data, "--out", tmp_path)
    assert "no recipe huge_vae" in refusal(capsys, *arguments)
