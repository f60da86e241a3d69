"""What the class token looks at: masks of the cells that hold most of its attention.

Letters: h heads, H x W grid.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(attention: Tensor, threshold: float) -> Tensor:
    """Keep the cells that together hold a share of each head's attention, largest first.

    A cell is kept where the sum of all cells up to and with it, smallest first, exceeds
    1 - threshold of the whole.

    Source:
        DINO's `visualize_attention.py`.

    Args:
        attention: Attention of the class token to the cells.
        threshold: Share of the attention that is kept, in [0, 1].

    Shape:
        attention [h, H, W]; returns the same, bool.
    """
    flat = attention.flatten(1)
    values, order = flat.sort(dim=1)
    share = (values / values.sum(dim=1, keepdim=True)).cumsum(dim=1)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, share > 1 - threshold)
    return kept.view_as(attention)
