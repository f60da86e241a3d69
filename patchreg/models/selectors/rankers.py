"""Rankers of patches that need no training of their own, to measure trained ones against.

Every ranker has `select(inputs) -> PatchSelection`, as the models of the methods have. It keeps all patches;
who asks takes the first k of the order.

Letters: B images, P patches in raster order, N tokens, h heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

from patchreg.registry import MODELS, SELECTORS
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.random import mix_seed


class PatchRanker(BaseModule):
    """A ranker over a grid of square patches; subclasses give the scores.

    Args:
        patch_size: Side of a patch in px.

    Raises:
        ConfigError: It is smaller than 1.
    """

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        if patch_size < 1:
            raise ConfigError(f"patch_size={patch_size}: expected at least 1 px")
        self.patch_size = patch_size

    def score(self, inputs: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the importance of every patch.

        Args:
            inputs: Preprocessed images.
            grid: Rows and columns of patches.

        Shape:
            inputs [B, 3, H, W]; returns [B, P].
        """
        raise NotImplementedError

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Rank the patches of images.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            DataError: The images cannot be cut into patches.
        """
        height, width = inputs.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise DataError(
                f"images of {height} x {width} px cannot be cut into patches of {self.patch_size} px"
            )
        grid = (height // self.patch_size, width // self.patch_size)
        return PatchSelection.of_all((height, width), grid, self.score(inputs, grid))


@SELECTORS.register_module()
class RandomSelector(PatchRanker):
    """Random order, drawn anew for every image.

    Args:
        patch_size: Side of a patch in px.
        seed: Seed; the draws depend on it and on the images before alone.
    """

    def __init__(self, patch_size: int, seed: int = 0) -> None:
        super().__init__(patch_size)
        self.seed = seed
        self.generator = torch.Generator()
        self.restart()

    def restart(self) -> None:
        """Draw from the beginning again: the same images in the same order get the same ranks."""
        self.generator.manual_seed(mix_seed(self.seed, 0x5E1EC7))

    def score(self, inputs: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return uniform draws.

        Args:
            inputs: Preprocessed images.
            grid: Rows and columns of patches.

        Shape:
            inputs [B, 3, H, W]; returns [B, P].
        """
        drawn = torch.rand(len(inputs), grid[0] * grid[1], generator=self.generator)
        return drawn.to(inputs.device)


