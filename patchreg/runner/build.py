"""From a config file to a runner."""

from __future__ import annotations

import copy
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import mmengine.dist
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.runner import Runner
from mmengine.runner import runner as mmengine_runner
from torch.utils.data import DataLoader

from patchreg import __version__
from patchreg.datasets.keyed import KeyedDataset
from patchreg.registry import MODEL_WRAPPERS, RUNNERS
from patchreg.runner.checkpoint import (
    check_file,
    check_state,
    load_parts,
    load_state,
    open_gradients,
    plain,
    plain_message_hub,
    restore_gradients,
    restore_message_hub,
    seal,
)
from patchreg.runner.explain import implements
from patchreg.runner.launch import init_processes
from patchreg.runner.sharding import (
    FullyShardedWrapper,
    child_lists,
    is_sharded,
    recompute,
    shard_optimizer,
    whole_model,
    whole_optimizer,
)
from patchreg.runner.stop import shielded
from patchreg.runner.strict import check_config, check_options, check_shadowed_helpers
from patchreg.utils.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingFileError,
    UserError,
)
from patchreg.utils.files import replace_safely
from patchreg.utils.public_weights import PUBLIC_WEIGHTS
from patchreg.utils.random import batch_random
from patchreg.utils.weights import load_file, state_dict_of


