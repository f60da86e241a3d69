"""The listener: a message and an image, embedded side by side.

Letters: B images, P patches, L symbols per patch, V vocabulary, D text width, C channels of the vision
tower.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchreg.methods.patchgame.speaker import probe
from patchreg.models.base import TokenFeatures
from patchreg.models.heads.projection import ProjectionHead
from patchreg.models.layers import check_heads, resize_pos_embed
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError, DataError


class SymbolEmbedding(nn.Module):
    """Table of symbol embeddings that takes indices or weights over the vocabulary.

    Source:
        `RelaxedEmbedding` of the official `patchgame.py`, which knows indices by their legacy tensor class
        only.

    Args:
        vocab_size: V.
        dims: D.
    """

    def __init__(self, vocab_size: int, dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dims))

    def forward(self, symbols: Tensor) -> Tensor:
        """Look symbols up.

        Args:
            symbols: Indices of an integer type, or weights.

        Shape:
            symbols [...] or [..., V]; returns [..., D].
        """
        return symbols @ self.weight if symbols.is_floating_point() else self.weight[symbols.long()]


class PatchGameListener(nn.Module):
    """Transformer over the message and a vision backbone, each with a projection head.

    Parameter names are the official ones: `embedding`, `cls_token`, `position_encoding`, `encoder`,
    `text_fc`, `vision`, `vision_fc`. Patches that the speaker does not use stay as tokens with an empty
    symbol.

    Source:
        `Receiver` of the official `patchgame.py`.

    Args:
        vision: Config of the vision backbone: features, or tokens of which the class token is read.
        img_size: Side of the training images in px.
        head: Options of the two `ProjectionHead`s.
        grid: Rows and columns of patches that the position encoding is made for.
        max_len: L.
        vocab_size: V.
        dims: D.
        num_heads: Attention heads; divides D.
        num_layers: Layers of the text encoder.
        copied_layers: Start all layers of the text encoder from one drawn layer, as published.

    Raises:
        ConfigError: `num_heads` does not divide `dims`, or there is no layer.
    """

    def __init__(
        self,
        vision: dict,
        img_size: int,
        head: dict,
        grid: tuple[int, int],
        max_len: int,
        vocab_size: int,
        dims: int,
        num_heads: int,
        num_layers: int,
        copied_layers: bool,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ConfigError(f"text_layers={num_layers}: expected at least 1")
        check_heads(dims, num_heads)
        self.grid = grid
        self.max_len = max_len
        self.position_encoding = nn.Parameter(torch.empty(1, grid[0] * grid[1] * max_len + 1, dims))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dims))
        self.vision = MODELS.build(vision)
        self.vision_fc = ProjectionHead(
            vector(probe(self.vision, img_size)).shape[1], norm_last_layer=False, **head
        )
        self.embedding = SymbolEmbedding(vocab_size, dims)
        layers = [
            nn.TransformerEncoderLayer(dims, num_heads, 4 * dims, dropout=0.0, batch_first=True)
            for _ in range(1 if copied_layers else num_layers)
        ]
        self.encoder = nn.TransformerEncoder(layers[0], num_layers, enable_nested_tensor=False)
        if not copied_layers:
            self.encoder.layers = nn.ModuleList(layers)
        self.text_fc = ProjectionHead(dims, norm_last_layer=False, **head)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position_encoding, std=0.01)
        nn.init.normal_(self.cls_token, std=0.02)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position encoding for a grid of patches.

        Args:
            grid: Rows and columns.

        Shape:
            Returns [1, P * L + 1, D].
        """
        if grid == self.grid:
            return self.position_encoding
        # Each of the L symbols of a patch has a map of its own.
        whole = self.position_encoding
        front, cells = whole[:, :1], whole[:, 1:].unflatten(1, (-1, self.max_len))
        resized = [
            resize_pos_embed(cells[:, :, place], self.grid, grid) for place in range(self.max_len)
        ]
        return torch.cat((front, torch.stack(resized, dim=2).flatten(1, 2)), dim=1)

    def read(self, message: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the feature of a message: the class token of the text encoder.

        Args:
            message: Weights over the vocabulary for each patch.
            grid: Rows and columns of its patches, if not those of training.

        Shape:
            message [B, P, L, V]; returns [B, D].

        Raises:
            DataError: The message is for another number of patches.
        """
        tokens = self.embedding(message).flatten(1, 2)
        positions = self.positions(grid or self.grid)
        if tokens.shape[1] + 1 != positions.shape[1]:
            raise DataError(
                f"a message of {tokens.shape[1]} symbols does not fit the grid {grid or self.grid} with "
                f"{self.max_len} per patch"
            )
        front = self.cls_token.expand(len(tokens), -1, -1)
        tokens = torch.cat((front, tokens), dim=1) + positions
        half = torch.is_autocast_enabled("cpu") or tokens.element_size() == 2
        if tokens.device.type == "cpu" and half:
            # The fused CPU kernel of PyTorch takes several times as long in half precision.
            with sdpa_kernel(SDPBackend.MATH):
                return self.encoder(tokens)[:, 0]
        return self.encoder(tokens)[:, 0]

    def look(self, images: Tensor) -> Tensor:
        """Return the feature of an image, which the vision tower is judged by.

        Args:
            images: Preprocessed images.

        Shape:
            images [B, 3, H, W]; returns [B, C].
        """
        return vector(self.vision(images))


def vector(output: Tensor | TokenFeatures) -> Tensor:
    """Return one vector per image: the class token, the mean of a map, or what the backbone gives.

    Args:
        output: Tokens with a class token, a map, or vectors.

    Shape:
        Returns [B, C].

    Raises:
        ConfigError: Tokens without a class token.
    """
    if isinstance(output, TokenFeatures) and output.extra:
        return output.tokens[:, 0]
    if not isinstance(output, TokenFeatures) and output.ndim in (2, 4):
        return output if output.ndim == 2 else output.mean(dim=(2, 3))
    raise ConfigError(
        "the listener's backbone gives no vector per image; use a ViT with cls_token=True, or "
        "TorchvisionBackbone with output='features'"
    )
