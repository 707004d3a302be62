"""Conversion is proved against forwards written here from the published architectures."""

import argparse
import contextlib
import json
import math
import pathlib
import zipfile

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from cytosyn_aug.cli.main import main
from cytosyn_aug.config import TileSpec
from cytosyn_aug.model import convert as conversion
from cytosyn_aug.model.checkpoint import load_model
from cytosyn_aug.model.compvis import compvis_vae_state, is_compvis_vae, vae_config_from_state
from cytosyn_aug.model.convert import (
    convert,
    read_checkpoint,
    repae_statistics,
    repae_transformer_state,
    reverse_time,
    transformer_config_from_state,
)
from cytosyn_aug.model.transformer import SiT
from tests.support.synthetic import random_parts, write_released

TILE = TileSpec(size_px=64, mpp=0.5)
SMALL = {
    "input_size": 8,
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "conditioning_dim": 6,
    "encoder_depth": 2,
    "z_dims": (6,),
    "projector_dim": 16,
}


class Resnet(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))  # [B, C, HW]
        attention = torch.softmax(q.mT @ k * x.shape[1] ** -0.5, dim=-1)
        return x + self.proj_out((v @ attention.mT).unflatten(2, x.shape[2:]))


def middle(c, groups):
    return nn.ModuleDict(
        {
            "block_1": Resnet(c, c, groups),
            "attn_1": Attention(c, groups),
            "block_2": Resnet(c, c, groups),
        }
    )


def through(modules, h):
    for module in modules:
        h = module(h)
    return h


class Encoder(nn.Module):
    def __init__(self, widths, layers, latent, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        c = widths[0]
        for level, width in enumerate(widths):
            blocks = [Resnet(c if j == 0 else width, width, groups) for j in range(layers)]
            down = nn.ModuleDict({"block": nn.ModuleList(blocks)})
            if level < len(widths) - 1:
                down["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.down.append(down)
            c = width
        self.mid = middle(c, groups)
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * latent, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for down in self.down:
            h = through(down["block"], h)
            if "downsample" in down:
                h = down["downsample"]["conv"](F.pad(h, (0, 1, 0, 1)))
        h = through((self.mid[k] for k in ("block_1", "attn_1", "block_2")), h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, widths, layers, latent, groups):
        super().__init__()
        c = widths[-1]
        self.conv_in = nn.Conv2d(latent, c, 3, padding=1)
        self.mid = middle(c, groups)
        ups = []
        for level in reversed(range(len(widths))):
            width = widths[level]
            blocks = [Resnet(c if j == 0 else width, width, groups) for j in range(layers + 1)]
            up = nn.ModuleDict({"block": nn.ModuleList(blocks)})
            if level > 0:
                up["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, padding=1)})
            ups.append(up)
            c = width
        self.up = nn.ModuleList(reversed(ups))  # index 0 is the finest level, run last
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):
        h = through((self.mid[k] for k in ("block_1", "attn_1", "block_2")), self.conv_in(z))
        for up in reversed(self.up):
            h = through(up["block"], h)
            if "upsample" in up:
                h = up["upsample"]["conv"](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))


class CompVis(nn.Module):
    """The autoencoder of latent diffusion under CompVis' names, from its description.

    Source: Rombach et al. (2022), appendix; Esser et al. (2021), table 7.
    """

    def __init__(self, widths, layers, latent=4, groups=32):
        super().__init__()
        self.encoder = Encoder(widths, layers, latent, groups)
        self.decoder = Decoder(widths, layers, latent, groups)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)