@RUNNERS.register_module()
class EngineRunner(Runner):
    """MMEngine's Runner with keyed data, safe atomic checkpoints and resumable loops.

    Built by `build_runner`; the arguments are those of `mmengine.runner.Runner`.
    """

    _timestamps: ClassVar[set[str]] = set()

    def setup_env(self, env_cfg: dict) -> None:
        """Join the process group in a way that works without GPUs, then as MMEngine.

        Args:
            env_cfg: As for MMEngine; `dist_cfg` may hold backend, timeout and port.
        """
        self._overriding: dict[str, list[Hook]] = {}
        # What a sharded model saves, gathered by all processes before the first one writes.
        self._whole: dict[str, Any] = {}
        init_processes(self._launcher, **env_cfg.get("dist_cfg", {}))
        super().setup_env(env_cfg)
        # MMEngine keeps logger, message hub and visualizer per name, which ends in the second of the start:
        # a second run in the same second would write into the first one's.
        base, number = self._timestamp, 1
        while self._timestamp in self._timestamps:
            number += 1
            self._timestamp = f"{base}_{number}"
        self._timestamps.add(self._timestamp)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call a hook point on the hooks that implement it, in order of priority.

        Args:
            fn_name: Name of the hook point.
            kwargs: What the hook point passes.
        """
        if fn_name == "before_save_checkpoint":
            kwargs["checkpoint"].update(self._whole)
        if fn_name not in self._overriding:
            self._overriding[fn_name] = [
                hook for hook in self._hooks if implements(type(hook), fn_name)
            ]
        for hook in self._overriding[fn_name]:
            getattr(hook, fn_name)(self, **kwargs)
        if fn_name == "before_save_checkpoint":
            # Last of all, so that whatever hooks added to the hub is turned into plain values too.
            checkpoint = kwargs["checkpoint"]
            checkpoint["message_hub"] = plain_message_hub(checkpoint["message_hub"])
            if "optimizer" in checkpoint and self._open_gradients:
                checkpoint["gradients"] = self._open_gradients
            for key in set(checkpoint) - {"state_dict"}:
                checkpoint[key] = plain(checkpoint[key])

    def register_hook(self, hook: Any, priority: Any = None) -> None:
        """Insert a hook by priority.

        Args:
            hook: Hook or its config.
            priority: Overrides the hook's own.
        """
        super().register_hook(hook, priority)
        self._overriding.clear()

    def get_hooks_info(self) -> str:
        """Return the hooks in call order, one line."""
        return " > ".join(f"{type(hook).__name__} ({hook.priority})" for hook in self._hooks)

    def _log_env(self, env_cfg: dict) -> None:
        facts = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": get_device(),
            "threads": torch.get_num_threads(),
            "processes": self.world_size,
            "seed": self.seed,
            "patchreg": __version__,
        }
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
        self.logger.info(", ".join(f"{key} {value}" for key, value in facts.items()))
        self.logger.debug(f"config:\n{self.cfg.pretty_text}")

    def wrap_model(self, model_wrapper_cfg: dict | None, model: torch.nn.Module) -> torch.nn.Module:
        """Wrap the model for data parallel training; also on CPUs, which MMEngine does not foresee.

        Args:
            model_wrapper_cfg: As for MMEngine.
            model: The model.
        """
        if model_wrapper_cfg and not self.distributed:
            raise ConfigError(
                f"model_wrapper_cfg: '{model_wrapper_cfg.get('type')}' spreads a model over several "
                "processes, but this run has one; start it with tools/dist_train.sh or leave it out"
            )
        sync_bn = self.cfg.get("sync_bn")
        if sync_bn not in (None, "torch"):
            raise ConfigError(
                f"sync_bn='{sync_bn}' is unknown; use 'torch', or None for no exchange"
            )
        if self.distributed and sync_bn and get_device() == "cpu":
            raise ConfigError(
                "sync_bn='torch': torch's SyncBatchNorm works on GPUs only; leave it out on CPUs"
            )
        if self.distributed and not any(value.requires_grad for value in model.parameters()):
            # Nothing to train: torch refuses to wrap it, and there is nothing to exchange.
            return model.to(get_device())
        kind = (model_wrapper_cfg or {}).get("type")
        if kind is not None and issubclass(MODEL_WRAPPERS.get(kind), FullyShardedWrapper):
            # MMEngine does both after the wrapping, when it is too late for shards.
            initialise = getattr(model, "init_weights", None)
            if initialise is not None:
                initialise()
            model = model.to(get_device())
            if sync_bn:
                model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
            for value in model.state_dict().values():
                mmengine.dist.broadcast(value)
            return MODEL_WRAPPERS.build(model_wrapper_cfg, default_args=dict(module=model))
        if not self.distributed or model_wrapper_cfg or get_device() != "cpu":
            return super().wrap_model(model_wrapper_cfg, model)
        unused = self.cfg.get("find_unused_parameters", False)
        return MMDistributedDataParallel(
            module=model, broadcast_buffers=False, find_unused_parameters=unused
        )

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build a loader whose augmentation is keyed by (seed, epoch, sample index, view).

        Args:
            dataloader: A loader, or its config; `bad_samples` may be 'error' or 'skip'.
            seed: Seed of the run.
            diff_rank_seed: Not used for data: all processes must agree on the order.
        """
        if isinstance(dataloader, DataLoader):
            return dataloader
        config = copy.deepcopy(dataloader)
        bad_samples = config.pop("bad_samples", "error")
        dataset = config["dataset"]
        if isinstance(dataset, Mapping):
            dataset = ROOT_DATASETS.build(dataset)
            if hasattr(dataset, "full_init"):
                dataset.full_init()
        config["dataset"] = KeyedDataset(dataset, seed or 0, bad_samples)
        loader = Runner.build_dataloader(config, seed=seed)
        loader.worker_init_fn = shielded(loader.worker_init_fn)
        return loader

    def _init_model_weights(self) -> None:
        """Initialise the weights and send the first process's to all; shards have been through that."""
        if not is_sharded(self._bare_model()):
            super()._init_model_weights()

    def train(self) -> torch.nn.Module:
        """Train; the parts of `activation_checkpointing` are computed again in the backward pass.

        MMEngine recomputes with torch's re-entrant form, which loses the gradients of whatever a part returns
        inside other objects than tuples.
        """
        before = mmengine_runner.turn_on_activation_checkpointing
        mmengine_runner.turn_on_activation_checkpointing = recompute
        try:
            return super().train()
        finally:
            mmengine_runner.turn_on_activation_checkpointing = before

    def _maybe_compile(self, target: str) -> None:
        """Compile the parts that `compile` names, in place; MMEngine would compile the whole training step.

        Args:
            target: Not used.

        Raises:
            ConfigError: The model has no such part, or an option is unknown.
        """
        options = self.cfg.get("compile") or None
        if options is None:
            return
        options = {} if options is True else dict(options)
        parts = options.pop("parts", ["backbone.blocks"])
        for _, part in child_lists(self._bare_model(), parts, "compile.parts"):
            part.compile(**options)
        self.logger.info(f"compiled: {', '.join(parts)}; the first iterations are slow")

    def build_evaluator(self, evaluator: Any) -> Any:
        """Build an evaluator; top-5 is left out where the model has fewer classes.

        Args:
            evaluator: An evaluator, or configs of metrics.
        """
        classes = getattr(getattr(self._bare_model(), "head", None), "num_classes", None)
        several = isinstance(evaluator, (list, tuple))
        metrics = list(evaluator) if several else [evaluator]
        for number, metric in enumerate(metrics):
            topk = metric.get("topk") if isinstance(metric, Mapping) else None
            if classes is None or not isinstance(topk, (list, tuple)) or max(topk) <= classes:
                continue
            kept = tuple(k for k in topk if k <= classes)
            if kept:
                self.logger.info(
                    f"accuracy: topk={kept} of {tuple(topk)}, there are {classes} classes"
                )
                metrics[number] = dict(metric, topk=kept)
        return super().build_evaluator(metrics if several else metrics[0])

    def build_train_loop(self, loop: Any) -> Any:
        """Build the training loop; `by_epoch` chooses between the resumable loops.

        Args:
            loop: A loop or its config.
        """
        if isinstance(loop, Mapping) and "type" not in loop:
            loop = dict(loop)
            loop["type"] = "EpochLoop" if loop.pop("by_epoch", True) else "IterLoop"
        return super().build_train_loop(loop)

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = "cpu",
        strict: bool = False,
        revise_keys: Sequence = (),
    ) -> dict[str, Any]:
        """Load weights from a file without running any code from it.

        Args:
            filename: Local path.
            map_location: Where tensors go.
            strict: Whether every key must match.
            revise_keys: Not used; convert foreign layouts with tools/convert.py.

        Raises:
            CheckpointError: The file is damaged or belongs to another model.
        """
        check_file(filename)
        checkpoint = self._read_checkpoint(filename, map_location)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        load_state(self._bare_model(), checkpoint["state_dict"], filename, strict, self.logger)
        self._has_loaded = True
        self.logger.info(f"loaded {filename}")
        return checkpoint

    def load_or_resume(self) -> None:
        """Load weights for evaluation or as a start, or resume a run."""
        if self._has_loaded:
            return
        if self._resume:
            source = self._load_from or self._newest_sound()
            if source is None:
                self.logger.info(
                    f"nothing to resume in {self.work_dir}; training starts from scratch"
                )
            else:
                self.resume(source)
        elif self._load_from is not None:
            # Training may start from the weights of a neighbour; evaluation may not.
            self.load_checkpoint(self._load_from, strict=self._train_loop is None)

    def _newest_sound(self) -> str | None:
        """Return the newest undamaged checkpoint of the work dir, the same on all processes.

        Raises:
            CheckpointError: There are checkpoints, but all are damaged.
        """
        answer: list[str | None] = [None, None]
        if mmengine.dist.is_main_process():
            damaged = []
            for path in checkpoints_of(self.work_dir):
                try:
                    check_file(path, required=True)
                except CheckpointError as error:
                    damaged.append(path)
                    self.logger.warning(f"{error}; it is left out, the one before it is tried")
                else:
                    answer[0] = path
                    break
            if damaged and answer[0] is None:
                answer[1] = (
                    f"none of the checkpoints in '{self.work_dir}' can be read ({', '.join(damaged)}); "
                    "train anew without --resume, or restore one from a copy"
                )
        mmengine.dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise CheckpointError(answer[1])
        return answer[0]

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: Any = "default",
    ) -> None:
        """Continue a run: weights, optimiser, schedules, counters, logs and seed.

        Args:
            filename: Checkpoint of this project.
            resume_optimizer: Whether to restore the optimiser.
            resume_param_scheduler: Whether to restore the schedules.
            map_location: Where tensors go; by default the device of the run.

        Raises:
            ConfigError: The file holds weights only, so there is nothing to continue.
        """
        device = get_device() if map_location == "default" else map_location
        checkpoint = self.load_checkpoint(filename, map_location=device, strict=True)
        if "meta" not in checkpoint or "iter" not in checkpoint["meta"]:
            raise ConfigError(
                f"'{filename}' holds weights only and cannot be resumed; start from them with "
                f"--cfg-options load_from={filename}"
            )
        meta = checkpoint["meta"]
        seed = meta.get("seed")
        if seed is not None and seed != self.seed:
            self.logger.warning(f"seed {self.seed} is replaced by the checkpoint's {seed}")
            self._randomness_cfg.update(seed=seed)
            self.set_randomness(**self._randomness_cfg)
            _reseed(self.train_loop.dataloader, seed)
        self.train_loop._epoch = meta["epoch"]
        self.train_loop._iter = meta["iter"]
        restore_message_hub(self.message_hub, checkpoint["message_hub"])
        if resume_optimizer and "optimizer" in checkpoint:
            self.optim_wrapper = self.build_optim_wrapper(self.optim_wrapper)
            state = checkpoint["optimizer"]
            if is_sharded(self._bare_model()):
                state = shard_optimizer(self.optim_wrapper.optimizer, state)
            self.optim_wrapper.load_state_dict(state)
            if "gradients" in checkpoint:
                # MMEngine is about to warn that they are lost.
                restore_gradients(self._bare_model(), checkpoint["gradients"])
                self.logger.info("the half accumulated gradients are restored")
        if resume_param_scheduler and "param_schedulers" in checkpoint and self.param_schedulers:
            self.param_schedulers = self.build_param_scheduler(self.param_schedulers)
            restored = checkpoint["param_schedulers"]
            for mine, theirs in _scheduler_pairs(self.param_schedulers, restored):
                mine.load_state_dict(theirs)
        self.logger.info(f"resumed at epoch {self.epoch}, iteration {self.iter} from {filename}")

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint with a checksum under a temporary name, then rename it.

        To be called on all processes; the first one writes.

        Args:
            out_dir: Folder.
            filename: Name of the file in it.
            args: As for MMEngine.
            kwargs: As for MMEngine.

        Raises:
            CheckpointError: The file cannot be written; older checkpoints are as they were.
        """
        model = self._bare_model()
        self._open_gradients = open_gradients(model, self.optim_wrapper)
        if is_sharded(model):
            self._whole = dict(state_dict=whole_model(model))
            if kwargs.get("save_optimizer", True):
                self._whole["optimizer"] = whole_optimizer(model, self.optim_wrapper)
        if not mmengine.dist.is_main_process():
            return
        partial, final = Path(out_dir, f".{filename}.partial"), Path(out_dir, filename)
        try:
            super().save_checkpoint(out_dir, partial.name, *args, **kwargs)
            seal(partial)
            replace_safely(partial, final)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"checkpoint '{final}' cannot be written ({error.strerror or error}); those "
                "before it are as they were: make room or mend the folder, then continue with --resume"
            ) from error
        finally:
            self._whole = {}

    def prepare(self, mode: str) -> None:
        """Build everything that MMEngine would build at the first use, so that mistakes show before the run.

        Args:
            mode: `train` or `test`.
        """
        alone = mode == "test" and self._load_from is None and not self._resume
        load_parts(self._bare_model(), self.logger, strict=alone)
        require: Any = getattr(self._bare_model(), "require_weights", None)
        if alone and require is not None:
            require()
        if self._resume and self._load_from is None:
            self._load_from = self._newest_sound()
        if self._load_from is not None:
            check_file(self._load_from)
            # Read twice on purpose: hooks that take part in loading exist only once the run has begun.
            state = self._read_checkpoint(self._load_from)["state_dict"]
            check_state(
                self._bare_model(), state, self._load_from, self._resume or self._train_loop is None
            )
        if mode == "test":
            self._test_loop = self.build_test_loop(self._test_loop)
            check_classes(self.cfg, "test_dataloader", self._test_loop.dataloader.dataset)
            return
        check_room(self.work_dir, self._bare_model())
        names = self.cfg.get("activation_checkpointing") or []
        child_lists(self._bare_model(), names, "activation_checkpointing")
        self._train_loop = self.build_train_loop(self._train_loop)
        check_classes(self.cfg, "train_dataloader", self._train_loop.dataloader.dataset)
        check_batches(self._train_loop.dataloader, self.world_size)
        if self._val_loop is not None:
            self._val_loop = self.build_val_loop(self._val_loop)
            check_classes(self.cfg, "val_dataloader", self._val_loop.dataloader.dataset)

    def _read_checkpoint(self, filename: str, map_location: Any = "cpu") -> dict[str, Any]:
        """Read a file; a model that takes only a part of one says itself which (`read_checkpoint`)."""
        read = getattr(self._bare_model(), "read_checkpoint", None)
        if read is not None and not self._resume:
            return read(filename)
        checkpoint = load_file(filename, map_location)
        checkpoint["state_dict"] = state_dict_of(checkpoint, filename)
        return checkpoint

    def _bare_model(self) -> torch.nn.Module:
        return self.model.module if is_model_wrapper(self.model) else self.model

    def val(self) -> dict:
        """Evaluate on the validation set, with draws from the global generators."""
        batch_random.end()
        return super().val()


def check_classes(config: Config, key: str, dataset: Any) -> None:
    """Refuse a data set with more classes than the classifier tells apart.

    Args:
        config: Config of the run.
        key: Where the data set stands in it.
        dataset: The data set; one without classes passes.

    Raises:
        ConfigError: Names both numbers.
    """
    head = config.get("model", {}).get("head")
    outputs = head.get("num_classes") if isinstance(head, Mapping) else None
    classes = getattr(dataset, "metainfo", {}).get("classes") or ()
    if isinstance(outputs, int) and len(classes) > outputs:
        raise ConfigError(
            f"model.head.num_classes={outputs}, but {key}.dataset has {len(classes)} classes "
            f"({', '.join(map(str, classes[:3]))}, ...); set it to {len(classes)}"
        )


def check_batches(loader: DataLoader, processes: int) -> None:
    """Refuse a training without a single batch.

    Args:
        loader: Loader of the training.
        processes: Processes that share the images.

    Raises:
        DataError: The data set is empty, or smaller than a batch where the last one is dropped.
    """
    dataset: Any = loader.dataset
    if len(loader) == 0:
        raise DataError(
            f"train_dataloader gives no batch: {len(dataset)} images for {processes} process(es) with "
            f"batch_size={loader.batch_size}, drop_last={loader.drop_last}; use smaller batches, "
            "drop_last=False, or more images"
        )


def check_room(work_dir: str | os.PathLike[str], model: torch.nn.Module) -> None:
    """Refuse a work dir that has no room for a single checkpoint.

    Args:
        work_dir: Folder of a run.
        model: What will be saved, with two values of optimiser state per trained parameter.

    Raises:
        ConfigError: The disk is too full.
    """
    if not mmengine.dist.is_main_process():
        return
    state = sum(value.nbytes for value in model.state_dict().values())
    trained = sum(value.nbytes for value in model.parameters() if value.requires_grad)
    needed, free = state + 2 * trained, shutil.disk_usage(work_dir).free
    if free < needed:
        raise ConfigError(
            f"work_dir '{work_dir}' is on a disk with {free / 2**20:.1f} MB left, and one checkpoint needs "
            f"about {needed / 2**20:.1f} MB; make room, or choose another folder with --work-dir"
        )


def _scheduler_pairs(mine: Any, theirs: Any) -> list[tuple[Any, Any]]:
    if isinstance(mine, dict):
        return [pair for name in mine for pair in zip(mine[name], theirs[name], strict=True)]
    return list(zip(mine, theirs, strict=True))


def _reseed(loader: DataLoader, seed: int) -> None:
    """Give a loader that was built before the seed was known the seed of the run."""
    dataset: Any = loader.dataset
    dataset.seed = seed
    if hasattr(loader.sampler, "seed"):
        loader.sampler.seed = seed


def checkpoints_of(work_dir: str | os.PathLike[str]) -> list[str]:
    """Return the checkpoints of a work dir that a run can continue from, newest first.

    Args:
        work_dir: Folder of a run.
    """
    found = [path for path in Path(work_dir).glob("*.pth") if not path.name.startswith("best_")]
    found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    pointer = Path(work_dir, "last_checkpoint")
    if pointer.is_file():
        path = Path(pointer.read_text(errors="replace").strip())
        # The folder may have been moved; checkpoints may lie in another one.
        inside = Path(work_dir, path.name)
        path = inside if inside.is_file() else path
        if path.is_file():
            found = [path, *(other for other in found if other != path)]
    return [str(path) for path in found]


def latest_checkpoint(work_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest checkpoint of a work dir, or None.

    Args:
        work_dir: Folder of a run.
    """
    return next(iter(checkpoints_of(work_dir)), None)


