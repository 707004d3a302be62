"""Compare this package's transformer and samplers with REPA-E's own code, number by number.

usage: python -m benchmarks.compare_with_repae REPAE_CHECKOUT [--size small|xl]
REPAE_CHECKOUT is a clone of https://github.com/End2End-Diffusion/REPA-E (MIT), of which
models/sit.py and samplers.py are imported as they are. Random weights, no downloads. Errors are
max |ours - theirs| / max |theirs|; the exit status is 1 if one reaches 1e-5 in float32 or 1e-7 in
float64, where both compute the time embedding and latent statistics in float32.
"""

import argparse
import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor, nn

from cytosyn_aug.model.solvers import (
    euler,
    euler_maruyama,
    guide,
    interpolate,
    linear_grid,
    reference_grid,
    velocity_target,
)
from cytosyn_aug.model.transformer import SiT

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-7}
NULL_CLASS = 1000  # written into their samplers
BATCH = 2
GUIDANCE = {"scale": 2.5, "low": 0.0, "high": 0.75}
# Arguments of both classes but for the condition, types and sampler steps of one run.
SMALL = {
    "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 96, "depth": 4,
    "num_heads": 4, "encoder_depth": 2, "z_dims": (24,), "projector_dim": 48,
}  # fmt: skip
XL = {
    "input_size": 28, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28,
    "num_heads": 16, "encoder_depth": 8, "z_dims": (768,), "projector_dim": 2048,
}  # fmt: skip
SIZES = {
    "small": (SMALL, 24, (torch.float32, torch.float64), 40),
    "xl": (XL, 768, (torch.float32,), 4),  # 2.7 GB of weights, shared by both networks
}
Row = tuple[str, Tensor, Tensor]  # what, ours, theirs


class FeatureEmbedder(nn.Module):
    """Stands in for their class embedder: class i means row i of a table, the null class zeros.

    Their samplers append integers for the null condition; so conditions stay integers there.
    """

    def __init__(self, features: Tensor, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features.shape[1], width)
        table = torch.zeros(NULL_CLASS + 1, features.shape[1])
        table[: len(features)] = features
        self.register_buffer("table", table, persistent=False)

    def forward(self, classes: Tensor, train: bool) -> Tensor:
        """Return embeddings [B, D] of integers [B]; nothing is dropped."""
        return self.linear(self.table[classes])


