"""Synthetic H&E inside a training loop: the public names, loaded on first use.

Importing the package imports no torch, so that `cytosyn-aug --help` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cytosyn_aug.cache.encodings import (
        encode_cached,
        encodings_spec,
        features_cached,
        fill_encodings,
    )
    from cytosyn_aug.cache.spec import CacheSpec, Field
    from cytosyn_aug.cache.store import LatentCache
    from cytosyn_aug.config import TileSpec
    from cytosyn_aug.images import tile_key
    from cytosyn_aug.model.conditions import FeatureTable
    from cytosyn_aug.model.encoder import Features
    from cytosyn_aug.model.generator import TileGenerator
    from cytosyn_aug.model.memory import MemoryPlan, plan_memory
    from cytosyn_aug.slides.normalize import normalize_slide
    from cytosyn_aug.slides.recipe import SlideRecipe, SlideReport
    from cytosyn_aug.stain.density import is_tissue
    from cytosyn_aug.stain.macenko import MacenkoReference
    from cytosyn_aug.stain.recipe import EditRecipe
    from cytosyn_aug.stain.reference import StainReference
    from cytosyn_aug.stain.reinhard import ReinhardReference
    from cytosyn_aug.stain.transport import DensityReference
    from cytosyn_aug.transforms.cached_variants import CachedVariants, LatentVariant
    from cytosyn_aug.transforms.classical import (
        DensityTransport,
        MacenkoNormalize,
        ReinhardNormalize,
    )
    from cytosyn_aug.transforms.redraw import redraw_latents
    from cytosyn_aug.transforms.replay import ReplayBank
    from cytosyn_aug.transforms.resample import ConditionedResample
    from cytosyn_aug.transforms.schedules import Ramp
    from cytosyn_aug.transforms.stain_transfer import StainNormalize, StainTransfer
    from cytosyn_aug.transforms.stain_views import StainViews
    from cytosyn_aug.transforms.variants import fill_variants, variants_spec

_HOMES = {
    "CacheSpec": "cache.spec",
    "CachedVariants": "transforms.cached_variants",
    "ConditionedResample": "transforms.resample",
    "DensityReference": "stain.transport",
    "DensityTransport": "transforms.classical",
    "EditRecipe": "stain.recipe",
    "FeatureTable": "model.conditions",
    "Features": "model.encoder",
    "Field": "cache.spec",
    "LatentCache": "cache.store",
    "LatentVariant": "transforms.cached_variants",
    "MacenkoNormalize": "transforms.classical",
    "MacenkoReference": "stain.macenko",
    "MemoryPlan": "model.memory",
    "Ramp": "transforms.schedules",
    "ReinhardNormalize": "transforms.classical",
    "ReinhardReference": "stain.reinhard",
    "ReplayBank": "transforms.replay",
    "SlideRecipe": "slides.recipe",
    "SlideReport": "slides.recipe",
    "StainNormalize": "transforms.stain_transfer",
    "StainReference": "stain.reference",
    "StainTransfer": "transforms.stain_transfer",
    "StainViews": "transforms.stain_views",
    "TileGenerator": "model.generator",
    "TileSpec": "config",
    "encode_cached": "cache.encodings",
    "features_cached": "cache.encodings",
    "fill_encodings": "cache.encodings",
    "fill_variants": "transforms.variants",
    "encodings_spec": "cache.encodings",
    "is_tissue": "stain.density",
    "normalize_slide": "slides.normalize",
    "plan_memory": "model.memory",
    "redraw_latents": "transforms.redraw",
    "tile_key": "images",
    "variants_spec": "transforms.variants",
}

__all__ = [
    "CacheSpec",
    "CachedVariants",
    "ConditionedResample",
    "DensityReference",
    "DensityTransport",
    "EditRecipe",
    "FeatureTable",
    "Features",
    "Field",
    "LatentCache",
    "LatentVariant",
    "MacenkoNormalize",
    "MacenkoReference",
    "MemoryPlan",
    "Ramp",
    "ReinhardNormalize",
    "ReinhardReference",
    "ReplayBank",
    "SlideRecipe",
    "SlideReport",
    "StainNormalize",
    "StainReference",
    "StainTransfer",
    "StainViews",
    "TileGenerator",
    "TileSpec",
    "encode_cached",
    "encodings_spec",
    "features_cached",
    "fill_encodings",
    "fill_variants",
    "is_tissue",
    "normalize_slide",
    "plan_memory",
    "redraw_latents",
    "tile_key",
    "variants_spec",
]


def __getattr__(name: str) -> object:
    """Import a public name from its module."""
    if name == "offline":
        return _offline()
    if name not in _HOMES:
        raise AttributeError(f"module 'cytosyn_aug' has no attribute {name!r}")
    return getattr(import_module(f"cytosyn_aug.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """Name what there is, though nothing is loaded yet."""
    return sorted({*globals(), *__all__, "offline"})


def _offline() -> object:
    try:
        return import_module("cytosyn_aug.offline")
    except ModuleNotFoundError as error:
        if error.name == "fcntl":
            raise ModuleNotFoundError("offline needs a POSIX system, for its locks") from error
        raise ModuleNotFoundError(
            f'{error.name} is missing; install it with: pip install "cytosyn-aug[offline]", in '
            'a checkout -e ".[offline]"',
            name=error.name,
        ) from error