def randomise(network, seed=0):
    """Make every parameter matter: new layers are zero or one, which would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 10
            parameter.data.normal_(0, fan_in**-0.5, generator=generator)
    for name, buffer in network.named_buffers():
        if name in ("bn.running_mean", "bn.running_var"):
            buffer.uniform_(0.5, 2.0, generator=generator)
    return network.eval()


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(
    ("widths", "layers", "groups"),
    [((8, 16), 1, 4), ((8, 16, 32, 32), 2, 8), ((4, 4, 8, 8, 16), 2, 4)],
    ids=["small", "layout of f8d4", "five levels"],
)
def test_a_compvis_autoencoder_computes_the_same_under_diffusers_names(widths, layers, groups):
    # float64, so that even another epsilon of a norm would show.
    ours = randomise(CompVis(widths, layers, groups=groups)).double()
    state = compvis_vae_state(ours.state_dict())
    vae = AutoencoderKL(**vae_config_from_state(state, norm_num_groups=groups)).double().eval()
    vae.load_state_dict(state)
    images = torch.rand(1, 3, 32, 48).double() * 2 - 1  # not square: rows and columns differ
    with torch.no_grad():
        moments = ours.quant_conv(ours.encoder(images))
        assert relative_error(vae.encode(images).latent_dist.parameters, moments) < 1e-9
        latents = moments[:, :4]
        decoded = ours.decoder(ours.post_quant_conv(latents))
        assert relative_error(vae.decode(latents).sample, decoded) < 1e-9


def test_the_full_size_autoencoder_fits_diffusers_tensor_for_tensor():
    with torch.device("meta"):
        state = CompVis((128, 256, 512, 512), layers=2).state_dict()
        converted = compvis_vae_state(state)
        vae = AutoencoderKL(**vae_config_from_state(state))
    assert len(state) == len(converted) == 248
    assert sum(t.numel() for t in converted.values()) == 83_653_863
    want = {k: v.shape for k, v in vae.state_dict().items()}
    assert {k: v.shape for k, v in converted.items()} == want


def test_a_released_folder_may_hold_compvis_names(tmp_path):
    parts = random_parts()
    ours = randomise(CompVis((32, 32, 64, 64), 2))
    compvis = parts._replace(vae=ours)
    ours.config = {"in_channels": 3}
    folder = write_released(tmp_path / "m", compvis, dtype=torch.float32)
    loaded = load_model(folder)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        moments = ours.quant_conv(ours.encoder(images))
        found = loaded.vae.encode(images).latent_dist.parameters
    assert relative_error(found, moments) < 1e-4
    assert "vae: CompVis' names were translated" in loaded.notes


def test_only_compvis_names_are_taken_for_compvis():
    state = CompVis((8, 8), 1, groups=4).state_dict()
    assert is_compvis_vae(state)
    assert not is_compvis_vae(compvis_vae_state(state))


def test_the_configuration_is_the_same_from_either_names():
    state = CompVis((8, 16, 16), 1, latent=3, groups=4).state_dict()
    config = vae_config_from_state(state, norm_num_groups=4)
    assert config == vae_config_from_state(compvis_vae_state(state), norm_num_groups=4)
    assert config["block_out_channels"] == (8, 16, 16)
    assert config["layers_per_block"] == 1
    assert config["latent_channels"] == 3


def test_tensors_of_the_loss_are_left_out_and_named():
    state = CompVis((8, 8), 1, groups=4).state_dict()
    extra = {"loss.logvar": torch.zeros(()), "discriminator.main.0.weight": torch.zeros(2)}
    with pytest.warns(UserWarning, match=r"2 tensors .* discriminator.main.0.weight, loss.logvar"):
        converted = compvis_vae_state(state | extra)
    assert len(converted) == len(state)


@pytest.mark.parametrize("name", ["encoder.down.0.attn.0.q.weight", "temb.weight", "quant_conv.g"])
def test_a_name_the_architecture_lacks_is_refused(name):
    state = CompVis((8, 8), 1, groups=4).state_dict()
    with pytest.raises(ValueError, match=f"AutoencoderKL lacks: {name}"):
        compvis_vae_state(state | {name: torch.zeros(1)})


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="not divided by 32 groups"):
        vae_config_from_state(CompVis((8, 8), 1, groups=4).state_dict())


# Transformers


def random_sit(seed=0, **changes):
    return randomise(SiT(**(SMALL | changes)), seed)


def batch(channels=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, channels, 8, 8, generator=generator)
    return x, torch.tensor([0.0, 0.37, 1.0]), torch.randn(3, 6, generator=generator)


def test_reversed_time_is_minus_the_original_at_one_minus_t():
    original = random_sit()
    converted = random_sit(seed=2)
    converted.load_state_dict(reverse_time(original.state_dict()))
    x, t, condition = batch()
    with torch.no_grad():
        want = -original(x, 1 - t, condition)
        assert relative_error(converted(x, t, condition), want) < 1e-5
        assert relative_error(original(x, t, condition), want) > 0.1


def test_reversing_time_twice_is_the_identity():
    state = random_sit().state_dict()
    twice = reverse_time(reverse_time(state))
    for name, tensor in state.items():
        torch.testing.assert_close(twice[name], tensor, rtol=0, atol=1e-6)


def test_reversed_time_keeps_the_velocity_of_a_learned_sigma():
    original = random_sit()
    p, channels, width = 2, 4, 32
    original.final_layer.linear = randomise(nn.Linear(width, p * p * 2 * channels), seed=3)
    x, t, condition = batch()
    with torch.no_grad():
        # Twice the channels pass through the same assembly of patches; SiT's forward then takes
        # `chunk(2, dim=1)[0]`.
        both = original(x, 1 - t, condition)
        assert both.shape == (3, 2 * channels, 8, 8)
        converted = SiT(**SMALL).eval()
        converted.load_state_dict(reverse_time(original.state_dict()))
        want = -both.chunk(2, dim=1)[0]
        assert relative_error(converted(x, t, condition), want) < 1e-5


def test_an_output_of_another_size_is_no_sit():
    state = random_sit().state_dict()
    state["final_layer.linear.weight"] = torch.zeros(24, 32)
    with pytest.raises(ValueError, match="has 24 outputs, expected 4 positions of 4 channels"):
        reverse_time(state)


def test_shapes_tell_the_configuration_but_not_the_heads():
    state = random_sit().state_dict()
    assert transformer_config_from_state(state, num_heads=2, encoder_depth=2) == (
        SMALL | {"patch_size": 2, "in_channels": 4, "mlp_ratio": 4.0}
    )
    assert transformer_config_from_state(state, num_heads=2)["encoder_depth"] == 3
    with pytest.raises(ValueError, match="num_heads is None for a width of 32"):
        transformer_config_from_state(state)
    with pytest.raises(ValueError, match="num_heads is 3 for a width of 32"):
        transformer_config_from_state(state, num_heads=3)


@pytest.mark.parametrize("changes", [{}, {"z_dims": ()}, {"patch_size": 1, "mlp_ratio": 3.0}])
def test_xl_is_recognised_with_16_heads(changes):
    with torch.device("meta"):
        network = SiT(**changes)
    config = transformer_config_from_state(network.state_dict())
    settings = {k: v for k, v in network.config.items() if not k.startswith("_")}
    jumps = {"decoupled_depth": None, "taught_guidance": None}  # no training but ours knows them
    assert config | jumps == settings


def test_prefixes_of_wrappers_are_taken_off():
    state = random_sit().state_dict()
    wrapped = {f"module._orig_mod.{k}": v for k, v in state.items()}
    assert repae_transformer_state({"ema": wrapped}).keys() == state.keys()
    with pytest.raises(ValueError, match="both with and without"):
        repae_transformer_state({"ema": wrapped | state})


def test_a_class_conditional_checkpoint_is_refused():
    state = {"y_embedder.embedding_table.weight": torch.zeros(1001, 8)}
    with pytest.raises(ValueError, match=r"conditioned on classes .*\[1001, 8\].* on features"):
        repae_transformer_state({"ema": state})


def test_weights_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="holds model, steps but no 'ema'"):
        repae_transformer_state({"model": {}, "steps": 3})
    with pytest.raises(ValueError, match="ema holds int, expected a state dict"):
        repae_transformer_state({"ema": 3})


# Files


@pytest.fixture(scope="module")
def checkpoint():
    """What REPA-E's training writes, at a small size."""
    return {
        "model": random_sit(1).state_dict(),
        "ema": random_sit(2).state_dict(),
        "vae": randomise(CompVis((32, 32, 64, 64), layers=1)).state_dict(),
        "discriminator": {"main.0.weight": torch.zeros(3)},
        "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(path_type="linear", prediction="v", encoder_depth=2, lr=1e-4),
        "steps": 400_000,
    }


