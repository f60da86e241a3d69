"""PatchGame: a speaker names the patches of one view, a listener finds the other view.

Letters: B images, P patches in raster order, L symbols per patch, V vocabulary, D width of a symbol
embedding, R common embedding, C channels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from patchreg.losses.contrastive import ContrastiveLoss, Embedding, match_places, matching_accuracy
from patchreg.methods.patchgame import convert
from patchreg.methods.patchgame.listener import PatchGameListener
from patchreg.methods.patchgame.speaker import PatchGameSpeaker, PatchGameSymbols
from patchreg.models.heads.projection import ProjectionHead
from patchreg.models.selectors.rank import top_mask
from patchreg.registry import MODELS
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.random import batch_random
from patchreg.utils.weights import load_file, state_dict_of


@dataclass(eq=False)
class PatchGameRound:
    """What happens in one round of the game.

    Args:
        score: Importance of the patches.
        rank: Normalised scores.
        selected: Weight of each patch.
        symbol_embed: Symbol embedding of the patches.
        symbol_logits: Logits of their symbols.
        message: Symbols times weights.
        image: Embedding of the listener's view.
        text: Embedding of the message.

    Shape:
        score, rank, selected [B, P]; symbol_embed [B, P, D]; symbol_logits [B, P, L * V]; message [B, P, L, V].
    """

    score: Tensor
    rank: Tensor
    selected: Tensor
    symbol_embed: Tensor
    symbol_logits: Tensor
    message: Tensor
    image: Embedding
    text: Embedding


@MODELS.register_module()
class PatchGamePretrainer(BaseModel):
    """Referential game on unlabelled images; its by-products are a patch ranker and a backbone.

    Training takes two views of each image: the speaker sees the first one and sends a symbol and a weight
    per patch, the listener sees the second one. `mode='tensor'` gives the features of the listener's
    vision tower, `select` the speaker's ranking of patches.

    Source:
        "PatchGame: Learning to Signal Mid-level Patches in Referential Games"; `patchgame.py` of the
        official code.

    Args:
        backbone: Config of the listener's vision tower, which gives features or tokens with a class token.
        ranker: Config of the speaker's rank network, which gives a map or tokens.
        selector: Config of a `RankSelector`.
        symbol: Config of the ViT that describes patches in their context, or None for one convolution.
        loss: Config of a `ContrastiveLoss`.
        head: Options of the two `ProjectionHead`s: `out_dim` (R) and what else they take.
        img_size: Side of the training images in px.
        patch_size: Side of a patch in px.
        hidden_dim: D.
        drop_rate: Dropout in front of the score, in [0, 1).
        vocab_size: V.
        max_len: L.
        hard: One-hot symbols; otherwise soft ones.
        temperature: Of the symbols, where no hook schedules it.
        trainable_temperature: Train it instead.
        text_dims: Width of the text encoder.
        text_heads: Its attention heads.
        text_layers: Its layers.
        copied_layers: Start its layers from one drawn layer, as published.
        eval_noise: Draw noise in evaluation too, as published; without, the same image always gives the
            same message.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine.

    Raises:
        ConfigError: The parts do not fit together.

    Differs from official:
        Runs in one process without a process group, on images of any size that patches divide. Evaluation
        is free of noise. Ranks are divided by the number of patches of training only where
        `selector.count` says so.
    """

    num_views = 2

    def __init__(
        self,
        backbone: dict,
        ranker: dict,
        selector: dict,
        symbol: dict | None,
        loss: dict,
        head: dict,
        img_size: int = 224,
        patch_size: int = 32,
        hidden_dim: int = 768,
        drop_rate: float = 0.1,
        vocab_size: int = 128,
        max_len: int = 1,
        hard: bool = True,
        temperature: float = 1.0,
        trainable_temperature: bool = False,
        text_dims: int = 192,
        text_heads: int = 3,
        text_layers: int = 12,
        copied_layers: bool = True,
        eval_noise: bool = False,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.img_size = img_size
        self.patch_size = patch_size
        self.eval_noise = eval_noise
        self.sender = PatchGameSpeaker(
            ranker, selector, symbol, img_size, patch_size, hidden_dim, drop_rate
        )
        self.gumbel = PatchGameSymbols(
            hidden_dim, vocab_size, max_len, hard, temperature, trainable_temperature
        )
        self.receiver = PatchGameListener(
            backbone,
            img_size,
            head,
            self.sender.grid,
            max_len,
            vocab_size,
            text_dims,
            text_heads,
            text_layers,
            copied_layers,
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.loss_module: ContrastiveLoss = MODELS.build(loss)

    def forward(
        self,
        inputs: Any,
        data_samples: list[Any] | None = None,
        geometry: Any = None,
        mode: str = "tensor",
    ) -> Any:
        """Run the model in one of MMEngine's modes.

        Args:
            inputs: Preprocessed images; for `loss` and `predict` two views of each, as a list.
            data_samples: Samples of single views, which `predict` fills.
            geometry: Not used: the game does not ask where views come from.
            mode: `tensor` returns features of the vision tower, `loss` a dict of losses, `predict` what
                `predict` says.

        Shape:
            inputs [B, 3, H, W], or two of these; features [B, C].

        Raises:
            ValueError: The mode is unknown.
        """
        if mode == "tensor":
            return self.features(inputs)
        if mode == "loss":
            return self.loss(inputs)
        if mode == "predict":
            return self.predict(inputs, data_samples)
        raise ValueError(f"mode={mode!r} is unknown; expected 'tensor', 'loss' or 'predict'")

    def read_checkpoint(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Read a checkpoint of this project or of the authors' training.

        Args:
            path: File to read.

        Raises:
            UserError: The file is missing, damaged, or no PatchGame.
        """
        loaded = load_file(path, allowed=convert.ALLOWED)
        if "state_dict" not in loaded:
            loaded, _ = convert.convert(loaded, os.fspath(path), "ours")
        return {**loaded, "state_dict": state_dict_of(loaded, path)}

    def features(self, inputs: Tensor) -> Tensor:
        """Return what the listener's vision tower sees, before its head.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, C].
        """
        return self.receiver.look(inputs)

    def play(
        self,
        speaker_view: Tensor,
        listener_view: Tensor,
        select_uniform: Tensor | None = None,
        symbol_uniform: Tensor | None = None,
    ) -> PatchGameRound:
        """Play one round; without uniforms, training (and evaluation with `eval_noise`) draws them.

        Args:
            speaker_view: First view of each image.
            listener_view: Second view.
            select_uniform: Draws behind the selection.
            symbol_uniform: Draws behind the symbols.

        Shape:
            views [B, 3, H, W]; select_uniform [B, P, 2]; symbol_uniform [B, P, L, V].
        """
        grid = self._grid(speaker_view)
        cells, images = grid[0] * grid[1], len(speaker_view)
        device = speaker_view.device
        if select_uniform is None and symbol_uniform is None and (self.training or self.eval_noise):
            if self.sender.selector.topk is None:
                select_uniform = batch_random.uniform(images, (cells, 2), device)
            symbol_uniform = batch_random.uniform(images, (cells, *self.gumbel.shape), device)
        embed, score, rank, selected = self.sender(speaker_view, select_uniform)
        logits, symbols = self.gumbel(embed, symbol_uniform)
        message = symbols * selected[:, :, None, None]
        text = self._project(self.receiver.text_fc, self.receiver.read(message, grid))
        image = self._project(self.receiver.vision_fc, self.receiver.look(listener_view))
        return PatchGameRound(score, rank, selected, embed, logits, message, image, text)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise DataError(
                f"images of {height} x {width} px cannot be cut into patches of {self.patch_size} px; "
                "resize or crop them to a multiple"
            )
        return height // self.patch_size, width // self.patch_size

    @staticmethod
    def _project(head: ProjectionHead, features: Tensor) -> Embedding:
        narrow, weight = head.bottleneck(features), head.last_layer.weight()
        return Embedding(nn.functional.linear(narrow, weight), narrow, weight)

    def loss(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the contrastive loss and, in percent, how often matching succeeds in the batch.

        Args:
            inputs: The two views of each image.

        Shape:
            inputs: two times [B, 3, H, W].
        """
        result = self.play(*_views(inputs))
        loss, logits, target = self.loss_module(result.image, result.text, self.logit_scale.exp())
        with torch.no_grad():
            top1, top5 = matching_accuracy(logits, target)
            scale = self.logit_scale.exp()
        temperature = torch.as_tensor(self.gumbel.temperature, device=loss.device).detach()
        return dict(
            loss_contrast=loss,
            match_top1=top1,
            match_top5=top5,
            logit_scale=scale,
            temperature=temperature.float().mean(),
        )

    def predict(self, inputs: Any, data_samples: list[Any] | None = None) -> list[Any]:
        """Match the messages and images of a batch, or fill in features.

        Args:
            inputs: Two views of each image, or one.
            data_samples: Samples of single views; `feature` of each is set.

        Returns:
            The samples; for two views a dict per image: `match_place`, [2] int64, how many other images
            match its message better, and how many other messages match the image better; `match_count`,
            the images of the batch.

        Shape:
            inputs [B, 3, H, W] once or twice.
        """
        if data_samples is not None and isinstance(inputs, Tensor):
            for sample, feature in zip(data_samples, self.features(inputs), strict=True):
                sample.set_field(feature, "feature", dtype=Tensor, field_type="data")
            return data_samples
        result = self.play(*_views(inputs))
        image, text = (
            nn.functional.normalize(side.rows.float(), dim=1)
            for side in (result.image, result.text)
        )
        cosines = image @ text.T
        own = torch.arange(len(cosines), device=cosines.device)
        places = (match_places(cosines.T, own), match_places(cosines, own))
        return [
            dict(match_place=place, match_count=len(own))
            for place in torch.stack(places, dim=1).cpu()
        ]

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Rank the patches; only the rank network runs.

        With `selector.topk` that many patches are kept, else all; the order is that of the scores either
        way.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            DataError: The image cannot be cut into patches.
        """
        self._grid(inputs)
        score, grid = self.sender.score(inputs)
        score = score.float()
        topk = self.sender.selector.topk
        keep = top_mask(score, topk) if topk else torch.ones_like(score, dtype=torch.bool)
        macs = self.sender.rank_macs(inputs, grid)
        return PatchSelection.from_grid(
            image_size=(inputs.shape[2], inputs.shape[3]),
            grid=grid,
            score=score,
            keep=keep,
            resolution=keep.float(),
            macs=score.new_full((len(score),), macs, dtype=torch.float64),
            dense_macs=macs,
        )

    @torch.no_grad()
    def symbols(self, inputs: Tensor) -> Tensor:
        """Return the most probable symbols of every patch.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, P, L] int64.

        Raises:
            DataError: The image cannot be cut into patches.
        """
        self._grid(inputs)
        logits, _ = self.gumbel(self.sender.embed(inputs)[0])
        return logits.unflatten(-1, self.gumbel.shape).argmax(dim=-1)


def _views(inputs: Any) -> tuple[Tensor, Tensor]:
    if isinstance(inputs, Tensor) or len(inputs) != 2:
        found = "one tensor" if isinstance(inputs, Tensor) else f"{len(inputs)} views"
        raise ConfigError(
            f"PatchGame plays with two views of each image and got {found}; end the pipeline with a "
            "transform that makes two, as configs/patchgame/_base_.py does"
        )
    return inputs[0], inputs[1]
