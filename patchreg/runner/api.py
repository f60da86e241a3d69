"""Trained models ready for use."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from patchreg.registry import HOOKS, MODELS
from patchreg.runner.build import EngineRunner, config_errors, resolve_checkpoint
from patchreg.runner.checkpoint import load_parts, load_state
from patchreg.utils.weights import load_file, state_dict_of


class _Evaluation:
    """As much of a runner as hooks need to prepare a model for evaluation."""

    def __init__(self, config: Config, model: Any) -> None:
        self.cfg = config
        self.model = model
        self.seed = 0
        self.logger = MMLogger.get_current_instance()
        self.build_dataloader = EngineRunner.build_dataloader

    @cached_property
    def test_dataloader(self) -> Any:
        """Loader of the test set."""
        with config_errors("the test data cannot be read"):
            return self.build_dataloader(self.cfg.test_dataloader, seed=self.seed)


def load_model(config: Config, checkpoint: str) -> Any:
    """Build the model of a config for evaluation, load its weights and prepare it as a test does.

    A hook of the config that has a method `prepare_model` gets to see the model, as before a test.

    Args:
        config: What `load_config` returned.
        checkpoint: Checkpoint, or folder of a run for its newest one.

    Raises:
        UserError: The model cannot be built, or the checkpoint is missing or of another model.
    """
    init_default_scope(config.get("default_scope", "patchreg"))
    parts = copy.deepcopy(config.model)
    if config.get("data_preprocessor") is not None:
        parts.setdefault("data_preprocessor", config.data_preprocessor)
    path = resolve_checkpoint(checkpoint)
    with config_errors(f"the model of '{config.filename}' cannot be built"):
        model = MODELS.build(parts)
    load_parts(model)
    # A model may know other layouts of its checkpoints, as in a run.
    read = getattr(model, "read_checkpoint", None)
    state = state_dict_of(load_file(path), path) if read is None else read(path)["state_dict"]
    load_state(model, state, path, strict=True)
    model = model.to(get_device()).eval()
    for hook in config.get("custom_hooks") or ():
        if hasattr(HOOKS.get(hook["type"]), "prepare_model"):
            HOOKS.build(hook).prepare_model(_Evaluation(config, model))
    return model
