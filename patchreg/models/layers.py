"""Building blocks that the transformers of several methods share.

Letters: B images, N tokens, E extra tokens in front of the grid, H x W token grid, C channels, h
heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.utils.errors import ConfigError, DataError


class PatchEmbed(nn.Module):
    """Cut an image or a map into patches and project each to one token.

    Args:
        in_channels: Channels of the input.
        embed_dims: Channels of a token.
        patch_size: Side of a patch in px; also the stride.
        norm: Apply LayerNorm (eps 1e-5) to the tokens, as the pyramid models do.
        crop_remainder: Leave out pixels at the right and the bottom that fill no patch, instead of
            refusing the image.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dims: int,
        patch_size: int,
        norm: bool = False,
        crop_remainder: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.crop_remainder = crop_remainder
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dims) if norm else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens in raster order and their grid.

        Args:
            images: Any height and width that are multiples of the patch size.

        Shape:
            images [B, in_channels, H * patch, W * patch]; returns [B, H * W, C] and (H, W).

        Raises:
            DataError: A side of the image is no multiple of the patch size, or smaller than a patch.
        """
        height, width = images.shape[-2:]
        remainder = height % self.patch_size or width % self.patch_size
        if (remainder and not self.crop_remainder) or min(height, width) < self.patch_size:
            nearest = [
                max(round(n / self.patch_size), 1) * self.patch_size for n in (height, width)
            ]
            raise DataError(
                f"an input of {height} x {width} px cannot be cut into patches of "
                f"{self.patch_size} px; resize or crop it to "
                f"a multiple, such as {nearest[0]} x {nearest[1]}"
            )
        features = self.proj(images)
        tokens = features.flatten(2).transpose(1, 2)
        return self.norm(tokens), (features.shape[2], features.shape[3])


def hidden_width(dims: int, ratio: float) -> int:
    """Return the width of an MLP between its layers.

    The product is cut off as in timm, unless it misses a whole number by rounding only: a ratio that
    was read off two widths (120 / 88) gives the width back.

    Args:
        dims: Channels C.
        ratio: Width of the MLP relative to C.
    """
    width = dims * ratio
    return round(width) if abs(width - round(width)) < 1e-6 else int(width)


class Mlp(nn.Module):
    """Two linear layers with exact (erf) GELU between them.

    Args:
        dims: Channels in and out.
        hidden_dims: Channels between the layers.
        drop_rate: Dropout after both layers, in [0, 1).
    """

    def __init__(self, dims: int, hidden_dims: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims, hidden_dims)
        self.fc2 = nn.Linear(hidden_dims, dims)
        self.drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to the last dimension.

        Args:
            x: Tokens.

        Shape:
            x [..., C]; returns the same.
        """
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention without mask, by the fastest exact way.

    Args:
        query: Queries.
        key: Keys.
        value: Values.

    Shape:
        query [B, h, Q, d]; key and value [B, h, M, d]; returns [B, h, Q, d].
    """
    short = key.shape[-2] <= 512
    if query.device.type == "cpu" and query.element_size() == 2 and short:
        # Measured with torch 2.14: the CPU kernel of PyTorch takes 3 to 5 times as long, forward
        # and backward, in half precision. Scores of longer sequences would cost too much memory.
        with torch.autocast("cpu", enabled=False):
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
            return scores.softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection.

    Args:
        dims: Channels.
        num_heads: Heads; divides `dims`.
        qkv_bias: Bias in the qkv projection.
        drop_rate: Dropout after the output projection, in [0, 1).
    """

    def __init__(
        self, dims: int, num_heads: int, qkv_bias: bool = True, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = check_heads(dims, num_heads)
        self.qkv = nn.Linear(dims, 3 * dims, bias=qkv_bias)
        self.proj = nn.Linear(dims, dims)
        self.drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Let every token look at all tokens of its image.

        Args:
            x: Tokens.

        Shape:
            x [B, N, C]; returns the same.
        """
        batch, count, dims = x.shape
        qkv = self.qkv(x).view(batch, count, 3, self.num_heads, dims // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = attend(query, key, value)
        return self.drop(self.proj(out.transpose(1, 2).reshape(batch, count, dims)))

    def weights(self, x: Tensor) -> Tensor:
        """Return how much every token looks at every token.

        Args:
            x: Tokens.

        Shape:
            x [B, N, C]; returns [B, h, N, N], rows sum to 1.
        """
        batch, count, dims = x.shape
        width = dims // self.num_heads
        qkv = self.qkv(x).view(batch, count, 3, self.num_heads, width)
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return ((query * width**-0.5) @ key.transpose(-2, -1)).softmax(dim=-1)


def check_heads(dims: int, num_heads: int) -> int:
    """Return the number of heads if it divides the width.

    Args:
        dims: Channels.
        num_heads: Heads.

    Raises:
        ConfigError: It does not.
    """
    if num_heads < 1 or dims % num_heads:
        fits = [n for n in range(1, dims + 1) if dims % n == 0]
        raise ConfigError(
            f"num_heads={num_heads} does not divide the width {dims}; use one of {fits}"
        )
    return num_heads


def drop_path(update: Tensor, uniform: Tensor | None, rate: float) -> Tensor:
    """Drop residual updates at random and scale the others by 1 / (1 - rate).

    The draw is an argument, so that a forward pass can make all its draws in a fixed order.

    Source:
        "Deep Networks with Stochastic Depth"; mask = floor(1 - rate + u), as in timm's `DropPath`.

    Args:
        update: What a residual branch adds.
        uniform: Draws from [0, 1), one per unit that is dropped together; None keeps everything.
        rate: Probability of dropping, in [0, 1).

    Shape:
        update [..., C]; uniform as the leading dimensions of update (missing ones are broadcast).
    """
    if uniform is None or rate == 0.0:
        return update
    keep = (uniform + (1.0 - rate)).floor().to(update.dtype) / (1.0 - rate)
    return update * keep.reshape(keep.shape + (1,) * (update.ndim - keep.ndim))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the rate of every block: rising linearly from 0 to `rate`.

    Args:
        rate: Rate of the last block, in [0, 1).
        depth: Number of blocks.

    Raises:
        ConfigError: The rate is outside [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ConfigError(
            f"drop_path_rate={rate} is outside [0, 1); 0.1 is usual, 0 switches it off"
        )
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def resize_pos_embed(
    pos_embed: Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    extra: int = 0,
    mode: str = "bicubic",
) -> Tensor:
    """Resample a position embedding for another token grid; entries of extra tokens stay.

    Args:
        pos_embed: Entries of the extra tokens first, then of the grid in raster order.
        old_grid: Grid the embedding was made for.
        new_grid: Grid wanted.
        extra: Number of extra tokens E.
        mode: `bicubic` (ViT) or `bilinear` (pyramid models); corners are not aligned.

    Shape:
        pos_embed [1, E + old cells, C]; returns [1, E + new cells, C].
    """
    if tuple(old_grid) == tuple(new_grid):
        return pos_embed
    dims = pos_embed.shape[-1]
    cells = pos_embed[:, extra:].reshape(1, *old_grid, dims).permute(0, 3, 1, 2)
    cells = cells.float() if cells.element_size() < 4 else cells
    cells = F.interpolate(cells, size=tuple(new_grid), mode=mode, align_corners=False)
    cells = cells.to(pos_embed.dtype).permute(0, 2, 3, 1).reshape(1, -1, dims)
    return torch.cat((pos_embed[:, :extra], cells), dim=1)


def resize_pos_embed_by_scale(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], extra: int = 0
) -> Tensor:
    """Resample a position embedding as DINO does: bicubic, by the scale (new + 0.1) / old.

    The scale is used as it is in the map of coordinates, so the numbers differ from those of
    `resize_pos_embed`, also where the two grids are equal.

    Source:
        `interpolate_pos_encoding` of the official DINO.

    Args:
        pos_embed: Entries of the extra tokens first, then of the grid in raster order.
        old_grid: Grid the embedding was made for.
        new_grid: Grid wanted.
        extra: Number of extra tokens E.

    Shape:
        pos_embed [1, E + old cells, C]; returns [1, E + new cells, C].
    """
    dims = pos_embed.shape[-1]
    cells = pos_embed[:, extra:].reshape(1, *old_grid, dims).permute(0, 3, 1, 2)
    cells = cells.float() if cells.element_size() < 4 else cells
    scale = [(new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True)]
    cells = F.interpolate(
        cells, scale_factor=scale, mode="bicubic", align_corners=False, recompute_scale_factor=False
    )
    assert tuple(cells.shape[2:]) == tuple(new_grid)
    cells = cells.to(pos_embed.dtype).permute(0, 2, 3, 1).reshape(1, -1, dims)
    return torch.cat((pos_embed[:, :extra], cells), dim=1)


def kept_cells(keep: Tensor) -> Tensor:
    """Return the kept cells of each image in raster order.

    Args:
        keep: Mask, of any type; every image keeps the same number.

    Shape:
        keep [B, H * W]; returns [B, kept] int64.

    Raises:
        DataError: Images keep different numbers of cells, or none.
    """
    counts = keep.bool().sum(dim=1)
    low, high = int(counts.min()), int(counts.max())
    if low != high or low == 0:
        raise DataError(
            f"images keep {low} to {high} patches; a batch needs the same number of each, at least 1: "
            "keep the k best of every image"
        )
    return keep.bool().nonzero()[:, 1].view(len(keep), low)


def keep_tokens(tokens: Tensor, cells: Tensor, extra: int) -> Tensor:
    """Return the extra tokens and those of some cells.

    Args:
        tokens: Extra tokens first, then the grid in raster order.
        cells: Cells to keep; every image keeps the same number.
        extra: Number of extra tokens E.

    Shape:
        tokens [B, N, C]; cells [B, kept] int64; returns [B, E + kept, C].

    Raises:
        DataError: The rows of cells are not those of the images; on a CPU also a cell outside of the
            grid.
    """
    if cells.ndim != 2 or len(cells) != len(tokens):
        raise DataError(
            f"cells have shape {tuple(cells.shape)}; expected one row for each of {len(tokens)} images"
        )
    count = tokens.shape[1] - extra
    if cells.device.type == "cpu" and cells.numel():
        low, high = int(cells.min()), int(cells.max())
        if low < 0 or high >= count:
            raise DataError(f"cells lie in {low}..{high}; the grid has 0..{count - 1}")
    kept = tokens.gather(1, (cells + extra).unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
    return torch.cat((tokens[:, :extra], kept), dim=1) if extra else kept


def init_transformer(module: nn.Module) -> None:
    """Initialise every Linear (trunc_normal 0.02, bias 0) and LayerNorm (1, 0) below a module.

    The normal distribution is cut at -2 and 2, not at two standard deviations; convolutions keep
    PyTorch's default.

    Source:
        DeiT's weight initialisation.

    Args:
        module: Module whose parts are initialised in place.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
