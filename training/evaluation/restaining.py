"""Which way of restaining works? A table of variants and ablations, measured on given slides.

Two questions, as in the project's acceptance tool but on training slides and batched:

* known answer: a random known change of stain S; reference = S(other tiles of the slide), content
  = tiles of the same slide, truth = S(content). Share of the colour error (Delta E 76) removed.
* gap: content and reference from different slides; share of the Lab Wasserstein distance to
  other tiles of the reference slide that is closed.

The method in use reads stain with the probe. The variants that edit with the diffusion model end
alike: the change from the round trip to the edited decode is matched by moments in optical density
and applied to the original pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from skimage.color import rgb2lab
from torch import Tensor

from cytosyn_aug.model.generator import TileGenerator
from cytosyn_aug.model.solvers import (
    adams_bashforth2,
    euler,
    guide,
    interpolate,
    linear_grid,
    sample_noise,
)
from cytosyn_aug.stain.density import (
    apply_density_map,
    density_moments,
    match_moments,
    pooled_density,
    tissue_weight,
)
from cytosyn_aug.stain.estimate import reference_statistics
from cytosyn_aug.stain.recipe import EditRecipe
from cytosyn_aug.stain.reference import StainReference
from cytosyn_aug.stain.restain import restain
from training.data.batches import TileSet, change_stain, stain_maps, step_generator

Restain = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way of restaining with the model.

    Attributes:
        start: "noise" the latents to `noise_level`, "invert" them by the ODE, or "flow": integrate
            the difference of the two velocities (FlowEdit).
        condition: Features on the way back: the reference's "mean", the content's own "shifted"
            by the difference of means, or "shuffled" (another slide's; an ablation).
        base: What the colour change starts from: the "decode" of the content, or the same edit
            under the content's "own" features, which cancels the model's bias.
        slide_source: Whether the source's mean is that of all content tiles, or each tile's own.
    """

    start: Literal["noise", "invert", "flow", "none"] = "noise"
    condition: Literal["mean", "shifted", "shuffled"] = "shifted"
    base: Literal["decode", "own"] = "decode"
    latents: Literal["keep", "match"] = "keep"
    slide_source: bool = False
    noise_level: float = 0.6
    steps: int = 6
    guidance: float = 1.0


def variant_method(generator: TileGenerator, variant: Variant, shuffled: Tensor) -> Restain:
    """Return the function (content, reference) -> restained content of a variant."""

    def run(content: Tensor, reference: Tensor) -> Tensor:
        own = generator.features(content).cls
        target = generator.features(reference).cls.mean(0)
        if variant.condition == "mean":
            condition = target.expand_as(own)
        else:
            if variant.condition == "shuffled":
                target = shuffled
            source = own.mean(0, keepdim=True) if variant.slide_source else own
            condition = own + target - source
        z = generator.whiten(generator.encode(content).mean)
        seeds = list(range(len(content)))
        start = z
        if variant.latents == "match":
            z_ref = generator.whiten(generator.encode(reference).mean)
            start = _match_latents(z, z_ref, variant.slide_source)
        edited = _edit(generator, variant, start, own, condition, seeds)
        base = z if variant.base == "decode" else _edit(generator, variant, z, own, own, seeds)
        before, after = (generator.decode(x) for x in (base, edited))
        return recolour(content, before, after)

    return run