@pytest.fixture
def written(checkpoint, tmp_path):
    """Write a checkpoint with some keys changed or, for None, left out."""

    def write(**changes):
        content = {k: v for k, v in (checkpoint | changes).items() if v is not None}
        torch.save(content, tmp_path / "0400000.pt")
        return tmp_path / "0400000.pt"

    return write


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_a_repae_checkpoint_becomes_a_model_folder(checkpoint, written, tmp_path, weights):
    out = convert(written(), tmp_path / "out", tile=TILE, num_heads=2, weights=weights)
    parts = load_model(out)
    assert parts.tile == TILE
    assert parts.encoder is None
    assert parts.transformer.config["encoder_depth"] == 2
    state = parts.transformer.state_dict()
    assert state.keys() == checkpoint[weights].keys()
    assert all(torch.equal(state[k], v) for k, v in checkpoint[weights].items())
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    original = CompVis((32, 32, 64, 64), layers=1).eval()
    original.load_state_dict(checkpoint["vae"])
    with torch.no_grad():
        want = original.quant_conv(original.encoder(images))
        assert relative_error(parts.vae.encode(images).latent_dist.parameters, want) < 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0400000.pt", "out"]


@pytest.mark.slow
def test_half_precision_rounds_weights_but_not_latent_statistics(checkpoint, written, tmp_path):
    out = convert(written(), tmp_path / "out", tile=TILE, num_heads=2, dtype=torch.float16)
    stored = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    assert stored["pos_embed"].dtype == torch.float16
    assert torch.equal(stored["bn.running_var"], checkpoint["ema"]["bn.running_var"])


