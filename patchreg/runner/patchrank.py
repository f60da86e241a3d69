"""PatchRank: how well a classifier does that sees the best k patches only, for any ranker and any ViT.

Letters: B images, P patches in raster order, k kept ones.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dist import collect_results, is_main_process
from mmengine.model import is_model_wrapper
from mmengine.registry import init_default_scope
from mmengine.runner import TestLoop
from torch import Tensor

from patchreg.models.layers import kept_cells
from patchreg.models.selectors.rank import top_mask
from patchreg.models.selectors.rankers import patch_sides, scores_on_grid
from patchreg.registry import LOOPS, SELECTORS
from patchreg.runner.api import load
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.tables import write_csv

ROUNDS = 9
COLUMNS = (
    *("ranker", "k", "share", "top1", "top5", "macs", "dense_macs", "ranker_macs"),
    *("images_per_second", "speed"),
)
_RUN_KEYS = {"config", "checkpoint", "img_size", "resize"}
RESIZES = ("bilinear", "nearest")


class Ranker:
    """Anything with `select`, fed with images as it knows them.

    Args:
        module: Selector or model.
        img_size: Side in px to which images are scaled for it, or None for their own size.
        resize: `bilinear` (antialiased) or `nearest`.

    Raises:
        ConfigError: It cannot rank, or `resize` is unknown.
    """

    def __init__(self, module: Any, img_size: int | None = None, resize: str = "bilinear") -> None:
        if resize not in RESIZES:
            raise ConfigError(f"resize={resize!r} is unknown; use one of {RESIZES}")
        if not callable(getattr(module, "select", None)):
            raise ConfigError(
                f"{type(module).__name__} has no method 'select(inputs) -> PatchSelection' and cannot rank"
            )
        self.module = module
        self.img_size = img_size
        self.resize = resize

    @classmethod
    def build(cls, config: Any, classifier: Any = None, checkpoint: str | None = None) -> Ranker:
        """Build a ranker.

        Args:
            config: A `...Selector`; or `config` and `checkpoint` of a run whose model ranks, and perhaps
                `img_size` and `resize`; or something built already.
            classifier: Model that is being evaluated, for rankers that read it.
            checkpoint: For a config that names none.

        Raises:
            ConfigError: The config is of neither kind.
        """
        if not isinstance(config, Mapping):
            return cls(config)
        if "type" in config:
            module = SELECTORS.build(dict(config))
            if classifier is not None and hasattr(module, "use"):
                module.use(classifier)
            return cls(module.eval())
        weights = config.get("checkpoint") or checkpoint
        if "config" not in config or not set(config) <= _RUN_KEYS:
            raise ConfigError(
                f"ranker {dict(config)}: expected type='...Selector', or config='configs/...' of a trained "
                "model and checkpoint='work_dirs/...' (else the checkpoint on the command line is meant, or "
                "the one that ships with the config), and perhaps img_size and resize"
            )
        model = load(config["config"], weights).network
        return cls(model, config.get("img_size"), config.get("resize", "bilinear"))

    @torch.no_grad()
    def select(self, batch: Mapping[str, Any], inputs: Tensor) -> PatchSelection:
        """Rank the patches of a batch.

        A model gets the images of the loader through its own preprocessor, a selector those that the
        classifier sees.

        Args:
            batch: What the loader gave.
            inputs: The same as the classifier sees it.

        Shape:
            inputs [B, 3, H, W].
        """
        preprocessor = getattr(self.module, "data_preprocessor", None)
        if preprocessor is not None:
            images = batch["inputs"]
            if self.img_size is not None:
                images = torch.stack(
                    [_resize(image, self.img_size, self.resize) for image in images]
                )
            inputs = preprocessor(dict(inputs=images), False)["inputs"]
        elif self.img_size is not None:
            inputs = _resize(inputs, self.img_size, self.resize)
        return self.rank(inputs)

    @torch.no_grad()
    def rank(self, inputs: Tensor) -> PatchSelection:
        """Rank the patches of images that are preprocessed for the ranker.

        A model that also classifies has a method `rank` for the ranking alone, else `select` is asked.

        Args:
            inputs: Images as the ranker knows them.

        Shape:
            inputs [B, 3, H, W].
        """
        return getattr(self.module, "rank", self.module.select)(inputs)


def _resize(images: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    single = images.ndim == 3
    options: dict[str, Any] = {}
    if mode == "bilinear":
        options = dict(antialias=True, align_corners=False)
    batch = (images[None] if single else images).float()
    scaled = F.interpolate(batch, size=(side, side), mode=mode, **options)
    return scaled[0] if single else scaled


def keep_best(selection: PatchSelection, count: int) -> PatchSelection:
    """Return a selection that keeps the best patches only.

    The highest scores of a grid; of windows that overlap the first ones, as the ranker ordered them.

    Args:
        selection: Selection over a grid.
        count: Patches to keep of each image.

    Raises:
        DataError: The selection has no grid, or fewer patches.
    """
    if selection.grid is None:
        raise DataError("a selection of free boxes has no grid; its order says which come first")
    if not selection.tiles():
        order = selection.order[:, :count]
        if count < 1 or order.shape[1] < count:
            raise DataError(
                f"cannot keep {count} of {order.shape[1]} windows; keep 1 to {order.shape[1]}, or have the "
                "ranker choose more"
            )
        chosen = torch.zeros_like(selection.keep, dtype=torch.int64)
        chosen = chosen.scatter_add(1, order.clamp(min=0), (order >= 0).long()).bool()
        left_out = selection.resolution.amin(dim=1, keepdim=True)
        return replace(
            selection,
            keep=chosen,
            resolution=torch.where(chosen, selection.resolution, left_out),
            order=order,
            boxes=selection.boxes[:, :count],
        )
    keep = top_mask(selection.score, count)
    return PatchSelection.from_grid(
        image_size=selection.image_size,
        grid=selection.grid,
        score=selection.score,
        keep=keep,
        resolution=torch.where(keep, selection.resolution, 0.0),
        macs=selection.macs,
        dense_macs=selection.dense_macs,
    )


def rank_patches(
    image: Any,
    ranker: Any,
    checkpoint: str | None = None,
    keep: int | None = None,
    img_size: int | None = None,
) -> PatchSelection:
    """Say which patches of an image matter, best first (`order`, `boxes`).

    The image is scaled to the size of the model; boxes refer to that size.

    Args:
        image: File, Pillow image, or uint8 RGB array.
        ranker: Config file of a model that ranks, such as `configs/patchgame/quick.py`, a model, or a selector
            or its config.
        checkpoint: Its checkpoint or the folder of its run, for a config file.
        keep: How many patches to keep, or None for what the ranker keeps.
        img_size: Side in px, or None for that of the model, or of the image for a selector.

    Shape:
        An array has [H, W, 3].

    Raises:
        UserError: The image cannot be read, or the model cannot be built.
    """
    from patchreg.transforms.loading import LoadImage, to_rgb8

    if isinstance(image, (str, Path)):
        pixels = LoadImage().read(str(image))
    else:
        pixels = image if isinstance(image, np.ndarray) else np.array(to_rgb8(image))
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise DataError(
            f"the image is an array of shape {pixels.shape} and type {pixels.dtype}; expected [H, W, 3] "
            "uint8 RGB"
        )
    if img_size is not None and img_size < 1:
        raise ConfigError(f"img_size={img_size}: expected a side in px, or None")
    init_default_scope("patchreg")
    if isinstance(ranker, (str, Path)):
        ranker = load(ranker, checkpoint).network
    built = Ranker.build(ranker)
    side = img_size or getattr(built.module, "img_size", None)
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    images = images[None] if side is None else _resize(images, side).round()[None]
    training = built.module.training
    built.module.eval()
    try:
        selection = built.select(dict(inputs=images), images.float())
    finally:
        built.module.train(training)
    return selection if keep is None else keep_best(selection, keep)


@LOOPS.register_module()
class PatchRankLoop(TestLoop):
    """Classify the test set from the best k patches of each image, for several rankers and k.

    Positions are kept and the other patches are really left out, so that fewer patches cost less time.
    The table goes to the log and to `patchrank.csv` in the work dir, its picture to `patchrank.png`.
    `images_per_second` and `speed` (against all patches) are those of the classifier without the ranker, by
    the CPU time of the process on a CPU and the wall clock elsewhere: the median of rounds in which all k run
    in turn. `macs` are the classifier's, `ranker_macs` the ranker's.

    Source:
        "PatchGame: Learning to Signal Mid-level Patches in Referential Games", section 4.2;
        `eval_patchrank.py` of the official code.

    Args:
        runner: The runner.
        dataloader: Loader of the test set, or its config.
        evaluator: Not used; accuracies are counted here.
        ks: Numbers of patches.
        rankers: By name, a `...Selector`, or `config` and `checkpoint` (and `img_size`, `resize`) of a model
            with `select`. Without `checkpoint` the one of the command line is meant.

    Raises:
        ConfigError: There is no ranker or no k, or the model is no classifier that can leave out patches.

    Differs from official:
        Any ranker and ViT, the ViT's own preprocessing, the rank network alone instead of the whole speaker,
        accuracies over all processes. There, without k, all patches were kept silently.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Any,
        evaluator: Any,
        ks: Sequence[int],
        rankers: dict[str, dict],
    ) -> None:
        super().__init__(runner, dataloader, evaluator)
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not callable(getattr(self.model, "classify_kept", None)):
            raise ConfigError(
                f"{type(self.model).__name__} cannot leave out patches; evaluate a PatchClassifier with a "
                "VisionTransformerBackbone, or a TimmPatchClassifier"
            )
        if not ks or min(ks) < 1 or not rankers:
            raise ConfigError(
                f"test_cfg: ks={list(ks)}, rankers={list(rankers)}: expected numbers of patches from 1, and "
                "at least one ranker"
            )
        self.ks = sorted(set(ks))
        self.rankers = {
            name: Ranker.build(ranker, self.model, getattr(runner, "_load_from", None))
            for name, ranker in rankers.items()
        }

    @torch.no_grad()
    def run(self) -> dict[str, float]:
        """Classify with all rankers and k.

        Returns:
            `patchrank/<ranker>_k<k>`: top-1 accuracy in percent.

        Raises:
            ConfigError: A k exceeds the number of patches.
        """
        runner, model = self.runner, self.model
        runner.call_hook("before_test")
        runner.call_hook("before_test_epoch")
        model.eval()
        hits: list[list[list[bool]]] = []
        ranker_macs = dict.fromkeys(self.rankers, 0.0)
        macs: dict[int, float] = {}
        dense = 0.0
        timed: Tensor | None = None
        for index, batch in enumerate(self.dataloader):
            data = model.data_preprocessor(batch, False)
            inputs = data["inputs"]
            timed = inputs if timed is None else timed
            labels = torch.stack([sample.gt_label.flatten()[0] for sample in data["data_samples"]])
            grid = self._grid(inputs)
            found = []
            whole: Tensor | None = None
            for name, ranker in self.rankers.items():
                selection = ranker.select(batch, inputs)
                if selection.macs is not None:
                    ranker_macs[name] = float(selection.macs.mean())
                score = scores_on_grid(selection, grid)
                for k in self.ks:
                    if k == score.shape[1] and whole is not None:
                        # All patches are the same ones for every ranker.
                        found.append(whole)
                        continue
                    cells = kept_cells(top_mask(score, k))
                    logits, cost, dense = model.classify_kept(inputs, cells)
                    macs[k] = float(cost.mean())
                    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
                    right = best == labels.to(best.device)[:, None]
                    found.append(torch.stack((right[:, 0], right.any(dim=1)), dim=1))
                    whole = found[-1] if k == score.shape[1] else whole
            hits += torch.stack(found, dim=1).tolist()
            runner.call_hook("after_test_iter", batch_idx=index, data_batch=None, outputs=None)
        every = collect_results(hits, len(self.dataloader.dataset), device="cpu")
        rates = self._rates(timed) if timed is not None else {}
        metrics: dict[str, float] = {}
        if is_main_process():
            assert every is not None
            shares = 100.0 * torch.tensor(every, dtype=torch.float64).mean(dim=0)
            rows = []
            cases = [(name, k) for name in self.rankers for k in self.ks]
            patches = grid[0] * grid[1]
            for (name, k), (top1, top5) in zip(cases, shares.tolist(), strict=True):
                rows.append(
                    dict(
                        ranker=name,
                        k=k,
                        share=k / patches,
                        top1=top1,
                        top5=top5,
                        macs=macs[k],
                        dense_macs=dense,
                        ranker_macs=ranker_macs[name],
                        images_per_second=rates[k],
                        speed=rates[k] / rates[0],
                    )
                )
                metrics[f"patchrank/{name}_k{k}"] = top1
            self._report(rows)
        runner.call_hook("after_test_epoch", metrics=metrics)
        runner.call_hook("after_test")
        return metrics

    def _grid(self, inputs: Tensor) -> tuple[int, int]:
        """Return the classifier's grid of patches."""
        height, width = patch_sides(self.model.backbone)
        grid = (inputs.shape[2] // height, inputs.shape[3] // width)
        if self.ks[-1] > grid[0] * grid[1]:
            raise ConfigError(
                f"test_cfg.ks={self.ks}: images of {inputs.shape[2]} x {inputs.shape[3]} px have "
                f"{grid[0] * grid[1]} patches"
            )
        return grid

    def _rates(self, inputs: Tensor) -> dict[int, float]:
        """Return images per second for each k, and for all patches as 0."""
        patches = int(np.prod(self._grid(inputs)))
        clock = time.process_time if inputs.device.type == "cpu" else time.perf_counter
        cells = {
            k: kept_cells(top_mask(torch.rand(len(inputs), patches, device=inputs.device), k))
            for k in self.ks
        }
        seconds: dict[int, list[float]] = {k: [] for k in (0, *self.ks)}
        for _ in range(ROUNDS + 2):
            for k, times in seconds.items():
                start = clock()
                logits = self.model.classify_kept(inputs, cells[k])[0] if k else self.model(inputs)
                # Values on the host end the work of any device.
                logits.sum().item()
                times.append(clock() - start)
        return {k: len(inputs) / statistics.median(times[2:]) for k, times in seconds.items()}

    def _report(self, rows: list[dict[str, Any]]) -> None:
        folder = Path(self.runner.work_dir)
        write_csv(folder / "patchrank.csv", rows, COLUMNS)
        draw_patchrank([folder / "patchrank.csv"], folder / "patchrank.png")
        names = list(self.rankers)
        width = max(8, *(len(name) for name in names))
        lines = ["   k  share  MACs of all  speed  " + "  ".join(f"{n:>{width}s}" for n in names)]
        for k in self.ks:
            part = [row for row in rows if row["k"] == k]
            first = part[0]
            cells = "  ".join(f"{row['top1']:{width}.2f}" for row in part)
            lines.append(
                f"{k:4d}  {first['share']:5.3f}  {first['macs'] / first['dense_macs']:11.3f}  "
                f"{first['speed']:4.2f}x  {cells}"
            )
        lines.append(f"written to {folder / 'patchrank.csv'} and patchrank.png")
        self.runner.logger.info("\n".join(["top-1 from the best k patches", *lines]))


def draw_patchrank(tables: Sequence[str | Path], path: str | Path) -> None:
    """Draw accuracy over the number of patches, one curve per ranker.

    Of several tables the mean is drawn, with the range from the lowest to the highest.

    Args:
        tables: Files `patchrank.csv`, of runs with other seeds.
        path: Picture to write; its folder is made.

    Raises:
        DataError: The tables have different rankers or k.
    """
    from patchreg.utils.draw import draw_ranges

    curves: dict[str, dict[float, list[float]]] = {}
    for number, table in enumerate(tables):
        with open(table, encoding="ascii", newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not set(COLUMNS) <= set(rows[0]):
            raise DataError(f"'{table}' is no table of PatchRankLoop")
        for row in rows:
            values = curves.setdefault(row["ranker"], {}).setdefault(float(row["k"]), [])
            values.append(float(row["top1"]))
            if len(values) != number + 1:
                raise DataError(f"'{table}' has other rankers or k than '{tables[0]}'")
    draw_ranges(curves, "patches that the classifier sees", "top-1 (%)", path)
