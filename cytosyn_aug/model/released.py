"""Released model folders: what their files state, translated to this package's arguments.

The released repository is gated and its files were never seen here; what is known of them comes
from code that loads them. So nothing is assumed silently: what a folder states and this package
does not use becomes a note, what contradicts it an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cytosyn_aug.config import PART_NAMES, Json
from cytosyn_aug.model.tensors import KeyMap

# Settings of REPA-E's class that change what the network computes, with the only value we compute.
_REQUIRED: Mapping[str, tuple[object, ...]] = {
    "path_type": ("linear",),
    "prediction": ("v", "velocity"),
    "qk_norm": (False,),
}
# Settings that matter in training only, or are read elsewhere.
_WITHOUT_EFFECT = {
    "class_dropout_prob", "use_cfg", "fused_attn", "bn_momentum", "decoder_hidden_size",
    "bn_running_mean", "bn_running_var", "latents_bias", "latents_scale", "z_dims",
}  # fmt: skip
# Entries of a pipeline that nothing here needs.
_PIPELINE_ONLY = {"scheduler", "safety_checker", "feature_extractor", "image_encoder"}


class Read(NamedTuple):
    """Arguments of a part's class, and remarks on what the folder states differently."""

    settings: Json
    notes: tuple[str, ...]


def transformer_settings(config: Json, tensors: Mapping[str, Tensor], cls: type) -> Read:
    """Translate a released `transformer/config.json`.

    Args:
        config: The file's content.
        tensors: The transformer's tensors: they decide on the projector and the condition's width.
        cls: The class to build.

    Raises:
        ValueError: A setting under which the network would compute something else.
    """
    problems = [
        f"{k} is {config[k]!r}, expected {' or '.join(map(repr, allowed))}"
        for k, allowed in _REQUIRED.items()
        if config.get(k) is not None and config[k] not in allowed
    ]
    if problems:
        raise ValueError(f"transformer/config.json asks for another network: {'; '.join(problems)}")
    read = known_settings(config, cls, "transformer", _WITHOUT_EFFECT | _REQUIRED.keys())
    settings, notes = dict(read.settings), list(read.notes)
    settings["z_dims"] = widths = _projector_widths(tensors)
    stated = config.get("z_dims", (768,))
    if list(widths) != (list(stated) if isinstance(stated, list | tuple) else [stated]):
        notes.append(f"transformer: alignment projector of widths {list(widths)} by its tensors")
    if config.get("use_cfg") is False or config.get("class_dropout_prob") == 0:
        notes.append(
            "transformer/config.json: trained without dropping the condition; guidance other "
            "than 1 and unconditional tiles mean nothing"
        )
    condition = tensors.get("y_embedder.linear.weight")
    if "conditioning_dim" not in settings and condition is not None and condition.ndim == 2:
        settings["conditioning_dim"] = condition.shape[1]
        notes.append(f"transformer: conditioning_dim {condition.shape[1]} by its tensors")
    return Read(settings, tuple(notes))


def known_settings(config: Json, cls: type, part: str, ignored: set[str] | None = None) -> Read:
    """Keep the settings a class takes; the others become notes.

    Args:
        config: Content of a `config.json`.
        cls: The class.
        part: Name for the notes.
        ignored: Names that need no note.
    """
    taken = set(inspect.signature(cls.__init__).parameters) - {"self"}  # type: ignore[misc]
    public = {k: v for k, v in config.items() if not k.startswith("_")}
    notes = tuple(
        f"{part}/config.json states {k} = {v!r}, which is not used"
        for k, v in sorted(public.items())
        if k not in taken | (ignored or set())
    )
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in public.items() if k in taken}
    return Read(kept, notes)


def index_notes(index: Json) -> tuple[str, ...]:
    """Return remarks on what `model_index.json` states beyond the parts that are read here."""
    read = {*PART_NAMES, "tile", "format_version", "latents_bias", "latents_scale"}
    return tuple(
        f"model_index.json states {k} = {v!r}, which is not used"
        for k, v in sorted(index.items())
        if not k.startswith("_") and k not in read | _PIPELINE_ONLY and v != [None, None]
    )


class LatentStatistics(NamedTuple):
    """Per-channel mean and variance of the VAE's latents, float32 [C], and their source."""

    mean: Tensor
    variance: Tensor
    source: str


