"""Vision transformers of timm, whole or on some patches only.

Letters: B images, E extra tokens, N tokens, C channels, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchreg.models.backbones.timm import TimmBackbone
from patchreg.models.base import PatchClassifier, TokenFeatures
from patchreg.models.layers import keep_tokens
from patchreg.models.preprocessor import ImagePreprocessor
from patchreg.registry import BACKBONES, MODELS
from patchreg.transforms.timm_eval import timm_data_config
from patchreg.utils.errors import ConfigError
from patchreg.utils.weights import load_file, state_dict_of


@BACKBONES.register_module()
class TimmViTBackbone(TimmBackbone):
    """Vision transformer of timm by name, with its tokens as output and its classifier at hand.

    Args:
        model_name: Name of a `VisionTransformer` of timm, such as `vit_base_patch32_384`.
        num_classes: Classes K of its head, or 0.
        checkpoint: Local weight file, or None for random weights.
        frozen: Never train it.
        model_kwargs: Further arguments of the timm model.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: timm is not installed, does not know the model, or it is of another kind.
        CheckpointError: The weights do not fit the model.
        MissingFileError: The weight file does not exist.
    """

    model: Any

    def __init__(
        self,
        model_name: str,
        num_classes: int = 0,
        checkpoint: str | None = None,
        frozen: bool = False,
        model_kwargs: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(model_name, num_classes, checkpoint, frozen, model_kwargs, init_cfg)
        from timm.models.vision_transformer import VisionTransformer

        if not isinstance(self.model, VisionTransformer) or self.model.dynamic_img_size:
            raise ConfigError(
                f"'{model_name}' is a {type(self.model).__name__}, whose patches cannot be left out; use a "
                "VisionTransformer of timm with a fixed image size, such as deit_small_patch16_224"
            )
        self.extra = int(self.model.num_prefix_tokens)
        self.checkpoint = checkpoint

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in px."""
        return tuple(self.model.patch_embed.patch_size)

    def forward(  # type: ignore[override]
        self, images: Tensor, out_blocks: Sequence[int] = (), cells: Tensor | None = None
    ) -> TokenFeatures:
        """Encode images, or some patches of them.

        Positions are added first, then the other patches are removed; extra tokens stay.

        Source:
            `VisionTransformer.forward_features` of timm; `eval_patchrank.py` of the official PatchGame.

        Args:
            images: Images of the model's size.
            out_blocks: Blocks, from 0, whose outputs are returned too.
            cells: Patches that take part, or None for all.

        Shape:
            images [B, 3, H, W]; cells [B, kept] int64; tokens [B, N, C].
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = self.model._pos_embed(self.model.patch_embed(images))
            if cells is not None:
                x = keep_tokens(x, cells, self.extra)
            x = self.model.norm_pre(x)
            kept = []
            for index, block in enumerate(self.model.blocks):
                x = block(x)
                if index in out_blocks:
                    kept.append(x)
            grid = tuple(self.model.patch_embed.grid_size)
            macs = None
            if cells is not None:
                macs = x.new_full((len(x),), self.macs(grid, cells.shape[1]), dtype=torch.float64)
            return TokenFeatures(
                tokens=self.model.norm(x),
                grid=grid,
                extra=self.extra,
                blocks=tuple(kept),
                macs=macs,
                dense_macs=self.macs(grid),
            )

    def macs(self, grid: tuple[int, int], kept: int | None = None) -> float:
        """Count the multiply-accumulates of the matrix products for one image.

        Args:
            grid: Rows and columns of the token grid.
            kept: Patches that reach the blocks, or None for all.
        """
        embed = self.model.patch_embed.proj
        cells = grid[0] * grid[1]
        count = self.extra + (cells if kept is None else kept)
        dims = self.model.embed_dim
        linear = sum(
            part.weight.numel()
            for part in self.model.blocks.modules()
            if isinstance(part, nn.Linear)
        )
        products = 2 * len(self.model.blocks) * count**2 * dims
        return float(embed.weight.numel() * cells + count * linear + products)

    def last_attention(self, images: Tensor) -> Tensor:
        """Return the attention of the last block.

        Args:
            images: Images of the model's size.

        Shape:
            images [B, 3, H, W]; returns [B, h, N, N], rows sum to 1.

        Raises:
            ConfigError: The model's blocks are of another kind.
        """
        last = self.model.blocks[-1]
        attention: Any = getattr(last, "attn", None)
        if not hasattr(attention, "qkv") or not hasattr(attention, "q_norm"):
            raise ConfigError(
                f"the attention of a {type(last).__name__} of timm is not known; use a plain ViT or DeiT"
            )
        depth = len(self.model.blocks)
        x = self.model._pos_embed(self.model.patch_embed(images))
        x = self.model.norm_pre(x)
        for block in self.model.blocks[: depth - 1]:
            x = block(x)
        x = last.norm1(x)
        batch, count, _ = x.shape
        qkv = attention.qkv(x).view(batch, count, 3, attention.num_heads, -1)
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = attention.q_norm(query), attention.k_norm(key)
        return ((query * attention.scale) @ key.transpose(-2, -1)).softmax(dim=-1)


class _TimmHead(nn.Module):
    """The head inside a timm model, in the form of this project's heads."""

    def __init__(self, backbone: TimmViTBackbone, loss: dict) -> None:
        super().__init__()
        # Not a sub-module: the weights stay where timm has them.
        self._backbone = [backbone]
        self.loss_module = MODELS.build(loss)

    def forward(self, features: TokenFeatures) -> Tensor:
        return self._backbone[0].model.forward_head(features.tokens)

    def loss(self, features: TokenFeatures, targets: Tensor) -> dict[str, Tensor]:
        return {"loss_cls": self.loss_module(self(features), targets)}

    def macs(self) -> float:
        model = self._backbone[0].model
        heads = (getattr(model, name, None) for name in ("head", "head_dist"))
        return float(sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear)))


