"""Any classification network of torchvision, with local weights.

Letters: B images, H x W input, h x w last feature map, C channels, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from patchreg.models.base import TokenFeatures, map_features
from patchreg.models.macs import CountedMacs
from patchreg.registry import BACKBONES
from patchreg.utils.errors import CheckpointError, ConfigError, did_you_mean
from patchreg.utils.weights import load_weights

OUTPUTS = ("logits", "features", "map", "tokens")
_HEADS = ("fc", "classifier", "heads", "head")
_WITH_MAP = (
    "AlexNet",
    "ConvNeXt",
    "DenseNet",
    "EfficientNet",
    "MNASNet",
    "MobileNetV2",
    "MobileNetV3",
    "RegNet",
    "ResNet",
    "ShuffleNetV2",
    "SqueezeNet",
    "VGG",
)
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")


def modern_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of torchvision's old DenseNet files (`denselayer1.norm.1.weight`).

    Keys of other networks pass unchanged.

    Source:
        `_load_state_dict` of `torchvision/models/densenet.py`.

    Args:
        state: Flat state dict.
    """
    return {_OLD_DENSENET.sub(r"\1\2.", key): value for key, value in state.items()}


def with_counts(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the counts of batches that BatchNorm keeps, which files of before PyTorch 0.4.1 lack.

    Args:
        state: State dict.
        own: State dict of the network.
    """
    name = "num_batches_tracked"
    if any(key.endswith(name) for key in state):
        return dict(state)
    start = "model." if state and all(key.startswith("model.") for key in state) else ""
    return {**state, **{start + key: own[key] * 0 for key in own if key.endswith(name)}}


@BACKBONES.register_module()
class TorchvisionBackbone(CountedMacs, BaseModule):
    """Classification network of torchvision by name, unmodified; nothing is downloaded.

    torchvision is imported when the network is built, not before. Its state-dict keys are
    torchvision's below `model.`.

    Args:
        model_name: Name known to `torchvision.models.get_model`, such as `resnet50`.
        num_classes: Classes K, or 0 for a network without classifier.
        output: `logits` of the classifier; `features`, its input; `map`, the last feature map;
            `tokens`, the same as `TokenFeatures`. None means logits with a classifier, features
            without.
        checkpoint: Local weight file, or None for random weights. A classifier for another number
            of classes in it is left out; everything else has to match. Old DenseNet keys are
            understood.
        frozen: Never train it: evaluation mode, no gradient.
        model_kwargs: Further arguments of the torchvision model.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: torchvision is not installed or does not know the network, or the output does
            not go with it.
        CheckpointError: The weights do not fit the network.
        MissingFileError: The weight file does not exist.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int = 0,
        output: str | None = None,
        checkpoint: str | None = None,
        frozen: bool = False,
        model_kwargs: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        output = output or ("logits" if num_classes else "features")
        if output not in OUTPUTS:
            raise ConfigError(f"output={output!r} is unknown; use one of {OUTPUTS}")
        if (output == "logits") != (num_classes > 0):
            raise ConfigError(
                f"output={output!r} with num_classes={num_classes}: logits need num_classes > 0, "
                "the other outputs num_classes=0"
            )
        self.output = output
        self.frozen = frozen
        self.model = _build(model_name, num_classes, model_kwargs or {})
        self._head = next(name for name in _HEADS if hasattr(self.model, name))
        self._remove_classifier(model_name)
        if checkpoint is not None:
            self._load(checkpoint, model_name)
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def _remove_classifier(self, model_name: str) -> None:
        """Take out what lies behind the output, so that no parameter is without use."""
        if self.output == "logits":
            return
        head = getattr(self.model, self._head)
        if self.output == "features":
            if isinstance(head, nn.Linear):
                setattr(self.model, self._head, nn.Identity())
                return
            for name, part in reversed(list(head.named_children())):
                if isinstance(part, nn.Linear):
                    setattr(head, name, nn.Identity())
                    return
            raise ConfigError(
                f"'{model_name}' has no linear classifier to take away; use output='map'"
            )
        kind = type(self.model).__name__
        if kind not in _WITH_MAP:
            raise ConfigError(
                f"output={self.output!r}: the feature map of '{model_name}' ({kind}) is not known; "
                f"known are those of {', '.join(_WITH_MAP)}"
            )
        setattr(self.model, self._head, nn.Identity())

    def _load(self, path: str, model_name: str) -> None:
        own = self.model.state_dict()
        state = with_counts(modern_keys(load_weights(path)), own)
        if all(key.startswith("model.") for key in state):
            state = {key[len("model.") :]: value for key, value in state.items()}
        foreign = [
            key
            for key in state
            if key.startswith(f"{self._head}.")
            and (key not in own or own[key].shape != state[key].shape)
        ]
        kept = {key: value for key, value in state.items() if key not in foreign}
        missing = [key for key in own if key not in kept and not key.startswith(f"{self._head}.")]
        wrong = [key for key in kept if key not in own or own[key].shape != kept[key].shape]
        lost = [key for key in own if key.startswith(f"{self._head}.") and key not in state]
        if missing or wrong or (self.output == "logits" and lost):
            raise CheckpointError(
                f"'{path}' does not fit '{model_name}': missing {(missing + lost)[:4]}, unexpected or "
                f"of another shape {wrong[:4]}; give the file of this network"
            )
        self.model.load_state_dict(kept, strict=False)

    def train(self, mode: bool = True) -> TorchvisionBackbone:
        """Switch the mode, unless frozen.

        Args:
            mode: True for training.
        """
        return super().train(mode and not self.frozen)

    def map(self, images: Tensor) -> Tensor:
        """Return the last feature map, before pooling.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W]; returns [B, C, h, w].
        """
        x = images
        for name, part in self.model.named_children():
            if name in ("avgpool", self._head):
                break
            x = part(x)
        return F.relu(x) if type(self.model).__name__ == "DenseNet" else x

    def run(self, images: Tensor) -> Tensor:
        """Return the output as the network gives it, a map where tokens are asked for.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W].
        """
        return self.map(images) if self.output in ("map", "tokens") else self.model(images)

    def forward(self, images: Tensor) -> Tensor | TokenFeatures:
        """Run the network.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W]; returns logits [B, K], features [B, C], a map [B, C, h, w], or
            tokens [B, h * w, C].
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out = self.run(images)
        if self.output != "tokens":
            return out
        return map_features(out, self.macs(tuple(images.shape[1:])))


def _build(model_name: str, num_classes: int, model_kwargs: dict) -> nn.Module:
    try:
        import torchvision
        from torchvision.models import get_model, list_models
    except ImportError as error:
        raise ConfigError(
            f"'{model_name}' needs torchvision, which is not installed: pip install torchvision"
        ) from error
    known = list_models(module=torchvision.models)
    if model_name not in known:
        raise ConfigError(
            f"torchvision {torchvision.__version__} has no classification network '{model_name}'."
            + did_you_mean(model_name, known)
        )
    for reserved in ("weights", "weights_backbone"):
        if model_kwargs.get(reserved) is not None:
            raise ConfigError(
                f"model_kwargs.{reserved}: nothing is downloaded; name a local file as `checkpoint`"
            )
    if num_classes:
        model_kwargs = {**model_kwargs, "num_classes": num_classes}
    model = get_model(model_name, weights=None, **model_kwargs)
    if getattr(model, "aux_logits", False):
        raise ConfigError(
            f"'{model_name}' returns several logits in training; set "
            "model_kwargs=dict(aux_logits=False)"
        )
    return model
