"""The doctor passes a sound model and names what is wrong with a broken one."""

import json

import numpy as np
import pytest
import torch

from cytosyn_aug import demo
from cytosyn_aug.cli.doctor import IMAGENET_MEAN, IMAGENET_STD, examine, verdict
from cytosyn_aug.cli.main import main
from cytosyn_aug.demo import load_samples
from cytosyn_aug.model.encoder import Features
from cytosyn_aug.model.generator import TileGenerator
from tests.support.synthetic import random_parts, write_released

STEPS = 12


@pytest.fixture(scope="module")
def samples():
    """Every second sample tile, of two laboratories again; the command looks at all."""
    return load_samples()[::2]


def failures(generator, samples):
    return (c.name for c in examine(generator, samples, steps=STEPS) if c.passed is False)


@pytest.mark.slow
def test_tiny_passes(samples):
    checks = list(examine(TileGenerator.from_pretrained(), samples, steps=STEPS))
    assert verdict(checks) == "all checks passed"
    assert all(c.passed for c in checks)


def negate_velocity(generator):
    generator.transformer.final_layer.linear.weight.data.neg_()
    generator.transformer.final_layer.linear.bias.data.neg_()


def shift_latents(generator):
    generator.transformer.bn.running_mean.add_(5 * generator.transformer.bn.running_var.sqrt())


def scramble_decoder(generator):
    generator.vae.decoder.conv_out.weight.data.neg_()


def flip_features(generator):
    weight = generator.transformer.y_embedder.linear.weight
    weight.data.copy_(weight.flip(1))


def ignore_time(generator):
    forward = generator.transformer.forward
    generator.transformer.forward = lambda x, t, c: forward(x, torch.full_like(t, 0.5), c)


def ignore_condition(generator):
    generator.transformer.y_embedder.linear.weight.data.zero_()


def take_the_patch_half(generator):
    forward = generator.encoder.forward

    def swapped(images):
        features = forward(images)
        return Features(features.patches.mean(1), features.cls[:, None].expand_as(features.patches))

    generator.encoder.forward = swapped


def normalise_as_imagenet(generator):
    generator.encoder.register_to_config(mean=IMAGENET_MEAN, std=IMAGENET_STD)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("break_it", "noticed"),
    [
        (negate_velocity, "velocity error"),
        (shift_latents, "whitened latents"),
        (scramble_decoder, "round trip"),
        (flip_features, "own features"),
        (ignore_time, "the right time"),
        (ignore_condition, "better than none"),
        (take_the_patch_half, "the mean of the patches"),
    ],
)
def test_a_broken_part_is_noticed(samples, break_it, noticed):
    generator = TileGenerator.from_pretrained()
    break_it(generator)
    assert any(noticed in name for name in failures(generator, samples))


@pytest.mark.slow
def test_other_pixel_statistics_make_the_features_worse(samples):
    generator = TileGenerator.from_pretrained()
    checks = {c.name: c for c in examine(generator, samples, steps=2)}
    assert checks["own pixel statistics predict better than ImageNet's"].value > 0.9
    normalise_as_imagenet(generator)
    name = "velocity error on real latents"
    wrong = next(c for c in examine(generator, samples, steps=2) if c.name == name)
    assert wrong.value > checks[name].value


@pytest.mark.slow
def test_without_an_encoder_the_condition_is_not_verified(samples):
    generator = TileGenerator.from_pretrained(encoder=None)
    text = verdict(list(examine(generator, samples, steps=STEPS)))
    assert text.startswith("all checks passed; not verified: own features")
    features = TileGenerator.from_pretrained().features(samples).cls
    checks = list(examine(generator, samples, features=features, steps=STEPS))
    asked = [c for c in checks if c.passed is None]
    assert verdict(checks).startswith("all checks passed")
    assert {c.expected for c in asked} == {"needs an encoder"}


def test_a_model_that_does_not_load_is_what_the_report_is_for(tmp_path, capsys):
    folder = write_released(tmp_path / "m", random_parts(), num_shards=2)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"depth": 3}))
    report = tmp_path / "report.json"
    assert main(["doctor", str(folder), "--out", str(report)]) == 2
    assert "missing: blocks.2.attn.qkv.bias" in capsys.readouterr().err
    content = json.loads(report.read_text())
    assert "missing: blocks.2.attn.qkv.bias" in content["error"]
    files = content["files"].items()
    shards = [v["tensors"] for k, v in files if k.endswith(".safetensors")]
    stored = {k: v for shard in shards for k, v in shard.items()}
    assert stored["blocks.0.attn.qkv.bias"] == "F16 [96]"
    assert json.loads(content["files"]["transformer/config.json"])["depth"] == 3


def test_a_device_that_is_not_there_is_refused_before_loading(capsys):
    assert main(["info", "--device", "abacus"]) == 2
    assert "expected one like 'cuda:0'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["info", "--device", "cuda"]) == 2
        assert "does not find here" in capsys.readouterr().err


@pytest.mark.slow
def test_features_of_the_samples_may_come_from_elsewhere(samples, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "load_samples", lambda: samples)
    file = tmp_path / "cls.npy"
    np.save(file, TileGenerator.from_pretrained().features(samples).cls.numpy())
    arguments = ["doctor", "--encoder", "none", "--steps", str(STEPS)]
    arguments += ["--out", str(tmp_path / "report.json"), "--features"]
    assert main([*arguments, str(file)]) == 0
    assert "all checks passed; not verified: own CLS" in capsys.readouterr().out
    np.save(file, np.ones((3, 192), np.float32))
    assert main([*arguments, str(file)]) == 2
    assert "3 rows of features for 4 tiles" in capsys.readouterr().err


@pytest.mark.slow
def test_the_commands_print_facts_and_write_the_report(tmp_path, capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["all"] > 5_000_000
    assert not facts["is_released_size"]
    assert facts["licence"] == "apache-2.0"
    report = tmp_path / "report.json"
    assert main(["doctor", "--steps", str(STEPS), "--out", str(report)]) == 0
    assert "all checks passed" in capsys.readouterr().out
    content = json.loads(report.read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert all(c["passed"] for c in content["checks"])


def test_bad_input_is_one_line_and_status_two(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert "is this a model folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "no.pt"), str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
