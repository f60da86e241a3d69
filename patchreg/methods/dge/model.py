"""DeiT with the Dynamic Grained Encoder, and the classifier that trains it under a cost budget.

Letters: B images, E extra tokens, H x W token grid, N = E + H * W tokens, C channels, Hr x Wr
regions of r x r tokens, S splits, K classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchreg.methods.dge.block import DGEBlock, Prepared, needs_gradient
from patchreg.methods.dge.cost import Routing, check_accounting, spread_regions
from patchreg.methods.dge.router import DynamicGrainedEncoder, check_splits
from patchreg.models.backbones.vit import VisionTransformerBackbone
from patchreg.models.base import PatchClassifier, TokenFeatures, stack_targets
from patchreg.registry import MODELS
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.random import batch_random


def check_grid(
    grid: tuple[int, int], region: int, padding: bool, patch_size: int
) -> tuple[int, int]:
    """Return the regions per side if the token grid can be cut into regions.

    Args:
        grid: Token grid (H, W).
        region: Region side r in tokens.
        padding: Allow regions that stick out of the grid.
        patch_size: Side of a token in px, for the message.

    Raises:
        DataError: The region does not divide the grid; names the nearest image sizes that work.
    """
    if not padding and any(side % region for side in grid):
        unit = region * patch_size
        below = tuple(max(side // region, 1) * unit for side in grid)
        above = tuple(-(-side // region) * unit for side in grid)
        text = " or ".join(f"{height} x {width}" for height, width in sorted({below, above}))
        raise DataError(
            f"a token grid of {grid[0]} x {grid[1]} is not divisible by the region of {region} "
            f"tokens; use images of {text} px (height x width), or region_padding=True"
        )
    return -(-grid[0] // region), -(-grid[1] // region)


def check_modes(eval_path: str, drop_path_mode: str) -> None:
    """Check names that the backbones with routers take.

    Args:
        eval_path: `sparse` or `dense`.
        drop_path_mode: `query` or `sample`.

    Raises:
        ConfigError: One is unknown.
    """
    if eval_path not in ("sparse", "dense"):
        raise ConfigError(f"eval_path={eval_path!r} is unknown; use 'sparse' or 'dense'")
    if drop_path_mode not in ("query", "sample"):
        raise ConfigError(f"drop_path_mode={drop_path_mode!r} is unknown; use 'query' or 'sample'")


def reset_routers(model: nn.Module) -> None:
    """Draw fresh weights for all routers of a model.

    Args:
        model: Model that is changed in place.
    """
    for part in model.modules():
        if isinstance(part, DynamicGrainedEncoder):
            part.router.reset_parameters()


def draw_drop_path(
    batch: int,
    depth: int,
    grid: tuple[int, int],
    extra: int,
    splits: tuple[int, ...],
    path: str,
    mode: str,
    device: torch.device,
) -> Sequence[Tensor]:
    """Draw for the drop path of blocks on one token grid.

    A draw belongs to (image, query number within the image), so it does not depend on the packing.

    Args:
        batch: Images B.
        depth: Number of blocks.
        grid: Token grid (H, W).
        extra: Number of extra tokens E.
        splits: Queries per region side of each candidate.
        path: `dense` or `sparse`.
        mode: `query` or `sample`.
        device: Where the draws are used.

    Shape:
        Returns for each block [B, 2] (`sample`) or [B, 2, most queries of an image] (`query`).
    """
    shape: tuple[int, ...] = (depth, 2)
    if mode == "query":
        steps = [max(splits) // split for split in splits] if path == "dense" else [1]
        shape += (extra + sum(-(-grid[0] // step) * -(-grid[1] // step) for step in steps),)
    return batch_random.uniform(batch, shape, device).unbind(1)


@MODELS.register_module()
class DGEVisionTransformerBackbone(VisionTransformerBackbone):
    """DeiT encoder in which every block queries each region at a granularity of its own choice.

    Source:
        DGE (NeurIPS 2021); `deit_dge_s124_*_patch16_256` of vtpack.

    Args:
        arch: As in `VisionTransformerBackbone`.
        img_size: As in `VisionTransformerBackbone`.
        splits: Queries per region side of each candidate; the region side is the largest.
        sparse_train: Train on the chosen granularity only; cheaper, but gates that were not chosen
            get no gradient and accuracy suffers.
        eval_path: `sparse` computes the chosen queries only, `dense` all of them with hard gates
            (the same result; a check, and faster where launching is dear). Can be changed at any
            time.
        skip_last_queries: In evaluation, run only the extra tokens through the last block: same
            logits for a head that reads them, about 7 % less computation.
        drop_path_mode: `query` drops single queries, as published; `sample` drops images.
        region_padding: Accept token grids that the region does not divide: they count as padded on
            the right and bottom, and only real tokens are averaged.
        attention_backend: How the packed queries of the sparse path attend, all with the same
            result: `varlen` (CUDA, half precision), `padded`, `per_image`, or `auto` for the
            fastest one that works.
        init_cfg: Weights to load, as in MMEngine.
        kwargs: Further arguments of `VisionTransformerBackbone`.

    Raises:
        ConfigError: Splits, paths or modes that do not exist or do not fit.

    Differs from official:
        Any image size, also with grids that are not square; the routing comes back with the output.
    """

    def __init__(
        self,
        arch: str | dict = "tiny",
        img_size: int | Sequence[int] = 256,
        splits: Sequence[int] = (4, 2, 1),
        sparse_train: bool = False,
        eval_path: str = "sparse",
        skip_last_queries: bool = False,
        drop_path_mode: str = "query",
        region_padding: bool = False,
        attention_backend: str = "auto",
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        check_modes(eval_path, drop_path_mode)
        self.splits = check_splits(splits)
        self.sparse_train = sparse_train
        self.eval_path = eval_path
        self.skip_last_queries = skip_last_queries
        self.drop_path_mode = drop_path_mode
        self.region_padding = region_padding
        self.attention_backend = attention_backend
        # Rows that each block computes whatever its router says; set while a graph is captured.
        self.row_capacity: int | None = None
        super().__init__(arch=arch, img_size=img_size, init_cfg=init_cfg, **kwargs)
        if skip_last_queries and (not self.extra or self.depth < 2):
            raise ConfigError(
                "skip_last_queries=True needs a class token (without one every token is read) and "
                "two blocks (with one nothing would be routed)"
            )

    def build_block(self, drop_path_rate: float) -> nn.Module:
        """Build one encoder block with its router.

        Args:
            drop_path_rate: Rate of this block.
        """
        return DGEBlock(
            self.embed_dims,
            self.num_heads,
            self.splits,
            self.mlp_ratio,
            self.qkv_bias,
            self.drop_rate,
            drop_path_rate,
            self.norm_eps,
            attention_backend=self.attention_backend,
        )

    def reset_parameters(self) -> None:
        """Draw fresh weights; routers last, because the general way would undo theirs."""
        super().reset_parameters()
        reset_routers(self)

    def forward(  # type: ignore[override]  # Regions need all patches, so there are no `cells`.
        self,
        images: Tensor,
        out_blocks: Sequence[int] = (),
        noise: Sequence[Tensor] | None = None,
    ) -> TokenFeatures:
        """Encode images.

        Args:
            images: Images whose sides are multiples of the patch size.
            out_blocks: Blocks, from 0, whose outputs are returned too.
            noise: Gumbel noise of every block instead of a fresh draw; in evaluation None means no
                noise.

        Shape:
            images [B, in_channels, H * patch, W * patch]; noise [B, Hr, Wr, S] each; tokens [B, N,
            C] ([B, E, C] in evaluation with `skip_last_queries`).

        Raises:
            DataError: The region does not divide the token grid, or the noise does not fit.
        """
        x, grid = self.embed(images)
        patch = self.patch_embed.patch_size
        regions = check_grid(grid, max(self.splits), self.region_padding, patch)
        if noise is not None and len(noise) != self.depth:
            raise DataError(
                f"noise has {len(noise)} entries; expected one for each of {self.depth} blocks"
            )
        path = self.eval_path
        noises: Sequence[Tensor | None] = [None] * self.depth if noise is None else noise
        uniforms: Sequence[Tensor | None] = [None] * self.depth
        if self.training:
            path = "sparse" if self.sparse_train else "dense"
            if noise is None:
                shape = (self.depth, *regions, len(self.splits))
                noises = batch_random.gumbel(len(x), shape, x.device).unbind(1)
            if self.drop_path_rate:
                uniforms = draw_drop_path(
                    len(x),
                    self.depth,
                    grid,
                    self.extra,
                    self.splits,
                    path,
                    self.drop_path_mode,
                    x.device,
                )
        routing = Routing(constants=self.embedding_macs(grid))
        # Evaluation in one go: every block leaves what the next one, or the last norm, starts with.
        blocks: Any = self.blocks
        fused = path == "sparse" and noise is None and not needs_gradient(self, x)
        fused = fused and all(block.fuses(x) for block in blocks)
        prepared: Prepared | None = None
        kept = []
        for index, block in enumerate(blocks):
            last = index == self.depth - 1
            if self.skip_last_queries and not self.training and last:
                path = "front"
            if fused:
                following = self.norm if last else blocks[index + 1].norm1
                x, record, prepared = block.infer(
                    x, grid, self.extra, path, prepared, following, self.row_capacity
                )
            else:
                x, record = block(x, grid, self.extra, path, noises[index], uniforms[index])
            routing.blocks.append(record)
            if index in out_blocks:
                kept.append(x)
        return TokenFeatures(
            tokens=self.norm(x) if prepared is None else prepared.normed,
            grid=grid,
            extra=self.extra,
            blocks=tuple(kept),
            macs=None if self.training else routing.executed("corrected"),
            dense_macs=routing.static("corrected"),
            routing=routing,
        )

    def embedding_macs(self, grid: tuple[int, int]) -> dict[str, float]:
        """Count the patch embedding for one image, in both accountings.

        Args:
            grid: Token grid (H, W).

        Differs from official:
            `upstream` repeats its slip of counting channels x height pixels instead of height x
            width.
        """
        weight = self.patch_embed.proj.weight
        patch, channels = self.patch_embed.patch_size, weight.shape[1]
        height, width = grid[0] * patch, grid[1] * patch
        per_pixel = channels * self.embed_dims
        return {
            "upstream": float(channels * height * per_pixel),
            "corrected": float(height * width * per_pixel),
        }

    def macs(self, grid: tuple[int, int]) -> float:  # type: ignore[override]
        """Count the multiply-accumulates of the dense twin for one image, routers included.

        Args:
            grid: Token grid (H, W).
        """
        tokens = self.extra + grid[0] * grid[1]
        blocks = [block for block in self.blocks if isinstance(block, DGEBlock)]
        embedding = self.embedding_macs(grid)["corrected"]
        return embedding + sum(block.macs(tokens) for block in blocks)


class FrozenTeacher:
    """Holds a teacher outside the module tree: not saved, averaged, synchronised or trained.

    Args:
        model: The teacher.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict) -> FrozenTeacher:
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.model.to(images.device)(images)


