"""Which images come when: samplers that key the augmentation and resume in the middle of an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from itertools import islice

import torch
from mmengine.dist import get_dist_info
from torch.utils.data import Sampler

from patchreg.registry import DATA_SAMPLERS
from patchreg.utils.errors import ConfigError


class SampleIndex(int):
    """Index of a sample that also says in which epoch and for the how-manieth time it is drawn.

    Args:
        value: Index in the data set.
        epoch: Epoch from 0.
        view: Repetition within the epoch from 0.
        place: Samples that all processes together have drawn in the epoch before; the first of a batch
            has the same on every process, however many share the global batch.
    """

    epoch: int
    view: int
    place: int

    def __new__(cls, value: int, epoch: int = 0, view: int = 0, place: int = 0) -> SampleIndex:
        self = super().__new__(cls, value)
        self.epoch = epoch
        self.view = view
        self.place = place
        return self

    def __getnewargs__(self) -> tuple[int, int, int, int]:  # type: ignore[override]
        return int(self), self.epoch, self.view, self.place


class ResumableSampler(Sampler):
    """Base of the samplers: process p of P takes entries p, p + P, ... of one common order.

    Subclasses set `num_samples` and implement `order`.

    Args:
        dataset: The data set.
        seed: Seed of the order, equal on all processes.
    """

    num_samples: int

    def __init__(self, dataset: Sized, seed: int | None = None) -> None:
        self.rank, self.world_size = get_dist_info()
        self.dataset = dataset
        self.seed = 0 if seed is None else seed
        self.epoch = 0
        self._skip = 0
        if len(dataset) == 0:
            raise ConfigError(
                "the data set is empty: no image was found under the configured root and annotation file"
            )

    def order(self) -> Iterator[tuple[int, int]]:
        """Yield (index, view) for all processes together."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass.

        Args:
            epoch: Epoch from 0.
        """
        self.epoch = epoch

    def skip(self, samples: int) -> None:
        """Leave out the first samples of this process in the next pass only.

        Args:
            samples: How many samples of this process are done.
        """
        self._skip = samples

    def __iter__(self) -> Iterator[SampleIndex]:
        skipped, self._skip = self._skip, 0
        mine = islice(self.order(), self.rank, None, self.world_size)
        for number, (index, view) in enumerate(islice(mine, skipped, self.num_samples), skipped):
            yield SampleIndex(index, self.epoch, view, number * self.world_size)

    def __len__(self) -> int:
        return self.num_samples


@DATA_SAMPLERS.register_module()
class DefaultSampler(ResumableSampler):
    """Every image once per epoch, shuffled or in order.

    Args:
        dataset: The data set.
        shuffle: Whether to draw a new order for every epoch, from (seed + epoch).
        seed: Seed of the order.
        round_up: Whether all processes get equally many samples; the order is repeated from its start for that,
            and evaluation drops the repetitions.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = True,
        seed: int | None = None,
        round_up: bool = True,
    ) -> None:
        super().__init__(dataset, seed)
        self.shuffle = shuffle
        if round_up:
            self.num_samples = math.ceil(len(dataset) / self.world_size)
        else:
            self.num_samples = math.ceil((len(dataset) - self.rank) / self.world_size)

    def order(self) -> Iterator[tuple[int, int]]:
        """Yield (index, 0), then the beginning once more for rounding up."""
        size = len(self.dataset)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            indices = torch.randperm(size, generator=generator).tolist()
        else:
            indices = list(range(size))
        for position in range(self.num_samples * self.world_size):
            yield indices[position % size], 0


@DATA_SAMPLERS.register_module()
class RepeatedAugmentationSampler(ResumableSampler):
    """Every drawn image several times in a row, over a part of the images per epoch.

    With P processes, neighbouring processes see the same image under different augmentation. An epoch has
    about as many samples as the data set.

    Source:
        Hoffer et al., "Augment your batch", CVPR 2020, as in the DeiT training code (one permutation
        seeded with the epoch number alone).

    Args:
        dataset: The data set.
        num_repeats: Times each image is drawn.
        selected_round: The samples of an epoch are rounded down to a multiple of this; 0 keeps all.
        seed: Not used by the order, which depends on the epoch alone.

    Raises:
        ConfigError: Fewer images than `selected_round`, which would give empty epochs.

    Differs from official:
        Each repetition has its own key, so that augmentations differ even where a rank draws two of them.
    """

    def __init__(
        self,
        dataset: Sized,
        num_repeats: int = 3,
        selected_round: int = 256,
        seed: int | None = None,
    ) -> None:
        super().__init__(dataset, seed)
        size = len(dataset)
        if num_repeats < 1:
            raise ConfigError(f"num_repeats={num_repeats}: expected at least 1")
        if selected_round and size < selected_round:
            raise ConfigError(
                f"repeated augmentation with selected_round={selected_round} on {size} images gives empty "
                "epochs; use more images, a smaller selected_round, or sampler=dict(type='DefaultSampler', "
                "shuffle=True)"
            )
        self.num_repeats = num_repeats
        rounded = size // selected_round * selected_round if selected_round else size
        self.num_samples = (
            rounded // self.world_size if selected_round else math.ceil(size / self.world_size)
        )

    def order(self) -> Iterator[tuple[int, int]]:
        """Yield (index, repetition)."""
        generator = torch.Generator().manual_seed(self.epoch)
        indices = torch.randperm(len(self.dataset), generator=generator).tolist()
        total = len(indices) * self.num_repeats
        padded = math.ceil(total / self.world_size) * self.world_size
        for position in range(padded):
            place, view = divmod(position % total, self.num_repeats)
            yield indices[place], view + (position // total) * self.num_repeats
