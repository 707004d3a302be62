"""Does a loaded model do what its parts are for? A functional check of minutes, for real weights.

Weights can load strictly and still be wrong: another time direction, another sign, latents
whitened with other statistics, conditions of another encoder or of the wrong half of its output.
A number alone does not tell, since nobody here knows what the real model reaches. So the right
input is compared with wrong ones: same tiles, same noise, smaller error for most tiles. The checks
use the sample tiles that ship with the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cytosyn_aug.model.conditions import Conditions, check_finite, read_conditions
from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.solvers import interpolate, sample_noise, velocity_target
from cytosyn_aug.stain.density import tissue_moments

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TIMES = (0.2, 0.4, 0.6, 0.8)
# A wrong input is worse for most tiles and times; by chance it would be for half.
_MOST = 0.7


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
    at_times = ", ".join(f"{e:.2f} at {t}" for e, t in zip(error.mean(0), _TIMES, strict=True))
    yield Check(
        "velocity error on real latents",
        bool(error.isfinite().all()) and float(error.mean()) < 1.7,
        float(error.mean()),
        f"below 1.7, here {at_times}; predicting nothing scores 2, a wrong sign or time direction "
        "more. Else the latent statistics belong to another VAE, or the weights to another flow",
    )
    yield from _comparisons(generator, tiles, latents, cls, error)
    yield from _sampler_checks(generator, tiles, cls, steps)


@torch.no_grad()
def velocity_errors(
    generator: TileGenerator, latents: Tensor, cls: Tensor, *, late: float = 0.0
) -> Tensor:
    """Return the mean squared velocity error of each tile at four times, float32 [N, 4].

    Args:
        generator: The model.
        latents: Whitened latents [N, C, h, w].
        cls: Conditions [N, D].
        late: Added to the time that the network is told.
    """
    noise = sample_noise(range(len(latents)), generator.latent_shape).to(latents)
    target = velocity_target(latents, noise)
    rows = []
    for time in _TIMES:
        x_t = interpolate(latents, noise, time)
        t = torch.full((len(latents),), time + late, device=latents.device)
        features = torch.cat(
            [
                generator.velocity(x, s, c)
                for x, s, c in zip(*(y.split(4) for y in (x_t, t, cls)), strict=True)
            ]
        )
        rows.append((features.float() - target).square().flatten(1).mean(1))
    return torch.stack(rows, 1)


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
        cls = read_conditions(features, width, len(tiles))
        check_finite(cls)
        return cls.to(generator.device)
    if generator.encoder is None:
        return generator.null_condition.expand(len(tiles), -1)
    return generator.features(tiles).cls


def _comparisons(
    generator: TileGenerator, tiles: Tensor, latents: Tensor, cls: Tensor, error: Tensor
) -> Iterator[Check]:
    """Compare the right time and condition with wrong ones, tile by tile under equal noise."""
    for late in (-0.15, 0.15):
        wrong = velocity_errors(generator, latents, cls, late=late)
        cause = "the network ignores time, or runs along it differently"
        yield _compare(f"the right time predicts better than {late:+}", error, wrong, cause)
    for name, other, cause in _wrong_conditions(generator, tiles, cls):
        if not bool(cls.any()):
            yield Check(name, None, None, "needs an encoder or features")
        elif other is None:
            yield Check(name, None, None, "needs an encoder")
        else:
            yield _compare(name, error, velocity_errors(generator, latents, other), cause)


def _compare(name: str, right: Tensor, wrong: Tensor, cause: str) -> Check:
    share = float((right < wrong).float().mean())
    text = f"for at least {_MOST:.0%} of tiles and times; else {cause}"
    return Check(name, share >= _MOST, share, text)


@torch.no_grad()
def _wrong_conditions(
    generator: TileGenerator, tiles: Tensor, cls: Tensor
) -> Iterator[tuple[str, Tensor | None, str]]:
    """Yield what is asked, a wrong condition (None without an encoder), and the likely cause."""
    other, encoder = cls.roll(len(cls) // 2, 0), generator.encoder
    cause = "the features come from another encoder, or the condition is not used"
    yield "own features predict better than another laboratory's", other, cause
    null = generator.null_condition.expand_as(cls)
    yield "own features predict better than none", null, cause
    patches = None if encoder is None else generator.features(tiles).patches.mean(1)
    cause = "the condition is not CLS but the other half of a double vector"
    yield "own CLS predicts better than the mean of the patches", patches, cause
    pixels = None
    if encoder is not None:
        mean, std = (torch.tensor(encoder.config[k]).view(3, 1, 1) for k in ("mean", "std"))
        shift, scale = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        # Tiles that look to the encoder's own statistics as tiles would to ImageNet's.
        as_imagenet = ((tiles.cpu() / 255 - shift) / scale * std + mean) * 255
        pixels = encoder(as_imagenet.to(generator.device)).cls.float()
    cause = "the encoder was trained with other pixel statistics"
    yield "own pixel statistics predict better than ImageNet's", pixels, cause


def _sampler_checks(
    generator: TileGenerator, tiles: Tensor, cls: Tensor, steps: int
) -> Iterator[Check]:
    chosen = torch.tensor([0, len(tiles) // 2])
    generated = generator.sample(cls[chosen], steps=steps, sampler="euler_maruyama").cpu()
    density = tissue_moments(generated).mean
    red, green, blue = density.mean(0).tolist()
    yield Check(
        f"two tiles drawn by the reference sampler in {steps} steps absorb as H&E does",
        green > max(red, blue) and bool(((density > 0.05) & (density < 2.5)).all()),
        green,
        "mean tissue optical density of green between 0.05 and 2.5 and above red's and blue's, "
        f"here {red:.2f} and {blue:.2f}; else latents are decoded with other statistics",
    )
    contrast = float(generated.float().std((1, 2, 3)).min())
    yield Check(
        "contrast of the drawn tiles",
        5 < contrast < 100,
        contrast,
        "standard deviation of 5 to 100 grey levels; noise or a flat field lies outside",
    )
