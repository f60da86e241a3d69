"""Cross-entropy between matched tokens of teacher and student, without storing the logits.

Letters: B images, U views of the teacher, T tokens of each, N student tokens that take part, C bottleneck
channels, K prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn

from patchreg.methods.pwself.matching import TokenMatches
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError

CENTER_MODES = ("per_position", "cls_patch", "global")


class MatchedCrossEntropy(torch.autograd.Function):
    """Weighted cross-entropy of each student token with its partners, some images at a time.

    For a student token with logits s and targets q_j of weights w_j the term is
    (sum_j w_j) lse(s) - <sum_j w_j q_j, s>: one pass per token, however many partners it has. Gradients
    are computed while the logits are there, and only scaled in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        center: Tensor,
        matches: TokenMatches,
        temperatures: tuple[float, float],
        block: int,
    ) -> Tensor:
        """Return the loss of every student token.

        Args:
            ctx: Context of autograd.
            x: Bottleneck features of the student's tokens.
            weight: Last layer of the student.
            teacher: Bottleneck features of the teacher's tokens, image by image.
            teacher_weight: Last layer of the teacher.
            center: Center of each token of a view, or one for all.
            matches: Pairs of tokens.
            temperatures: Those of student and teacher.
            block: Logits that exist at the same time.

        Shape:
            x [N, C]; weights [K, C]; teacher [B, U, T, C]; center [T, K] or [1, K]; returns [N].
        """
        exact, types = center.dtype, (x.dtype, weight.dtype)
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(low), weight.to(low)
            teacher, teacher_weight = teacher.to(low), teacher_weight.to(low)
        # The temperatures go where the tensors are small: into the features, the center, the gradients.
        student_temperature, teacher_temperature = temperatures
        scaled = x / student_temperature
        shift = center / -teacher_temperature
        terms = torch.zeros(len(x), dtype=exact, device=x.device)
        grad_x = torch.zeros_like(x, dtype=exact)
        grad_weight = torch.zeros_like(weight, dtype=exact)
        # The largest weight counts 1 until the end, so that float16 gradients do not vanish.
        unit = float(matches.weight.max())
        # What is copied to the device is copied at once.
        values = (matches.weight / unit).to(exact).to(x.device, non_blocking=True)
        places = torch.stack((matches.student, matches.teacher)).to(x.device, non_blocking=True)
        share = torch.zeros_like(terms).index_add_(0, places[0], values)
        for images, rows, pairs, spans in _plan(matches, teacher, weight.shape[0], block):
            start = torch.tensor([[rows.start], [images.start * tokens_of(teacher)]])
            targets = teacher[images]
            mix = torch.sparse_coo_tensor(
                places[:, pairs] - start.to(x.device),
                -values[pairs],
                (rows.stop - rows.start, targets[..., 0].numel()),
                check_invariants=False,
            ).coalesce()

            def teacher_logits(span: slice, targets: Tensor = targets) -> Tensor:
                part = targets @ teacher_weight[span].t()
                part = torch.add(shift[:, span], part, alpha=1 / teacher_temperature)
                return part.flatten(0, 2)

            def student_logits(span: slice, rows: slice = rows) -> Tensor:
                return (scaled[rows] @ weight[span].t()).to(exact)

            kinds: tuple[Callable[[slice], Tensor], ...] = (teacher_logits, student_logits)
            # With a single span the logits are kept, with several they are made twice.
            kept = [kind(spans[0]) for kind in kinds] if len(spans) == 1 else None
            sums = []
            for number, kind in enumerate(kinds):
                total = (kept[number] if kept else kind(spans[0])).logsumexp(1)
                for span in spans[1:]:
                    total = torch.logaddexp(total, kind(span).logsumexp(1))
                sums.append(total[:, None])
            for span in spans:
                target, part = kept or [kind(span) for kind in kinds]
                # The goal of every row, times -1.
                goal = torch.sparse.mm(mix, target.sub_(sums[0]).exp_())
                part -= sums[1]
                terms[rows] += torch.linalg.vecdot(goal, part)
                slope = goal.addcmul_(part.exp_(), share[rows, None]).to(x.dtype)
                grad_x[rows] += slope @ weight[span]
                grad_weight[span] += slope.t() @ scaled[rows]
        terms *= unit
        grad_x *= unit / student_temperature
        grad_weight *= unit
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.types = types
        return terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale the gradients.

        Args:
            ctx: Context of autograd.
            grad: Gradient of the sum, the same for every token.

        Shape:
            grad [N].
        """
        grad_x, grad_weight = ctx.saved_tensors
        # The caller sums the tokens, so all of them have one gradient.
        scale = grad[0]
        found = (grad_x * scale).to(ctx.types[0]), (grad_weight * scale).to(ctx.types[1])
        return *found, None, None, None, None, None, None


def tokens_of(teacher: Tensor) -> int:
    """Return how many tokens the teacher has per image.

    Args:
        teacher: Its features.

    Shape:
        teacher [B, U, T, C].
    """
    return teacher.shape[1] * teacher.shape[2]


def _plan(
    matches: TokenMatches, teacher: Tensor, count: int, block: int
) -> Iterator[tuple[slice, slice, slice, list[slice]]]:
    """Cut the work into images, their rows, their pairs, and spans of prototypes.

    Several images at a time where their logits fit into the block, else one image and a part of the
    prototypes at a time.
    """
    starts = matches.starts
    firsts = torch.searchsorted(matches.student, starts).tolist()
    width = int(starts.diff().max()) + tokens_of(teacher)
    at_once = max(block // (width * count), 1)
    chunk = min(count, max(block // width, 1))
    # Spans of equal length, so that the last one is not a sliver.
    chunk = -(-count // -(-count // chunk))
    spans = [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    for image in range(0, len(teacher), at_once):
        until = min(image + at_once, len(teacher))
        rows = slice(int(starts[image]), int(starts[until]))
        yield slice(image, until), rows, slice(firsts[image], firsts[until]), spans


@MODELS.register_module()
class PWSelfLoss(nn.Module):
    """Patch-wise DINO loss: teacher and student agree on every pair of matched tokens.

    For views u of the teacher and v != u of the student, with matched tokens (a, b):
    L_uv = mean over images and pairs of -sum_k softmax((z_u[a] - center) / tau_t)_k
    log softmax(s_v[b] / tau_s)_k; the loss is the mean of L_uv. The class tokens are one of the pairs.
    Afterwards center = m center + (1 - m) mean of z over images, views of the teacher and processes.

    Source:
        "Patch-Wise Self-Supervised Visual Representation Learning" (arXiv:2310.18651), `DINOLoss`.

    Args:
        out_dim: K; filled in by the model.
        tokens: T; filled in by the model.
        student_temperature: tau_s, above 0.
        teacher_temperature: tau_t, above 0; `PWSelfTeacherHook` changes it.
        center_momentum: m, in [0, 1].
        center_mode: `per_position` has one center per token, as published; `cls_patch` one for the
            class token and one for all patches; `global` a single one.
        block_size: Logits that exist at the same time; None for 2^19 on a CPU, whose cache they fit,
            and 2^27 on a GPU. Where those of one image do not fit, they are made twice, a part of
            the prototypes at a time.

    Raises:
        ConfigError: A value is out of its range.

    Differs from official:
        Logits are never stored whole; views may be of any number and size; one center per position
        is an option, because the same position shows different places in different views.
    """

    center: Tensor
    place: Tensor

    def __init__(
        self,
        out_dim: int = 1,
        tokens: int = 2,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
        center_mode: str = "per_position",
        block_size: int | None = None,
    ) -> None:
        super().__init__()
        if min(student_temperature, teacher_temperature) <= 0:
            raise ConfigError(
                f"student_temperature={student_temperature}, teacher_temperature="
                f"{teacher_temperature}: expected both above 0"
            )
        if not 0 <= center_momentum <= 1 or (block_size is not None and block_size < 1):
            raise ConfigError(
                f"center_momentum={center_momentum}, block_size={block_size}: expected a momentum in "
                "[0, 1] and at least one logit per block"
            )
        if center_mode not in CENTER_MODES:
            raise ConfigError(f"center_mode='{center_mode}': use one of {', '.join(CENTER_MODES)}")
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.center_momentum = center_momentum
        self.block_size = block_size
        place = torch.arange(tokens)
        limit = {"per_position": tokens - 1, "cls_patch": 1, "global": 0}[center_mode]
        self.register_buffer("place", place.clamp(max=limit), persistent=False)
        self.register_buffer("center", torch.zeros(1, limit + 1, out_dim))

    def forward(
        self,
        student: Tensor,
        student_weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        matches: TokenMatches,
    ) -> dict[str, Tensor]:
        """Return the loss and the cross-entropies it consists of; update the center in training.

        Args:
            student: Bottleneck features of the student's tokens `matches.rows`.
            student_weight: Last layer of the student.
            teacher: Bottleneck features of all tokens of the teacher, view by view.
            teacher_weight: Last layer of the teacher.
            matches: Pairs of tokens.

        Shape:
            student [N, C]; teacher [U * B, T, C]; weights [K, C]. Returns `loss_pwself`, and `ce_class`
            and `ce_patch`, the mean cross-entropies of class tokens and of patches.
        """
        exact = torch.float64 if student.dtype == torch.float64 else torch.float32
        images = len(matches.starts) - 1
        views = len(teacher) // images
        by_image = teacher.detach().unflatten(0, (views, images)).transpose(0, 1)
        # One center per token, or one for all, need no copy.
        center = self.center[0] if self.center.shape[1] != 2 else self.center[0, self.place]
        block = self.block_size or (1 << 19 if student.device.type == "cpu" else 1 << 27)
        terms = MatchedCrossEntropy.apply(
            student,
            student_weight,
            by_image,
            teacher_weight.detach(),
            center.to(exact),
            matches,
            (self.student_temperature, self.teacher_temperature),
            block,
        )
        loss = terms.sum()
        is_class = torch.zeros(len(terms), dtype=torch.bool)
        is_class[matches.student[matches.is_class]] = True
        class_share = float(matches.weight[matches.is_class].sum())
        with torch.no_grad():
            class_part = terms.detach().mul(is_class.to(terms.device, non_blocking=True)).sum()
            found = {
                "loss_pwself": loss,
                "ce_class": class_part / max(class_share, 1e-12),
                "ce_patch": (loss.detach() - class_part) / max(1 - class_share, 1e-12),
            }
            if self.training:
                self.update_center(teacher, teacher_weight)
        return found

    @torch.no_grad()
    def update_center(self, teacher: Tensor, weight: Tensor) -> None:
        """Move the center towards the mean logits of the teacher, over all processes.

        The last layer is linear, so the mean is taken before it.

        Args:
            teacher: Bottleneck features of all tokens of the teacher.
            weight: Last layer of the teacher.

        Shape:
            teacher [U * B, T, C]; weight [K, C].
        """
        with torch.autocast(teacher.device.type, enabled=False):
            mean = teacher.to(self.center.dtype).mean(0)
            count = self.center.shape[1]
            pooled = mean.new_zeros(count, mean.shape[1]).index_add_(0, self.place, mean)
            pooled /= torch.bincount(self.place, minlength=count)[:, None]
            if get_world_size() > 1:
                all_reduce(pooled, "mean")
            logits = pooled @ weight.to(pooled.dtype).t()
        self.center.mul_(self.center_momentum).add_(logits, alpha=1 - self.center_momentum)
