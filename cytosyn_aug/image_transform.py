"""What all albumentations transforms share: an ImageOnlyTransform around a torchvision one.

For albumentations 2.0.8, the last release under the MIT licence. Draws come from torch's generator,
which DataLoader seeds differently in every worker and epoch; albumentations 2.0.8 would repeat its
own in all of them. So `torch.manual_seed` repeats draws, and `A.Compose(seed=...)` has no effect.
What is drawn can be written as JSON, and so can the transforms: `to_dict` keeps where a model came
from instead of its weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cytosyn_aug.stain.estimate import EditRecipe
from cytosyn_aug.transforms.sample_metadata import LABEL, LABORATORY, SLIDE
from cytosyn_aug.transforms.schedules import Probability, Ramp, check_probability, value_at
from cytosyn_aug.transforms.serialization import write_argument
from cytosyn_aug.transforms.tile_transform import TileTransform

try:
    import albumentations
except ImportError as error:
    raise ImportError(
        "cytosyn_aug.albumentations needs albumentations 2.0.8; pip install albumentations==2.0.8"
    ) from error
if albumentations.__version__ != "2.0.8":
    # AlbumentationsX has the same import name and goes on from 2.0.9, under another licence.
    raise ImportError(
        f"found albumentations {albumentations.__version__}, expected 2.0.8, the last release "
        "under the MIT licence and the one this is tested with; AlbumentationsX is not. Use the "
        "torchvision transforms of cytosyn_aug beside it (tensors and PIL images), or "
        "`pip uninstall albumentationsx` and `pip install albumentations==2.0.8`"
    )

_STRUCTURE = frozenset({"mask", "masks", "mask3d", "masks3d", "bboxes", "keypoints"})
_IMAGES = frozenset({"image", "images", "volume", "volumes"})
_DRAWN = ("chosen", "seeds", "references", "strengths", "variants")


class TileImageTransform(albumentations.ImageOnlyTransform):
    """Carry a torchvision transform into albumentations; HWC uint8 or float32 in, the same out.

    Args:
        inner: The transform. Where its own p is not 1 (p by class or by slide), it draws by that.
        p: Probability that an image is edited.
        arguments: What the transform is made of beside p, for `to_dict`.

    Raises:
        ValueError: p is no probability.
    """

    def __init__(
        self,
        inner: TileTransform,
        p: Probability,
        arguments: dict[str, Any],  # Any: arguments of any type
    ) -> None:
        check_probability(p)
        # albumentations compares p with numbers, in OneOf and elsewhere.
        super().__init__(p=p if isinstance(p, int | float) else 1.0)
        self.inner = inner
        self._scheduled = p
        self._arguments = arguments
        self._kinds: dict[str, str] = {}

    @property
    def available_keys(self) -> set[str]:
        """Name also what draws go by: `A.Compose(strict=True)` refuses keys of no transform."""
        return super().available_keys | {LABEL, SLIDE, LABORATORY}

    @property
    def num_failed(self) -> int:
        """Images, in all workers, that came back unchanged because a network failed on them."""
        return self.inner.num_failed

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch begins; see `TileTransform.set_epoch`."""
        self.inner.set_epoch(epoch)

    def add_targets(self, additional_targets: dict[str, str]) -> None:
        """Remember all additional targets; albumentations' own keeps only images, not masks."""
        self._kinds |= additional_targets
        super().add_targets(additional_targets)

    def should_apply(self, force_apply: bool = False) -> bool:
        """Decide with torch's generator; see the module."""
        if force_apply or self.inner.p != 1.0:
            return True
        p = value_at(
            self._scheduled if isinstance(self._scheduled, Ramp) else self.p, self.inner.epoch
        )
        return bool(torch.rand((), dtype=torch.float64, device="cpu") < p)

    def __call__(self, *args: Any, force_apply: bool = False, **kwargs: Any) -> Any:
        """Refuse a sample that does not fit, drawn or not; then do as albumentations does.

        Checked where it is drawn only, a pipeline with p = 0.3 would fail at its third sample.
        """
        if not args:  # which albumentations refuses
            self._check(kwargs)
        return super().__call__(*args, force_apply=force_apply, **kwargs)

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw seed and reference; JSON-safe, so that ReplayCompose can store them."""
        # Of a stack, all images are edited alike, as albumentations does.
        tensor = _to_tensor(self._images(data)[0])
        return self.inner.make_params([tensor], self.inner.read_facts(data, [tensor]))

    def _check(self, data: dict[str, Any]) -> None:
        kinds = self._kinds_in(data)
        moved = sorted(k for k, kind in kinds.items() if kind in _STRUCTURE)
        if moved and not self.inner.keeps_structure:
            raise ValueError(
                f"{type(self).__name__} moves structure, and the sample carries {moved}; "
                "drop them, keep structure, or pass allow_geometry_change=True"
            )
        tensors = [_to_tensor(image) for image in self._images(data)]
        if not tensors:
            raise TypeError(
                f"got no image among {sorted(kinds)}; pass image=, a numpy array [H, W, 3]"
            )
        for tensor in tensors:
            self.inner.transform(tensor, {"chosen": [False]})  # checks, and edits nothing
        if not self.replay_mode:  # then all is drawn already
            self.inner.read_facts(data, tensors[:1])

    def _kinds_in(self, data: dict[str, Any]) -> dict[str, str]:
        return {k: self._kinds.get(k, k) for k, value in data.items() if value is not None}

    def _images(self, data: dict[str, Any]) -> list[np.ndarray]:
        """Return all images of a sample, those of stacks one by one."""
        found: list[np.ndarray] = []
        for key, kind in self._kinds_in(data).items():
            if kind in _IMAGES:
                given = data[key]
                if not isinstance(given, np.ndarray):
                    raise TypeError(
                        f"got an image of {type(given).__name__}, expected a numpy array "
                        "[H, W, 3] of uint8, or float32 in [0, 1]; use numpy.asarray"
                    )
                is_stack = given.ndim > 3
                found += list(given.reshape(-1, *given.shape[-3:])) if is_stack else [given]
        return found

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        """Edit one image."""
        drawn = {k: params[k] for k in _DRAWN if k in params}
        edited = self.inner.transform(_to_tensor(img), drawn)
        return np.ascontiguousarray(edited.permute(1, 2, 0).numpy())

    def __repr__(self) -> str:
        """Show plain settings, and of all others what they are."""
        shown = [f"p={self._scheduled if self.p == 1.0 else self.p!r}"]
        for name, value in self._arguments.items():
            if isinstance(value, list | tuple):
                shown.append(f"{name}=[{len(value)}]")
            elif value is None or isinstance(value, str | int | float | Ramp | EditRecipe):
                shown.append(f"{name}={value!r}")
            else:
                shown.append(f"{name}=<{type(value).__name__}>")
        return f"{type(self).__name__}({', '.join(shown)})"

    def get_transform_init_args(self) -> dict[str, Any]:
        """Return the arguments as JSON holds them, for `to_dict` and ReplayCompose.

        All but functions (`features`), which stay what they are: albumentations asks also to show
        or to replay a pipeline, which does not need JSON, and saving one raises for them.
        """
        return {k: v if callable(v) else write_argument(v) for k, v in self._arguments.items()}

    def get_base_init_args(self) -> dict[str, Any]:
        """Return p as JSON holds it."""
        is_number = isinstance(self._scheduled, int | float)
        return {"p": write_argument(self.p if is_number else self._scheduled)}


def _to_tensor(image: np.ndarray) -> Tensor:
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"got an image of shape {list(image.shape)}, expected [H, W, 3] RGB; "
            "repeat grey-scale channels, drop alpha"
        )
    # A copy of what cannot be written, such as np.asarray(PIL.Image): torch has no such tensors.
    return torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
