"""PW-Self: a student predicts, token by token, what its moving average sees in other views.

Letters: B images, V views, U views of the teacher, T tokens of a view, D channels, C bottleneck channels,
h heads, N student tokens that take part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from patchreg.methods.pwself.matching import RULES, match_batch
from patchreg.models.base import TokenFeatures
from patchreg.models.multi_view import by_size
from patchreg.models.selectors.rankers import class_attention
from patchreg.registry import MODELS
from patchreg.structures import PatchSelection, ViewGeometry
from patchreg.utils.errors import ConfigError, DataError


class Branch(nn.Module):
    """Backbone and projection head of student or teacher.

    Args:
        backbone: Config of the backbone.
        head: Config of the head.

    Raises:
        ConfigError: The backbone has no class token, or another width than the head.
    """

    def __init__(self, backbone: dict, head: dict) -> None:
        super().__init__()
        self.backbone: Any = MODELS.build(backbone)
        if getattr(self.backbone, "extra", None) != 1:
            raise ConfigError(
                f"backbone {type(self.backbone).__name__} has no single class token before its patches; "
                "use VisionTransformerBackbone"
            )
        dims = self.backbone.embed_dims
        if head.setdefault("in_channels", dims) != dims:
            raise ConfigError(
                f"head.in_channels={head['in_channels']}: the backbone gives {dims} channels"
            )
        self.head: Any = MODELS.build(head)


@MODELS.register_module()
class PWSelfPretrainer(BaseModel):
    """Student and teacher of patch-wise self-distillation.

    The teacher sees the first views, the student all of them. Its weights follow the student's as a
    moving average (`PWSelfTeacherHook`); its backbone is what is evaluated.

    Source:
        "Patch-Wise Self-Supervised Visual Representation Learning" (arXiv:2310.18651).

    Args:
        backbone: Config of the backbone; `drop_path_rate` holds for the student only.
        head: Config of the projection head.
        loss: Config of the loss; `out_dim` and `tokens` are filled in.
        num_global: Views that the teacher sees.
        global_size: Side of these views in px, or None for the backbone's `img_size`.
        matching: `published`, or `containment`: each patch of the student to the patch of the teacher
            that holds its centre.
        class_weight: Part of the class token in the loss of a pair of views, in [0, 1]; None counts
            it like a matched patch, as published.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: Sizes that do not fit, an unknown rule, or batch norm in the head.

    Differs from official:
        The student's head works on matched tokens only, which gives the same loss.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        loss: dict,
        num_global: int = 2,
        global_size: int | None = None,
        matching: str = "published",
        class_weight: float | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        if matching not in RULES:
            raise ConfigError(f"matching='{matching}' is unknown; use one of {', '.join(RULES)}")
        if head.get("use_bn"):
            raise ConfigError(
                "head.use_bn=True: batch norm has no meaning on tokens; set it to False"
            )
        if num_global < 1:
            raise ConfigError(f"num_global={num_global}: the teacher needs at least one view")
        if class_weight is not None and not 0 <= class_weight <= 1:
            raise ConfigError(f"class_weight={class_weight}: expected 0 to 1, or None")
        self.num_global = num_global
        self.matching = matching
        self.class_weight = class_weight
        self.student = Branch(backbone, dict(head))
        self.teacher = Branch(dict(backbone, drop_path_rate=0.0), dict(head))
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.patch_size = self.student.backbone.patch_embed.patch_size
        rows, columns = self.student.backbone.grid
        if global_size is not None:
            rows = columns = global_size // self.patch_size
            if rows < 1:
                raise ConfigError(
                    f"global_size={global_size} px is smaller than a patch of {self.patch_size} px"
                )
        self.grid = (rows, columns)
        sizes = dict(out_dim=self.student.head.out_dim, tokens=1 + rows * columns)
        self.criterion = MODELS.build(dict(loss, **sizes))

    def forward(
        self,
        inputs: Any,
        data_samples: list[Any] | None = None,
        mode: str = "tensor",
        geometry: ViewGeometry | None = None,
    ) -> Any:
        """Run the model in one of MMEngine's modes.

        Args:
            inputs: Views for `loss`, else images.
            data_samples: Filled by `predict`.
            mode: `loss` returns a dict of losses; `tensor` the class tokens of the teacher's backbone;
                `predict` the samples with `feature`.
            geometry: Boxes and flips of the views.

        Shape:
            inputs V times [B, 3, h, w] for `loss`, else [B, 3, H, W]; features [B, D].

        Raises:
            DataError: There is no geometry to match by, or no sample to fill.
            ValueError: The mode is unknown.
        """
        if mode == "tensor":
            return self.features(inputs)
        if mode == "loss":
            if geometry is None:
                raise DataError(
                    "training needs the geometry of the views: end the pipeline with MultiView and use "
                    "MultiViewPreprocessor"
                )
            return self.loss(inputs, geometry)
        if mode == "predict":
            if data_samples is None:
                raise DataError("predict needs one data sample per image to fill")
            for sample, feature in zip(data_samples, self.features(inputs).cpu(), strict=True):
                sample.set_field(feature, "feature", dtype=None, field_type="data")
            return data_samples
        raise ValueError(f"mode={mode!r} is unknown; expected 'tensor', 'loss' or 'predict'")

    def loss(self, views: Sequence[Tensor], geometry: ViewGeometry) -> dict[str, Tensor]:
        """Return the loss of a training batch.

        Args:
            views: Normalised views, those of the teacher first.
            geometry: Boxes and flips of the views.

        Shape:
            views V times [B, 3, h, w].

        Raises:
            DataError: The teacher's views have another size than the model was made for.
        """
        side = list(geometry.sizes[: self.num_global])
        if len(side) < self.num_global or geometry.num_views < 2:
            raise DataError(
                f"num_global={self.num_global} with {geometry.num_views} views of an image: the teacher "
                "sees the first num_global views, and the student all, at least 2; set num_global or "
                "MultiView.views"
            )
        expected = tuple(cells * self.patch_size for cells in self.grid)
        for size in side:
            if tuple(pixels // self.patch_size for pixels in size) != self.grid:
                raise DataError(
                    f"the first {self.num_global} views are {side} px, the model's centers are made for "
                    f"{expected} px; set global_size of the model to the size of these views"
                )
        matches = match_batch(
            geometry, self.patch_size, self.num_global, self.matching, self.class_weight
        )
        with torch.no_grad():
            tokens = self.teacher.backbone(torch.cat(list(views[: self.num_global]))).tokens
            target = self.teacher.head.bottleneck(tokens)
            target_weight = self.teacher.head.last_layer.weight()
        by_view: dict[int, Tensor] = {}
        for numbers, batch in by_size(views):
            tokens = self.student.backbone(batch).tokens
            for number, part in zip(numbers, tokens.chunk(len(numbers)), strict=True):
                by_view[number] = part.flatten(0, 1)
        flat = torch.cat([by_view[number] for number in range(len(views))])
        head = self.student.head
        features = head.bottleneck(flat[matches.rows.to(flat.device, non_blocking=True)])
        return self.criterion(features, head.last_layer.weight(), target, target_weight, matches)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher's parameters towards the student's.

        Args:
            momentum: Weight of the teacher's own value, in [0, 1].
        """
        torch._foreach_lerp_(
            list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum
        )

    def extract(self, inputs: Tensor) -> TokenFeatures:
        """Run the teacher's backbone.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        return self.teacher.backbone(inputs)

    @torch.no_grad()
    def features(self, inputs: Tensor) -> Tensor:
        """Return the class token of the teacher's backbone for each image.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, D].
        """
        return self.extract(inputs).tokens[:, 0]

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Say what the class token of the teacher's backbone looks at; all patches are computed.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        return class_attention(self.teacher.backbone, inputs)
