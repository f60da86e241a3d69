"""Revisited Oxford and Paris: retrieval of landmarks."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from patchreg.datasets.image_files import _FileDataset
from patchreg.registry import DATASETS
from patchreg.transforms.loading import LoadImage
from patchreg.utils.errors import ConfigError, DataError, MissingFileError
from patchreg.utils.pickles import unpickle_arrays

NAMES = ("roxford5k", "rparis6k")


@DATASETS.register_module()
class RevisitedDataset(_FileDataset):
    """Queries or database of ROxford5k and RParis6k: `<data_root>/<name>/{gnd_<name>.pkl,jpg/*.jpg}`.

    `metainfo["ground_truth"]` of the queries holds, for each, the images of the database that are
    `easy`, `hard` and `junk`. The pickle is read by an unpickler that knows arrays only.

    Source:
        Radenovic et al., "Revisiting Oxford and Paris: large-scale image retrieval benchmarking"
        (CVPR 2018), http://cmp.felk.cvut.cz/revisitop.

    Args:
        data_root: Folder that holds roxford5k/ or rparis6k/.
        name: "roxford5k" or "rparis6k".
        split: "query" or "database".
        crop_query: Cut queries to the box of the landmark, as the protocol of the benchmark asks;
            DINO's figures are without.
        pipeline: Transforms, as configs or callables, applied in order; start with `LoadImage`.
        test_mode: Whether a transform that gives up on an image is an error instead of a redraw.
        lazy_init: Read the ground truth at first use instead of now.

    Raises:
        MissingFileError: A part of the layout is missing; the text shows it.
        DataError: The ground truth is damaged, or holds more than arrays.
        ConfigError: The name is unknown.
    """

    SPLITS = ("query", "database")

    def __init__(
        self,
        data_root: str,
        name: str,
        split: str = "database",
        crop_query: bool = False,
        pipeline: Sequence[dict | Callable] = (),
        test_mode: bool = False,
        lazy_init: bool = False,
    ) -> None:
        if name not in NAMES:
            raise ConfigError(f"RevisitedDataset: name={name!r} is unknown; use one of {NAMES}")
        self.name = name
        self.crop_query = crop_query
        self.boxes: list[tuple[float, ...]] = []
        super().__init__(
            data_root=str(Path(data_root, name)),
            split=split,
            pipeline=pipeline,
            test_mode=test_mode,
            lazy_init=lazy_init,
        )

    def load_samples(self) -> None:
        """Read the ground truth."""
        path = Path(self.data_root, f"gnd_{self.name}.pkl")
        layout = (
            f"Expected {self.data_root}/gnd_{self.name}.pkl and {self.data_root}/jpg/<image>.jpg, as "
            "published at http://cmp.felk.cvut.cz/revisitop"
        )
        if not path.is_file():
            raise MissingFileError(f"{self.name}: '{path}' does not exist. {layout}")
        try:
            truth = unpickle_arrays(path.read_bytes())
            names = truth["imlist" if self.split == "database" else "qimlist"]
            queries = [
                {key: np.asarray(item[key]).reshape(-1).tolist() for key in keys}
                for item in truth["gnd"]
                for keys in [("easy", "hard", "junk", "bbx")]
            ]
        except pickle.UnpicklingError as error:
            raise DataError(f"'{path}' is not loaded: {error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"'{path}' is no ground truth of the revisited benchmark ({error!r} is missing); "
                "it has imlist, qimlist and gnd with easy, hard, junk and bbx"
            ) from error
        paths = [f"jpg/{name}.jpg" for name in names]
        absent = next((item for item in paths if not Path(self.data_root, item).is_file()), None)
        if absent is not None:
            raise MissingFileError(f"{self.name}: '{absent}' does not exist. {layout}")
        if self.split == "query":
            self._metainfo["ground_truth"] = [
                {key: item[key] for key in ("easy", "hard", "junk")} for item in queries
            ]
            self.boxes = [tuple(item["bbx"]) for item in queries]
            if len(queries) != len(names):
                raise DataError(
                    f"'{path}' has {len(names)} queries in qimlist, but {len(queries)} in gnd"
                )
            for name, box in zip(names, self.boxes, strict=True):
                sound = len(box) == 4 and round(box[0]) < round(box[2])
                if self.crop_query and not (sound and round(box[1]) < round(box[3])):
                    raise DataError(
                        f"'{path}': the box of '{name}' is {list(box)}; expected left, top, right, "
                        "bottom in px, not empty"
                    )
        self.set_samples(paths, range(len(paths)))
        self.set_classes(names)
        self.check_labels(f"'{path}'")

    def read_sample(self, row: int) -> dict[str, Any]:
        """Return the path of an image, or the landmark cut out of it.

        Args:
            row: Row in `labels`.
        """
        info = super().read_sample(row)
        if self.crop_query and self.split == "query":
            from PIL import Image

            image = LoadImage().read(info["img_path"])
            # Pillow's rule, as in the code of the benchmark: rounded, the end excluded.
            left, top, right, bottom = self.boxes[row]
            info["img"] = np.array(Image.fromarray(image).crop((left, top, right, bottom)))
        return info
