"""Linear classifier on frozen features.

Letters: B images, N tokens, C channels, n blocks, K classes.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
from dataclasses import replace
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from patchreg.models.base import PatchClassifier, TokenFeatures
from patchreg.models.features import as_tokens, backbone_state
from patchreg.registry import MODELS
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import load_file, load_weights


def probe_features(features: TokenFeatures, avgpool_patchtokens: bool = False) -> Tensor:
    """Return what a linear probe reads of each image.

    The class tokens of the blocks side by side, oldest first; with the average of the patch tokens,
    the two are interleaved number by number, as official classifiers expect. Without class token the
    mean of the grid takes its place.

    Source:
        DINO's `eval_linear.py`.

    Args:
        features: Tokens with, as `blocks`, the outputs of the last blocks after the final norm.
        avgpool_patchtokens: Add the mean of the last block's patch tokens.

    Shape:
        Returns [B, n C] or [B, 2 C].
    """
    blocks = features.blocks or (features.tokens,)
    cells = features.tokens[:, features.extra :].mean(dim=1)
    if not features.extra:
        return cells
    found = torch.cat([block[:, 0] for block in blocks], dim=1)
    return torch.stack((found, cells), dim=2).flatten(1) if avgpool_patchtokens else found


@MODELS.register_module()
class LinearProbeHead(BaseModule):
    """Linear classifier on frozen features, weights drawn from N(0, 0.01), bias 0.

    Parameter names are those of DINO's public classifiers (`linear.weight`, `linear.bias`).

    Source:
        `LinearClassifier` of DINO's `eval_linear.py`.

    Args:
        num_classes: Classes K.
        in_channels: Channels of a token C.
        n_last_blocks: Blocks n whose class tokens are read.
        avgpool_patchtokens: Read the mean of the patch tokens too; only with one block.
        checkpoint: File of a trained classifier, such as DINO's `dino_deitsmall16_linearweights.pth`,
            or None.
        loss: Config of the loss.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: The average with several blocks.
        CheckpointError: The file holds no classifier of this size.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        n_last_blocks: int = 1,
        avgpool_patchtokens: bool = False,
        checkpoint: str | None = None,
        loss: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if n_last_blocks < 1:
            raise ConfigError(f"n_last_blocks={n_last_blocks}: expected at least 1")
        if avgpool_patchtokens and n_last_blocks > 1:
            raise ConfigError(
                f"avgpool_patchtokens=True with n_last_blocks={n_last_blocks}: the mean of the "
                "patch tokens is interleaved with one class token; use n_last_blocks=1"
            )
        self.n_last_blocks = n_last_blocks
        self.avgpool_patchtokens = avgpool_patchtokens
        width = in_channels * (2 if avgpool_patchtokens else n_last_blocks)
        self.num_classes = num_classes
        self.linear = nn.Linear(width, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.loss_module = MODELS.build(loss or {"type": "CrossEntropyLoss"})
        if checkpoint is not None:
            self._load(checkpoint)

    def _load(self, path: str) -> None:
        state = load_weights(path)
        weight, bias = (state.get(f"linear.{name}") for name in ("weight", "bias"))
        if weight is None or bias is None or weight.shape != self.linear.weight.shape:
            found = None if weight is None else tuple(weight.shape)
            raise CheckpointError(
                f"'{path}' holds no classifier for this head: linear.weight is {found}, expected "
                f"{tuple(self.linear.weight.shape)}; set num_classes, n_last_blocks and "
                "avgpool_patchtokens as it was trained"
            )
        self.linear.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, features: TokenFeatures) -> Tensor:
        """Return the logits.

        Args:
            features: Tokens and blocks of the frozen backbone.

        Shape:
            Returns [B, K].
        """
        found = probe_features(features, self.avgpool_patchtokens)
        if found.shape[1] != self.linear.in_features:
            raise ConfigError(
                f"the backbone gives {found.shape[1]} features, the head reads "
                f"{self.linear.in_features}; set head.in_channels and head.n_last_blocks"
            )
        return self.linear(found)

    def loss(self, features: TokenFeatures, targets: Tensor) -> dict[str, Tensor]:
        """Return the classification loss.

        Args:
            features: Tokens and blocks of the frozen backbone.
            targets: Labels, or soft scores.

        Shape:
            targets [B] or [B, K].
        """
        return {"loss_cls": self.loss_module(self(features), targets)}

    def macs(self) -> float:
        """Count the multiply-accumulates of the classifier for one image."""
        return float(self.linear.weight.numel())


