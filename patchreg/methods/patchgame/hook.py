"""Temperature of the symbols over the training."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from patchreg.methods.patchgame.model import PatchGamePretrainer
from patchreg.methods.patchgame.speaker import check_temperature
from patchreg.registry import HOOKS
from patchreg.utils.errors import ConfigError
from patchreg.utils.schedules import linear_warmup


@HOOKS.register_module()
class PatchGameTemperatureHook(Hook):
    """Lower the temperature of the symbols linearly, then hold it.

    Nothing is stored: the temperature follows from the iteration, also on resume. A temperature that is
    trained is left alone.

    Source:
        `temperature_scheduler` of the official `train.py`.

    Args:
        start: Temperature of the first iteration, above 0.
        final: Temperature at the end of the linear part, above 0.
        epochs: Length of the linear part in epochs, or None for half of the training (rounded down).

    Raises:
        ConfigError: A temperature is not above 0; when training begins, the linear part is longer than the
            training or the model is another one.
    """

    def __init__(self, start: float = 5.0, final: float = 1.0, epochs: int | None = None) -> None:
        self.start, self.final = check_temperature(start), check_temperature(final)
        self.epochs = epochs

    def before_train(self, runner: Any) -> None:
        """Find the length of the linear part.

        Args:
            runner: The runner of the training.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not isinstance(model, PatchGamePretrainer):
            raise ConfigError(
                f"PatchGameTemperatureHook is for a PatchGamePretrainer, not a {type(model).__name__}"
            )
        self._symbols = model.gumbel
        epochs = runner.max_epochs // 2 if self.epochs is None else self.epochs
        if not 0 <= epochs <= runner.max_epochs:
            raise ConfigError(
                f"PatchGameTemperatureHook: epochs={epochs} does not fit into a training of "
                f"{runner.max_epochs} epochs"
            )
        self._steps = epochs * len(runner.train_dataloader)

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict | None = None
    ) -> None:
        """Set the temperature of the iteration.

        Args:
            runner: The runner of the training.
            batch_idx: Not used.
            data_batch: Not used.
        """
        self._symbols.set_temperature(
            linear_warmup(runner.iter, self.start, self.final, self._steps)
        )
