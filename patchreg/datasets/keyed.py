"""The wrapper around every data set: keyed augmentation, and a policy for samples that cannot be read."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.logging import print_log

from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.random import kept_generators, mix_seed, seed_batch, seed_sample

BAD_SAMPLES = ("error", "skip")


class KeyedDataset:
    """Seed the augmentation of each sample by (seed, epoch, index, view).

    Attributes of the wrapped data set are reachable through the wrapper.

    Args:
        dataset: The data set.
        seed: Seed of the run.
        bad_samples: `error` ends the run at a sample that cannot be read; `skip` warns with its name and takes
            another one in its place, always the same.
    """

    def __init__(self, dataset: Any, seed: int, bad_samples: str = "error") -> None:
        if bad_samples not in BAD_SAMPLES:
            raise ConfigError(
                f"bad_samples '{bad_samples}': expected one of {', '.join(BAD_SAMPLES)}"
            )
        self.dataset = dataset
        self.seed = seed
        self.bad_samples = bad_samples

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Unpickling in a loader worker asks for attributes before `dataset` is set.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Read a batch; a loader calls it, so that the generators are saved once per batch.

        Args:
            indices: Indices of the batch.
        """
        first = indices[0]
        seed_batch(self.seed, getattr(first, "epoch", 0), getattr(first, "place", int(first)))
        with kept_generators():
            return [self._read(index) for index in indices]

    def _read(self, index: int) -> Any:
        epoch, view = getattr(index, "epoch", 0), getattr(index, "view", 0)
        position = int(index)
        for attempt in range(10):
            seed_sample(self.seed, epoch, position, view)
            try:
                return self.dataset[position]
            except DataError as error:
                if self.bad_samples == "error":
                    raise
                print_log(f"skipped a sample: {error}", logger="current", level=logging.WARNING)
                position = mix_seed(self.seed, int(index), attempt) % len(self)
        raise DataError(
            f"10 samples in a row could not be read, the last one at index {position}; check the data set"
        )
