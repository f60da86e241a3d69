"""Functional Map of the World as crops of annotated boxes, listed in a table without header."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from patchreg.datasets.image_files import _FileDataset
from patchreg.registry import DATASETS
from patchreg.utils.errors import DataError, MissingFileError

FMOW_CLASSES = tuple(
    """
    airport airport_hangar airport_terminal amusement_park aquaculture archaeological_site
    barn border_checkpoint burial_site car_dealership construction_site crop_field dam
    debris_or_rubble educational_institution electric_substation factory_or_powerplant
    fire_station flooded_road fountain gas_station golf_course ground_transportation_station
    helipad hospital impoverished_settlement interchange lake_or_pond lighthouse
    military_facility multi-unit_residential nuclear_powerplant office_building
    oil_or_gas_facility park parking_lot_or_garage place_of_worship police_station port
    prison race_track railway_bridge recreational_facility road_bridge runway shipyard
    shopping_mall single-unit_residential smokestack solar_farm space_facility stadium
    storage_tank surface_mine swimming_pool toll_booth tower tunnel_opening waste_disposal
    water_treatment_facility wind_farm zoo
    """.split()  # noqa: SIM905 - quoted, it fills sixty lines
)


@DATASETS.register_module()
class FMoWDataset(_FileDataset):
    """Image crops named in a table of lines `class id,image path`, without header.

    `tools/prepare_data.py fmow` makes the crops and the tables. Images may be grey, with a palette
    or transparent; they are read as RGB.

    Source:
        Christie et al., "Functional Map of the World", CVPR 2018; `CustomDatasetFromImages` of the
        PatchDrop repository.

    Args:
        ann_file: The table; relative to `data_root` unless it exists as given.
        data_root: Folder of the data set.
        data_prefix: Folder that relative image paths start from; None means `data_root`, an empty
            string the working directory, as in the official code.
        num_classes: Classes; with 62 they have their names.
        pipeline: Transforms, as configs or callables, applied in order; start with `LoadImage`.
        subset: Use only this many images, the same share of every class. None uses all.
        subset_seed: Seed of the draw of the subset.
        metainfo: Extra meta information; wins over that of the data set.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        indices: Use the first `indices` rows, or these rows, as in MMEngine.
        lazy_init: Read the table at first use instead of now.

    Raises:
        MissingFileError: The table, or an image named in it, does not exist.
        DataError: The table is empty, has a header, or a line cannot be used; the text names it.

    Differs from official:
        Paths do not start from the working directory, and grey images work.
    """

    SPLITS = ()

    def __init__(
        self,
        ann_file: str,
        data_root: str = "data/fmow",
        data_prefix: str | None = None,
        num_classes: int = 62,
        pipeline: Sequence[dict | Callable] = (),
        subset: int | None = None,
        subset_seed: int = 0,
        metainfo: dict | None = None,
        test_mode: bool = False,
        indices: int | Sequence[int] | None = None,
        lazy_init: bool = False,
    ) -> None:
        self.table = Path(ann_file)
        if not self.table.is_file():
            self.table = Path(data_root, ann_file)
        self.num_classes = num_classes
        super().__init__(
            data_root=data_root if data_prefix is None else data_prefix,
            split="",
            pipeline=pipeline,
            subset=subset,
            subset_seed=subset_seed,
            metainfo=metainfo,
            test_mode=test_mode,
            indices=indices,
            lazy_init=lazy_init,
        )

    def load_samples(self) -> None:
        """Read and check the table."""
        if not self.table.is_file():
            raise MissingFileError(
                f"table '{self.table}' does not exist; make it with: python tools/prepare_data.py "
                "fmow, or set ann_file and data_root"
            )
        paths: list[str] = []
        labels: list[int] = []
        try:
            with self.table.open(newline="", encoding="utf-8-sig") as file:
                for line, row in enumerate(csv.reader(file, strict=True), 1):
                    if row:
                        labels.append(self._label(line, row))
                        paths.append(self._path(line, row[1].strip()))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                f"{self.table}: not a CSV text in UTF-8 ({error}); save the table again as UTF-8"
            ) from error
        named = len(FMOW_CLASSES) == self.num_classes
        self.set_samples(paths, labels)
        self.set_classes(FMOW_CLASSES if named else [str(i) for i in range(self.num_classes)])
        self.check_labels(f"'{self.table}'")

    def _label(self, line: int, row: list[str]) -> int:
        if len(row) != 2:
            raise DataError(
                f"{self.table}:{line}: {len(row)} columns; expected two, <class id>,<image path>"
            )
        text = row[0].strip()
        if not text.isascii() or not text.isdecimal():
            hint = "; the table must have no header line" if line == 1 else ""
            swapped = ", the columns are swapped?" if row[1].strip().isdecimal() else ""
            raise DataError(
                f"{self.table}:{line}: '{text}' is no class id (an integer){swapped}{hint}"
            )
        if int(text) >= self.num_classes:
            raise DataError(
                f"{self.table}:{line}: class id {text} is outside 0..{self.num_classes - 1}; correct "
                "it, or set num_classes"
            )
        return int(text)

    def _path(self, line: int, path: str) -> str:
        full = os.path.join(self.data_root, path)
        if not path or not os.path.isfile(full):
            raise MissingFileError(
                f"{self.table}:{line}: image '{full}' does not exist; relative paths start from "
                f"'{self.data_root}' (set data_prefix to change that)"
            )
        return path
