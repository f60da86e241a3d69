"""Localiser and downstream classifiers of AnchorNet, one model per training stage.

Letters: B images, H x W image, h x w cells, K windows per image, s side of a window or view, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.methods.anchornet.trunk import Window
from patchreg.methods.anchornet.views import crop_windows, five_crops, resized_view
from patchreg.models.base import (
    PatchClassifier,
    TokenFeatures,
    fill_predictions,
    stack_targets,
)
from patchreg.models.macs import conv_macs
from patchreg.models.selectors.rankers import scores_on_grid
from patchreg.registry import MODELS, SELECTORS
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError, DataError

EVALUATIONS = ("five_crop", "localised")


@dataclass(eq=False)
class Localisation:
    """What the localiser found in a batch.

    Args:
        logits: Its own classification.
        cam: Class activation map of its predicted class.
        cells: Chosen windows in the order found, -1 for none.
        window: Where the cells look.

    Shape:
        logits [B, C]; cam [B, h, w]; cells [B, K].
    """

    logits: Tensor
    cam: Tensor
    cells: Tensor
    window: Window

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return self.cam.shape[1], self.cam.shape[2]


def window_selection(
    found: Localisation,
    image_size: tuple[int, int],
    share: float,
    macs: Tensor,
    dense_macs: float,
) -> PatchSelection:
    """Say in the common vocabulary which windows were looked at.

    Args:
        found: What the localiser found.
        image_size: Height and width in px.
        share: Share of full sampling that cells outside of all windows get.
        macs: Multiply-accumulates per image.
        dense_macs: Those of the dense twin.

    Shape:
        macs [B] float64.
    """
    from patchreg.methods.anchornet.selector import window_boxes

    order = found.cells
    score = found.cam.flatten(1).float()
    keep = torch.zeros_like(score, dtype=torch.int64)
    keep = keep.scatter_add(1, order.clamp(min=0), (order >= 0).long()).bool()
    selection = PatchSelection(
        image_size=image_size,
        grid=found.grid,
        score=score,
        keep=keep,
        resolution=torch.where(keep, 1.0, share),
        order=order,
        boxes=window_boxes(order, found.grid[1], found.window),
        macs=macs,
        dense_macs=dense_macs,
    )
    selection.validate()
    return selection


@MODELS.register_module()
class AnchorNetClassifier(PatchClassifier):
    """Classifier whose class activation map says which windows of an image matter.

    Source:
        Section 3 of the paper; `train_anchornet.py` of the official repository.

    Args:
        backbone: Config of the trunk; any backbone with one feature map works, see `window_cells`.
        head: Config of a head with `cam`.
        selector: Config of the selector of windows.
        window_cells: For a backbone with padding, whose cells have no exact window: side of a window
            in cells. A window is then scored by the mean of its cells, the part of the logit that it
            contributes.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        selector: dict | None = None,
        window_cells: int | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(backbone, head, data_preprocessor, init_cfg)
        self.selector = SELECTORS.build(selector or {"type": "CAMPatchSelector"})
        self.window_cells = window_cells
        if window_cells is None and not hasattr(self.backbone, "window"):
            raise ConfigError(
                f"{type(self.backbone).__name__} does not tell which window its cells see; use "
                "AnchorNetBackbone, or give window_cells (3 makes windows of 96 px at stride 32)"
            )

    @property
    def min_image_size(self) -> int:
        """Shortest side of an image that can be localised in, in px; at stride 32 with `window_cells`."""
        return self.backbone.window.side if self.window_cells is None else 32 * self.window_cells

    def extract(self, inputs: Tensor) -> TokenFeatures:
        """Run the backbone.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            DataError: The images are smaller than one window.
        """
        return as_tokens(self.backbone, inputs)

    def macs(self, shape: tuple[int, ...]) -> float:
        """Count the multiply-accumulates for one image.

        Args:
            shape: Channels, height and width of the image.
        """
        return network_macs(self.backbone, shape) + self.head.macs()

    @torch.no_grad()
    def localise(self, inputs: Tensor) -> Localisation:
        """Find the windows that speak most for the predicted class; the label is never used.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        return self.localise_features(self.extract(inputs), (inputs.shape[2], inputs.shape[3]))

    def localise_features(self, features: TokenFeatures, size: tuple[int, int]) -> Localisation:
        """Find the windows of images whose features are known.

        Args:
            features: What `extract` returned.
            size: Height and width of the images in px.

        Raises:
            DataError: The map is smaller than a window, or its cells are no squares that fill the image.
        """
        logits = self.head(features)
        cam = self.head.cam(features, logits.argmax(1))
        if self.window_cells is None:
            window = self.backbone.window
        else:
            if min(features.grid) < self.window_cells:
                raise DataError(
                    f"a map of {features.grid[0]} x {features.grid[1]} cells is smaller than one window of "
                    f"{self.window_cells} x {self.window_cells}; use larger images or a smaller window_cells"
                )
            stride = size[0] // features.grid[0]
            if (stride * features.grid[0], stride * features.grid[1]) != tuple(size):
                raise DataError(
                    f"a map of {features.grid[0]} x {features.grid[1]} cells does not divide an image of "
                    f"{size[0]} x {size[1]} px into squares, which window_cells needs; use sides that are "
                    "multiples of the backbone's stride"
                )
            window = Window(self.window_cells * stride, stride)
            cam = F.avg_pool2d(cam, self.window_cells, 1)
        return Localisation(logits, cam, self.selector(cam, window), window)

    def place_windows(self, selection: PatchSelection, size: tuple[int, int]) -> Localisation:
        """Find the windows that another ranker speaks for; a window counts with the mean of its scores.

        Args:
            selection: What the ranker answered.
            size: Height and width of the images in px.

        Raises:
            ConfigError: The backbone's cells have no exact window.
        """
        if self.window_cells is not None:
            raise ConfigError(
                "windows of another ranker need a backbone without padding, whose cells have exact windows; "
                "leave out window_cells"
            )
        window = self.backbone.window
        window.grid(*size)
        pixels = scores_on_grid(selection, size).unflatten(1, (1, *size))
        scores = F.avg_pool2d(pixels, window.side, window.stride)[:, 0]
        return Localisation(scores.flatten(1), scores, self.selector(scores, window), window)

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Propose windows; the localiser itself reads the whole image.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        features = self.extract(inputs)
        found = self.localise_features(features, (inputs.shape[2], inputs.shape[3]))
        macs, dense_macs = self.cost(features)
        size = (inputs.shape[2], inputs.shape[3])
        return window_selection(found, size, 1.0, macs, dense_macs)


def as_tokens(backbone: torch.nn.Module, inputs: Tensor) -> TokenFeatures:
    """Run any backbone and give its output the form that heads read.

    Args:
        backbone: Returns `TokenFeatures`, a feature map (alone or last in a tuple), or vectors such
            as logits.
        inputs: Preprocessed images.

    Shape:
        inputs [B, 3, H, W]; a map [B, N, h, w] becomes h * w tokens, a vector [B, N] one token.
    """
    out = backbone(inputs)
    if isinstance(out, TokenFeatures):
        return out
    if isinstance(out, (tuple, list)):
        out = out[-1]
    macs = network_macs(backbone, tuple(inputs.shape[1:]))
    if out.ndim == 2:
        return TokenFeatures(out.unsqueeze(1), (1, 1), 0, dense_macs=macs)
    tokens = out.flatten(2).transpose(1, 2)
    return TokenFeatures(tokens, (out.shape[2], out.shape[3]), 0, maps=(out,), dense_macs=macs)


def network_macs(backbone: torch.nn.Module, shape: tuple[int, ...]) -> float:
    """Count the multiply-accumulates of any backbone for one image.

    Args:
        backbone: One that counts itself (`macs`), or one of convolutions and linear layers.
        shape: Channels, height and width of the image.
    """
    count = getattr(backbone, "macs", None)
    if count is not None:
        return count(shape)
    known: dict[tuple[int, ...], float] = backbone.__dict__.setdefault("_anchornet_macs", {})
    if shape not in known:
        known[shape] = conv_macs(backbone, shape)
    return known[shape]


@MODELS.register_module()
class AnchorNetViewClassifier(PatchClassifier):
    """Downstream network on views: any torchvision, timm or registered backbone, and a head.

    Source:
        Section 3.3 of the paper.

    Args:
        backbone: Config of the network. Without `head` its output are logits.
        head: Config of the head, or None.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(
            backbone, head or {"type": "AnchorNetLogitsHead"}, data_preprocessor, init_cfg
        )

    def extract(self, inputs: Tensor) -> TokenFeatures:
        """Run the network on views.

        Args:
            inputs: Views.

        Shape:
            inputs [B, 3, s, s].
        """
        return as_tokens(self.backbone, inputs)

    def view_logits(self, views: Tensor) -> Tensor:
        """Classify views.

        Args:
            views: Views.

        Shape:
            views [n, 3, s, s]; returns [n, C].
        """
        return self.head(as_tokens(self.backbone, views))

    def view_macs(self, shape: tuple[int, ...]) -> float:
        """Count the multiply-accumulates for one view.

        Args:
            shape: Channels, height and width of the view.
        """
        return network_macs(self.backbone, shape) + self.head.macs()


