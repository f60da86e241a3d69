"""Routing of the Dynamic Grained Encoder: how finely each region of the token grid is queried.

Letters: B images, H x W token grid, E extra tokens, N = E + H * W, C channels, Hr x Wr regions of r
x r tokens, S splits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.utils.errors import ConfigError


def check_splits(splits: Sequence[int]) -> tuple[int, ...]:
    """Return the candidates as plain integers if they can be used.

    Args:
        splits: Queries per region side of each candidate.

    Raises:
        ConfigError: Empty, doubled or non-positive entries, or one that does not divide the
            largest.
    """
    values = tuple(int(split) for split in splits)
    if not values or any(value < 1 for value in values) or len(set(values)) != len(values):
        raise ConfigError(
            f"splits={list(splits)}: expected different positive integers, such as [4, 2, 1]"
        )
    region = max(values)
    bad = [value for value in values if region % value]
    if bad:
        fits = [value for value in range(region, 0, -1) if region % value == 0]
        raise ConfigError(
            f"splits={list(splits)}: {bad[0]} does not divide the region {region}; "
            f"use some of {fits}"
        )
    return values


def region_mean(x: Tensor, grid: tuple[int, int], extra: int, region: int) -> Tensor:
    """Average the grid tokens of every region; cut-off regions average the tokens they have.

    Args:
        x: Tokens, extra tokens first; those are left out.
        grid: Token grid (H, W).
        extra: Number of extra tokens E.
        region: Region side r in tokens.

    Shape:
        x [B, N, C]; returns [B, Hr, Wr, C], float32 for half-precision tokens.
    """
    height, width = grid
    batch, _, dims = x.shape
    down, right = -height % region, -width % region
    cells = x[:, extra:]
    if down or right:
        cells = cells.reshape(batch, height, width, dims)
        cells = F.pad(cells, (0, 0, 0, right, 0, down))
    rows, columns = (height + down) // region, (width + right) // region
    # Two sums over whole rows of memory: ten times as fast on a CPU as one mean over both sides.
    dtype = torch.float32 if x.element_size() < 4 else x.dtype
    strips = cells.reshape(batch, rows, region, columns * region * dims).sum(2, dtype=dtype)
    total = strips.view(batch, rows, columns, region, dims).sum(3)
    if not down and not right:
        return total / region**2
    tall = total.new_full((rows, 1), region)
    wide = total.new_full((columns,), region)
    tall[-1], wide[-1] = region - down, region - right
    return total / (tall * wide).unsqueeze(-1)


class DGERouter(nn.Module):
    """Linear router from the mean token of a region to one score per candidate.

    Source:
        Official `Router`; the first candidate starts with probability 0.95.

    Args:
        dims: Channels C of a token.
        candidates: Number of splits S.
    """

    def __init__(self, dims: int, candidates: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dims, candidates)
        # No buffer: averages and checkpoints of a model do not know it.
        self.offset: Tensor | None = None
        self.reset_parameters()

    def _apply(self, *args: Any, **kwargs: Any) -> DGERouter:
        """Move the offset along with the weights; its type stays, halves would blur a budget."""
        super()._apply(*args, **kwargs)
        if self.offset is not None:
            self.offset = self.offset.to(self.gate.weight.device)
        return self

    def reset_parameters(self, first: float = 0.95) -> None:
        """Draw fresh weights; to be called after the initialisation of the whole model.

        Args:
            first: Probability of the first candidate for a zero input, in (0, 1).
        """
        candidates = self.gate.out_features
        nn.init.trunc_normal_(self.gate.weight, std=0.01)
        nn.init.zeros_(self.gate.bias)
        if candidates > 1:
            value = 0.5 * math.log(first * (candidates - 1) / (1 - first))
            nn.init.constant_(self.gate.bias, -value)
            with torch.no_grad():
                self.gate.bias[0] = value

    def forward(self, means: Tensor) -> Tensor:
        """Score the candidates; runs in the type of the weights, also under autocast.

        In evaluation `offset` is added where it is set, see `DynamicGrainedEncoder.shift`.

        Args:
            means: Mean token of every region.

        Shape:
            means [B, Hr, Wr, C]; returns [B, Hr, Wr, S].

        Differs from official:
            There autocast runs it in half precision, where scores of nearly equal candidates tie.
        """
        means = means.to(self.gate.weight.dtype)
        if torch.is_autocast_enabled(means.device.type):
            with torch.autocast(means.device.type, enabled=False):
                logits = self.gate(means)
        else:
            logits = self.gate(means)
        if self.offset is None or self.training:
            return logits
        return logits + self.offset.to(logits)


class DynamicGrainedEncoder(nn.Module):
    """Candidates and router of one encoder block, and how a choice is made.

    Source:
        DGE (NeurIPS 2021), dynamic grained router; official `DynamicGrainedEncoder`.

    Args:
        dims: Channels C of a token.
        splits: Queries per region side of each candidate; the first one is preferred at the start.

    Raises:
        ConfigError: The splits cannot be used.

    Differs from official:
        `splits` is a buffer (there a frozen parameter) and computation uses Python integers, so
        that training never waits for the device.
    """

    splits: Tensor

    def __init__(self, dims: int, splits: Sequence[int] = (4, 2, 1)) -> None:
        super().__init__()
        self.candidates = check_splits(splits)
        self.region = max(self.candidates)
        self.register_buffer("splits", torch.tensor(self.candidates, dtype=torch.int64))
        self.router = DGERouter(dims, len(self.candidates))

    def shift(self, amount: float | None) -> None:
        """Favour finer or coarser candidates in evaluation.

        The score of candidate s grows by amount * s^2 / r^2, its share of full sampling, so `amount`
        is what the router pays for a query: regions that win most by them get them first.

        Args:
            amount: Above 0 favours finer candidates, below 0 coarser ones; infinite takes the
                finest or the coarsest everywhere, None goes back to the trained router.
        """
        if amount is None:
            self.router.offset = None
            return
        shares = torch.tensor([(split / self.region) ** 2 for split in self.candidates])
        if math.isinf(amount):
            best = (shares * math.copysign(1.0, amount)).argmax()
            offset = torch.full_like(shares, -math.inf)
            offset[best] = 0.0
        else:
            offset = amount * shares
        self.router.offset = offset.to(self.splits.device)

    def choose(self, logits: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Choose a candidate for every region.

        Args:
            logits: Router scores.
            noise: Gumbel noise; None takes the best score, without gradient.

        Shape:
            logits and noise [B, Hr, Wr, S]; returns the choice [B, Hr, Wr] int64 and the
            straight-through gate [B, Hr, Wr, S] (value one-hot up to rounding, gradient of the
            softmax), or None without noise.
        """
        if noise is None:
            return logits.argmax(dim=-1), None
        noisy = logits + noise.to(logits.dtype)
        choice = noisy.argmax(dim=-1)
        soft = noisy.softmax(dim=-1)
        return choice, self.one_hot(choice, soft.dtype) - soft.detach() + soft

    def one_hot(self, choice: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a gate of zeros and ones.

        Args:
            choice: Chosen candidate of every region.
            dtype: Type of the result.

        Shape:
            choice [B, Hr, Wr]; returns [B, Hr, Wr, S].
        """
        shape = (*choice.shape, len(self.candidates))
        return torch.zeros(shape, dtype=dtype, device=choice.device).scatter_(
            -1, choice.unsqueeze(-1), 1.0
        )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        errors = args[-1]
        loaded = state_dict.get(prefix + "splits")
        if loaded is not None and loaded.tolist() != list(self.candidates):
            errors.append(
                f"{prefix}splits is {loaded.tolist()} in the checkpoint but "
                f"{list(self.candidates)} in the model; set the backbone's `splits` accordingly"
            )
            state_dict = {
                key: value for key, value in state_dict.items() if key != prefix + "splits"
            }
        super()._load_from_state_dict(state_dict, prefix, *args)