@MODELS.register_module()
class TimmPatchClassifier(PatchClassifier):
    """Vision transformer of timm with its own classifier, which can run on some patches only.

    Source:
        `eval_patchrank.py` of the official PatchGame.

    Args:
        backbone: Config of a `TimmViTBackbone` with `num_classes`.
        loss: Config of the loss, where it is trained.
        own_checkpoint: Whether a checkpoint that a run loads is for this model. False leaves it to a ranker
            that is evaluated with it; the weights then come from `backbone.checkpoint`.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: The backbone is another one, or has no classifier.

    Differs from official:
        Works with the attributes of today's timm. Which patches are kept is always said, so never
        silently all.
    """

    def __init__(
        self,
        backbone: dict,
        loss: dict | None = None,
        own_checkpoint: bool = True,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        # Its head is a view of the backbone, so it is made here and not from a config.
        super(PatchClassifier, self).__init__(
            data_preprocessor=data_preprocessor, init_cfg=init_cfg
        )
        self.backbone = MODELS.build(backbone)
        if not isinstance(self.backbone, TimmViTBackbone) or not self.backbone.model.num_classes:
            raise ConfigError(
                "TimmPatchClassifier needs backbone=dict(type='TimmViTBackbone', model_name=..., "
                "num_classes=...) with at least one class"
            )
        self.head = _TimmHead(self.backbone, loss or {"type": "CrossEntropyLoss"})
        self.own_checkpoint = own_checkpoint

    def read_checkpoint(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read a checkpoint of this model, or keep the weights that it has.

        Args:
            path: File to read.

        Raises:
            ConfigError: It keeps its weights and has only random ones.
        """
        if not self.own_checkpoint and self.backbone.checkpoint is None:
            raise ConfigError(
                "the classifier has random weights: name timm's file of them with "
                "model.backbone.checkpoint=FILE"
            )
        if not self.own_checkpoint:
            return {"state_dict": self.state_dict()}
        loaded = load_file(path)
        return {**loaded, "state_dict": state_dict_of(loaded, path)}


@MODELS.register_module()
class TimmPreprocessor(ImagePreprocessor):
    """Normalise images with the mean and deviation that a model of timm was published with.

    Args:
        model_name: Name of the model.
        non_blocking: Copy to the device without waiting.

    Raises:
        ConfigError: timm is not installed or does not know the model.
    """

    def __init__(self, model_name: str, non_blocking: bool = False) -> None:
        config = timm_data_config(model_name)
        mean, std = ([255.0 * value for value in config[name]] for name in ("mean", "std"))
        super().__init__(mean=mean, std=std, non_blocking=non_blocking)
