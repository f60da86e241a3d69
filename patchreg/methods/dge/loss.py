"""Losses of the Dynamic Grained Encoder: cost budget and distillation."""

from __future__ import annotations

import torch.nn.functional as F
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn

from patchreg.methods.dge.cost import check_accounting
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError


@MODELS.register_module()
class DGEBudgetLoss(nn.Module):
    """Squared distance of the cost ratio from a budget, in float64.

    loss = loss_weight * (mean dynamic cost / max(static cost, 1) - budget)^2

    Source:
        DGE (NeurIPS 2021), budget constraint; official training engine.

    Args:
        budget: Wanted ratio of dynamic to static cost, in (0, 1].
        loss_weight: Factor, at least 0.
        scope: `process` takes the mean over the images of each process, as published; `global` over
            all processes.
        accounting: How cost is counted: `upstream`, as published, or `corrected`.

    Raises:
        ConfigError: A value is out of range or unknown.
    """

    def __init__(
        self,
        budget: float,
        loss_weight: float = 1.0,
        scope: str = "process",
        accounting: str = "upstream",
    ) -> None:
        super().__init__()
        if not 0.0 < budget <= 1.0:
            raise ConfigError(
                f"budget={budget} is outside (0, 1]; 0.5 asks for half the static cost"
            )
        if loss_weight < 0:
            raise ConfigError(f"loss_weight={loss_weight} is negative; 1.0 is usual")
        if scope not in ("process", "global"):
            raise ConfigError(f"scope={scope!r} is unknown; use 'process' or 'global'")
        self.budget = budget
        self.loss_weight = loss_weight
        self.scope = scope
        self.accounting = check_accounting(accounting)

    def forward(self, dynamic: Tensor, static: float) -> Tensor:
        """Return the loss; its gradient reaches routers and what feeds them.

        Args:
            dynamic: Cost of every image with the chosen queries.
            static: Cost of an image when every token is a query.

        Shape:
            dynamic [B] float64; returns a float64 scalar.
        """
        mean = dynamic.mean()
        if self.scope == "global" and get_world_size() > 1:
            # Value of the mean over processes, gradient of the own part: data parallel averages
            # gradients.
            everywhere = mean.detach().clone()
            all_reduce(everywhere, "mean")
            mean = mean + (everywhere - mean.detach())
        return self.loss_weight * (mean / max(static, 1.0) - self.budget) ** 2


@MODELS.register_module()
class DGEDistillationLoss(nn.Module):
    """DeiT's distillation through the distillation token.

    Source:
        "Training data-efficient image transformers", section 4; official `DistillationLoss`.

    Args:
        mode: `none` keeps the class loss; `soft` adds a divergence to the teacher's distribution;
            `hard` a cross-entropy to the teacher's decision.
        alpha: Weight of the teacher's term, in [0, 1]; the class loss gets 1 - alpha.
        tau: Temperature of `soft`, above 0.
        divide_by_classes: Divide the divergence by batch size x classes, as published (its weight
            then shrinks with the number of classes), not by the batch size.

    Raises:
        ConfigError: A value is out of range or unknown.
    """

    def __init__(
        self,
        mode: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
        divide_by_classes: bool = True,
    ) -> None:
        super().__init__()
        if mode not in ("none", "soft", "hard"):
            raise ConfigError(f"mode={mode!r} is unknown; use 'none', 'soft' or 'hard'")
        if not 0.0 <= alpha <= 1.0 or tau <= 0.0:
            raise ConfigError(f"alpha={alpha}, tau={tau}: expected alpha in [0, 1] and tau > 0")
        self.mode = mode
        self.alpha = alpha
        self.tau = tau
        self.divide_by_classes = divide_by_classes

    def forward(self, base: Tensor, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Weigh the class loss and add the teacher's term.

        Args:
            base: Class loss.
            student: Logits of the distillation token.
            teacher: Logits of the teacher.

        Shape:
            base scalar; student and teacher [B, K].

        Raises:
            ConfigError: Student and teacher have different classes.
        """
        if self.mode == "none":
            return {"loss_cls": base}
        if student.shape != teacher.shape:
            raise ConfigError(
                f"the student's logits have shape {tuple(student.shape)}, the teacher's "
                f"{tuple(teacher.shape)}; use a teacher with the same classes"
            )
        if student.element_size() < 4:
            student, teacher = student.float(), teacher.float()
        if self.mode == "hard":
            term = F.cross_entropy(student, teacher.argmax(dim=1))
        else:
            student = F.log_softmax(student / self.tau, dim=1)
            teacher = F.log_softmax(teacher.to(student.dtype) / self.tau, dim=1)
            term = F.kl_div(student, teacher, reduction="sum", log_target=True) * self.tau**2
            term = term / (student.numel() if self.divide_by_classes else len(student))
        return {"loss_cls": (1 - self.alpha) * base, "loss_distill": self.alpha * term}
