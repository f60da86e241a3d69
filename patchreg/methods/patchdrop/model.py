"""PatchDrop: a policy acquires patches, a classifier reads what was acquired.

Letters: B images, H x W px, P patches in raster order, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from patchreg.methods.patchdrop.mask import cell_size, mask_patches
from patchreg.methods.patchdrop.selector import bounded_probability, log_probability
from patchreg.models.base import ImageModel, fill_predictions, stack_targets
from patchreg.registry import MODELS
from patchreg.runner.checkpoint import load_state
from patchreg.structures import PatchSelection
from patchreg.utils.errors import CheckpointError, ConfigError, DataError
from patchreg.utils.weights import load_file, state_dict_of

STAGES = ("pretrain", "finetune", "twostream")


@dataclass(eq=False)
class PatchDropStep:
    """What one training step did, without gradients, for hooks.

    Args:
        probability: Bounded probability of keeping each patch.
        sampled: Sampled decisions.
        greedy: Most probable decisions.
        sampled_reward: Reward of the sampled decisions.
        greedy_reward: Reward of the greedy decisions.
        sampled_right: Whether the prediction for the sampled decisions is right.
        greedy_right: Whether the prediction for the greedy decisions is right.
        sampled_logits: Class logits for the sampled decisions (two streams: the sum).
        greedy_logits: Class logits for the greedy decisions.
        overview: What the policy saw.

    Shape:
        [B, P], rewards [B, 1], right [B], logits [B, K], overview [B, 3, h, w].
    """

    probability: Tensor
    sampled: Tensor
    greedy: Tensor
    sampled_reward: Tensor
    greedy_reward: Tensor
    sampled_right: Tensor
    greedy_right: Tensor
    sampled_logits: Tensor
    greedy_logits: Tensor
    overview: Tensor


@dataclass(eq=False)
class PatchDropOutput:
    """What one evaluation pass gives.

    Args:
        logits: Class logits, of both streams where there are two.
        probability: Probability of keeping each patch.
        actions: Decisions.
        macs: Multiply-accumulates executed for each image.
        dense_macs: Multiply-accumulates of the classifier on the whole image.

    Shape:
        logits [B, K]; probability [B, P]; actions bool [B, P]; macs float64 [B].
    """

    logits: Tensor
    probability: Tensor
    actions: Tensor
    macs: Tensor
    dense_macs: float


@MODELS.register_module()
class PatchDropClassifier(ImageModel):
    """Policy network, high-resolution classifier and, in stage 3, low-resolution classifier.

    The policy sees the low-resolution view and decides about all patches at once; dropped patches
    are erased and the classifier reads the rest. Which parts learn depends on the stage:

    - `pretrain`: the policy; the classifier is frozen, in evaluation mode.
    - `finetune`: policy and classifier; the classifier reads the greedy choice first and the
      sampled one second, both in training mode, so both move its BatchNorm statistics.
    - `twostream`: as before, with the logits of the frozen low-resolution classifier added.

    A classifier with a method `classify(images, actions, grid)` is given the decisions and does not
    have to compute what was dropped; any other sees the erased image.

    Source:
        "Learning When and Where to Zoom With Deep Reinforcement Learning", CVPR 2020; `pretrain.py`,
        `finetune.py`, `finetune2stream.py` of the PatchDrop repository.

    Args:
        classifier: Config of the high-resolution classifier, such as a `PatchClassifier`.
        selector: Config of the policy, such as a `PatchDropSelector`.
        overview: Config of the low-resolution view.
        policy_loss: Config of reward and policy loss.
        stage: `pretrain`, `finetune` or `twostream`.
        lr_classifier: Config of the low-resolution classifier; in stage `twostream` only.
        grid: Rows and columns of the patches.
        patch_size: Side of a patch in px when the grid does not cover the image, or None.
        fill: What a dropped patch becomes: `zero` (the mean colour), or `overview`, the enlarged
            low-resolution view.
        fusion: `sum` of the two streams' logits, or `weighted` by the kept share of the greedy
            choice (first public version, there in training only).
        classifier_mode: `train`, or `eval` for a classifier that learns with fixed BatchNorm
            statistics (stage 2 of the first public version).
        class_weight: Factor of the cross-entropy in stages 2 and 3.
        data_preprocessor: Config of the preprocessor, or None.
        init_cfg: Weights to load, as in MMEngine. Those of the parts are loaded strictly, and are
            required for every part that is frozen, unless `random_parts` is set.
        random_parts: Allow frozen parts with random weights (tests).

    Raises:
        ConfigError: The arguments do not fit together.

    Differs from official:
        Passes that need no gradient are run without; 224-px networks and the two-stream stage work,
        which they do not there.
    """

    def __init__(
        self,
        classifier: dict,
        selector: dict,
        overview: dict,
        policy_loss: dict | None = None,
        stage: str = "pretrain",
        lr_classifier: dict | None = None,
        grid: tuple[int, int] = (4, 4),
        patch_size: int | None = None,
        fill: str = "zero",
        fusion: str = "sum",
        classifier_mode: str = "train",
        class_weight: float = 1.0,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
        random_parts: bool = False,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        choices = (
            ("stage", stage, STAGES),
            ("fill", fill, ("zero", "overview")),
            ("fusion", fusion, ("sum", "weighted")),
            ("classifier_mode", classifier_mode, ("train", "eval")),
        )
        for name, value, known in choices:
            if value not in known:
                raise ConfigError(f"{name}={value!r} is unknown; use one of {known}")
        if (stage == "twostream") != (lr_classifier is not None):
            raise ConfigError(
                f"stage={stage!r} with lr_classifier {'missing' if lr_classifier is None else 'set'}: "
                "the low-resolution classifier belongs to stage 'twostream' and to no other"
            )
        self.stage = stage
        self.grid = (grid[0], grid[1])
        self.patch_size = patch_size
        self.fill = fill
        self.fusion = fusion
        self.classifier_mode = classifier_mode
        self.class_weight = class_weight
        self.random_parts = random_parts
        self.classifier = MODELS.build(classifier)
        self.selector = MODELS.build(selector)
        self.overview = MODELS.build(overview)
        self.lr_classifier = None if lr_classifier is None else MODELS.build(lr_classifier)
        self.policy_loss = MODELS.build(policy_loss or {"type": "PatchDropPolicyLoss"})
        if self.selector.num_patches != self.grid[0] * self.grid[1]:
            raise ConfigError(
                f"selector.num_patches={self.selector.num_patches} does not fit a grid of "
                f"{self.grid[0]} x {self.grid[1]} patches"
            )
        if patch_size is not None and patch_size < 1:
            raise ConfigError(f"patch_size={patch_size}: expected a side in px, or None")
        if hasattr(self.classifier, "classify") and (patch_size is not None or fill != "zero"):
            raise ConfigError(
                f"patch_size={patch_size}, fill={fill!r}: a {type(self.classifier).__name__} reads the "
                "kept patches of a grid that covers the image, and no others; leave both out"
            )
        self.active: Tensor | None = None
        """1 for patches the policy decides about already, set by PatchDropCurriculumHook."""
        self.last_step: PatchDropStep | None = None
        for part in self.frozen_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def frozen_parts(self) -> list[nn.Module]:
        """Return the parts that do not learn in this stage."""
        frozen = [self.classifier] if self.stage == "pretrain" else []
        return frozen if self.lr_classifier is None else [*frozen, self.lr_classifier]

    def train(self, mode: bool = True) -> PatchDropClassifier:
        """Switch the mode; frozen parts stay in evaluation mode.

        Args:
            mode: True for training.
        """
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
        if self.classifier_mode == "eval":
            self.classifier.eval()
        return self

    def init_weights(self) -> None:
        """Load the weights that the parts name, strictly.

        Raises:
            ConfigError: A frozen part names none.
            CheckpointError: The weights belong to another network, or to another stage.
        """
        names = {"classifier": self.classifier, "selector": self.selector}
        if self.lr_classifier is not None:
            names["lr_classifier"] = self.lr_classifier
        self.require_weights()
        for name, part in names.items():
            config = part.init_cfg
            if isinstance(config, dict) and config.get("type") == "Pretrained":
                load_part(part, config["checkpoint"], config.get("prefix"), f"model.{name}")
                part._is_init = True
        super().init_weights()

    def require_weights(self) -> None:
        """Refuse frozen parts that no file gives weights to.

        Raises:
            ConfigError: A frozen part names no weights, and those of the whole model lack it.
        """
        if self.random_parts:
            return
        whole: set[str] = set()
        if isinstance(self.init_cfg, dict) and self.init_cfg.get("type") == "Pretrained":
            path = self.init_cfg["checkpoint"]
            whole = set(state_dict_of(load_file(path), path))
        for name in ("classifier", "lr_classifier"):
            part = getattr(self, name)
            if part is None or part not in self.frozen_parts() or part.init_cfg is not None:
                continue
            if not all(f"{name}.{key}" in whole for key in part.state_dict()):
                raise ConfigError(
                    f"stage {self.stage!r} does not train model.{name}, which has no weights; set "
                    f"model.{name}.init_cfg=dict(type='Pretrained', checkpoint=...)"
                )

    def logits(self, inputs: Tensor) -> Tensor:
        """Classify images.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, K].
        """
        return self.run(inputs).logits

    def classify_all(self, inputs: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return logits, the cost of each image, and that of the classifier on a whole one.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W]; returns [B, K], float64 [B] and a number.
        """
        out = self.run(inputs)
        return out.logits, out.macs, out.dense_macs

    def classify(
        self, images: Tensor, actions: Tensor, overview: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Let the classifier read what was acquired.

        Args:
            images: Preprocessed images.
            actions: Decisions, 0 or 1.
            overview: The low-resolution view, for `fill='overview'`.

        Shape:
            images [B, 3, H, W]; actions [B, P]; returns logits [B, K], the cost of each image float64
            [B], and the cost of a whole image.
        """
        if hasattr(self.classifier, "classify"):
            logits, macs, dense = self.classifier.classify(images, actions, self.grid)
            return lifted(logits), macs, dense
        fill = None
        if self.fill == "overview":
            fill = F.interpolate(overview, images.shape[2:], mode="nearest")
        erased = mask_patches(images, actions, self.grid, self.patch_size, fill)
        features = self.classifier.extract(erased)
        return lifted(self.classifier.head(features)), *self.classifier.cost(features)

    def fuse(self, logits: Tensor, lr_logits: Tensor | None, greedy: Tensor) -> Tensor:
        """Combine the two streams; one stream passes unchanged.

        Args:
            logits: Logits of the high-resolution classifier.
            lr_logits: Logits of the low-resolution classifier, or None.
            greedy: Greedy decisions, whose kept share is the weight of `fusion='weighted'`.

        Shape:
            logits, lr_logits [B, K]; greedy [B, P]; returns [B, K].
        """
        if lr_logits is None:
            return logits
        if self.fusion == "sum":
            return logits + lr_logits
        share = greedy.to(logits.dtype).mean(1, keepdim=True)
        return share * logits + (1 - share) * lr_logits

    @torch.no_grad()
    def decide(self, overview: Tensor) -> Tensor:
        """Return the decisions of an evaluation, also in training.

        Args:
            overview: Low-resolution views.

        Shape:
            overview [B, 3, h, w]; returns bool [B, P].
        """
        training = self.selector.training
        self.selector.eval()
        try:
            return self._policy(overview)[1]
        finally:
            self.selector.train(training)

    def _policy(self, overview: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the probability of keeping each patch, the decisions, and the cost of an image."""
        logits, macs = self.selector(overview)
        probability = logits.sigmoid()
        return probability, self.force_inactive(self.selector.decide(probability)), macs

    def force_inactive(self, actions: Tensor) -> Tensor:
        """Keep the patches that the curriculum has not reached.

        Args:
            actions: Decisions.

        Shape:
            actions [B, P]; returns the same.
        """
        if self.active is None:
            return actions
        active = self.active.to(actions.device, torch.bool)
        return torch.where(active, actions, torch.ones_like(actions))

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        """Return the losses of a training batch, and means over it under names without `loss`.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples with labels.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            DataError: Labels are missing or mixed.
            ConfigError: A policy that does not learn, in the stage that trains nothing else.
        """
        targets = stack_targets(data_samples, inputs.device)
        if targets.is_floating_point():
            raise DataError("PatchDrop's reward needs one label per image; set batch_augment=None")
        uniform = self.selector.draws(inputs, torch.promote_types(inputs.dtype, torch.float32))
        overview = self.overview(inputs)
        bounded = bounded_probability(self.selector(overview)[0].sigmoid(), self.selector.alpha)
        if self.stage == "pretrain" and not bounded.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                f"stage 'pretrain' trains the policy alone, and a {type(self.selector).__name__} does not "
                "learn; set stage='finetune' to train the classifier on its choices"
            )
        with torch.no_grad():
            sampled = self.force_inactive(self.selector.sample(bounded, uniform.to(bounded.dtype)))
            greedy = self.force_inactive(self.selector.greedy(bounded))
            lr_logits = None if self.lr_classifier is None else self._low_resolution(overview)
        greedy_logits, sampled_logits = self._both(inputs, greedy, sampled, overview)
        greedy_logits = self.fuse(greedy_logits, lr_logits, greedy)
        sampled_logits = self.fuse(sampled_logits, lr_logits, greedy)
        with torch.no_grad():
            reward, right = self.policy_loss.reward(sampled_logits, targets, sampled)
            baseline, greedy_right = self.policy_loss.reward(greedy_logits, targets, greedy)
            charged = self.policy_loss.charge(sampled) - self.policy_loss.charge(greedy)
        losses = {}
        if bounded.requires_grad:
            log_prob = log_probability(sampled, bounded)
            active = None if self.active is None else self.active.to(log_prob)
            losses["loss_policy"] = self.policy_loss(log_prob, reward - baseline - charged, active)
        if self.stage != "pretrain":
            losses["loss_cls"] = self.class_weight * F.cross_entropy(sampled_logits, targets)
        self.last_step = PatchDropStep(
            bounded.detach(),
            sampled,
            greedy,
            reward,
            baseline,
            right,
            greedy_right,
            sampled_logits.detach(),
            greedy_logits.detach(),
            overview,
        )
        losses.update(
            greedy_accuracy=greedy_right.float().mean(),
            greedy_reward=baseline.mean(),
            greedy_kept=greedy.sum(1).mean(),
            sampled_accuracy=right.float().mean(),
            sampled_reward=reward.mean(),
            sampled_kept=sampled.sum(1).mean(),
        )
        return losses

    def _low_resolution(self, overview: Tensor) -> Tensor:
        assert self.lr_classifier is not None
        return lifted(self.lr_classifier(overview))

    def _both(
        self, inputs: Tensor, greedy: Tensor, sampled: Tensor, overview: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of the greedy and of the sampled choice."""
        if self.stage == "pretrain":
            with torch.no_grad():
                # The frozen classifier treats images one by one, so both choices are one batch.
                logits = self.classify(
                    inputs.repeat(2, 1, 1, 1),
                    torch.cat((greedy, sampled)),
                    overview.repeat(2, 1, 1, 1),
                )[0]
            return logits[: len(inputs)], logits[len(inputs) :]
        if next(self.selector.parameters(), None) is None:
            # A fixed policy has nothing to compare with.
            logits = self.classify(inputs, sampled, overview)[0]
            return logits.detach(), logits
        with torch.no_grad():
            greedy_logits = self.classify(inputs, greedy, overview)[0]
        return greedy_logits, self.classify(inputs, sampled, overview)[0]

    def run(self, inputs: Tensor) -> PatchDropOutput:
        """Evaluate images: overview, decisions, erased image, logits.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        overview = self.overview(inputs)
        probability, actions, policy_macs = self._policy(overview)
        found, macs, dense = self.classify(inputs, actions.to(inputs.dtype), overview)
        macs = macs + policy_macs
        if self.lr_classifier is not None:
            features = self.lr_classifier.extract(overview)
            macs = macs + self.lr_classifier.cost(features)[0]
            lr_logits = lifted(self.lr_classifier.head(features))
            found = self.fuse(found, lr_logits, actions)
        return PatchDropOutput(found, probability, actions, macs, dense)

    def blank_labels(self, inputs: Tensor) -> list[int]:
        """Return what is predicted for each image when nothing of it is acquired.

        Args:
            inputs: Preprocessed images; only a low-resolution classifier looks at them.

        Shape:
            inputs [B, 3, H, W].
        """
        image = torch.zeros_like(inputs[:1])
        nothing = image.new_zeros(1, self.selector.num_patches)
        logits = self.classify(image, nothing, self.overview(image))[0].expand(len(inputs), -1)
        if self.lr_classifier is not None:
            seen = self._low_resolution(self.overview(inputs))
            logits = self.fuse(logits, seen, nothing.expand(len(inputs), -1))
        return logits.argmax(dim=1).tolist()

    @torch.no_grad()
    def predict(self, inputs: Tensor, data_samples: list[Any] | None = None) -> list[Any]:
        """Fill in predictions, decisions and cost of a batch.

        Args:
            inputs: Preprocessed images.
            data_samples: Samples to fill; their class needs `set_pred_score`, `set_pred_label`,
                `set_field`.

        Shape:
            inputs [B, 3, H, W].

        Raises:
            DataError: There are no samples to fill.
        """
        out = self.run(inputs)
        samples = fill_predictions(data_samples, out.logits, out.macs, out.dense_macs)
        right, wrong = self.policy_loss.values(out.actions.float())
        rewards = torch.cat((right, wrong), dim=1).tolist()
        blank = self.blank_labels(inputs)
        actions, probability = out.actions.cpu(), out.probability.cpu()
        for index, sample in enumerate(samples):
            values = dict(
                patch_keep=actions[index],
                patch_probability=probability[index],
                patch_rewards=rewards[index],
                blank_label=blank[index],
            )
            for name, value in values.items():
                sample.set_field(value, name, dtype=None, field_type="data")
        return samples

    @torch.no_grad()
    def select(self, inputs: Tensor) -> PatchSelection:
        """Say which patches are acquired.

        A dropped patch has been seen at the resolution of the overview.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        return self._selection(inputs, self.run(inputs))

    @torch.no_grad()
    def rank(self, inputs: Tensor) -> PatchSelection:
        """Say which patches would be acquired; the classifier does not run, and the cost is the policy's.

        Args:
            inputs: Preprocessed images.

        Shape:
            inputs [B, 3, H, W].
        """
        probability, actions, macs = self._policy(self.overview(inputs))
        spent = probability.new_full((len(inputs),), macs, dtype=torch.float64)
        # The probabilities stand in for class logits, which nobody asks for here.
        found = PatchDropOutput(probability, probability, actions, spent, macs)
        return self._selection(inputs, found)

    def _selection(self, inputs: Tensor, out: PatchDropOutput) -> PatchSelection:
        """Put decisions into the common vocabulary."""
        height, width = inputs.shape[2:]
        cells = cell_size((height, width), self.grid, self.patch_size)
        seen = min(1.0, self.overview.size**2 / (height * width))
        kept = torch.ones_like(out.probability)
        return PatchSelection.from_grid(
            # Only a grid that covers the image has cells at its edges.
            image_size=(cells[0] * self.grid[0], cells[1] * self.grid[1]),
            grid=self.grid,
            score=out.probability,
            keep=out.actions,
            resolution=torch.where(out.actions, kept, seen * kept),
            macs=out.macs,
            dense_macs=out.dense_macs,
        )


def lifted(logits: Tensor) -> Tensor:
    """Return logits at least in float32, in which rewards and losses are computed.

    Args:
        logits: Logits of any floating type.
    """
    return logits.float() if logits.element_size() < 4 else logits


def load_part(part: nn.Module, checkpoint: str, prefix: str | None, name: str) -> None:
    """Load one part of a PatchDropClassifier, all or nothing.

    Args:
        part: Classifier or policy.
        checkpoint: File of an earlier stage.
        prefix: Name of the part in that file, such as `selector.`, or None for a file of the part
            alone.
        name: Name of the part in the config, for messages.

    Raises:
        CheckpointError: The file is of another stage, or its network is another one.
    """
    state = state_dict_of(load_file(checkpoint), checkpoint)
    if prefix:
        start = prefix.rstrip(".") + "."
        inner = {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}
        if not inner:
            found = sorted({key.split(".")[0] for key in state})
            raise CheckpointError(
                f"'{checkpoint}' is of another stage: it holds {', '.join(found)} but no '{start}' "
                f"for {name}; name the checkpoint of the stage before this one"
            )
        state = inner
    elif any(key.startswith("selector.") for key in state):
        raise CheckpointError(
            f"'{checkpoint}' is a whole PatchDrop checkpoint; set {name}.init_cfg.prefix to the part "
            f"it is taken from, such as '{name.split('.')[-1]}.'"
        )
    load_state(part, state, checkpoint, strict=True)
    print_log(f"{name}: {len(state)} tensors from {checkpoint}", logger="current")
