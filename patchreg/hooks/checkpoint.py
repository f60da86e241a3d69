"""When checkpoints are written, which are kept, and what points to the newest."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook as _CheckpointHook

from patchreg.registry import HOOKS
from patchreg.utils.files import write_safely


@HOOKS.register_module()
class CheckpointHook(_CheckpointHook):
    """Save checkpoints every few epochs or iterations, the best ones, and one when a run is stopped.

    The arguments are those of `mmengine.hooks.CheckpointHook`.

    Differs from official:
        An old checkpoint is removed after its successor is safely on disk, not before; the pointer
        `last_checkpoint` is replaced in one step; a stop in the middle of an epoch is saved too.
    """

    def before_train(self, runner: Any) -> None:
        """Find the folder and tidy up what a killed run has left there."""
        super().before_train(runner)
        self._position = -1
        if is_main_process():
            for partial in Path(self.out_dir).glob(".*.partial"):
                partial.unlink(missing_ok=True)
        info = runner.message_hub.runtime_info
        self._kept: list[str] = list(info.get("kept_checkpoints", []))
        self._remove_old()

    def _remove_old(self) -> None:
        if self.max_keep_ckpts <= 0:
            return
        old = self._kept[: -self.max_keep_ckpts]
        self._kept = self._kept[-self.max_keep_ckpts :]
        if is_main_process():
            for name in old:
                Path(self.out_dir, name).unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        self._save(runner, self.filename_tmpl.format(step), meta)

    def _save(self, runner: Any, name: str, meta: dict) -> str:
        self._kept = [item for item in self._kept if item != name] + [name]
        self.last_ckpt = os.path.join(self.out_dir, name)
        runner.message_hub.update_info("kept_checkpoints", list(self._kept))
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            **self.args,
        )
        if is_main_process():
            write_safely(Path(runner.work_dir, "last_checkpoint"), str(self.last_ckpt).encode())
        self._position = meta["iter"]
        self._remove_old()
        return str(self.last_ckpt)

    def has_position(self, iteration: int) -> bool:
        """Whether the newest checkpoint holds the state after an iteration.

        Args:
            iteration: Iterations done.
        """
        return self._position == iteration

    def save_position(self, runner: Any) -> str:
        """Save the state between two iterations, if that is not done already.

        Args:
            runner: The runner of the training.

        Returns:
            The checkpoint.
        """
        if self.has_position(runner.iter):
            return str(self.last_ckpt)
        name = f"iter_{runner.iter}.pth"
        return self._save(runner, name, dict(epoch=runner.epoch, iter=runner.iter))

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Note that this state is validated, and save the best checkpoints.

        Args:
            runner: The runner.
            metrics: Results of the validation.
        """
        # A name that begins with "val" would be logged as a result.
        runner.message_hub.update_info("last_validation", runner.iter)
        if not metrics or not self.save_best:
            super().after_val_epoch(runner, metrics or {})
            return
        before = self._best()
        # The parent would remove the old best checkpoint before it writes the new one.
        self._set_best(dict.fromkeys(before))
        super().after_val_epoch(runner, metrics)
        after = self._best()
        self._set_best({key: after.get(key) or old for key, old in before.items()})
        for key, old in before.items():
            if old and after.get(key) and after[key] != old and is_main_process():
                with contextlib.suppress(FileNotFoundError):
                    os.remove(old)

    def _best(self) -> dict[str, str | None]:
        if hasattr(self, "best_ckpt_path"):
            return {"": self.best_ckpt_path}
        return dict(getattr(self, "best_ckpt_path_dict", {}))

    def _set_best(self, paths: dict[str, str | None]) -> None:
        if "" in paths:
            self.best_ckpt_path = paths[""]
        else:
            self.best_ckpt_path_dict = paths
