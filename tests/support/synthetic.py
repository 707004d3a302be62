"""Synthetic tiles, slides and random models, as functions; fixtures are in conftest."""

import json

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from cytosyn_aug.config import TileSpec
from cytosyn_aug.model.checkpoint import ModelParts
from cytosyn_aug.model.encoder import StainProbe, TileEncoder
from cytosyn_aug.model.tensors import WEIGHTS_NAME
from cytosyn_aug.model.transformer import SiT

SIZE = 112


def synthetic_tiles(num, seed=0, size=SIZE):
    """Purple blobs on a pink ground with a band of glass: uint8 [num, 3, size, size]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    tiles = []
    for _ in range(num):
        haematoxylin = np.zeros((size, size))
        for cy, cx in rng.uniform(8, size - 8, (12, 2)):
            haematoxylin += 0.9 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 12)
        eosin = 0.8 + 0.2 * np.sin(x / 5 + rng.uniform(0, 6))
        density = haematoxylin[..., None] * [0.65, 0.70, 0.29] + eosin[..., None] * [
            0.07,
            0.99,
            0.11,
        ]
        density[:, : size // 7] = 0
        noise = rng.normal(0, 0.01, density.shape)
        tiles.append(np.clip(256 * np.exp(-(density + noise)) - 1, 0, 255).round())
    return torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).to(torch.uint8)


def random_parts(seed=0):
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    encoder = TileEncoder(
        input_px=SIZE, embed_dim=24, depth=2, num_heads=2, mlp_ratio=4.0, init_values=None
    )
    transformer = SiT(
        input_size=SIZE // 8,
        hidden_size=32,
        depth=2,
        num_heads=2,
        conditioning_dim=24,
        encoder_depth=1,
        z_dims=(),
    )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    probe = StainProbe(conditioning_dim=24)
    probe.shift.copy_(torch.tensor([0.4, 0.9, 0.3, 0.2, 0.1, 0.0, 0.3, 0.1, 0.1]))
    probe.scale.fill_(0.05)
    return ModelParts(vae, transformer, encoder, probe, TileSpec(size_px=SIZE), digest="")


def with_student(parts, **changes):
    """Add a student of the transformer's shape and latents, random in every weight."""
    settings = {k: v for k, v in parts.transformer.config.items() if not k.startswith("_")}
    split = {"decoupled_depth": 1, "taught_guidance": (3.0, 0.0, 0.75)}
    torch.manual_seed(1)
    student = SiT(**settings | split | changes).eval()
    for parameter in student.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    student.bn.load_state_dict(parts.transformer.bn.state_dict())
    return parts._replace(student=student)


def write_released(folder, parts, *, dtype=torch.float16, num_shards=1, statistics="bn"):
    """Write parts as the released repository is laid out: no version, REPA-E's config, no tiles.

    `statistics` says where the latent statistics go: "bn", "config", "index" or "vae".
    """
    mean, variance = parts.transformer.bn.running_mean, parts.transformer.bn.running_var
    index = {
        "_class_name": ["pipeline", "CytoSynPipeline"],
        "transformer": ["sit", "SiT"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    configs = {name: dict(getattr(parts, name).config) for name in ("transformer", "vae")}
    configs["transformer"] |= {"path_type": "linear", "use_cfg": True, "class_dropout_prob": 0.1}
    tensors = {name: getattr(parts, name).state_dict() for name in ("transformer", "vae")}
    if statistics != "bn":
        tensors["transformer"] = {
            k: v for k, v in tensors["transformer"].items() if not k.startswith("bn.")
        }
    if statistics == "config":
        configs["transformer"] |= {
            "bn_running_mean": mean.tolist(),
            "bn_running_var": variance.tolist(),
        }
    elif statistics == "index":
        index |= {"latents_bias": mean.tolist(), "latents_scale": variance.rsqrt().tolist()}
    elif statistics == "vae":
        configs["vae"] |= {"latents_mean": mean.tolist(), "latents_std": variance.sqrt().tolist()}
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        _write_shards(folder / name, tensors[name], dtype, num_shards)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _write_shards(folder, tensors, dtype, num_shards):
    tensors = {
        k: v.detach().to(dtype if v.is_floating_point() else v.dtype).contiguous()
        for k, v in tensors.items()
    }
    if num_shards == 1:
        save_file(tensors, folder / WEIGHTS_NAME)
        return
    where = {}
    for number in range(num_shards):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {k: tensors[k] for k in sorted(tensors)[number::num_shards]}
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"weight_map": where}))


TISSUE, INK = (186, 112, 170), (30, 110, 60)


def slide_picture(grid, side, seed=0):
    """Draw a slide of squares of this side: # tissue, p green pen, b blurred tissue, . glass."""
    rng = np.random.default_rng(seed)
    rows = grid.split()
    picture = np.full((len(rows) * side, len(rows[0]) * side, 3), 243, np.uint8)
    for row, line in enumerate(rows):
        for column, kind in enumerate(line):
            square = picture[row * side : (row + 1) * side, column * side : (column + 1) * side]
            if kind == "#":
                square[:] = np.clip(TISSUE + rng.normal(0, 25, (side, side, 1)), 0, 255)
            elif kind in "pb":
                square[:] = INK if kind == "p" else TISSUE
    return picture


def write_slide(file, picture, *, mpp="0.25", power="40", dpcm=None, unit="CENTIMETER"):
    """Write a picture as an Aperio-like SVS, or with `mpp` and `power` None as a generic TIFF.

    Two levels, 1 and 4, in tiles of 256 px that are compressed without loss.
    """
    import tifffile  # an extra of the tests

    is_aperio = not (mpp is None and power is None)
    facts = "".join(f"|{k} = {v}" for k, v in (("AppMag", power), ("MPP", mpp)) if v is not None)
    scale = {} if dpcm is None else {"resolution": (dpcm, dpcm), "resolutionunit": unit}
    with tifffile.TiffWriter(file) as tiff:
        for level, image in enumerate((picture, picture[::4, ::4])):
            height, width = image.shape[:2]
            size = f"{width}x{height} [0,0 {width}x{height}] (256x256) JPEG/RGB Q=90"
            tiff.write(
                np.ascontiguousarray(image),
                tile=(256, 256),
                photometric="rgb",
                compression="adobe_deflate",
                description=f"Aperio Image Library v12.0\r\n{size}{facts}" if is_aperio else None,
                subfiletype=0 if is_aperio or level == 0 else 1,
                metadata=None,
                **scale,
            )
            if is_aperio and level == 0:  # the second page of an SVS is its thumbnail
                tiff.write(image[::16, ::16].copy(), photometric="rgb", metadata=None)
    return file


def damage_tile(file, index, level_page=0):
    """Overwrite the bytes of one 256 px tile of a slide with zeros."""
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[level_page]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(count))


def save_tile(file, tile):
    """Write a tile uint8 [3, H, W] as an image file, with the folders it needs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tile.permute(1, 2, 0).contiguous().numpy()).save(file)
    return file