def resolve_checkpoint(path: str | os.PathLike[str]) -> str:
    """Return the file that a checkpoint path means.

    Args:
        path: A file; a folder, or `last.pth` in it, for the newest checkpoint of the folder; or a name of
            `patchreg.utils.public_weights`, such as `dino_vits16`, for where its file is looked for.
    """
    path = os.fspath(path)
    if os.path.isfile(path):
        return path
    if path in PUBLIC_WEIGHTS:
        return str(PUBLIC_WEIGHTS[path].path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if os.path.isdir(path) or os.path.basename(path) == "last.pth":
        return latest_checkpoint(folder) or path
    return path


def default_work_dir(config_path: str | os.PathLike[str]) -> str:
    """Return `work_dirs/<method>/<leaf>` for `configs/<method>/<leaf>.py`.

    Args:
        config_path: Path of a config.
    """
    parts = Path(config_path).with_suffix("").parts
    if "configs" in parts:
        parts = parts[len(parts) - parts[::-1].index("configs") :]
    else:
        parts = parts[-1:]
    return os.path.join("work_dirs", *parts)


def load_config(
    path: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
    work_dir: str | None = None,
    moved: Mapping[str, str] | None = None,
) -> Config:
    """Read a config file, apply overrides and check every key of it.

    A checkpoint called `last.pth`, or a folder given for one, means the newest checkpoint of that folder.

    Args:
        path: Config file.
        options: Overrides by dotted key, as `--cfg-options` gives them.
        work_dir: Where the run writes; by default `work_dirs/<method>/<leaf>`.
        moved: Work dirs of earlier stages and where those stages write instead; checkpoints below them need not
            exist yet.

    Raises:
        MissingFileError: The file does not exist.
        ConfigError: A key, argument, type or name in it is wrong; says which and what is nearest.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise MissingFileError(_missing_config(path))
    try:
        config = Config.fromfile(path, import_custom_modules=False)
    except (UserError, KeyboardInterrupt):
        raise
    except FileNotFoundError as error:
        raise MissingFileError(
            f"config '{path}' names a base that does not exist: {error}"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"config '{path}' cannot be read: {type(error).__name__}: {error}"
        ) from error
    check_shadowed_helpers(path)
    if options:
        check_options(config, options)
        try:
            config.merge_from_dict(dict(options))
        except (KeyError, IndexError, TypeError, AssertionError) as error:
            raise ConfigError(
                f"--cfg-options cannot be applied: {error}; list items are addressed by their number "
                "(train_dataloader.dataset.pipeline.0.scale=64)"
            ) from error
    if work_dir is not None:
        config.work_dir = work_dir
    elif config.get("work_dir") is None:
        config.work_dir = default_work_dir(path)
    moved = moved or {}
    _resolve_checkpoints(config._cfg_dict, moved)
    check_config(config, to_come=tuple(moved.values()))
    return config


def _resolve_checkpoints(node: Any, moved: Mapping[str, str]) -> None:
    """Point the checkpoints in a config to the files they mean, in place."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        if isinstance(value, (dict, list)):
            _resolve_checkpoints(value, moved)
        elif isinstance(value, str) and key in ("checkpoint", "load_from", "table"):
            for usual, actual in moved.items():
                if Path(value).is_relative_to(usual):
                    value = os.path.join(actual, os.path.relpath(value, usual))
            node[key] = resolve_checkpoint(value)


def _missing_config(path: str) -> str:
    folder, stem = Path(path).parent, Path(path).name
    text = f"config '{path}' does not exist"
    from patchreg.utils.errors import did_you_mean

    if folder.is_dir():
        return text + "." + did_you_mean(stem, [item.name for item in folder.glob("*.py")])
    known = [str(item) for item in Path("configs").glob("*/*.py")]
    return text + "." + did_you_mean(path, known)


@contextmanager
def config_errors(what: str) -> Any:
    """Turn errors of constructors that a config feeds into config errors.

    Args:
        what: What is being built, for the message.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(f"{what}: {error}") from error
    except Exception as error:
        if os.environ.get("PATCHREG_TRACEBACK") == "1":
            raise
        raise ConfigError(
            f"{what}: {error or type(error).__name__} (PATCHREG_TRACEBACK=1 shows where)"
        ) from error


def build_runner(config: Config) -> EngineRunner:
    """Build the runner of a checked config.

    Args:
        config: What `load_config` returned.

    Raises:
        ConfigError: A part cannot be built from its arguments.
    """
    config = copy.deepcopy(config)
    randomness = dict(config.get("randomness") or {})
    if randomness.get("seed") is None:
        randomness["seed"] = 0
    config.randomness = randomness
    # MMEngine's own default asks for nccl.
    config.setdefault("env_cfg", {})
    folder = Path(config.work_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"work dir '{folder}' cannot be made ({error.strerror}); choose another with --work-dir"
        ) from error
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"work dir '{folder}' cannot be written ({error.strerror}); what is in it is as it was: mend it, "
            "or choose another with --work-dir"
        ) from error
    with config_errors("the config cannot be built"):
        return EngineRunner.from_cfg(config)
