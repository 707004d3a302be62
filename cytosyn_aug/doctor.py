"""Does a loaded model do what its parts are for? A functional check of minutes, for real weights.

Weights can load strictly and still be wrong: another time direction, another sign, latents
whitened with other statistics, conditions of another encoder. Each of these changes a number that
is known beforehand. The checks use the sample tiles that ship with the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cytosyn_aug.conditions import Conditions, read_conditions
from cytosyn_aug.flow import interpolate, velocity_target
from cytosyn_aug.generator import TileGenerator
from cytosyn_aug.sampling import sample_noise
from cytosyn_aug.stain import tissue_moments

_TIMES = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, slots=True)
class Check:
    """One question, its answer, and what was expected.

    Attributes:
        name: What was asked.
        passed: True, False, or None if it could not be asked.
        value: The measured number.
        expected: The range, in words, with the likely cause of a failure.
    """

    name: str
    passed: bool | None
    value: float | None
    expected: str


def examine(
    generator: TileGenerator, tiles: Tensor, *, features: Conditions | None = None, steps: int = 250
) -> Iterator[Check]:
    """Yield the checks one by one, cheap ones first.

    Args:
        generator: The model.
        tiles: uint8 [N, 3, size, size], real tissue of at least two looks, N >= 4.
        features: CLS vectors of these tiles, or a file of them, if the model has no encoder.
        steps: Steps of the reference sampler, which draws two tiles.

    Raises:
        ValueError: Features of another width or number than the tiles.
    """
    cls = _conditions(generator, tiles, features)
    latents = generator.whiten(generator.encode(tiles).mean)
    yield _whitened(latents)
    yield _round_trip(tiles, generator.decode(latents))
    error = velocity_errors(generator, latents, cls)
    yield Check(
        "velocity error on real latents",
        bool(error.isfinite().all()) and float(error.mean()) < 1.7,
        float(error.mean()),
        "below 1.7; predicting nothing scores 2 and a wrong sign or time direction more. Else "
        "the latent statistics belong to another VAE, or the weights to another flow",
    )
    yield from _condition_checks(generator, latents, cls, error)
    yield from _sampler_checks(generator, tiles, cls, steps)


@torch.no_grad()
def velocity_errors(generator: TileGenerator, latents: Tensor, cls: Tensor) -> Tensor:
    """Return the mean squared velocity error of each tile, averaged over four times, float32 [N].

    Args:
        generator: The model.
        latents: Whitened latents [N, C, h, w].
        cls: Conditions [N, D].
    """
    noise = sample_noise(range(len(latents)), generator.latent_shape).to(latents)
    rows = []
    for time in _TIMES:
        x_t = interpolate(latents, noise, time)
        t = torch.full((len(latents),), time, device=latents.device)
        found = torch.cat(
            [
                generator.velocity(x, s, c)
                for x, s, c in zip(*(y.split(4) for y in (x_t, t, cls)), strict=True)
            ]
        )
        target = velocity_target(latents, noise)
        rows.append((found.float() - target).square().flatten(1).mean(1))
    return torch.stack(rows).mean(0)


def verdict(checks: list[Check]) -> str:
    """Return the summary: how many failed, and how many could not be asked."""
    failed = [c.name for c in checks if c.passed is False]
    skipped = [c.name for c in checks if c.passed is None]
    text = f"FAILED: {', '.join(failed)}" if failed else "all checks passed"
    return text + (f"; not verified: {', '.join(skipped)}" if skipped else "")


def as_json(checks: list[Check]) -> list[dict[str, Any]]:
    """Return the checks as JSON values."""
    return [asdict(c) for c in checks]


def _whitened(latents: Tensor) -> Check:
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    worst = float(torch.maximum(mean.abs(), std.log().abs()).max())
    return Check(
        "whitened latents of real tiles have mean 0 and std 1",
        worst < 1.5,
        worst,
        "largest |mean| and |log std| of a channel below 1.5; else latent statistics and VAE do "
        "not belong together",
    )


def _round_trip(tiles: Tensor, decoded: Tensor) -> Check:
    mse = (tiles.double() - decoded.cpu().double()).square().flatten(1).mean(1)
    psnr = float((10 * torch.log10(255.0**2 / mse)).mean())
    return Check(
        "autoencoder round trip",
        psnr > 18,
        psnr,
        "above 18 dB (tiny 23, an SD-VAE about 27); else the VAE's weights or layout are wrong",
    )


def _conditions(generator: TileGenerator, tiles: Tensor, features: Conditions | None) -> Tensor:
    if features is not None:
        width = len(generator.null_condition)
        return read_conditions(features, width, len(tiles)).to(generator.device)
    if generator.encoder is None:
        return generator.null_condition.expand(len(tiles), -1)
    return generator.features(tiles).cls


def _condition_checks(
    generator: TileGenerator, latents: Tensor, cls: Tensor, error: Tensor
) -> Iterator[Check]:
    name = "own features predict a tile better than another laboratory's"
    expected = (
        "for at least 70 % of the tiles; else the features come from another encoder, another "
        "normalisation or the wrong half of a 1536-vector"
    )
    if not bool(cls.any()):
        yield Check(name, None, None, f"{expected}. Needs an encoder or features")
        return
    other = velocity_errors(generator, latents, cls.roll(len(cls) // 2, 0))
    share = float((error < other).float().mean())
    yield Check(name, share >= 0.7, share, expected)


def _sampler_checks(
    generator: TileGenerator, tiles: Tensor, cls: Tensor, steps: int
) -> Iterator[Check]:
    chosen = torch.tensor([0, len(tiles) // 2])
    made = generator.sample(cls[chosen], steps=steps, sampler="euler_maruyama").cpu()
    real, fake = (tissue_moments(x).mean for x in (tiles[chosen].cpu(), made))
    apart = float((real - fake).abs().max())
    yield Check(
        f"colour of two tiles drawn by the reference sampler in {steps} steps",
        apart < 0.4,
        apart,
        "mean tissue optical density within 0.4 of the sources'",
    )
    contrast = float(made.float().std((1, 2, 3)).min())
    yield Check(
        "contrast of the drawn tiles",
        5 < contrast < 100,
        contrast,
        "standard deviation of 5 to 100 grey levels; noise or a flat field lies outside",
    )
