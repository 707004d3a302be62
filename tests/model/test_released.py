"""Folders as the released repository is laid out: every dtype, shards, places of statistics."""

import json

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file

from cytosyn_aug.model.checkpoint import load_model, save_model
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.tensors import WEIGHTS_NAME, KeyMap
from tests.support.synthetic import random_parts, write_released


def parts_with_statistics():
    parts = random_parts()
    parts.transformer.bn.running_mean.copy_(torch.tensor([0.5, -1.25, 0.0, 2.0]))
    parts.transformer.bn.running_var.copy_(torch.tensor([4.0, 0.25, 1.0, 9.0]))
    return parts


def edit_tensors(folder, part, change):
    file = folder / part / WEIGHTS_NAME
    tensors = load_file(file)
    save_file(change(tensors), file)


def edit_config(folder, part, **settings):
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def assert_same_weights(loaded, original, **tolerance):
    for name in ("vae", "transformer"):
        state = getattr(loaded, name).state_dict()
        for key, value in getattr(original, name).state_dict().items():
            torch.testing.assert_close(state[key], value, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_type_loads(tmp_path, dtype, num_shards):
    original = parts_with_statistics()
    folder = write_released(tmp_path / "m", original, dtype=dtype, num_shards=num_shards)
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-7}
    assert_same_weights(load_model(folder), original, **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_take_the_wanted_type_and_statistics_stay_float32(tmp_path, dtype):
    folder = write_released(tmp_path / "m", parts_with_statistics(), dtype=torch.float32)
    parts = load_model(folder, dtype=dtype)
    assert {p.dtype for p in parts.transformer.parameters()} == {dtype}
    assert parts.transformer.bn.running_mean.dtype == torch.float32


@pytest.mark.parametrize("statistics", ["bn", "config", "index", "vae"])
def test_latent_statistics_are_found_wherever_they_stand(tmp_path, statistics):
    original = parts_with_statistics()
    folder = write_released(tmp_path / "m", original, dtype=torch.float32, statistics=statistics)
    parts = load_model(folder)
    x = torch.randn(2, 4, 14, 14)
    torch.testing.assert_close(parts.transformer.whiten(x), original.transformer.whiten(x))
    said = [n for n in parts.notes if n.startswith("latent statistics come from")]
    assert len(said) == (statistics != "bn")


def test_a_folder_without_latent_statistics_says_where_it_looked(tmp_path):
    folder = write_released(tmp_path / "m", parts_with_statistics(), statistics="nowhere")
    with pytest.raises(ValueError, match=r"bn.running_mean.*latents_bias.*key map"):
        load_model(folder)


def test_the_key_map_can_state_latent_statistics(tmp_path):
    original = parts_with_statistics()
    folder = write_released(tmp_path / "m", original, dtype=torch.float32, statistics="nowhere")
    answers = {"latents_bias": [0.5, -1.25, 0, 2], "latents_scale": [0.5, 2, 1, 1 / 3]}
    (tmp_path / "keys.json").write_text(json.dumps(answers))
    parts = load_model(folder, key_map=tmp_path / "keys.json")
    torch.testing.assert_close(
        parts.transformer.bn.running_var, original.transformer.bn.running_var
    )


def test_statistics_that_disagree_are_refused(tmp_path):
    folder = write_released(tmp_path / "m", parts_with_statistics())
    edit_config(folder, "transformer", bn_running_mean=[0.0] * 4, bn_running_var=[1.0] * 4)
    with pytest.raises(ValueError, match="state different latent statistics"):
        load_model(folder)


def test_statistics_rounded_to_half_precision_agree(tmp_path):
    original = parts_with_statistics()
    original.transformer.bn.running_mean.mul_(1.00037)
    folder = write_released(tmp_path / "m", original, dtype=torch.float16)
    edit_config(
        folder,
        "transformer",
        bn_running_mean=original.transformer.bn.running_mean.tolist(),
        bn_running_var=original.transformer.bn.running_var.tolist(),
    )
    assert load_model(folder).transformer.bn.running_mean[3] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "value"), [("path_type", "cosine"), ("qk_norm", True), ("prediction", "eps")]
)
def test_a_config_that_asks_for_another_network_is_refused(tmp_path, name, value):
    folder = write_released(tmp_path / "m", parts_with_statistics())
    edit_config(folder, "transformer", **{name: value})
    with pytest.raises(ValueError, match=f"{name} is"):
        load_model(folder)


def test_settings_that_are_not_used_become_notes(tmp_path):
    folder = write_released(tmp_path / "m", parts_with_statistics())
    edit_config(folder, "transformer", flavour="strange")
    notes = load_model(folder).notes
    assert any("flavour = 'strange'" in n for n in notes)
    assert any("no tiles; 112 px at 0.5 microns/pixel assumed" in n for n in notes)
    assert not any("use_cfg" in n for n in notes)