@pytest.mark.slow
def test_a_sit_checkpoint_needs_time_and_statistics(checkpoint, written, tmp_path):
    sit = {k: v for k, v in checkpoint["ema"].items() if not k.startswith(("bn.", "projectors."))}
    args = argparse.Namespace(path_type="Linear", prediction="velocity")
    source = written(ema=sit, vae=None, args=args)
    save_file(checkpoint["vae"], tmp_path / "vae.safetensors")
    given = {"tile": TILE, "num_heads": 2, "vae": tmp_path / "vae.safetensors"}
    with pytest.raises(ValueError, match="trained with path_type 'Linear', expected 'linear'"):
        convert(source, tmp_path / "out", **given)
    with pytest.raises(ValueError, match="no latent statistics"):
        convert(source, tmp_path / "out", time="sit", **given)
    stats = {"latents_bias": torch.zeros(1, 4, 1, 1), "latents_scale": torch.full((4,), 0.18215)}
    torch.save(stats, tmp_path / "stats.pt")
    given["latent_stats"] = tmp_path / "stats.pt"
    network = load_model(convert(source, tmp_path / "out", time="sit", **given)).transformer
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(network.whiten(latents), latents * 0.18215)
    original = SiT(**(SMALL | {"z_dims": ()})).eval()
    original.load_state_dict(sit, strict=False)  # no bn: it plays no part in the velocity
    x, t, condition = batch()
    with torch.no_grad():
        want = -original(x, 1 - t, condition)
        assert relative_error(network(x, t, condition), want) < 1e-5