@SELECTORS.register_module()
class CentreSelector(PatchRanker):
    """From the centre of the image outwards: photographers put things there.

    Args:
        patch_size: Side of a patch in px.
    """

    def score(self, inputs: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return minus the distance to the centre, in image sides.

        Args:
            inputs: Preprocessed images.
            grid: Rows and columns of patches.

        Shape:
            inputs [B, 3, H, W]; returns [B, P].
        """
        rows, columns = (
            (torch.arange(count, device=inputs.device) + 0.5) / count - 0.5 for count in grid
        )
        distance = (rows[:, None].square() + columns[None].square()).sqrt()
        return -distance.flatten().expand(len(inputs), -1).contiguous()


@SELECTORS.register_module()
class GradientSelector(PatchRanker):
    """Where the picture changes most: mean magnitude of the image's gradient in each patch.

    Args:
        patch_size: Side of a patch in px.
    """

    def score(self, inputs: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the mean of |d/dx| + |d/dy| (differences of neighbours, mean over the channels).

        Args:
            inputs: Preprocessed images.
            grid: Rows and columns of patches.

        Shape:
            inputs [B, 3, H, W]; returns [B, P].
        """
        grey = inputs.float().mean(dim=1, keepdim=True)
        # Without padding the last row and column would have no neighbour and weaken their patches.
        down = F.pad(grey, (0, 0, 0, 1), mode="replicate").diff(dim=2).abs()
        right = F.pad(grey, (0, 1, 0, 0), mode="replicate").diff(dim=3).abs()
        return F.avg_pool2d(down + right, self.patch_size).flatten(1)


@SELECTORS.register_module()
class ClassAttentionSelector(BaseModule):
    """What the class token of a ViT looks at in the last block, averaged over the heads.

    The ViT is either its own, or the classifier that is being evaluated (`use`), which then has to run twice.

    Source:
        `get_last_selfattention` of DINO; the attention baseline of the PatchGame paper.

    Args:
        backbone: Config of a `VisionTransformerBackbone` or `TimmViTBackbone` with a class token, or None for
            that of the classifier.
        init_cfg: Weights to load, as in MMEngine.
    """

    def __init__(self, backbone: dict | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.vit: Any = None if backbone is None else MODELS.build(backbone)

    def use(self, classifier: Any) -> None:
        """Take the ViT of a classifier, unless there is one.

        Args:
            classifier: Model with a `backbone`.
        """
        if self.vit is None:
            self.vit = classifier.backbone

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Rank the patches of images.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            ConfigError: There is no ViT, or it has no class token.
        """
        vit = self.vit
        if vit is None or not hasattr(vit, "last_attention"):
            raise ConfigError(
                "ClassAttentionSelector has no ViT; give it `backbone`, or evaluate a classifier with a "
                "VisionTransformerBackbone or TimmViTBackbone"
            )
        if not vit.extra:
            raise ConfigError("ClassAttentionSelector needs a ViT with a class token")
        return class_attention(vit, inputs)


def class_attention(vit: Any, inputs: Tensor) -> PatchSelection:
    """Rank patches by what the class token of a ViT looks at in the last block, averaged over the heads.

    Args:
        vit: Backbone with `last_attention` and a class token.
        inputs: Preprocessed images.

    Shape:
        inputs [B, 3, H, W].
    """
    score = vit.last_attention(inputs)[:, :, 0, vit.extra :].mean(dim=1).float()
    size = patch_sides(vit)
    grid = (inputs.shape[2] // size[0], inputs.shape[3] // size[1])
    macs = vit.macs(grid)
    return PatchSelection.of_all(
        image_size=(inputs.shape[2], inputs.shape[3]),
        grid=grid,
        score=score,
        macs=score.new_full((len(score),), macs, dtype=torch.float64),
        dense_macs=macs,
    )


def patch_sides(vit: Any) -> tuple[int, int]:
    """Return height and width in px of the patches of a ViT.

    Args:
        vit: Backbone with a patch embedding.
    """
    size = vit.patch_size if hasattr(vit, "patch_size") else vit.patch_embed.patch_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _scores_of_windows(selection: PatchSelection, grid: tuple[int, int]) -> Tensor:
    boxes = selection.boxes.flatten(0, 1)
    box = boxes[(boxes[:, 2] > boxes[:, 0]).nonzero()[:1, 0]][0]
    assert selection.grid is not None
    places = []
    for pixels, cells, count, side in (
        (selection.image_size[0], selection.grid[0], grid[0], float(box[3] - box[1])),
        (selection.image_size[1], selection.grid[1], grid[1], float(box[2] - box[0])),
    ):
        centre = (torch.arange(count, device=boxes.device) + 0.5) * (pixels / count)
        # From the first window's centre to the last one's is -1 to 1.
        reach = max(pixels - side, 1.0) if cells > 1 else 1.0
        places.append(2 * (centre - side / 2) / reach - 1)
    y, x = torch.meshgrid(*places, indexing="ij")
    maps = selection.score.float().unflatten(1, (1, *selection.grid))
    where = torch.stack((x, y), dim=-1).to(maps).expand(len(maps), -1, -1, -1)
    found = F.grid_sample(maps, where, padding_mode="border", align_corners=True)
    return found.flatten(1)


def scores_on_grid(selection: PatchSelection, grid: tuple[int, int]) -> Tensor:
    """Return the scores of a selection on another grid of patches.

    Scores on a grid are resampled (bilinear, antialiased); those of windows that overlap are read off
    (bilinear) where the windows have their centres. Free boxes count by their place in the order:
    a patch gets the best of the shares in which boxes cover it, each times (K - place) / K.

    Args:
        selection: What a ranker answered.
        grid: Rows and columns wanted.

    Shape:
        Returns [B, rows * columns].
    """
    if selection.grid is not None:
        if not selection.tiles():
            return _scores_of_windows(selection, grid)
        maps = selection.score.float().unflatten(1, (1, *selection.grid))
        if selection.grid != tuple(grid):
            maps = F.interpolate(
                maps, size=tuple(grid), mode="bilinear", antialias=True, align_corners=False
            )
        return maps.flatten(1)
    height, width = selection.image_size
    boxes = selection.boxes
    rows = torch.arange(grid[0] + 1, device=boxes.device) * (height / grid[0])
    columns = torch.arange(grid[1] + 1, device=boxes.device) * (width / grid[1])
    x0, y0, x1, y1 = boxes.unbind(-1)

    def covered(edges: Tensor, low: Tensor, high: Tensor) -> Tensor:
        inner = torch.minimum(edges[1:], high[..., None]) - torch.maximum(
            edges[:-1], low[..., None]
        )
        return inner.clamp(min=0) / (edges[1] - edges[0])

    share = covered(rows, y0, y1)[..., :, None] * covered(columns, x0, x1)[..., None, :]
    places = torch.arange(boxes.shape[1], 0, -1, device=boxes.device) / max(boxes.shape[1], 1)
    weight = places * (selection.order >= 0)
    return (share * weight[..., None, None]).amax(dim=1).flatten(1)
