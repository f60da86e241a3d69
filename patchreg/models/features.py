"""From what a backbone returns to one feature vector per image, for evaluations without training.

Letters: B images, N tokens, C channels, H x W grid.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn import functional as F

from patchreg.models.base import TokenFeatures
from patchreg.registry import MODELS
from patchreg.utils.errors import CheckpointError, ConfigError
from patchreg.utils.weights import load_file, state_dict_of

POOLS = ("auto", "cls", "mean", "gem", "cls_gem", "flat")


def as_tokens(output: Any) -> TokenFeatures:
    """Give what any backbone returns one form.

    Args:
        output: `TokenFeatures`; a feature map [B, C, H, W]; tokens [B, N, C] with the class token
            first; vectors [B, C]; or a sequence of these, of which the last is taken.

    Raises:
        ConfigError: The backbone returns something else.
    """
    if isinstance(output, TokenFeatures):
        return output
    if isinstance(output, (list, tuple)) and output:
        return as_tokens(output[-1])
    if isinstance(output, Tensor) and output.ndim == 4:
        grid = (output.shape[2], output.shape[3])
        return TokenFeatures(tokens=output.flatten(2).transpose(1, 2), grid=grid, extra=0)
    if isinstance(output, Tensor) and output.ndim == 3:
        return TokenFeatures(tokens=output, grid=(1, output.shape[1] - 1), extra=1)
    if isinstance(output, Tensor) and output.ndim == 2:
        return TokenFeatures(tokens=output[:, None], grid=(1, 1), extra=0)
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ConfigError(
        f"features cannot be taken from a backbone that returns {shape}; expected TokenFeatures, a "
        "map [B, C, H, W], tokens [B, N, C] or vectors [B, C]"
    )


def gem(cells: Tensor, power: float = 4.0, eps: float = 1e-6) -> Tensor:
    """Average cells by their generalised mean.

    Source:
        Radenovic et al., "Fine-tuning CNN image retrieval with no human annotation"; DINO's
        `eval_copy_detection.py`.

    Args:
        cells: Tokens of a grid.
        power: Exponent; 1 is the mean.
        eps: Lower bound of the values.

    Shape:
        cells [B, N, C]; returns [B, C].
    """
    return cells.clamp(min=eps).pow(power).mean(dim=1).pow(1.0 / power)


def pool_tokens(features: TokenFeatures, pool: str = "auto") -> Tensor:
    """Make one vector of the tokens of each image.

    Args:
        features: What the backbone returned.
        pool: `cls` the class token, `mean` and `gem` the plain and the generalised mean (power 4) of
            the grid, `cls_gem` class token and generalised mean side by side, `flat` the whole grid,
            `auto` the class token where there is one, else the mean. Without class token `cls_gem`
            uses the mean in its place.

    Shape:
        Returns [B, C], [B, 2 C] or [B, H * W * C].

    Raises:
        ConfigError: There is no class token, or the pool is unknown.
    """
    if pool not in POOLS:
        raise ConfigError(f"pool={pool!r} is unknown; use one of {POOLS}")
    tokens, extra = features.tokens, features.extra
    cells = tokens[:, extra:]
    if pool == "cls" and not extra:
        raise ConfigError("pool='cls': the backbone has no class token; use 'mean' or 'auto'")
    if pool == "flat":
        return cells.flatten(1)
    if pool == "gem":
        return gem(cells)
    whole = tokens[:, 0] if extra and pool != "mean" else cells.mean(dim=1)
    return torch.cat((whole, gem(cells)), dim=1) if pool == "cls_gem" else whole


@MODELS.register_module()
class FeatureExtractor(BaseModel):
    """A frozen backbone that turns images into vectors, for k-NN, retrieval and copy detection.

    Any backbone works: those of this package, timm's and torchvision's, and what other packages
    register. Weights come from a training run of this project, from the authors' checkpoints or from
    a bare state dict, see `read_checkpoint`.

    Source:
        DINO's `eval_knn.py`, `eval_image_retrieval.py` (`multi_scale`), `eval_copy_detection.py`.

    Args:
        backbone: Config of the backbone.
        pool: How its tokens become a vector, as for `pool_tokens`.
        scales: Sizes relative to the image at which it is looked at; the features of several are
            averaged and divided by their length.
        checkpoint_key: Part of a training checkpoint that holds the backbone, such as `teacher` or
            `student`; parts that a checkpoint does not have are passed over.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: A scale is not positive, or the pool is unknown.

    Differs from official:
        There a batch is divided by its common length, so that several scales need batches of one
        image.
    """

    def __init__(
        self,
        backbone: dict,
        pool: str = "auto",
        scales: Sequence[float] = (1.0,),
        checkpoint_key: str = "teacher",
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        if pool not in POOLS:
            raise ConfigError(f"pool={pool!r} is unknown; use one of {POOLS}")
        if not scales or min(scales) <= 0:
            raise ConfigError(f"scales={tuple(scales)}: expected positive numbers, such as [1.0]")
        self.backbone = MODELS.build(backbone)
        self.pool = pool
        self.scales = tuple(scales)
        self.checkpoint_key = checkpoint_key
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode.

        Args:
            mode: Not used.
        """
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, inputs: Tensor, data_samples: list[Any] | None = None, mode: str = "tensor"
    ) -> Tensor:
        """Return the features of images.

        Args:
            inputs: Preprocessed images.
            data_samples: Not used.
            mode: Only `tensor`.

        Shape:
            inputs [B, 3, H, W]; returns [B, D].

        Raises:
            ConfigError: Another mode is asked for.
        """
        if mode != "tensor":
            raise ConfigError(
                f"FeatureExtractor makes features only (mode='tensor'), not {mode!r}; evaluate it "
                "with test_cfg.type='FeatureTestLoop'"
            )
        return self.features(inputs)

    def features(self, inputs: Tensor) -> Tensor:
        """Return one vector per image.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, D].
        """
        if self.scales == (1.0,):
            return pool_tokens(as_tokens(self.backbone(inputs)), self.pool)
        total: Tensor | None = None
        for scale in self.scales:
            resized = inputs
            if scale != 1:
                resized = F.interpolate(
                    inputs, scale_factor=scale, mode="bilinear", align_corners=False
                )
            found = pool_tokens(as_tokens(self.backbone(resized)), self.pool)
            total = found if total is None else total + found
        assert total is not None
        return F.normalize(total / len(self.scales), dim=1)

    def read_checkpoint(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read the backbone's weights from a file, whatever else it holds.

        Known are the checkpoints of this project, those of the authors' training (a dict of
        `student` and `teacher`) and bare state dicts; `checkpoint_key` is looked for first.

        Args:
            path: File to read.

        Raises:
            CheckpointError: No weight of the backbone is inside.
        """
        state = backbone_state(self.backbone, path, self.checkpoint_key)
        return {"state_dict": {f"backbone.{key}": value for key, value in state.items()}}


_HEADS = {"head", "heads", "head_dist", "fc", "classifier", "last_linear"}
"""What a classifier is called, which a backbone may lack the end of."""


def backbone_state(
    backbone: nn.Module, path: str | os.PathLike[str], checkpoint_key: str = "teacher"
) -> dict[str, Tensor]:
    """Return the part of a checkpoint that belongs to a backbone, under the backbone's own names.

    Args:
        backbone: The backbone.
        path: File to read; an `argparse.Namespace` in it, as the authors' have, is passed over.
        checkpoint_key: Part that is looked for first.

    Raises:
        MissingFileError: The file does not exist.
        CheckpointError: No part of it holds weights of the backbone, or it has more blocks.

    Differs from official:
        There names are shortened wherever a prefix occurs in them, and a file that fits nowhere is
        passed over with a printed line.
    """
    loaded = load_file(path, allowed=[argparse.Namespace])
    part = loaded.get(checkpoint_key)
    state = state_dict_of(part if isinstance(part, dict) else loaded, path)
    own = backbone.state_dict()
    # A wrapper around a library's model has one more level than the library's own files.
    inner = {key.removeprefix("model."): key for key in own}
    tops = {key.split(".")[0] for key in inner} - _HEADS
    best: dict[str, Tensor] = {}
    deeper: list[str] = []
    for prefix in (f"{checkpoint_key}.backbone.", f"{checkpoint_key}.", "backbone.", ""):
        cut = {
            key[len(prefix) :].removeprefix("module."): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
        cut = {inner.get(key, key): value for key, value in cut.items()}
        found = {key: value for key, value in cut.items() if key in own}
        if len(found) > len(best):
            best = found
            left = {key.removeprefix("model."): key for key in cut if key not in own}
            deeper = [key for short, key in left.items() if short.split(".")[0] in tops]
        if len(best) == len(own):
            break
    if own and not best:
        raise CheckpointError(
            f"'{os.fspath(path)}' holds no weight of the backbone {type(backbone).__name__} (its "
            f"keys: {', '.join(list(state)[:4])}, ...); name the part that holds it with "
            "model.checkpoint_key, or convert the file with tools/convert.py"
        )
    if deeper:
        raise CheckpointError(
            f"'{os.fspath(path)}' is of a network with more blocks than the backbone "
            f"{type(backbone).__name__}, or with other ones: {', '.join(deeper[:3])}, ... have no "
            "place; set model.backbone (depth, type) as in the config of the run that wrote the file"
        )
    unused = len(state) - len(best)
    if unused:
        print_log(
            f"{len(best)} of the backbone's {len(own)} tensors taken from {os.fspath(path)}; "
            f"{unused} others in it (heads, other branches) are not used",
            logger="current",
            level=logging.INFO,
        )
    return best