def test_statistics_become_mean_and_variance():
    stats = {"latents_bias": torch.arange(4.0).view(1, 4, 1, 1), "latents_scale": torch.ones(4) / 2}
    state = repae_statistics(stats)
    assert state["bn.running_mean"].tolist() == [0, 1, 2, 3]
    assert state["bn.running_var"].tolist() == [4, 4, 4, 4]


@pytest.mark.slow
def test_given_statistics_win_over_those_of_the_weights(checkpoint, written, tmp_path):
    # As REPA-E's save_vae_weights.py extracts them, here of the other weights.
    bn = {k: v.view(1, -1, 1, 1) for k, v in checkpoint["model"].items() if k.startswith("bn.r")}
    scale = bn["bn.running_var"].rsqrt()
    stats = {"latents_bias": bn["bn.running_mean"], "latents_scale": scale}
    torch.save(stats, tmp_path / "stats.pt")
    given = {"tile": TILE, "num_heads": 2, "latent_stats": tmp_path / "stats.pt"}
    network = load_model(convert(written(), tmp_path / "out", **given)).transformer
    latents = torch.randn(1, 4, 8, 8)
    want = (latents - stats["latents_bias"]) * scale
    torch.testing.assert_close(network.whiten(latents), want)
    assert not torch.equal(network.bn.running_mean, checkpoint["ema"]["bn.running_mean"])


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_separate_autoencoder_wins(checkpoint, written, tmp_path, wrapped):
    other = randomise(CompVis((32, 32, 64, 64), layers=1), seed=9).state_dict()
    torch.save({"state_dict": other} if wrapped else other, tmp_path / "vae.pt")
    given = {"tile": TILE, "num_heads": 2, "vae": tmp_path / "vae.pt"}
    bias = load_model(convert(written(), tmp_path / "out", **given)).vae.encoder.conv_in.bias
    assert torch.equal(bias, other["encoder.conv_in.bias"])


def refused(source, out, match, **changes):
    with pytest.raises(ValueError, match=match):
        convert(source, out, **({"tile": TILE, "num_heads": 2} | changes))
    assert not out.exists()
    assert not list(out.parent.glob(".*"))


@pytest.mark.slow
def test_what_does_not_fit_is_refused_and_leaves_nothing(checkpoint, written, tmp_path):
    out = tmp_path / "out"
    refused(written(), out, "tile is 224 px, expected 64", tile=TileSpec())
    refused(written(), out, "time is 'ddpm', expected", time="ddpm")
    refused(written(), out, "but no 'last'", weights="last")
    refused(written(vae=None), out, "no 'vae'")
    three = CompVis((32, 32, 64, 64), layers=1, latent=3).state_dict()
    refused(written(vae=three), out, "has 3 latent channels, expected the transformer's 4")
    cosine = argparse.Namespace(path_type="cosine", prediction="v")
    refused(written(args=cosine), out, "trained with path_type 'cosine', expected 'linear'")
    short = checkpoint["ema"] | {"blocks.1.mlp.fc2.bias": torch.zeros(5)}
    refused(written(ema=short), out, r"blocks.1.mlp.fc2.bias is \[5\], expected \[32\]")
    more = checkpoint["ema"] | {"blocks.0.attn.q_norm.weight": torch.zeros(16)}
    refused(written(ema=more), out, "unexpected: blocks.0.attn.q_norm.weight")
    missing = {k: v for k, v in checkpoint["ema"].items() if k != "x_embedder.proj.weight"}
    refused(written(ema=missing), out, "no tensor x_embedder.proj.weight")
    broken = checkpoint["ema"] | {"pos_embed": torch.full((1, 16, 32), torch.nan)}
    refused(written(ema=broken), out, "not finite: pos_embed")


def test_float16_refuses_weights_beyond_its_range(checkpoint, written, tmp_path):
    large = checkpoint["ema"] | {"x_embedder.proj.bias": torch.full((32,), 1e5)}
    refused(written(ema=large), tmp_path / "out", "not finite", dtype=torch.float16)


