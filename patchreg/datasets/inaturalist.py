"""iNaturalist 2018 and 2019 in the layout and with the labels of the DeiT code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from patchreg.datasets.image_files import _FileDataset
from patchreg.registry import DATASETS
from patchreg.utils.errors import ConfigError, DataError, MissingFileError

CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


@DATASETS.register_module()
class INaturalistDataset(_FileDataset):
    """iNaturalist, labelled by one level of its taxonomy.

    `<data_root>/{train,val}<year>.json` list images and annotations, `<data_root>/categories.json`
    is a list indexed by category id. A label is the rank of first appearance of the category's
    string while going through the *training* annotations; the image of an entry
    `a/<super-category>/b/c` lies at `<data_root>/a/b/c` and its category id is b.

    Source: the `INatDataset` of the official DeiT training code.

    Args:
        data_root: Folder with the JSON files and the images.
        split: "train" or "val".
        year: 2018 or 2019.
        category: Level that gives the label, one of kingdom, phylum, class, order, supercategory,
            family, genus, name.
        pipeline: Transforms, as configs or callables, applied in order; start with `LoadImage`.
        subset: Use only this many images, the same share of every class. None uses all.
        subset_seed: Seed of the draw of the subset.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Read the files at first use instead of now.

    Raises:
        MissingFileError: A JSON file does not exist.
        DataError: A JSON file does not have the layout above.
        ConfigError: `year` or `category` is none of the known ones.
    """

    SPLITS = ("train", "val")

    def __init__(
        self,
        data_root: str,
        split: str = "train",
        year: int = 2018,
        category: str = "name",
        pipeline: Sequence[dict | Callable] = (),
        subset: int | None = None,
        subset_seed: int = 0,
        metainfo: dict | None = None,
        test_mode: bool = False,
        indices: int | Sequence[int] | None = None,
        lazy_init: bool = False,
    ) -> None:
        if category not in CATEGORIES:
            raise ConfigError(f"category={category!r} is not a level; use one of {CATEGORIES}")
        if year not in (2018, 2019):
            raise ConfigError(f"year={year} is not known; use 2018 or 2019")
        self.year = year
        self.category = category
        super().__init__(
            data_root=data_root,
            split=split,
            pipeline=pipeline,
            subset=subset,
            subset_seed=subset_seed,
            metainfo=metainfo,
            test_mode=test_mode,
            indices=indices,
            lazy_init=lazy_init,
        )

    def load_samples(self) -> None:
        """Read the three JSON files."""
        train = self._read(f"train{self.year}.json")
        content = train if self.split == "train" else self._read(f"{self.split}{self.year}.json")
        categories = self._read("categories.json")
        try:
            names = [entry[self.category] for entry in categories]
            label_of: dict[str, int] = {}
            for annotation in train["annotations"]:
                label_of.setdefault(names[int(annotation["category_id"])], len(label_of))
            paths, labels = [], []
            for image in content["images"]:
                parts = image["file_name"].split("/")
                paths.append(os.path.join(parts[0], parts[2], parts[3]))
                labels.append(label_of[names[int(parts[2])]])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"the files of iNaturalist {self.year} under '{self.data_root}' do not fit "
                f"together ({type(error).__name__}: {error}); expected images[].file_name as "
                "a/<super-category>/<category id>/<file>, annotations[].category_id, and a list in "
                "categories.json"
            ) from error
        self.set_samples(paths, labels)
        self.set_classes(list(label_of))
        self.check_labels(f"iNaturalist {self.year} split '{self.split}' under '{self.data_root}'")

    def _read(self, name: str) -> Any:
        path = Path(self.data_root, name)
        if not path.is_file():
            raise MissingFileError(
                f"'{path}' does not exist; expected train{self.year}.json, val{self.year}.json, "
                f"categories.json and the images under '{self.data_root}'"
            )
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"'{path}' is not valid JSON ({error}); fetch it again") from error
