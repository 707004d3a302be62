"""H0-mini in timm's own names: layout, normalisation and loading, with timm as the reference."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import checkpoint_filter_fn

from cytosyn_aug import (
    ConditionedResample,
    FeatureTable,
    StainNormalize,
    StainReference,
    StainTransfer,
)
from cytosyn_aug.config import TileSpec
from cytosyn_aug.model.checkpoint import load_encoder, load_model
from cytosyn_aug.model.encoder import H0_MINI_MEAN, H0_MINI_STD, read_encoder
from cytosyn_aug.model.generator import TileGenerator
from tests.support.synthetic import SIZE, random_parts, synthetic_tiles, write_released


def timm_h0_mini(**changes):
    """Build it as its card says, or a small one of the same layout."""
    return timm.create_model(
        "vit_base_patch14_reg4_dinov2",
        pretrained=False,
        mlp_layer=SwiGLUPacked,
        act_layer=torch.nn.SiLU,
        mlp_ratio=5.33334,
        num_classes=0,
        global_pool="",
        **({"img_size": 224} | changes),
    )


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = timm_h0_mini(embed_dim=128, depth=2, num_heads=2, img_size=SIZE)
    for parameter in model.parameters():  # zero biases and tiny layer scales would hide errors
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def model_folder_for_small(tmp_path):
    parts = random_parts()
    wide = type(parts.transformer)(
        **{k: v for k, v in parts.transformer.config.items() if not k.startswith("_")}
        | {"conditioning_dim": 128}
    )
    return write_released(tmp_path / "m", parts._replace(transformer=wide), dtype=torch.float32)


@pytest.mark.parametrize("with_config", [True, False])
def test_features_are_timms(small, model_folder_for_small, tmp_path, with_config):
    folder = tmp_path / "h0"
    folder.mkdir()
    save_file(small.state_dict(), folder / "model.safetensors")
    if with_config:
        config = {"pretrained_cfg": {"mean": H0_MINI_MEAN, "std": H0_MINI_STD}}
        (folder / "config.json").write_text(json.dumps(config))
    source = folder if with_config else folder / "model.safetensors"
    generator = TileGenerator(load_model(model_folder_for_small, encoder=source))
    tiles = synthetic_tiles(3)
    found = generator.features(tiles)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (H0_MINI_MEAN, H0_MINI_STD))
    with torch.no_grad():
        tokens = small((tiles / 255 - mean) / std)
    torch.testing.assert_close(found.cls, tokens[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.patches, tokens[:, 5:], rtol=1e-4, atol=1e-5)


def test_a_config_of_other_pixel_statistics_is_followed_and_noted(small):
    config = {"pretrained_cfg": {"mean": [0.485, 0.456, 0.406]}}
    encoder, _, notes = read_encoder(config, small.state_dict(), SIZE)
    assert encoder.config["mean"] == (0.485, 0.456, 0.406)
    assert len(notes) == 1
    assert "mean (0.485, 0.456, 0.406)" in notes[0]


def test_layer_scale_is_read_off_the_tensors(small):
    without = {k: v for k, v in small.state_dict().items() if ".ls" not in k}
    encoder = read_encoder({}, without, SIZE)[0]
    assert encoder.vit.state_dict().keys() == without.keys()


def test_a_wrong_encoder_is_reported_by_name(small, model_folder_for_small, tmp_path):
    state = {k: v for k, v in small.state_dict().items() if "norm1" not in k}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"encoder does not fit TileEncoder[^$]*blocks.\[0-1\].norm1"
    ):
        load_model(model_folder_for_small, encoder=tmp_path / "model.safetensors")


def test_dinov2_names_are_read_as_timm_reads_them(small, model_folder_for_small, tmp_path):
    """timm translates them on loading, and adds the position of CLS to the token."""
    state = {k: v for k, v in small.state_dict().items() if "mlp" not in k}
    position = torch.randn(1, 1, 128)
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    state["cls_token"] = state["cls_token"] - position
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 128)
    for block in range(2):
        for theirs, ours in (("w12", "fc1"), ("w3", "fc2")):
            for kind in ("weight", "bias"):
                name = f"blocks.{block}.mlp.{theirs}.{kind}"
                state[name] = small.state_dict()[f"blocks.{block}.mlp.{ours}.{kind}"]
    save_file(state, tmp_path / "model.safetensors")
    parts = load_model(model_folder_for_small, encoder=tmp_path / "model.safetensors")
    assert any("DINOv2" in note for note in parts.notes)
    for name, value in small.state_dict().items():
        torch.testing.assert_close(parts.encoder.vit.state_dict()[name], value, msg=name)


def test_positions_of_another_grid_are_interpolated_as_in_timm(small, tmp_path):
    larger = timm_h0_mini(embed_dim=128, depth=2, num_heads=2, img_size=2 * SIZE).state_dict()
    _, named, notes = read_encoder({}, larger, SIZE)
    wanted = checkpoint_filter_fn(larger, small)["pos_embed"]
    torch.testing.assert_close(named["pos_embed"], wanted)
    assert any("16x16 patches were interpolated" in note for note in notes)


def test_an_encoder_of_another_width_is_refused(small, tmp_path):
    folder = write_released(tmp_path / "m", random_parts(), dtype=torch.float32)
    save_file(small.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="encoder gives 128 features, the transformer takes 24"):
        load_model(folder, encoder=tmp_path / "model.safetensors")


def test_an_encoder_loads_alone_as_beside_a_model(small, model_folder_for_small, tmp_path):
    save_file(small.state_dict(), tmp_path / "model.safetensors")
    alone = load_encoder(tmp_path, TileSpec(size_px=SIZE))
    beside = load_model(model_folder_for_small, encoder=tmp_path).encoder
    tiles = synthetic_tiles(2)
    assert torch.equal(alone(tiles).cls, beside(tiles).cls)
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_encoder(model_folder_for_small / "vae" / "nowhere")


def test_a_pickled_encoder_is_refused_with_the_way_out(tmp_path):
    folder = write_released(tmp_path / "m", random_parts())
    with pytest.raises(ValueError, match=r"cytosyn-aug convert .*pytorch_model.safetensors"):
        load_model(folder, encoder=tmp_path / "pytorch_model.bin")


def test_full_size_names_and_shapes_are_timms():
    with torch.device("meta"):
        theirs = timm_h0_mini().state_dict()
        ours = read_encoder({}, theirs, 224)[0].vit
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.items()
    }
    assert sum(p.numel() for p in ours.parameters()) == 85_739_520


def test_without_an_encoder_colour_still_works_and_features_must_be_given(tmp_path):
    parts = random_parts()._replace(encoder=None, stain_probe=None)
    folder = write_released(tmp_path / "m", parts, dtype=torch.float32)
    generator = TileGenerator.from_pretrained(folder, encoder=None)
    tiles = synthetic_tiles(3)
    reference = StainReference.fit(generator, tiles)
    assert StainNormalize(generator, reference)(tiles).shape == tiles.shape
    with pytest.raises(ValueError, match=r"without an encoder.*H0-mini"):
        generator.features(tiles)
    cls = torch.randn(2, 24)
    both = torch.cat([cls, torch.zeros(2, 24)], 1)
    made = [generator.sample(x, steps=2) for x in (cls, both)]
    assert torch.equal(*made)
    fitted = StainReference.fit(generator, tiles, features=torch.randn(3, 24))
    assert fitted.cls.shape == (3, 24)
    with pytest.raises(ValueError, match="2 rows of features for 3 tiles"):
        StainReference.fit(generator, tiles, features=cls)


def test_resampling_takes_precomputed_features_of_a_model_without_encoder(tmp_path):
    """The same tiles come out as with the encoder that computed the features."""
    folder = write_released(tmp_path / "m", random_parts(), dtype=torch.float32)
    with_encoder = TileGenerator(random_parts())
    without = TileGenerator.from_pretrained(folder, encoder=None)
    tiles = synthetic_tiles(3)
    table = FeatureTable(tiles, with_encoder.features(tiles).cls, width=24)
    made = []
    for generator, features in ((with_encoder, None), (without, table)):
        torch.manual_seed(0)
        made.append(ConditionedResample(generator, p=1.0, steps=2, features=features)(tiles))
    assert torch.equal(*made)
    assert not torch.equal(made[0], tiles)
    with pytest.raises(ValueError, match="without an encoder: pass features"):
        ConditionedResample(without)
    with pytest.raises(ValueError, match="leave min_similarity"):
        ConditionedResample(without, features=table, min_similarity=0.5)
    reference = StainReference.fit(without, tiles)
    with pytest.raises(ValueError, match=r"preserve='none'.*without an encoder"):
        StainTransfer(without, [reference], preserve="none")
