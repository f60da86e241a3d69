"""Classifiers whose cost falls with the number of patches that are kept.

Letters: B images, H x W px, P patches in raster order, C channels, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchreg.methods.patchdrop.mask import check_actions, cut_patches, expand_actions
from patchreg.methods.patchdrop.selector import keep_best
from patchreg.models.backbones import VisionTransformerBackbone
from patchreg.models.base import PatchClassifier, TokenFeatures
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError
from patchreg.utils.random import batch_random


class _PatchwiseClassifier(PatchClassifier):
    """Common part: training on random choices of patches, evaluation on all of them or as told."""

    def __init__(
        self,
        backbone: dict,
        head: dict,
        grid: tuple[int, int] = (4, 4),
        train_keep: tuple[int, int] | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(backbone, head, data_preprocessor, init_cfg)
        self.grid = (grid[0], grid[1])
        cells = grid[0] * grid[1]
        if train_keep is not None and not 0 < train_keep[0] <= train_keep[1] <= cells:
            raise ConfigError(
                f"train_keep={tuple(train_keep)}: expected 0 < fewest <= most <= {cells} patches"
            )
        self.train_keep = train_keep

    def extract_kept(self, images: Tensor, actions: Tensor, grid: tuple[int, int]) -> TokenFeatures:
        """Return one token per image, made from its kept patches only, and its cost.

        Args:
            images: Preprocessed images.
            actions: Decisions, 0 or 1.
            grid: Rows and columns of the decisions.

        Shape:
            images [B, 3, H, W]; actions [B, P]; tokens [B, 1, C].
        """
        raise NotImplementedError

    def extract(self, inputs: Tensor) -> TokenFeatures:
        """Run the backbone on whole images, or on a random choice of patches while training.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; tokens [B, 1, C].
        """
        actions = inputs.new_ones(len(inputs), self.grid[0] * self.grid[1])
        if self.train_keep is not None and self.training:
            score = batch_random.uniform(len(inputs), (actions.shape[1],), inputs.device)
            low, high = self.train_keep
            # The same number for the whole batch keeps the batch dense.
            count = int(batch_random.numpy().integers(low, high + 1))
            actions = keep_best(score, count).to(inputs.dtype)
        return self.extract_kept(inputs, actions, self.grid)

    def classify(
        self, images: Tensor, actions: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, float]:
        """Return logits from the kept patches, the cost of each image, and that of a whole one.

        Args:
            images: Preprocessed images.
            actions: Decisions, 0 or 1.
            grid: Rows and columns of the decisions.

        Shape:
            images [B, 3, H, W]; actions [B, P]; returns [B, K], float64 [B] and a number.
        """
        features = self.extract_kept(images, actions, grid)
        return self.head(features), *self.cost(features)


@MODELS.register_module()
class PatchDropTokenClassifier(_PatchwiseClassifier):
    """Vision transformer that is given the tokens of the kept patches only.

    Images of one batch that keep equally many patches run together; nothing is padded. Without any
    patch the class token stands alone.

    Source:
        Own. The official classifier computes the erased image in full.

    Args:
        backbone: Config of a `VisionTransformerBackbone` with a class token, whose token grid is a
            multiple of the grid of the decisions.
        head: Config of the head, which reads the class token.
        grid: Rows and columns of the patches for training and evaluation on its own.
        train_keep: Train on its own with a random number of patches between these two, or None for
            all.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: The backbone has no class token, or drops branches or units at random.
    """

    backbone: VisionTransformerBackbone

    def __init__(self, backbone: dict, head: dict, **kwargs: Any) -> None:
        super().__init__(backbone, head, **kwargs)
        if self.backbone.extra != 1 or self.backbone.drop_path_rate or self.backbone.drop_rate:
            raise ConfigError(
                "PatchDropTokenClassifier needs a backbone with a class token, without a "
                "distillation token, drop_rate and drop_path_rate"
            )

    def extract_kept(self, images: Tensor, actions: Tensor, grid: tuple[int, int]) -> TokenFeatures:
        """Return the class token of every image.

        Args:
            images: Preprocessed images.
            actions: Decisions, 0 or 1.
            grid: Rows and columns of the decisions.

        Shape:
            images [B, 3, H, W]; actions [B, P]; tokens [B, 1, C].
        """
        check_actions(actions, grid[0] * grid[1])
        tokens, token_grid = self.backbone.embed(images)
        mask = expand_actions(actions.bool(), token_grid, grid).flatten(1)
        per_cell = mask.shape[1] // actions.shape[1]
        counts = actions.sum(1).long() * per_cell
        pieces, rows = [], []
        for count in counts.unique().tolist():
            row = (counts == count).nonzero().flatten()
            kept = tokens[row, 1:][mask[row]].view(len(row), count, tokens.shape[2])
            x = torch.cat((tokens[row, :1], kept), dim=1)
            for block in self.backbone.blocks:
                x = block(x)
            pieces.append(x[:, :1])
            rows.append(row)
        order = torch.cat(rows).argsort()
        cells = token_grid[0] * token_grid[1]
        # All patches are embedded, whatever becomes of them.
        embedding = self.backbone.patch_embed.proj.weight.numel()
        cost = torch.tensor(
            [self.backbone.macs((1, n)) + embedding * (cells - n) for n in counts.tolist()],
            dtype=torch.float64,
        )
        return TokenFeatures(
            tokens=self.backbone.norm(torch.cat(pieces)[order]),
            grid=grid,
            extra=1,
            macs=cost.to(images.device),
            dense_macs=self.backbone.macs(token_grid),
        )


@MODELS.register_module()
class PatchDropBagClassifier(_PatchwiseClassifier):
    """Bag of patches: every kept patch is classified by itself, the image is the mean of them.

    The head is linear, so it reads the mean of the patches' features. Without any patch the
    features are zero and the head's bias decides.

    Source:
        Conditional BagNet of the paper, section 5 (its network is not published).

    Args:
        backbone: Config of a backbone that returns `TokenFeatures` for an image of a patch's size.
        head: Config of the head; its pool has to be `mean` or `cls`, which are the same here.
        grid: Rows and columns of the patches for training and evaluation on its own.
        train_keep: Train on its own with a random number of patches between these two, or None for
            all.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.
    """

    def extract_kept(self, images: Tensor, actions: Tensor, grid: tuple[int, int]) -> TokenFeatures:
        """Return the mean feature of the kept patches.

        Args:
            images: Preprocessed images.
            actions: Decisions, 0 or 1.
            grid: Rows and columns of the decisions.

        Shape:
            images [B, 3, H, W]; actions [B, P]; tokens [B, 1, C].
        """
        check_actions(actions, grid[0] * grid[1])
        kept = actions.bool()
        patches = cut_patches(images, grid)
        counts = kept.sum(1)
        image = kept.nonzero()[:, 0]
        if len(image):
            found = self.backbone(patches[kept])
            features, per_patch = found.tokens.mean(1), found.dense_macs
        else:
            # One patch tells the width; its features are not used, nor kept in BatchNorm's statistics.
            training = self.backbone.training
            self.backbone.eval()
            found = self.backbone(patches[:1, 0])
            self.backbone.train(training)
            features, per_patch = found.tokens.mean(1)[:0], found.dense_macs
        total = features.new_zeros(len(images), features.shape[1])
        mean = total.index_add(0, image, features) / counts.clamp(min=1).unsqueeze(1)
        return TokenFeatures(
            tokens=mean.to(features.dtype).unsqueeze(1),
            grid=grid,
            extra=1,
            macs=counts.double() * per_patch,
            dense_macs=per_patch * kept.shape[1],
        )