@MODELS.register_module()
class DGEClassifier(PatchClassifier):
    """Classifier with a cost budget on its routers and, if wanted, a teacher.

    Source:
        vtpack's training engine: class loss + budget loss, DeiT's distillation.

    Args:
        backbone: Config of the backbone; without routers (a plain DeiT) `budget_loss` must be None.
        head: Config of the head.
        budget_loss: Config of the budget loss, or None.
        teacher: Config of a frozen model that returns logits, or None.
        distillation: Config of the distillation loss; needs `teacher` and a distilled head.
        accounting: How reported costs are counted, `corrected` or `upstream`; the budget loss has
            its own.
        budget: Mean share of the dense twin's cost (corrected) that evaluation is moved to, in
            (0, 1], by `DGEBudgetHook` or `calibrate_budget`; None evaluates as trained.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: Parts that do not fit together.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        budget_loss: dict | None = None,
        teacher: dict | None = None,
        distillation: dict | None = None,
        accounting: str = "corrected",
        budget: float | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(backbone, head, data_preprocessor, init_cfg)
        self.accounting = check_accounting(accounting)
        if budget is not None and not 0 < budget <= 1:
            raise ConfigError(f"budget={budget}: expected a share in (0, 1], or None")
        if budget is not None and not self._routers():
            raise ConfigError("budget needs a backbone with routers; remove it for a plain one")
        self.budget = budget
        self.budget_loss = None if budget_loss is None else MODELS.build(budget_loss)
        if (teacher is None) != (distillation is None):
            raise ConfigError(
                "distillation needs both `teacher` and `distillation`; set both or none"
            )
        self.distillation = None if distillation is None else MODELS.build(distillation)
        self._teacher = None if teacher is None else FrozenTeacher(MODELS.build(teacher))
        if self.distillation is not None and not getattr(self.head, "distilled", False):
            raise ConfigError(
                "distillation needs a model with two outputs: set dist_token=True in the backbone "
                "and distilled=True in the head"
            )
        if (
            getattr(self.backbone, "skip_last_queries", False)
            and getattr(self.head, "pool", "") == "mean"
        ):
            raise ConfigError(
                "skip_last_queries=True computes extra tokens only; use a head with pool='cls'"
            )

    def _routers(self) -> list[DynamicGrainedEncoder]:
        return [part for part in self.modules() if isinstance(part, DynamicGrainedEncoder)]

    def shift_routers(self, amount: float | None) -> None:
        """Favour finer or coarser candidates in all blocks, in evaluation.

        Args:
            amount: As in `DynamicGrainedEncoder.shift`.
        """
        for router in self._routers():
            router.shift(amount)

    def extract(self, inputs: Tensor, noise: Sequence[Tensor] | None = None) -> TokenFeatures:
        """Run the backbone and add the head to the cost of the pass.

        Args:
            inputs: Preprocessed images.
            noise: Router noise of every block instead of a fresh draw.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            ConfigError: Evaluation with a budget that nothing has calibrated.
        """
        if (
            self.budget is not None
            and not self.training
            and self._routers()[0].router.offset is None
        ):
            raise ConfigError(
                f"budget={self.budget} is not calibrated: add dict(type='DGEBudgetHook') to "
                "custom_hooks, or call patchreg.methods.dge.budget.calibrate_budget"
            )
        features = self.backbone(inputs) if noise is None else self.backbone(inputs, noise=noise)
        if features.routing is not None:
            # Officially width x classes, whatever else the head has.
            classes = getattr(self.head, "num_classes", None)
            published = None if classes is None else features.tokens.shape[-1] * classes
            features.routing.add_constant(self.head.macs(), upstream=published)
        return features

    def loss(
        self, inputs: Tensor, data_samples: list[Any], noise: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Return the losses of a training batch, and what they are about.

        `dge_ratio`, `comp_static` and `comp_dynamic` are for the log.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples with targets.
            noise: Router noise of every block instead of a fresh draw.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            ConfigError: There is a budget but the backbone routes nothing.
        """
        features = self.extract(inputs, noise)
        targets = stack_targets(data_samples, inputs.device)
        if self.distillation is None:
            losses = self.head.loss(features, targets)
        else:
            logits, logits_dist = self.head(features)
            base = self.head.loss_module(logits, targets)
            losses = self.distillation(base, logits_dist, self._teacher(inputs))
        if self.budget_loss is not None:
            if features.routing is None:
                raise ConfigError(
                    "budget_loss needs a backbone with routers; remove it for a plain one"
                )
            accounting = self.budget_loss.accounting
            static = features.routing.static(accounting)
            dynamic = features.routing.dynamic(accounting)
            losses["loss_dge"] = self.budget_loss(dynamic, static)
            mean = dynamic.detach().mean()
            losses["dge_ratio"] = mean / max(static, 1.0)
            losses["comp_dynamic"] = mean
            losses["comp_static"] = torch.full_like(mean, static)
        return losses

    def cost(self, features: TokenFeatures) -> tuple[Tensor, float]:
        """Return the cost of the whole model: executed per image, and of the dense twin.

        Args:
            features: What `extract` returned.

        Shape:
            Returns [B] float64 and a number.
        """
        if features.routing is None:
            return super().cost(features)
        routing = features.routing
        return routing.executed(self.accounting), routing.static(self.accounting)

    def fill(self, data_samples: list[Any], features: TokenFeatures) -> None:
        """Write how the regions of each image are spread over the granularities into the samples.

        Args:
            data_samples: Samples to fill; `granularity` becomes a [routed blocks, S] tensor.
            features: What `extract` returned.
        """
        if features.routing is None:
            return
        for sample, histogram in zip(data_samples, features.routing.histogram().cpu(), strict=True):
            sample.set_field(histogram, "granularity", dtype=None, field_type="data")

    @torch.no_grad()
    def block_shares(self, inputs: Tensor) -> Tensor:
        """Say how finely each block looks at each region; see `Routing.shares`.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, routed blocks, rows, columns].

        Raises:
            ConfigError: The backbone routes nothing.
        """
        routing = self.extract(inputs).routing
        if routing is None:
            raise ConfigError("a backbone without routers looks at every region fully")
        return routing.shares()

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Say how finely each region is looked at.

        Cells are regions, in a pyramid those of the finest stage, to which the choices of coarser
        stages are spread. `resolution` is the share s^2 / r^2 of full sampling, averaged over the
        blocks. `score` is the same plus the share expected under the routers' softmax, scaled down
        so that it only breaks ties. `keep` marks regions that any block looks at above the coarsest
        granularity.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; P = Hr * Wr.
        """
        features = self.extract(inputs)
        if features.routing is None:
            return super().select(inputs)
        blocks = features.routing.routed
        splits = blocks[0].splits
        region = max(splits)
        shares = torch.tensor([(split / region) ** 2 for split in splits], device=inputs.device)
        finest = max(blocks, key=lambda block: math.prod(block.grid))
        cells = finest.choice.shape[1:]
        resolution = features.routing.shares().mean(1)
        expected = torch.stack(
            [
                spread_regions(
                    block.logits.float().softmax(-1) @ shares, block.grid, finest.grid, cells
                )
                for block in blocks
            ]
        ).mean(0)
        macs, dense_macs = self.cost(features)
        rows, columns = resolution.shape[1:]
        cell = (
            region * inputs.shape[2] // finest.grid[0],
            region * inputs.shape[3] // finest.grid[1],
        )
        selection = PatchSelection.from_grid(
            image_size=(rows * cell[0], columns * cell[1]),
            grid=(rows, columns),
            score=(resolution + expected / (2 * len(blocks) * region**2)).flatten(1),
            keep=(resolution > shares.min() * (1 + 1e-4)).flatten(1),
            resolution=resolution.flatten(1),
            macs=macs,
            dense_macs=dense_macs,
        )
        height, width = inputs.shape[2:]
        if selection.image_size == (height, width):
            return selection
        # Regions that stick out of the image are cut off there.
        limits = selection.boxes.new_tensor([width, height, width, height])
        boxes = torch.minimum(selection.boxes, limits)
        return dataclasses.replace(selection, image_size=(height, width), boxes=boxes)