@MODELS.register_module()
class AnchorNetResizedClassifier(AnchorNetViewClassifier):
    """Downstream network on the shrunk image: the first look of the pipeline.

    The dense twin is the same network on the whole image.

    Source:
        `train_downnet_resized.py` of the official repository.

    Args:
        backbone: Config of the network. Without `head` its output are logits.
        head: Config of the head, or None.
        view_size: Side of the shrunk image in px.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict | None = None,
        view_size: int = 95,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(backbone, head, data_preprocessor, init_cfg)
        if view_size < 1:
            raise ConfigError(f"view_size={view_size}: expected at least 1 px")
        self.view_size = view_size

    def extract(self, inputs: Tensor) -> TokenFeatures:
        """Shrink the images and run the network.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        features = super().extract(resized_view(inputs, self.view_size))
        features.macs = inputs.new_full((len(inputs),), features.dense_macs, dtype=torch.float64)
        features.dense_macs = self.view_macs(tuple(inputs.shape[1:])) - self.head.macs()
        return features

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Look at the whole image once, coarsely.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        macs, dense_macs = self.cost(self.extract(inputs))
        size = (inputs.shape[2], inputs.shape[3])
        share = min(1.0, self.view_size**2 / (size[0] * size[1]))
        return PatchSelection.of_all(
            image_size=size,
            grid=(1, 1),
            resolution=inputs.new_full((len(inputs), 1), share, dtype=torch.float32),
            macs=macs,
            dense_macs=dense_macs,
        )