@MODELS.register_module()
class LinearProbeClassifier(PatchClassifier):
    """Image classifier whose backbone is frozen and whose head, a `LinearProbeHead`, is trained.

    Weights of the backbone are those of a self-supervised run, see `read_checkpoint`; they are saved
    with the head. Several blocks are read from vision transformers; others give their output only.

    Source:
        DINO's `eval_linear.py`.

    Args:
        backbone: Config of the backbone.
        head: Config of the head.
        checkpoint_key: Part of a training checkpoint that holds the backbone, such as `teacher`.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: The head reads blocks that the backbone does not give.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        checkpoint_key: str = "teacher",
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(backbone, head, data_preprocessor, init_cfg)
        self.checkpoint_key = checkpoint_key
        given = ("checkpoint", "init_cfg", "pretrained")
        self._has_weights = init_cfg is not None or any(backbone.get(key) for key in given)
        self.backbone.register_load_state_dict_post_hook(self._note_weights)
        self.backbone.requires_grad_(False)
        if self.head.n_last_blocks > 1:
            self._check_blocks(self.head.n_last_blocks)

    def _note_weights(self, *_: Any) -> None:
        self._has_weights = True

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        """Return the loss of the head; warns once where nothing was loaded into the backbone.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples with targets.

        Shape:
            inputs [B, 3, H, W].
        """
        if not self._has_weights:
            self._note_weights()
            print_log(
                "the backbone of this probe has random weights: give those of a run with "
                "--cfg-options load_from=CHECKPOINT",
                logger="current",
                level=logging.WARNING,
            )
        return super().loss(inputs, data_samples)

    def _check_blocks(self, count: int) -> None:
        inner = getattr(self.backbone, "model", self.backbone)
        takes = "out_blocks" in inspect.signature(self.backbone.forward).parameters
        if not (takes and hasattr(inner, "blocks") and hasattr(inner, "norm")):
            raise ConfigError(
                f"head.n_last_blocks={count}: {type(self.backbone).__name__} gives its output only; "
                "use n_last_blocks=1"
            )
        if count > len(inner.blocks):
            raise ConfigError(
                f"head.n_last_blocks={count}: the backbone has {len(inner.blocks)} blocks"
            )

    def train(self, mode: bool = True) -> LinearProbeClassifier:
        """Switch the head's mode; the backbone stays in evaluation mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def extract(self, inputs: Tensor) -> TokenFeatures:
        """Run the frozen backbone.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        count = self.head.n_last_blocks
        if count == 1:
            return as_tokens(self.backbone(inputs))
        blocks, norm = self._encoder()
        features = self.backbone(inputs, out_blocks=range(len(blocks) - count, len(blocks)))
        earlier = tuple(norm(block) for block in features.blocks[:-1])
        return replace(features, blocks=(*earlier, features.tokens))

    def _encoder(self) -> tuple[Any, Any]:
        """Return blocks and final norm of the backbone, or of the library's model in it."""
        inner = self.backbone if hasattr(self.backbone, "blocks") else self.backbone.model
        return inner.blocks, inner.norm

    def read_checkpoint(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read a probe's own checkpoint, or the backbone of any other file.

        Args:
            path: File to read.

        Raises:
            CheckpointError: No weight of the backbone is inside.
        """
        own = {f"head.{key}": value for key, value in self.head.state_dict().items()}
        backbone = backbone_state(self.backbone, path, self.checkpoint_key)
        found = {f"backbone.{key}": value for key, value in backbone.items()}
        state = load_file(path, allowed=[argparse.Namespace]).get("state_dict", {})
        if all(key in state for key in own):
            own = {key: state[key] for key in own}
        else:
            print_log(
                f"{os.fspath(path)} holds no classifier for this probe; the head keeps its own "
                "weights",
                logger="current",
                level=logging.WARNING,
            )
        return {"state_dict": {**found, **own}}
