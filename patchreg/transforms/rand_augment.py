"""RandAugment of the DeiT recipe for RGB images."""

from __future__ import annotations

from typing import Any

from patchreg.registry import TRANSFORMS


@TRANSFORMS.register_module()
class RGBRandAugment:
    """mmpretrain's RandAugment with timm's policies (`rand-m9-mstd0.5-inc1`), fed in BGR.

    Source: Cubuk et al., "RandAugment", arXiv:1909.13719; parameters of the DeiT recipe.

    Differs from official:
        mmpretrain's colour operation weighs the channels as BGR; on RGB arrays it is off by 7 to 11
        grey levels from timm's, in BGR by less than one. Geometric operations interpolate with
        OpenCV instead of Pillow (off by 1 to 2 grey levels on average, at edges); the other
        operations agree. timm's own version is twice as slow and fails on Pillow 13 when it draws
        zero bits for posterize.

    Args:
        magnitude: Magnitude of all operations, in [0, 10].
        magnitude_std: Standard deviation of the normal noise on the magnitude.
        num_ops: Operations drawn per image, with replacement; each is applied with probability one
            half.
        fill: RGB colour in [0, 255] of pixels that come from outside the image.

    Shape:
        `img` of the sample: [H, W, 3] uint8 RGB before and after.
    """

    def __init__(
        self,
        magnitude: float = 9,
        magnitude_std: float = 0.5,
        num_ops: int = 2,
        fill: tuple[int, int, int] = (124, 116, 104),
    ) -> None:
        from mmpretrain.datasets.transforms.auto_augment import RANDAUG_POLICIES, RandAugment

        # mmpretrain looks bare names up in the scope of the run, which is not its own.
        policies = [
            {**policy, "type": f"mmpretrain.{policy['type']}"}
            for policy in RANDAUG_POLICIES["timm_increasing"]
        ]
        self.augment = RandAugment(
            policies=policies,
            num_policies=num_ops,
            magnitude_level=magnitude,
            magnitude_std=magnitude_std,
            total_level=10,
            hparams={"pad_val": list(fill)[::-1], "interpolation": "bicubic"},
        )

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Return the sample with `img` changed.

        Args:
            results: Sample with `img`.
        """
        import cv2

        results["img"] = cv2.cvtColor(results["img"], cv2.COLOR_RGB2BGR)
        results = self.augment(results)
        results["img"] = cv2.cvtColor(results["img"], cv2.COLOR_BGR2RGB)
        return results

    def __repr__(self) -> str:
        return f"RGBRandAugment({self.augment})"