@MODELS.register_module()
class AnchorNetPatchClassifier(AnchorNetViewClassifier):
    """Downstream network on windows, trained on those that a frozen localiser chooses.

    The localiser is always in evaluation mode, gets no gradient, and is no part of the checkpoint.

    Source:
        `train_downnet_patch.py` of the official repository.

    Args:
        backbone: Config of the network. Without `head` its output are logits.
        anchor: Config of the trained localiser.
        head: Config of the head, or None.
        evaluation: `five_crop` averages the logits of four corners and the centre, as published;
            `localised` those of the chosen windows.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: The evaluation is unknown.

    Differs from official:
        The localiser runs without gradient (there its graph is built and thrown away). An image with
        fewer windows than asked for counts with those it has.
    """

    def __init__(
        self,
        backbone: dict,
        anchor: dict,
        head: dict | None = None,
        evaluation: str = "five_crop",
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(backbone, head, data_preprocessor, init_cfg)
        if evaluation not in EVALUATIONS:
            raise ConfigError(f"evaluation={evaluation!r} is unknown; use one of {EVALUATIONS}")
        self.evaluation = evaluation
        self.anchor = MODELS.build(anchor)
        if evaluation == "five_crop" and getattr(self.anchor, "window_cells", None) is not None:
            raise ConfigError(
                "evaluation='five_crop' takes crops of the localiser's window, whose side depends on the "
                "image with window_cells; use evaluation='localised'"
            )
        self.anchor.requires_grad_(False)
        self.anchor.eval()
        self.register_state_dict_post_hook(_without_anchor)
        self.register_load_state_dict_post_hook(_no_anchor_needed)

    @property
    def min_image_size(self) -> int:
        """Shortest side of an image that can be localised in, in px."""
        return self.anchor.min_image_size

    def train(self, mode: bool = True) -> AnchorNetPatchClassifier:
        """Switch the mode of the network; the localiser stays as it is.

        Args:
            mode: True for training.
        """
        super().train(mode)
        self.anchor.eval()
        return self

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        """Return the mean loss over all chosen windows; each has the label of its image.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples with targets.

        Shape:
            inputs [B, 3, H, W].
        """
        found = self.anchor.localise(inputs)
        rows, ranks = (found.cells >= 0).nonzero(as_tuple=True)
        views = crop_windows(inputs, rows, found.cells[rows, ranks], found.window)
        targets = stack_targets(data_samples, inputs.device)[rows]
        return self.head.loss(as_tokens(self.backbone, views), targets)

    def extract(self, inputs: Tensor) -> TokenFeatures:
        """Average the logits of the views that the evaluation looks at, as one token.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; tokens [B, 1, C].
        """
        size = tuple(inputs.shape[1:])
        if self.evaluation == "five_crop":
            side = self.anchor.backbone.window.side
            logits = self.view_logits(five_crops(inputs, side)).unflatten(0, (len(inputs), 5))
            mean = logits.mean(1)
            views = torch.full_like(mean[:, 0], 5, dtype=torch.float64)
            before = 0.0
        else:
            found = self.anchor.localise(inputs)
            side, count = found.window.side, found.cells.shape[1]
            rows = torch.arange(len(inputs), device=inputs.device).repeat_interleave(count)
            crops = crop_windows(inputs, rows, found.cells.flatten(), found.window)
            logits = self.view_logits(crops).unflatten(0, (len(inputs), count))
            seen = (found.cells >= 0).unsqueeze(2)
            mean = torch.where(seen, logits, 0).sum(1) / seen.sum(1)
            views = seen.sum((1, 2)).double()
            before = self.anchor.macs(size)
        return TokenFeatures(
            tokens=mean.unsqueeze(1),
            grid=(1, 1),
            extra=0,
            macs=before + views * self.view_macs((size[0], side, side)),
            dense_macs=self.view_macs(size),
        )

    def classify_all(self, inputs: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the mean logits over the views, the cost of each image, and that of a whole one.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, C], float64 [B] and a number.
        """
        features = self.extract(inputs)
        assert features.macs is not None
        return features.tokens[:, 0], features.macs, features.dense_macs

    def logits(self, inputs: Tensor) -> Tensor:
        """Classify images by the mean over their views.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, C].
        """
        return self.classify_all(inputs)[0]

    def predict(self, inputs: Tensor, data_samples: list[Any] | None = None) -> list[Any]:
        """Fill in predictions and cost of a batch.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples to fill.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            DataError: There are no samples to fill.
        """
        return fill_predictions(data_samples, *self.classify_all(inputs))

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Choose windows with the localiser.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        found = self.anchor.localise(inputs)
        size = tuple(inputs.shape[1:])
        view = (size[0], found.window.side, found.window.side)
        seen = (found.cells >= 0).sum(1).double()
        macs = self.anchor.macs(size) + seen * self.view_macs(view)
        return window_selection(found, (size[1], size[2]), 0.0, macs, self.view_macs(size))


def _without_anchor(
    module: torch.nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}anchor.")]:
        del state[key]


def _no_anchor_needed(module: torch.nn.Module, incompatible: Any) -> None:
    kept = [key for key in incompatible.missing_keys if not key.startswith("anchor.")]
    incompatible.missing_keys[:] = kept