def test_a_projector_may_be_present_though_the_config_is_silent(tmp_path):
    folder = write_released(tmp_path / "m", parts_with_statistics(), dtype=torch.float32)
    width, hidden = 32, 2048
    shapes = {0: (hidden, width), 2: (hidden, hidden), 4: (24, hidden)}
    projector = {f"projectors.0.{k}.weight": torch.zeros(s) for k, s in shapes.items()}
    projector |= {f"projectors.0.{k}.bias": torch.zeros(s[0]) for k, s in shapes.items()}
    edit_tensors(folder, "transformer", lambda t: t | projector)
    assert load_model(folder).transformer.config["z_dims"] == (24,)


def test_fixed_positions_may_be_absent(tmp_path):
    original = parts_with_statistics()
    folder = write_released(tmp_path / "m", original, dtype=torch.float32)
    edit_tensors(folder, "transformer", lambda t: {k: v for k, v in t.items() if k != "pos_embed"})
    assert_same_weights(load_model(folder), original, rtol=0, atol=0)


def test_the_condition_width_is_read_off_its_layer(tmp_path):
    folder = write_released(tmp_path / "m", parts_with_statistics())
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    del config["conditioning_dim"]
    file.write_text(json.dumps(config))
    assert load_model(folder).transformer.config["conditioning_dim"] == 24


def test_renamed_tensors_are_reported_once_with_an_answer_that_works(tmp_path):
    """The printed JSON, saved as it is, loads the folder."""
    original = parts_with_statistics()
    folder = write_released(tmp_path / "m", original, dtype=torch.float32)

    def rename(tensors):
        new = {"y_embedder.linear": "cond_embedder.proj", "final_layer.linear": "head.linear"}
        return {
            next((k.replace(a, b) for a, b in new.items() if a in k), k): v
            for k, v in tensors.items()
        }

    edit_tensors(folder, "transformer", rename)
    edit_tensors(folder, "vae", lambda t: {f"module.{k}": v for k, v in t.items()})
    with pytest.raises(ValueError, match="does not fit SiT") as error:
        load_model(folder)
    message = str(error.value)
    assert "does not fit AutoencoderKL" in message
    answer = tmp_path / "keys.json"
    answer.write_text(message[message.index("{") :])
    assert json.loads(answer.read_text())["vae"] == {"module.*": "*"}
    assert_same_weights(load_model(folder, key_map=answer), original, rtol=0, atol=0)


def test_the_key_map_is_part_of_the_digest(tmp_path):
    folder = write_released(tmp_path / "m", parts_with_statistics())
    other = KeyMap(latents_bias=(0.5, -1.25, 0.0, 2.0), latents_scale=(0.5, 2.0, 1.0, 0.5))
    assert load_model(folder).digest != load_model(folder, key_map=other).digest


def test_code_beside_the_weights_is_not_executed(tmp_path):
    folder = write_released(tmp_path / "m", parts_with_statistics())
    trap = f"open({str(tmp_path / 'executed')!r}, 'w')"
    for name in ("pipeline.py", "transformer/sit.py", "transformer/__init__.py"):
        (folder / name).write_text(trap)
    load_model(folder)
    assert not (tmp_path / "executed").exists()


