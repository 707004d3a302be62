"""Every network gets the same pixels, whichever set they come from, and says what it was given."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.mlp import SwiGLUPacked
from torchvision.models import inception_v3
from torchvision.transforms import v2

from cytosyn_aug.images import images_to_pixels
from cytosyn_aug.model.generator import TileGenerator
from tests.support.synthetic import synthetic_tiles
from training.evaluation import extractors
from training.evaluation.extractors import BATCH_SIZE, load_extractor
from training.stages.perception import PerceptualNetwork

ROUNDING = {"rtol": 1e-4, "atol": 1e-4}  # of float32 kernels that differ by batch shape


@pytest.fixture(scope="module")
def tiles():
    return synthetic_tiles(5, size=224)


@pytest.fixture(scope="module")
def tiny():
    return load_extractor("tiny")


def test_tiny_is_the_packaged_encoders_cls(tiny, tiles):
    expected = TileGenerator.from_pretrained().features(tiles).cls.double()
    torch.testing.assert_close(tiny.features(tiles), expected, **ROUNDING)


@pytest.mark.slow
def test_alexnet_is_the_mean_of_its_five_maps(tiles):
    with torch.no_grad():
        maps = PerceptualNetwork("alex")(images_to_pixels(tiles))
    expected = torch.cat([m.mean((2, 3)) for m in maps], 1).double()
    torch.testing.assert_close(load_extractor("alexnet").features(tiles), expected, **ROUNDING)


def test_own_is_the_evaluated_models_encoder(generator, tiles):
    own = load_extractor("own", own=generator.encoder)
    small = synthetic_tiles(3)
    assert own.input_px == generator.tile.size_px
    torch.testing.assert_close(
        own.features(small), generator.features(small).cls.double(), **ROUNDING
    )
    with pytest.raises(ValueError, match="loaded without an encoder"):
        load_extractor("own")


def test_a_tiles_features_do_not_depend_on_the_set_it_is_in(tiny):
    """To the bit: this is what makes real and generated sets comparable."""
    many = synthetic_tiles(BATCH_SIZE + 3, size=224)
    whole = tiny.features(many)
    assert torch.equal(tiny.features(many[:4]), whole[:4])
    assert torch.equal(tiny.features(many.flip(0)), whole.flip(0))


def test_a_tile_of_the_networks_side_is_not_resized(tiny, tiles):
    mean, std = (torch.tensor(x)[:, None, None] for x in (tiny.mean, tiny.std))
    assert torch.equal(tiny.preprocess(tiles), (tiles.float().div(255) - mean) / std)


def test_resizing_is_antialiased_bicubic_within_range(tiny):
    images = synthetic_tiles(2, size=448)
    images[:, :, :40, ::2] = 0  # stripes overshoot, and alias without a filter
    got = tiny.preprocess(images)
    side = v2.Resize(224, v2.InterpolationMode.BICUBIC, antialias=True)
    expected = side(images.float().div(255)).clamp(0, 1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (tiny.mean, tiny.std))
    torch.testing.assert_close(got, (expected - mean) / std)


def test_images_that_are_not_uint8_are_refused(tiny, tiles):
    with pytest.raises(ValueError, match="expected uint8"):
        tiny.features(tiles.float())


def test_provenance_changes_with_the_weights_and_survives_json():
    first, second = load_extractor("tiny"), load_extractor("tiny")
    before = first.provenance()
    assert json.loads(json.dumps(before)) == before == second.provenance()
    next(second.module.parameters()).data.view(-1)[0] += 1
    changed = {k for k, v in second.provenance().items() if v != before[k]}
    assert "weights" in changed


def test_the_picture_that_vouches_for_a_network_passes_it_once():
    tiny, seen = load_extractor("tiny"), []
    watched = replace(tiny, embed=lambda pixels: seen.append(len(pixels)) or tiny.embed(pixels))
    assert watched.provenance() == watched.provenance()
    assert seen == [BATCH_SIZE]


@pytest.mark.slow
def test_inception_is_torchvisions_with_its_own_preprocessing(tmp_path, tiles):
    torch.manual_seed(0)
    network = inception_v3(weights=None, init_weights=False, transform_input=True).eval()
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    extractor = load_extractor(f"inception={tmp_path / 'inception.pth'}")
    got = extractor.features(tiles[:2])
    assert got.shape == (2, 2048)
    resized = torch.nn.functional.interpolate(
        tiles[:2].float() / 255, (299, 299), mode="bicubic", antialias=True
    ).clamp(0, 1)
    normalise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = network(normalise(resized)).double()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def random_timm(folder, architecture, **arguments):
    """Write a random network as a repository holds it, and return it."""
    torch.manual_seed(0)
    network = timm.create_model(architecture, pretrained=False, **arguments)
    for parameter in network.parameters():  # tiny layer scales would hide errors
        torch.nn.init.normal_(parameter, std=0.05)
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    statistics = {"mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2]}
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": statistics}))
    return network.eval(), v2.Normalize(**statistics)


def test_a_vision_transformer_of_timm_gives_its_cls(tmp_path, tiles):
    network, normalise = random_timm(tmp_path / "m", "vit_tiny_patch16_224")  # with a classifier
    extractor = load_extractor(f"vit_tiny_patch16_224={tmp_path / 'm'}")
    with torch.no_grad():
        expected = network.forward_features(normalise(tiles.float() / 255))[:, 0].double()
    torch.testing.assert_close(extractor.features(tiles), expected, **ROUNDING)


def test_a_convolutional_network_of_timm_gives_its_pooled_features(tmp_path, tiles):
    network, _ = random_timm(tmp_path / "m", "resnet18", num_classes=0)
    extractor = load_extractor(f"resnet18={tmp_path / 'm' / 'model.safetensors'}")
    default = v2.Normalize(network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    with torch.no_grad():
        expected = network(default(tiles.float() / 255)).double()
    torch.testing.assert_close(extractor.features(tiles), expected, rtol=1e-3, atol=1e-3)


def test_a_published_encoder_is_built_as_its_card_says(tmp_path, tiles, monkeypatch):
    """Packed SwiGLU and the grid of positions are read off the tensors; the rest is small here."""
    small = {"embed_dim": 128, "depth": 2, "num_heads": 2}
    published = extractors._PUBLISHED["h0-mini"]
    arguments = published.arguments | small
    monkeypatch.setitem(extractors._PUBLISHED, "h0-mini", replace(published, arguments=arguments))
    packed = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "img_size": 224}
    network, normalise = random_timm(
        tmp_path / "m", published.architecture, num_classes=0, **arguments, **packed
    )
    extractor = load_extractor(f"h0-mini={tmp_path / 'm'}")
    with torch.no_grad():
        expected = network.forward_features(normalise(tiles.float() / 255))[:, 0].double()
    torch.testing.assert_close(extractor.features(tiles), expected, **ROUNDING)
    bare = load_extractor(f"h0-mini={tmp_path / 'm' / 'model.safetensors'}")
    assert (bare.mean, bare.std) == published.statistics


# Parameters of the released encoders at their own side, as their cards or timm state them.
MILLIONS = {
    "dinov2": 304,
    "h0-mini": 86,
    "uni": 303,
    "uni2-h": 681,
    "virchow": 631,
    "virchow2": 631,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MILLIONS)
def test_published_arguments_give_the_published_number_of_parameters(name):
    published = extractors._PUBLISHED[name]
    arguments = {"img_size": 518 if name == "dinov2" else 224} | published.arguments
    if arguments.get("mlp_ratio", 4) > 5:
        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    with torch.device("meta"):
        network = timm.create_model(published.architecture, num_classes=0, **arguments)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert round(millions) == MILLIONS[name]


def test_positions_trained_at_another_side_are_interpolated(tmp_path):
    network, _ = random_timm(tmp_path / "m", "vit_tiny_patch16_224", num_classes=0, img_size=384)
    extractor = load_extractor(f"vit_tiny_patch16_224={tmp_path / 'm'}")
    assert extractor.features(synthetic_tiles(1, size=224)).shape == (1, network.num_features)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "extractor 'nonsense'"),
        ("nonsense=weights.safetensors", "extractor 'nonsense'"),
        ("resnet18", "expected tiny, own, alexnet"),
        ("tiny=weights.safetensors", "takes no source"),
        ("inception", "expected a file"),
        ("inception=absent.pth", "expected a file"),
    ],
)
def test_what_cannot_be_loaded_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        load_extractor(spec)


def test_weights_of_another_network_are_refused(tmp_path):
    random_timm(tmp_path / "m", "resnet18")
    with pytest.raises(ValueError, match="extractor vit_tiny_patch16_224 does not fit"):
        load_extractor(f"vit_tiny_patch16_224={tmp_path / 'm'}")


def test_absent_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither an existing folder nor a Hub id"):
        load_extractor(f"h0-mini={tmp_path / 'absent'}")


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_extractor(f"uni={tmp_path / 'w.bin'}")