def test_a_folder_in_use_is_not_overwritten(written, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        convert(written(), tmp_path / "out", tile=TILE, num_heads=2)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_tensor_that_changes_on_disk_is_found(written, tmp_path, monkeypatch):
    save = conversion.save_model

    def save_wrongly(folder, parts, dtype):
        parts.transformer.blocks[1].attn.proj.bias.data[3] += 1e-3
        save(folder, parts, dtype)

    monkeypatch.setattr(conversion, "save_model", save_wrongly)
    with pytest.raises(OSError, match=r"transformer/blocks.1.attn.proj.bias changed on disk"):
        convert(written(), tmp_path / "out", tile=TILE, num_heads=2)
    assert [p.name for p in tmp_path.iterdir()] == ["0400000.pt"]


class Malicious:
    """A pickle that makes a file when opened."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return pathlib.Path.touch, (self.file,)


def test_a_pickle_of_code_is_refused_and_not_executed(written, tmp_path):
    proof = tmp_path / "executed"
    source = written(extra=Malicious(proof))
    refused(source, tmp_path / "out", "which may execute code, and was not loaded")
    assert not proof.exists()
    with contextlib.suppress(Exception):  # the bait works where it is taken
        torch.load(source, weights_only=False)
    assert proof.exists()


def test_allowing_the_command_line_does_not_outlast_the_reading(written):
    read_checkpoint(written())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.pt does not exist"):
        read_checkpoint(tmp_path / "absent.pt")
    for name in ("page.pt", "page.safetensors"):
        (tmp_path / name).write_text("<html>404</html>")
        with pytest.raises(ValueError, match=f"{name} is corrupt, or older than torch 1.6"):
            read_checkpoint(tmp_path / name)
    torch.save({"ema": torch.zeros(99)}, tmp_path / "short.pt")
    content = (tmp_path / "short.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"short.pt is corrupt"):
        read_checkpoint(tmp_path / "short.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a/b.txt", "text")
    with pytest.raises(ValueError, match=r"other.pt is corrupt"):
        read_checkpoint(tmp_path / "other.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, expected a dict"):
        read_checkpoint(tmp_path / "list.pt")


def test_the_folder_names_its_parts_and_scale(written, tmp_path):
    out = convert(written(), tmp_path / "deep" / "out", tile=TILE, num_heads=2)
    index = json.loads((out / "model_index.json").read_text())
    assert index["tile"] == {"size_px": 64, "mpp": 0.5}
    assert "encoder" not in index


def test_a_pickled_part_becomes_safetensors_with_nothing_changed(tmp_path, capsys):
    state = {"a.weight": torch.randn(3, 4), "b": torch.arange(3), "c": torch.randn(4, 3).half().T}
    torch.save(state, tmp_path / "pytorch_model.bin")
    out = tmp_path / "model.safetensors"
    assert main(["convert", str(tmp_path / "pytorch_model.bin"), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    stored = load_file(out)
    assert stored.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(stored[name], value)
        assert stored[name].dtype == value.dtype
    assert main(["convert", str(tmp_path / "pytorch_model.bin"), str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    torch.save({"state": state}, tmp_path / "nested.bin")
    assert main(["convert", str(tmp_path / "nested.bin"), str(tmp_path / "x.safetensors")]) == 2
    assert "expected a state dict of tensors only" in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "model.safetensors", "nested.bin", "pytorch_model.bin",
    ]  # fmt: skip


def test_a_pickled_part_that_changes_on_disk_is_found(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.bin")
    monkeypatch.setattr(
        conversion, "save_file", lambda tensors, file: save_file({"a": torch.zeros(3)}, file)
    )
    with pytest.raises(OSError, match="a changed on disk"):
        conversion.convert_tensors(tmp_path / "a.bin", tmp_path / "a.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["a.bin"]