def test_attention_under_diffusers_former_names_loads_as_in_diffusers(tmp_path):
    """Stable diffusion's autoencoders are stored so; diffusers renames on loading."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
    )
    parts = parts_with_statistics()._replace(vae=vae)
    folder = write_released(tmp_path / "m", parts, dtype=torch.float32)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        pairs = [(f"attentions.0.{a}.", f"attentions.0.{b}.") for a, b in former.items()]
        return {
            next((k.replace(a, b) for a, b in pairs if a in k), k): v for k, v in tensors.items()
        }

    edit_tensors(folder, "vae", rename)
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(folder / "vae" / WEIGHTS_NAME)
    theirs = AutoencoderKL.from_pretrained(folder / "vae").eval()
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        wanted = theirs.encode(pixels).latent_dist.mean
        assert torch.equal(load_model(folder).vae.encode(pixels).latent_dist.mean, wanted)


def test_wrapped_transformer_names_get_one_line_and_an_answer(tmp_path):
    """Both sets of a training checkpoint side by side; the average is what to take."""
    original = parts_with_statistics()
    folder = write_released(tmp_path / "m", original, dtype=torch.float32)
    edit_tensors(
        folder,
        "transformer",
        lambda t: {f"{p}.{k}": v.clone() for p in ("model", "ema") for k, v in t.items()},
    )
    with pytest.raises(ValueError, match="does not fit SiT") as error:
        load_model(folder)
    message = str(error.value)
    assert "latent statistics" not in message  # they are there, under the prefix
    answer = tmp_path / "keys.json"
    answer.write_text(message[message.index("{") :])
    assert_same_weights(load_model(folder, key_map=answer), original, rtol=0, atol=0)


def test_missing_statistics_stand_in_the_same_report(tmp_path):
    folder = write_released(tmp_path / "m", parts_with_statistics(), statistics="nowhere")
    edit_tensors(folder, "vae", lambda t: {k: v for k, v in t.items() if "conv_in" not in k})
    with pytest.raises(ValueError, match=r"no latent statistics[^$]*does not fit AutoencoderKL"):
        load_model(folder)


def test_the_generator_keeps_latent_statistics_in_full(tmp_path):
    original = parts_with_statistics()
    original.transformer.bn.running_mean.fill_(0.5137)
    folder = write_released(tmp_path / "m", original, dtype=torch.float32)
    generator = TileGenerator.from_pretrained(folder, encoder=None, dtype=torch.bfloat16)
    assert generator.transformer.x_embedder.proj.weight.dtype == torch.bfloat16
    assert torch.equal(generator.transformer.bn.running_mean, torch.full((4,), 0.5137))


def test_a_learned_null_condition_is_used_once_it_is_named(tmp_path):
    null = torch.linspace(-1, 1, 24)
    folder = write_released(tmp_path / "m", parts_with_statistics(), dtype=torch.float32)
    edit_tensors(folder, "transformer", lambda t: t | {"y_embedder.null_token": null})
    with pytest.raises(ValueError, match=r"unexpected: y_embedder\.null_token"):
        load_model(folder)
    answer = tmp_path / "keys.json"
    answer.write_text('{"transformer": {"y_embedder.null_token": "null_condition"}}')
    generator = TileGenerator(load_model(folder, key_map=answer))
    assert torch.equal(generator.null_condition, null)
    save_model(tmp_path / "ours", load_model(folder, key_map=answer), torch.float32)
    assert torch.equal(load_model(tmp_path / "ours").null_condition, null)
    edit_tensors(folder, "transformer", lambda t: t | {"y_embedder.null_token": torch.zeros(32)})
    with pytest.raises(ValueError, match=r"null_condition is \[32\], expected \[24\]"):
        load_model(folder, key_map=answer)


@pytest.mark.parametrize("setting", [{"use_cfg": False}, {"class_dropout_prob": 0}])
def test_a_model_trained_without_guidance_says_so(tmp_path, setting):
    folder = write_released(tmp_path / "m", parts_with_statistics())
    edit_config(folder, "transformer", **setting)
    assert any("guidance other than 1" in note for note in load_model(folder).notes)


def test_the_vaes_scaling_factor_counts_as_in_diffusers(tmp_path):
    """There whitened latents are (z - mean) scaling_factor / std."""
    original = parts_with_statistics()
    folder = write_released(tmp_path / "m", original, dtype=torch.float32, statistics="vae")
    edit_config(folder, "vae", scaling_factor=0.5)
    found = load_model(folder)
    wanted = original.transformer.bn.running_var / 0.5**2
    torch.testing.assert_close(found.transformer.bn.running_var, wanted)
    assert any("scaling_factor 0.5" in note for note in found.notes)


def test_what_only_the_index_states_is_part_of_the_digest(tmp_path):
    folder = write_released(tmp_path / "m", parts_with_statistics(), statistics="index")
    before = load_model(folder).digest
    index = json.loads((folder / "model_index.json").read_text())
    index["latents_bias"][0] += 0.25
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_model(folder).digest != before


@pytest.mark.parametrize(
    ("entry", "noted"), [([None, None], False), (["timm", "VisionTransformer"], False), (7, True)]
)
def test_odd_entries_of_the_index_are_survived(tmp_path, entry, noted):
    folder = write_released(tmp_path / "m", parts_with_statistics())
    index = json.loads((folder / "model_index.json").read_text())
    name = "strange" if noted else "encoder"
    (folder / "model_index.json").write_text(json.dumps(index | {name: entry}))
    parts = load_model(folder)
    assert parts.encoder is None
    assert any("strange = 7" in note for note in parts.notes) == noted


@pytest.mark.parametrize(
    "settings", [{"z_dims": 768}, {"z_dims": None}, {"qk_norm": None}, {"z_dims": [24]}]
)
def test_odd_settings_that_change_nothing_are_survived(tmp_path, settings):
    original = parts_with_statistics()
    folder = write_released(tmp_path / "m", original, dtype=torch.float32)
    edit_config(folder, "transformer", **settings)
    assert_same_weights(load_model(folder), original, rtol=0, atol=0)


def test_parts_of_two_models_are_refused(tmp_path):
    folder = write_released(tmp_path / "m", parts_with_statistics())
    file = folder / "model_index.json"
    tile = {"tile": {"size_px": 224, "mpp": 0.5}}
    file.write_text(json.dumps(json.loads(file.read_text()) | tile))
    with pytest.raises(ValueError, match=r"make tiles of 112 px, model_index.json states 224"):
        load_model(folder)