def load(file: Path) -> ModuleType:
    """Import one of their files by its path."""
    if not file.is_file():
        sys.exit(f"{file} does not exist; pass a checkout of End2End-Diffusion/REPA-E")
    spec = importlib.util.spec_from_file_location(f"repae_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randomise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw all weights, of scale 1/sqrt(inputs), and latent statistics; positions are kept."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 10
            parameter.data.normal_(0, fan_in**-0.5, generator=generator)
    network.bn.running_mean.normal_(0, 1, generator=generator)
    network.bn.running_var.uniform_(0.5, 20, generator=generator)


def build(sit: ModuleType, size: str, features: Tensor) -> tuple[SiT, nn.Module]:
    """Return our network and theirs, in evaluation mode, sharing the same tensors."""
    settings, num_features, _, _ = SIZES[size]
    theirs = sit.SiT(
        **settings, path_type="linear", decoder_hidden_size=settings["hidden_size"],
        num_classes=NULL_CLASS, qk_norm=False, fused_attn=True,
    )  # fmt: skip
    theirs.y_embedder = FeatureEmbedder(features, settings["hidden_size"])
    randomise(theirs, torch.Generator().manual_seed(0))
    with torch.device("meta"):
        ours = SiT(**settings, conditioning_dim=num_features)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    return ours.eval(), theirs.eval()


def compare_networks(ours: SiT, theirs: nn.Module, features: Tensor) -> Iterator[Row]:
    """Yield outputs of both networks on the same latents."""
    dtype = features.dtype
    generator = torch.Generator().manual_seed(1)
    side, channels = ours.config["input_size"], ours.config["in_channels"]
    latents, eps = torch.randn(2, BATCH, channels, side, side, generator=generator).to(dtype)
    t = torch.rand(BATCH, generator=generator).to(dtype)
    classes = torch.arange(BATCH)
    yield "fixed positions", ours.fixed_positions().to(dtype), theirs.pos_embed

    velocity, tokens = ours.forward_tokens(latents, t, features)
    yield "velocity (inference)", velocity, theirs.inference(latents, t, classes)
    depth = theirs.encoder_depth
    feats = theirs.forward_feats(latents, t, classes, depth)
    yield f"tokens after block {depth} (forward_feats)", tokens, feats
    stats = theirs.extract_latents_stats()
    bias, scale = (stats[k].view(1, -1, 1, 1) for k in ("latents_bias", "latents_scale"))
    yield "whitened latents", ours.whiten(latents), (latents - bias) * scale

    # Their training forward whitens with the batch norm in evaluation mode, which adds its eps.
    times = t.view(-1, 1, 1, 1)
    targets = [torch.randn(BATCH, tokens.shape[1], w).to(dtype) for w in ours.config["z_dims"]]
    kwargs = {"path_type": "linear", "prediction": "v", "align_only": False}
    out = theirs(latents, classes, targets, kwargs, time_input=times, noises=eps)
    x = ours.bn(latents)
    velocity, tokens = ours.forward_tokens(interpolate(x, eps, times), t, features)
    yield "velocity (training forward)", velocity, out["model_output"]
    yield "projected tokens", ours.projectors[0](tokens), out["zs_tilde"][0]
    loss = (velocity - velocity_target(x, eps)).square().mean((1, 2, 3))
    yield "denoising loss", loss, out["denoising_loss"]


def compare_samplers(
    ours: SiT, theirs: nn.Module, samplers: ModuleType, features: Tensor, num_steps: int
) -> Iterator[Row]:
    """Yield samples of both from the same start and the same noise at every step."""
    dtype = features.dtype
    generator = torch.Generator().manual_seed(2)
    side, channels = ours.config["input_size"], ours.config["in_channels"]
    shape = (BATCH, channels, side, side)
    start = torch.randn(shape, generator=generator).to(dtype)
    steps = [torch.randn(shape, generator=generator).double() for _ in range(num_steps - 1)]
    null = torch.zeros(features.shape[1], dtype=dtype)
    classes = torch.arange(BATCH)
    for guidance in ({"scale": 1.0}, GUIDANCE):
        velocity = guide(ours, features, null, **guidance)
        given = {
            "num_steps": num_steps,
            "cfg_scale": guidance["scale"],
            "guidance_low": guidance.get("low", 0.0),
            "guidance_high": guidance.get("high", 1.0),
        }
        what = "without guidance" if guidance["scale"] == 1 else "guided in [0, 0.75]"
        recorded = itertools.chain(steps, itertools.repeat(None))  # one more draw would fail
        with mock.patch.object(torch, "randn_like", side_effect=recorded) as draw:
            reference = samplers.euler_maruyama_sampler(theirs, start, classes, **given)
        assert draw.call_count == num_steps - 1
        sample = euler_maruyama(
            velocity, start.double(), steps.__getitem__, reference_grid(num_steps)
        )
        yield f"SDE Euler-Maruyama, {num_steps} steps, {what}", sample, reference
        reference = samplers.euler_sampler(theirs, start, classes, **given)
        sample = euler(velocity, start.double(), linear_grid(num_steps))
        yield f"ODE Euler, {num_steps} steps, {what}", sample, reference


def main() -> int:
    """Print one line a comparison; return 1 if any fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, metavar="REPAE_CHECKOUT")
    parser.add_argument("--size", choices=SIZES, default="small")
    args = parser.parse_args()
    sit, samplers = load(args.checkout / "models" / "sit.py"), load(args.checkout / "samplers.py")
    _, num_features, dtypes, num_steps = SIZES[args.size]
    features = torch.randn(BATCH, num_features, generator=torch.Generator().manual_seed(3))
    ours, theirs = build(sit, args.size, features)
    num_parameters = sum(p.numel() for p in ours.parameters())
    print(f"{args.size}: {num_parameters:,} parameters, torch {torch.__version__}, nothing stubbed")
    print("all layers random, as zero-initialised last layers would hide errors; in their network")
    print("y_embedder is a linear layer of features, the null class 1000 a feature of zeros")

    failures = 0
    for dtype in dtypes:
        for network in (ours, theirs):
            nn.Module.to(network, dtype)  # diffusers' own `to` warns of nothing here
        features = features.to(dtype)
        head = f"{dtype}, tolerance {TOLERANCES[dtype]:g}"
        print(f"\n{head:<57}max |theirs|   relative error")
        with torch.no_grad():
            for what, a, b in itertools.chain(
                compare_networks(ours, theirs, features),
                compare_samplers(ours, theirs, samplers, features, num_steps),
            ):
                error = ((a - b).abs().max() / b.abs().max()).item()
                is_close = a.shape == b.shape and error < TOLERANCES[dtype]  # false for NaN
                failures += not is_close
                mark = "" if is_close else "  FAILED"
                print(f"  {what:<55}{b.abs().max().item():12.4f}{error:17.2e}{mark}", flush=True)
    print(f"\n{failures} comparisons failed" if failures else "\nall agree")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
