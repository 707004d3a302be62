"""Networks that turn tiles into features, all through one fixed path from pixels to numbers.

Real and generated tiles take the same path: uint8, scaled to [0, 1], resized only where a network
wants another side (bicubic, antialiased, in float32), that network's own mean and deviation,
float32, batches of one fixed size, the last one filled up. What was done is in `provenance`.

A name alone, or NAME=SOURCE, chooses a network:

* `tiny`: CLS of the encoder packaged with `tiny`, whichever model is evaluated;
* `own`: CLS of the evaluated model's own encoder, which is also its condition;
* `alexnet`: AlexNet's five maps, averaged over the tile; packaged, and used in no training stage;
* `inception=FILE.pth`: torchvision's ImageNet weights, which are not those of published FID;
* `dinov2`, `h0-mini`, `uni`, `uni2-h`, `virchow`, `virchow2`: published, most of them gated;
* `ARCHITECTURE=SOURCE`: any timm network.

SOURCE is a safetensors file, a folder with one, or a repository on the Hub that you may read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cytosyn_aug.config import Triple
from cytosyn_aug.io.json_files import read_json
from cytosyn_aug.model.checkpoint import EMBEDDED_MODEL, load_model
from cytosyn_aug.model.encoder import H0_MINI_MEAN, H0_MINI_STD, TileEncoder
from cytosyn_aug.model.hub import ENCODER_PATTERNS, announce_licence, find_folder
from cytosyn_aug.model.parts import load_strictly
from cytosyn_aug.model.tensors import read_tensors, weight_files
from training.evaluation.result_store import ResultStore, images_digest
from training.stages.perception import PerceptualNetwork

BATCH_SIZE = 16
TILES_PER_FILE = 64 * BATCH_SIZE  # of kept features
TILE_PX = 224
_HALF: Triple = (0.5, 0.5, 0.5)
_IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, slots=True, eq=False)
class Extractor:
    """A network with its path from pixels to features.

    Attributes:
        name: What it was asked for by.
        module: The network, evaluation mode, for the digest of its weights.
        embed: Maps float32 [B, 3, input_px, input_px], normalised, to features [B, F].
        layer: Which of the network's outputs the features are.
        mean: RGB mean in [0, 1] that is subtracted.
        std: RGB standard deviation that is divided by.
        input_px: Side the network is given.
        kept: Where features are kept between runs; None to extract them each time.
        golden: What `provenance` has measured, by the digest of the weights.
    """

    name: str
    module: nn.Module
    embed: Callable[[Tensor], Tensor]
    layer: str
    mean: Triple
    std: Triple
    input_px: int = TILE_PX
    kept: ResultStore | None = None
    golden: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the features of uint8 images [N, 3, H, W], float64 [N, F] on the CPU.

        Raises:
            ValueError: Images of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"got images of {images.dtype} {list(images.shape)}, expected uint8 [N, 3, H, W]; "
                "extractors normalise by themselves"
            )
        if self.kept is None:
            return self._extract(images)
        rows, path = [], self.provenance()
        for part in images.split(TILES_PER_FILE):
            made_from = path | {"images": images_digest(part)}
            rows.append(self.kept.get(self.name, made_from, partial(self._extract, part)))
        return torch.cat(rows)

    def _extract(self, images: Tensor) -> Tensor:
        device = next(self.module.parameters()).device
        rows = []
        for part in images.split(BATCH_SIZE):
            # Kernels round by batch shape, so all batches have the same.
            filled = torch.cat([part, part[-1:].expand(BATCH_SIZE - len(part), -1, -1, -1)])
            features = self.embed(self.preprocess(filled.to(device)))
            rows.append(features[: len(part)].double().cpu())
        return torch.cat(rows)

    def preprocess(self, images: Tensor) -> Tensor:
        """Return what the network is given for uint8 images [B, 3, H, W], float32."""
        values = images.float().div(255.0)
        if values.shape[2:] != (self.input_px, self.input_px):
            side = (self.input_px, self.input_px)
            values = F.interpolate(values, side, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            torch.tensor(x, device=images.device).view(1, 3, 1, 1) for x in (self.mean, self.std)
        )
        return values.sub(mean).div(std)

    def provenance(self) -> dict[str, object]:
        """Return all that a number depends on besides the tiles, for a report.

        `golden` is the norm of the features of one fixed picture: two machines that agree on it,
        and on the digest, extract alike.
        """
        weights = weights_digest(self.module)
        if weights not in self.golden:  # a whole batch, and every set of tiles asks
            ramp = torch.arange(TILE_PX) * 255 // (TILE_PX - 1)
            picture = torch.stack([ramp.expand(TILE_PX, -1), ramp.flip(0).expand(TILE_PX, -1)])
            picture = torch.cat([picture, picture[:1].transpose(1, 2)]).to(torch.uint8)
            self.golden[weights] = float(self._extract(picture[None]).norm())
        return {
            "weights": weights,
            "layer": self.layer,
            "input_px": self.input_px,
            "resize": "bicubic, antialiased, where the tile has another side",
            "mean": list(self.mean),
            "std": list(self.std),
            "dtype": "float32",
            "batch_size": BATCH_SIZE,
            "golden": float(f"{self.golden[weights]:.5g}"),
        }


def load_extractor(
    spec: str,
    *,
    own: TileEncoder | None = None,
    device: torch.device | str = "cpu",
    kept: ResultStore | None = None,
) -> Extractor:
    """Return the extractor of a name or NAME=SOURCE; the module's docstring lists them.

    Args:
        spec: Name or NAME=SOURCE.
        own: Encoder of the evaluated model, for `own`.
        device: Where it runs.
        kept: Where features are kept between runs.

    Raises:
        ValueError: Unknown name, a source where none belongs or none where one must be, weights
            that do not fit.
        FileNotFoundError: No such source.
        PermissionError: A gated repository.
        ConnectionError: The Hub cannot be reached.
    """
    name, _, source = spec.partition("=")
    if name in ("tiny", "own", "alexnet"):
        if source:
            raise ValueError(f"extractor {name} is packaged and takes no source, got {spec!r}")
        network = _alexnet() if name == "alexnet" else _encoder(name, own)
    elif name == "inception":
        network = _inception(source)
    else:
        network = _timm(name, source)
    network.module.to(device)
    return replace(network, kept=kept)


def weights_digest(module: nn.Module) -> str:
    """Return 16 hexadecimal digits of SHA-256 over names, types, shapes and bytes of the state."""
    whole = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        whole.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        whole.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def _encoder(name: str, own: TileEncoder | None) -> Extractor:
    encoder = own if name == "own" else load_model(EMBEDDED_MODEL).encoder
    if encoder is None:
        raise ValueError(
            "extractor own: this model was loaded without an encoder; leave it out, or load the "
            "model with one"
        )
    vit, config = encoder.vit, encoder.config
    return Extractor(
        name,
        encoder,
        lambda pixels: vit(pixels.to(vit.patch_embed.proj.weight.dtype))[:, 0],
        "CLS",
        tuple(config["mean"]),
        tuple(config["std"]),
        config["input_px"],
    )


def _alexnet() -> Extractor:
    network = PerceptualNetwork("alex")

    def embed(pixels: Tensor) -> Tensor:
        return torch.cat([m.float().mean((2, 3)) for m in network(pixels)], 1)

    # The network expects [-1, 1].
    return Extractor("alexnet", network, embed, "five maps, averaged", _HALF, _HALF)


def _inception(source: str) -> Extractor:
    file = Path(source)
    if not source or not file.is_file():
        raise ValueError(
            f"extractor inception got weights {source!r}, expected a file; give torchvision's as "
            "inception=inception_v3_google-0cc3c7bd.pth, or its safetensors form"
        )
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, init_weights=False)
    is_safe = file.suffix == ".safetensors"
    tensors = read_tensors([file]) if is_safe else torch.load(file, "cpu", weights_only=True)
    load_strictly(network, tensors, str(file))
    network.fc = nn.Identity()
    network.eval().requires_grad_(False)
    # torchvision's weights were ported from TensorFlow, which scales to [-1, 1].
    return Extractor("inception", network, network, "pooled, 2048", _HALF, _HALF, 299)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Published:
    """A published encoder: repository, and what its model card passes to `timm.create_model`."""

    repository: str
    architecture: str
    arguments: dict[str, Any]  # Any: timm's own arguments
    statistics: tuple[Triple, Triple] = _IMAGENET


_PUBLISHED = {
    "dinov2": _Published(
        repository="timm/vit_large_patch14_dinov2.lvd142m",
        architecture="vit_large_patch14_dinov2",
        arguments={},
    ),
    "h0-mini": _Published(
        repository="bioptimus/H0-mini",
        architecture="vit_base_patch14_reg4_dinov2",
        arguments={"mlp_ratio": 5.33334},
        statistics=(H0_MINI_MEAN, H0_MINI_STD),
    ),
    "uni": _Published(
        repository="MahmoodLab/UNI",
        architecture="vit_large_patch16_224",
        arguments={"init_values": 1e-5},
    ),
    "uni2-h": _Published(
        repository="MahmoodLab/UNI2-h",
        architecture="vit_giant_patch14_224",
        arguments={
            "depth": 24,
            "num_heads": 24,
            "embed_dim": 1536,
            "mlp_ratio": 5.33334,
            "init_values": 1e-5,
            "no_embed_class": True,
            "reg_tokens": 8,
        },
    ),
    "virchow": _Published(
        repository="paige-ai/Virchow",
        architecture="vit_huge_patch14_224",
        arguments={"mlp_ratio": 5.3375, "init_values": 1e-5},
    ),
    "virchow2": _Published(
        repository="paige-ai/Virchow2",
        architecture="vit_huge_patch14_224",
        arguments={"mlp_ratio": 5.3375, "init_values": 1e-5, "reg_tokens": 4},
    ),
}


def _timm(name: str, source: str) -> Extractor:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    known = _PUBLISHED.get(name)
    if known is None and not (source and timm.is_model(name)):
        raise ValueError(
            f"extractor {name!r} with weights {source!r}: expected tiny, own, alexnet, "
            f"inception=FILE, one of {', '.join(_PUBLISHED)}, or a timm ARCHITECTURE=SOURCE"
        )
    config, tensors = _read(source or (known.repository if known else ""))
    architecture = known.architecture if known else name
    arguments = (known.arguments if known else {}) | _shape_arguments(tensors)
    network = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    tensors = {k: v for k, v in tensors.items() if k.split(".")[0] not in ("head", "fc")}
    load_strictly(network, tensors, f"extractor {name}")
    network.eval().requires_grad_(False)
    usual = (
        known.statistics
        if known
        else (network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    )
    stated = config.get("pretrained_cfg", config)
    mean, std = (tuple(stated.get(k, v)) for k, v in zip(("mean", "std"), usual, strict=True))
    if isinstance(network, VisionTransformer):
        return Extractor(
            name, network, lambda x: network.forward_features(x)[:, 0], "CLS", mean, std
        )
    return Extractor(name, network, network, "pooled", mean, std)


def _shape_arguments(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return what timm must be told about a vision transformer that only its tensors say."""
    if "pos_embed" not in tensors or "patch_embed.proj.weight" not in tensors:
        return {}
    # Positions are interpolated to the tile's.
    arguments: dict[str, Any] = {"dynamic_img_size": True}
    num_positions, patch_px = (
        tensors["pos_embed"].shape[1],
        tensors["patch_embed.proj.weight"].shape[-1],
    )
    num_registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    for num_prefix in (0, 1, 1 + num_registers):  # positions may include those tokens
        side = math.isqrt(num_positions - num_prefix)
        if side * side == num_positions - num_prefix:
            arguments["img_size"] = side * patch_px
    wide, narrow = (tensors.get(f"blocks.0.mlp.fc{k}.weight") for k in (1, 2))
    if wide is not None and narrow is not None and wide.shape[0] == 2 * narrow.shape[1]:
        from timm.layers.mlp import SwiGLUPacked

        arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    if "blocks.0.attn.qkv.weight" in tensors and "blocks.0.ls1.gamma" not in tensors:
        arguments["init_values"] = None
    return arguments


def _read(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration, if any, and the tensors of a file, folder or repository."""
    if Path(source).is_file():
        if Path(source).suffix != ".safetensors":
            raise ValueError(f"{source} is no safetensors file; convert it, pickles are not loaded")
        return {}, read_tensors([Path(source)])
    folder = find_folder(source, patterns=ENCODER_PATTERNS)
    announce_licence(source, folder)
    file = folder / "config.json"
    config = read_json(file, "") if file.is_file() else {}
    return config, read_tensors(weight_files(folder, "model.safetensors"))
