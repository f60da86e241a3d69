"""Randomness that does not depend on how a run was launched, interrupted or resumed.

Two kinds of draws are keyed apart. What happens to one sample (augmentation) is keyed by
(seed, epoch, sample index, view); `shared_seed` is for what a transform does to all samples of a batch
alike. What the model draws (router noise, drop path, mixing weights) is drawn for the *global* batch of
an optimisation step from (seed, step, draw number); each process, and each part of an accumulated batch,
takes its rows.

Row order: with W processes, the samplers hand row `j * W + rank` of a global batch to local row `j`, and an
accumulated step strings its parts together, so local row j of part a is global row `(a * b + j) * W + rank`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_samples_generator = np.random.MT19937(0)
_batch_seed: int | None = None


def mix_seed(*parts: int) -> int:
    """Hash integers into one 63-bit seed (splitmix64 finaliser over the running state).

    Args:
        parts: Any integers; order matters.
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (int(part) & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def seed_all(seed: int) -> None:
    """Seed the global generators of `random`, NumPy and torch (CPU, and CUDA when it is in use)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def seed_sample(seed: int, epoch: int, index: int, view: int = 0) -> None:
    """Seed the CPU generators for the augmentation of one sample.

    Args:
        seed: Seed of the run.
        epoch: Epoch, from 0.
        index: Index of the sample in its data set.
        view: Which view or repetition of the sample within the epoch, from 0.
    """
    key = mix_seed(seed, epoch, index, view)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key)


def seed_batch(seed: int, epoch: int, place: int) -> None:
    """Note what the samples of one global batch have in common, for transforms that ask for it.

    Args:
        seed: Seed of the run.
        epoch: Epoch, from 0.
        place: Samples drawn in the epoch before the batch, by all processes together.
    """
    global _batch_seed
    _batch_seed = mix_seed(seed, epoch, place, 1)


def shared_seed() -> int:
    """Return a seed that is the same for all samples of a global batch; a fresh one outside of loaders."""
    if _batch_seed is None:
        return int(torch.randint(0, 1 << 62, (1,)).item())
    return _batch_seed


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the CPU generators at the end.

    Nothing is saved in a loader worker, where nothing else draws, and inside a training loop, which seeds them
    anew before every step.
    """
    if batch_random.in_loop or torch.utils.data.get_worker_info() is not None:
        yield
        return
    saved = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()  # type: ignore[attr-defined]
    # NumPy's state is dear to copy, so its generator is exchanged for one of our own.
    np.random.set_bit_generator(_samples_generator)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_bit_generator(saved[1])  # type: ignore[attr-defined]
        torch.set_rng_state(saved[2])


class BatchRandom:
    """Draws for the global batch of one optimisation step.

    A training loop calls `begin` before every forward; without it (plain Python use) draws come from
    torch's global generator. `in_loop` says that a training loop is running.
    """

    def __init__(self) -> None:
        self._key: tuple[int, int] | None = None
        self.in_loop = False
        self._draws = 0
        self._part = 0
        self._parts = 1
        self._rank = 0
        self._world = 1

    def begin(
        self, seed: int, step: int, *, part: int = 0, parts: int = 1, rank: int = 0, world: int = 1
    ) -> None:
        """Start the draws of one forward pass.

        Args:
            seed: Seed of the run.
            step: Optimisation step, from 0 (not the iteration, when gradients are accumulated).
            part: Which part of an accumulated batch, from 0.
            parts: Parts per step.
            rank: Rank of this process.
            world: Number of processes.
        """
        self._key = (seed, step)
        self._draws = 0
        self._part, self._parts, self._rank, self._world = part, parts, rank, world

    def end(self) -> None:
        """Return to torch's global generator."""
        self._key = None

    @property
    def active(self) -> bool:
        """Whether draws are keyed at the moment."""
        return self._key is not None

    def _next_seed(self) -> int:
        assert self._key is not None
        self._draws += 1
        return mix_seed(*self._key, self._draws)

    def uniform(
        self,
        batch: int,
        shape: tuple[int, ...],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw from U[0, 1) for the images of the local batch.

        Args:
            batch: Images in the local batch; equal on all processes and parts while keyed.
            shape: Shape per image.
            device: Device of the result; draws of different device types differ.
            dtype: Floating type of the result; the draw itself is float32.

        Shape:
            Returns [batch, *shape].
        """
        device = torch.device(device)
        if self._key is None:
            return torch.rand((batch, *shape), device=device).to(dtype)
        generator = torch.Generator(device).manual_seed(self._next_seed())
        rows = batch * self._world * self._parts
        drawn = torch.rand((rows, *shape), generator=generator, device=device)
        first = self._part * batch * self._world + self._rank
        return drawn[first : first + batch * self._world : self._world].to(dtype)

    def gumbel(
        self,
        batch: int,
        shape: tuple[int, ...],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw from the standard Gumbel distribution for the images of the local batch.

        Args:
            batch: Images in the local batch.
            shape: Shape per image.
            device: Device of the result.
            dtype: Floating type of the result.

        Shape:
            Returns [batch, *shape].
        """
        # The open interval keeps both logarithms finite: float32 uniforms are multiples of 2^-24.
        uniform = self.uniform(batch, shape, device).clamp_(2.0**-25, 1.0 - 2.0**-24)
        return (-torch.log(-torch.log(uniform))).to(dtype)

    def numpy(self) -> np.random.Generator:
        """Return a generator that all processes of the step share (mixing weights, boxes)."""
        if self._key is None:
            return np.random.default_rng(int(torch.randint(0, 1 << 62, (1,)).item()))
        return np.random.default_rng(self._next_seed())


batch_random = BatchRandom()
