"""The policy finds the one cell that matters, on made-up images."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import init_default_scope
from patchdrop_helpers import labelled, patchdrop

CLASSES, SIDE, CELL = 10, 4, 8


def make_batch(
    textures: torch.Tensor, generator: torch.Generator, size: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with one textured cell each, their labels and the cells."""
    images = 0.05 * torch.randn(size, 3, 32, 32, generator=generator)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    cells = torch.randint(0, SIDE**2, (size,), generator=generator)
    for image, label, cell in zip(images, labels.tolist(), cells.tolist(), strict=True):
        row, column = divmod(cell, SIDE)
        image[:, row * CELL : row * CELL + CELL, column * CELL : column * CELL + CELL] += (
            textures[label] + 1.5
        )
    return images, labels, cells


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_policy_learns_where_to_look(seed: int) -> None:
    init_default_scope("patchreg")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    textures = torch.randn(CLASSES, 3, CELL, CELL, generator=generator)
    textures -= textures.mean((1, 2, 3), keepdim=True)
    model = patchdrop("pretrain", width=8)
    classifier = model.classifier.requires_grad_(True).train()
    optimiser = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in range(150):
        images, labels, _ = make_batch(textures, generator)
        optimiser.zero_grad()
        classifier.loss(images, labelled(labels))["loss_cls"].backward()
        optimiser.step()
    classifier.requires_grad_(False)
    optimiser = torch.optim.Adam(model.selector.parameters(), lr=1e-3)
    model.train()
    for _ in range(300):
        images, labels, _ = make_batch(textures, generator)
        optimiser.zero_grad()
        model.loss(images, labelled(labels))["loss_policy"].backward()
        optimiser.step()
    model.eval()
    images, labels, cells = make_batch(textures, generator, 512)
    with torch.no_grad():
        out = model.run(images)
    accuracy = (out.logits.argmax(1) == labels).float().mean().item()
    kept = out.actions.sum(1).float().mean().item()
    found = out.actions.gather(1, cells[:, None]).float().mean().item()
    print(f"seed {seed}: accuracy {accuracy:.3f}, kept {kept:.2f}, true cell kept {found:.3f}")
    assert accuracy >= 0.97
    assert kept <= 5.5
    assert found >= 0.97