def recolour(content: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Apply to `content` the colour change from `before` to `after`, all uint8 [B, 3, H, W]."""
    a, b = pooled_density(before), pooled_density(after)
    weight = tissue_weight(a)
    change = match_moments(density_moments(a, weight), density_moments(b, weight))
    return apply_density_map(content, change).round().to(torch.uint8)


def stain_method(
    generator: TileGenerator, probe_share: float, by_slide: bool, then: Variant | None = None
) -> Restain:
    """Return the method in use; share 0 is optical transport of colour, without any network.

    Args:
        generator: The model.
        probe_share: See `cytosyn_aug.stain.recipe.EditRecipe`.
        by_slide: Whether the source is fitted to all content tiles, or each tile stands alone.
        then: A variant that edits the restained tiles once more, with the transformer.
    """
    recipe = EditRecipe(probe_share=probe_share)

    def run(content: Tensor, reference: Tensor) -> Tensor:
        target = StainReference.fit(generator, reference)
        source = StainReference.fit(generator, content) if by_slide else None
        targets = reference_statistics(generator, target, recipe).to(content.device)
        strength = torch.ones(len(content), device=content.device)
        mpp = generator.tile.mpp
        restained = restain(
            generator, content, targets, strength, mpp=mpp, source=source, recipe=recipe
        ).images
        restained = restained.round().to(torch.uint8)
        if then is None:
            return restained
        own = generator.features(restained).cls
        seeds = list(range(len(content)))
        z = generator.whiten(generator.encode(restained).mean)
        edited = _edit(generator, then, z, own, own, seeds)
        return recolour(restained, *(generator.decode(x) for x in (z, edited)))

    return run


def rival_method(name: Literal["macenko", "reinhard"]) -> Restain:
    """Return torchstain's normaliser, fitted to a mosaic of the reference tiles.

    A tile that it cannot handle (a singular stain matrix) comes back as it was.
    """
    import torchstain

    def run(content: Tensor, reference: Tensor) -> Tensor:
        classes = {
            "macenko": torchstain.normalizers.MacenkoNormalizer,
            "reinhard": torchstain.normalizers.ReinhardNormalizer,
        }
        normaliser = classes[name]("torch")
        normaliser.fit(torch.cat([torch.cat(list(x), 2) for x in reference.split(4)], 1))
        out = []
        for tile in content:
            try:
                if name == "macenko":
                    normalized = normaliser.normalize(tile, stains=False)[0]
                else:
                    normalized = normaliser.normalize(tile.float())
            except torch.linalg.LinAlgError:
                normalized = tile.permute(1, 2, 0)
            out.append(normalized.float().round().clamp(0, 255).to(torch.uint8).permute(2, 0, 1))
        return torch.stack(out)

    return run


def methods(generator: TileGenerator, shuffled: Tensor) -> dict[str, Restain]:
    """Return every row of the table.

    Args:
        generator: The model.
        shuffled: Features [D] of a slide that is neither content nor reference.
    """
    table = {
        "torchstain macenko": rival_method("macenko"),
        "torchstain reinhard": rival_method("reinhard"),
    } | {
        f"probe share {share:g}, {'slide' if by_slide else 'tile'}": stain_method(
            generator, share, by_slide
        )
        for by_slide in (False, True)
        for share in (0.0, 0.5, 0.75, 1.0)
    }
    variants = {
        "latent statistics, no transformer": Variant(start="none", latents="match"),
        "noise 0.5, reference's features": Variant(noise_level=0.5, condition="mean"),
        "noise 0.7, reference's features": Variant(noise_level=0.7, condition="mean"),
        "noise 0.7, guidance 2": Variant(noise_level=0.7, condition="mean", guidance=2.0),
        "noise 0.7, against own features": Variant(noise_level=0.7, condition="mean", base="own"),
        "noise 0.7, shifted by slide": Variant(noise_level=0.7, slide_source=True, base="own"),
        "noise 0.7, shuffled features": Variant(noise_level=0.7, condition="shuffled"),
        "inversion 0.7": Variant(start="invert", noise_level=0.7, condition="mean"),
        "FlowEdit 0.7": Variant(start="flow", noise_level=0.7, condition="mean"),
        "latent statistics + noise 0.5": Variant(
            latents="match", noise_level=0.5, condition="mean"
        ),
    }
    table |= {k: variant_method(generator, v, shuffled) for k, v in variants.items()}
    table["probe share 0.75, tile, then noise 0.5"] = stain_method(
        generator, 0.75, False, Variant(noise_level=0.5)
    )
    return table


def known_answer(tiles: TileSet, method: Restain, per_slide: int = 2) -> float:
    """Return the share of Delta E removed over slides and random stain changes."""
    before, after = [], []
    for k in range(len(tiles.slides)):
        images = tiles.images[tiles.slide_index == k]
        order = torch.randperm(len(images), generator=step_generator(7, k))
        content, reference = images[order[:8]], images[order[8:24]]
        for j in range(per_slide):
            change = stain_maps(1, step_generator(7, k, stream=10 + j), share=1.0)
            truth = change_stain(content, change.expand(8, 3, 3))
            restained = method(content, change_stain(reference, change.expand(16, 3, 3)))
            for a, b, c in zip(content, restained, truth, strict=True):
                lab = [_lab(x) for x in (a, b, c)]
                mask = lab[0][..., 0] < 88
                if mask.sum() < 500:
                    continue
                before.append(np.linalg.norm(lab[0] - lab[2], axis=-1)[mask].mean())
                after.append(np.linalg.norm(lab[1] - lab[2], axis=-1)[mask].mean())
    return float(1 - np.mean(after) / np.mean(before))


def gap_closed(tiles: TileSet, method: Restain, num_pairs: int = 8) -> float:
    """Return the share of the Lab gap between slides that is closed."""
    pairs = list(itertools.permutations(range(len(tiles.slides)), 2))
    order = torch.randperm(len(pairs), generator=step_generator(8, 0))[:num_pairs].tolist()
    closed = []
    for content_slide, reference_slide in (pairs[i] for i in order):
        content = tiles.images[tiles.slide_index == content_slide][:8]
        reference = tiles.images[tiles.slide_index == reference_slide]
        target = _lab_tissue(reference[16:40])
        restained = method(content, reference[:16])
        closed.append((_gap(_lab_tissue(content), target), _gap(_lab_tissue(restained), target)))
    before, after = np.array(closed).mean(0)
    return float(1 - after / before)


def _edit(
    generator: TileGenerator,
    variant: Variant,
    z: Tensor,
    own: Tensor,
    condition: Tensor,
    seeds: list[int],
) -> Tensor:
    level, null = variant.noise_level, generator.null_condition
    forward = guide(generator.velocity, condition, null, variant.guidance, high=1.0)
    if variant.start == "none":
        return z
    times = linear_grid(variant.steps, level)
    if variant.start == "invert":
        plain = guide(generator.velocity, own, null)
        noised = adams_bashforth2(plain, z, times[::-1])
        return adams_bashforth2(forward, noised, times)
    eps = sample_noise(seeds, generator.latent_shape)
    if variant.start == "flow":
        plain = guide(generator.velocity, own, null)

        def difference(x: Tensor, t: float) -> Tensor:
            noised = interpolate(z, eps, t)
            return forward(x + noised - z, t) - plain(noised, t)

        return euler(difference, z, times)
    return adams_bashforth2(forward, interpolate(z, eps, level), times)


def _match_latents(z: Tensor, reference: Tensor, by_slide: bool) -> Tensor:
    """Match mean and covariance over positions of the latents to the reference's (WCT)."""
    target = reference.transpose(0, 1).flatten(1).double()
    groups = [z] if by_slide else list(z.split(1))
    out = []
    for group in groups:
        flat = group.transpose(0, 1).flatten(1).double()
        a, b = (torch.cov(x) + 1e-4 * torch.eye(4, dtype=x.dtype) for x in (flat, target))
        root = _root(a)
        inverse = torch.linalg.inv(root)
        matrix = inverse @ _root(root @ b @ root) @ inverse
        moved = matrix @ (flat - flat.mean(1, keepdim=True)) + target.mean(1, keepdim=True)
        out.append(moved.float().unflatten(1, (len(group), *z.shape[2:])).transpose(0, 1))
    return torch.cat(out)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(1e-8).sqrt()) @ vectors.T


def _lab(image: Tensor) -> np.ndarray:
    return rgb2lab(image.permute(1, 2, 0).numpy())


def _lab_tissue(images: Tensor) -> np.ndarray:
    lab = np.concatenate([_lab(x).reshape(-1, 3) for x in images])
    return lab[lab[:, 0] < 88][::23]


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    return sum(wasserstein_distance(a[:, i], b[:, i]) for i in range(3))