def latent_statistics(
    tensors: Mapping[str, Tensor],
    transformer: Json,
    vae: Json,
    index: Json,
    key_map: KeyMap,
    num_channels: int,
) -> LatentStatistics:
    """Find the statistics that whiten latents, wherever a folder may keep them.

    Looked for in this order: the user's key map; `bn.*` tensors of the transformer; its config
    (`bn_running_mean` and `bn_running_var`, or `latents_bias` and `latents_scale`); attributes of
    the pipeline in `model_index.json` (`latents_bias`, `latents_scale`); the VAE's config
    (`latents_mean`, `latents_std`), where diffusers' pipelines multiply by `scaling_factor` too.

    Raises:
        ValueError: None of them states any, two disagree by more than half precision explains, or
            there are not as many as latent channels.
    """
    stated = _stated_statistics(tensors, transformer, vae, index, key_map)
    if not stated:
        raise ValueError(
            "the folder states no latent statistics; looked for bn.running_mean and "
            "bn.running_var among the transformer's tensors, bn_running_mean in its config, "
            "latents_bias in model_index.json and latents_mean in vae/config.json. Read "
            "`latents_bias` and `latents_scale` off the original pipeline and pass them in a "
            "key map file"
        )
    first = stated[0]
    if first.mean.numel() not in (1, num_channels):
        raise ValueError(
            f"{first.source} states latent statistics of {first.mean.numel()} channels, expected "
            f"{num_channels}"
        )
    for other in stated[1:]:
        if first.source != "the key map" and not _agree(first, other):
            raise ValueError(
                f"{first.source} and {other.source} state different latent statistics "
                f"(mean {first.mean.tolist()} and {other.mean.tolist()}, variance "
                f"{first.variance.tolist()} and {other.variance.tolist()}); decide with "
                "latents_bias and latents_scale in a key map file"
            )
    return first


def _stated_statistics(
    tensors: Mapping[str, Tensor], transformer: Json, vae: Json, index: Json, key_map: KeyMap
) -> list[LatentStatistics]:
    """Return the statistics that each part of a folder states, those to be preferred first."""
    return [
        *_scaled("the key map", key_map.latents_bias, key_map.latents_scale),
        *_plain(
            "bn.* of the transformer",
            tensors.get("bn.running_mean"),
            tensors.get("bn.running_var"),
        ),
        *_plain(
            "transformer/config.json",
            transformer.get("bn_running_mean"),
            transformer.get("bn_running_var"),
        ),
        *_scaled(
            "transformer/config.json",
            transformer.get("latents_bias"),
            transformer.get("latents_scale"),
        ),
        *_scaled("model_index.json", index.get("latents_bias"), index.get("latents_scale")),
        *_deviating(vae),
    ]


def _plain(source: str, mean: object, variance: object) -> list[LatentStatistics]:
    if mean is None or variance is None:
        return []
    return [_statistics(source, _vector(mean), _vector(variance))]


def _scaled(source: str, bias: object, scale: object) -> list[LatentStatistics]:
    if bias is None or scale is None:
        return []
    return [_statistics(source, _vector(bias), _vector(scale).double().square().reciprocal())]


def _deviating(vae: Json) -> list[LatentStatistics]:
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    if mean is None or std is None:
        return []
    factor = vae.get("scaling_factor") or 1.0
    source = "vae/config.json" + ("" if factor == 1 else f" with its scaling_factor {factor}")
    return [_statistics(source, _vector(mean), (_vector(std) / factor).square())]


def _statistics(source: str, mean: Tensor, variance: Tensor) -> LatentStatistics:
    if mean.shape != variance.shape or not bool(((variance > 0) & variance.isfinite()).all()):
        raise ValueError(
            f"{source} states latent statistics that are none: mean {mean.tolist()}, variance "
            f"{variance.tolist()}; expected as many positive variances as means"
        )
    return LatentStatistics(mean.float(), variance.float(), source)


def _vector(values: object) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).flatten()


def _agree(a: LatentStatistics, b: LatentStatistics) -> bool:
    """Compare within what half precision loses; the means in units of the deviation."""
    if a.mean.shape != b.mean.shape:
        return False
    apart = (a.mean - b.mean).abs() / a.variance.sqrt()
    ratio = (a.variance / b.variance - 1).abs()
    return bool((apart < 0.01).all() & (ratio < 0.02).all())


def _projector_widths(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    widths: list[int] = []
    while (name := f"projectors.{len(widths)}.4.weight") in tensors:
        widths.append(tensors[name].shape[0])
    return tuple(widths)
