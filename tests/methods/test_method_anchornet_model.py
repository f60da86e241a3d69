"""Localiser and downstream training of AnchorNet against the authors' numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from anchornet_helpers import (
    close,
    golden,
    inclusive,
    localiser,
    normalised,
    official_shapes,
    recipe_localiser,
    recipe_network,
)
from dge_helpers import samples
from safetensors import safe_open
from torch import Tensor, nn

from patchreg.methods.anchornet.convert import (
    UNUSED,
    anchor_from_official,
    anchor_to_official,
)
from patchreg.methods.anchornet.selector import window_boxes
from patchreg.methods.anchornet.views import (
    crop_windows,
    five_crop_origins,
    five_crops,
    resized_view,
)
from patchreg.models.base import TokenFeatures
from patchreg.registry import HEADS, MODELS
from patchreg.structures import PatchSelection
from patchreg.utils.errors import ConfigError, DataError


def weights(file: Any) -> dict[str, Tensor]:
    """The official state dict that a file stores."""
    return {key[2:]: file[key] for key in file if key.startswith("w.")}


def test_localiser_gives_the_published_features() -> None:
    file = golden("anchornet_eval", "images_u8")
    model = localiser(12).eval()
    model.load_state_dict(anchor_from_official(weights(file)))
    trunk, images = model.backbone, normalised(file["images_u8"])
    with torch.inference_mode():
        x = torch.nn.functional.silu(trunk.bn1(trunk.conv1(images)))
        for number, block in enumerate(trunk.bneck):
            x = block(x)
            assert close(x[:, 0], file[f"block{number}_ch0"], 1e-4)
            assert close(x.mean((2, 3)), file[f"block{number}_mean"], 1e-4)
        features = model.extract(images)
        found = model.localise(images)
        assert torch.equal(features.maps[0], trunk.exp_conv(x))
        assert torch.equal(found.logits, model(images))
    assert features.grid == (17, 17)
    assert close(features.maps[0][:, ::32], file["fea_every32"], 1e-4)
    assert close(features.maps[0].std((2, 3), unbiased=False), file["fea_std_hw"], 1e-4)
    assert close(features.maps[0].mean((2, 3)), file["fea_mean_hw"], 1e-4)
    assert torch.equal(found.logits.argmax(1), file["pred"])
    assert close(model.head.cam(features), file["cam_all"], 1e-4)
    assert close(found.cam, file["cam"], 1e-4)
    boxes = window_boxes(found.cells, 17, found.window)
    assert torch.equal(inclusive(boxes), file["boxes"])


def test_head_turns_features_into_logits_maps_and_boxes() -> None:
    file = golden("anchornet_eval")
    head = HEADS.build(dict(type="AnchorNetCAMHead", num_classes=12))
    head.fc.load_state_dict({"weight": file["w.fc.weight"], "bias": file["w.fc.bias"]})
    with torch.inference_mode():
        logits = head(TokenFeatures(file["fea_mean_hw"].unsqueeze(1), (1, 1), 0))
    assert close(logits, file["logits"], 1e-4)
    assert torch.equal(logits.argmax(1), file["pred"])
    # A logit is 512 times the mean of its map, plus its bias.
    again = 512 * file["cam"].double().mean((1, 2)) + file["w.fc.bias"][file["pred"]]
    assert close(again, file["logits"].double().amax(1), 1e-4)
    model = localiser(12)
    cells = model.selector(file["cam"], model.backbone.window)
    boxes = window_boxes(cells, 17, model.backbone.window)
    assert torch.equal(inclusive(boxes), file["boxes"])


def test_two_steps_of_training_give_the_published_gradients_and_weights() -> None:
    file = golden("anchornet_train")
    with safe_open(file.path, framework="pt") as opened:
        meta = opened.metadata()
    model = localiser(12).train()
    start = anchor_from_official(weights(file))
    model.load_state_dict(start)
    optimiser = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    images, batch = normalised(file["images_u8"]), samples(file["target"])
    shapes = official_shapes(model.state_dict())
    for step in (0, 1):
        optimiser.zero_grad()
        features = model.extract(images)
        losses = model.head.loss(features, file["target"])
        assert close(losses["loss_cls"], file[f"step{step}.loss"], 1e-4)
        assert close(model.head(features), file[f"step{step}.logits"], 1e-3)
        losses["loss_cls"].backward()
        if step == 0:
            check_gradients(model, file, json.loads(meta["sorted_param_names"]))
        optimiser.step()
    after = anchor_to_official(model.state_dict())
    for key in [key for key in file if key.startswith("after.")]:
        assert close(after[key[len("after.") :]], file[key], 1e-3), key
    sums = dict(zip(json.loads(meta["sorted_state_keys"]), file["after_sums"], strict=True))
    assert set(sums) == set(shapes)
    for key, total in sums.items():
        if not UNUSED.match(key):
            value = after[key].double()
            assert abs(value.sum() - total) <= 1e-3 * value.abs().sum() + 1e-12, key
    # The loss of the model is the mean cross-entropy of the batch.
    model.load_state_dict(start)
    assert close(model(images, batch, mode="loss")["loss_cls"], file["step0.loss"], 1e-4)


def check_gradients(model: nn.Module, file: Any, names: list[str]) -> None:
    """Gradients of the first step, and which parameters have none."""
    found = {
        name.removeprefix("backbone.").removeprefix("head."): value.grad
        for name, value in model.named_parameters()
    }
    assert all(grad is not None for grad in found.values())
    without = [name for name, none in zip(names, file["grad_none"], strict=True) if none]
    assert set(names) - set(found) == set(without)
    assert all(UNUSED.match(name) for name in without)
    zero = torch.tensor(0.0)
    norms = torch.stack([found[name].norm() if name in found else zero for name in names])
    assert close(norms, file["grad_norms"], 1e-3)
    for key in [key for key in file if key.startswith("grad.")]:
        assert close(found[key[len("grad.") :]], file[key], 1e-3), key


def test_counts_are_the_published_ones() -> None:
    expected = golden("downstream_forward")["anchornet.params_macs"].tolist()
    model = localiser()
    official = anchor_to_official(model.state_dict())
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    count = sum(v.numel() for k, v in official.items() if not k.endswith(buffers))
    assert count == expected[0] == 674_984
    assert len(official) == 164
    assert sum(value.numel() for value in model.parameters()) == 674_696
    for side, macs in zip((95, 160, 192, 224, 256, 320), expected[1:], strict=True):
        assert model.backbone.macs((3, side, side)) + model.head.macs() == macs
    assert expected[4] == 60_538_544


def test_windows_follow_from_the_blocks() -> None:
    file = golden("geometry")
    trunk = localiser().eval().backbone
    assert (trunk.window.side, trunk.window.stride) == (95, 8)
    for side, cells in zip(file["input_size"].tolist(), file["grid_size"].tolist(), strict=True):
        assert trunk.window.grid(side, 300) == (cells, 26)
        if side in (95, 103, 131):
            assert trunk.run(torch.zeros(1, 3, side, 95)).shape[2] == cells
    boxes = window_boxes(torch.arange(289)[None], 17, trunk.window)[0]
    assert torch.equal(inclusive(boxes), file["boxes"])
    with pytest.raises(DataError, match="94 x 200 px is smaller than one window of 95"):
        trunk(torch.zeros(1, 3, 94, 200))
    with pytest.raises(ConfigError, match="at least one"):
        MODELS.build(dict(type="AnchorNetBackbone", blocks=[]))


@pytest.mark.parametrize(
    ("blocks", "stem", "size", "cell"),
    [
        (None, 2, (131, 97), (3, 0)),
        ([(1, 8, 1), (2, 8, 2), (2, 8, 1)], 1, (31, 26), (4, 2)),
        ([(2, 8, 2), (2, 8, 1)], 2, (40, 33), (1, 2)),
    ],
)
def test_a_cell_sees_exactly_its_window(
    blocks: Any, stem: int, size: tuple[int, int], cell: tuple[int, int]
) -> None:
    table = {} if blocks is None else dict(blocks=blocks)
    trunk = MODELS.build(
        dict(type="AnchorNetBackbone", stem_stride=stem, out_channels=16, **table)
    ).eval()
    for block in trunk.bneck:
        # The gates look at the whole image; without them only the window is left.
        block.se = nn.Identity()
    images = torch.randn(1, 3, *size, requires_grad=True)
    out = trunk.run(images)
    assert trunk.window.grid(*size) == tuple(out.shape[2:])
    out[0, :, cell[0], cell[1]].sum().backward()
    touched = images.grad[0].abs().sum(0) > 0
    side, stride = trunk.window.side, trunk.window.stride
    expected = torch.zeros(size, dtype=torch.bool)
    top, left = cell[0] * stride, cell[1] * stride
    expected[top : top + side, left : left + side] = True
    assert torch.equal(touched, expected)


def test_selection_tells_windows_in_the_common_vocabulary() -> None:
    model = recipe_localiser(3)
    images = torch.randn(3, 3, 127, 143, generator=torch.Generator().manual_seed(0))
    selection = model.select(images)
    assert isinstance(selection, PatchSelection)
    assert selection.grid == (5, 7)
    found = model.localise(images)
    for row, order, boxes in zip(found.cam, selection.order, selection.boxes, strict=True):
        assert order[0] == row.argmax()
        for cell, box in zip(order.tolist(), boxes.tolist(), strict=True):
            if cell >= 0:
                y, x = 8 * (cell // 7), 8 * (cell % 7)
                assert box == [x, y, x + 95, y + 95]
    assert selection.macs is not None
    assert selection.macs[0] == selection.dense_macs == model.backbone.macs((3, 127, 143)) + 512e3


def test_a_network_with_padding_scores_windows_by_the_mean_of_their_cells() -> None:
    net = dict(type="TorchvisionBackbone", model_name="resnet18", output="map")
    head = dict(type="AnchorNetCAMHead", num_classes=9, in_channels=512)
    model = MODELS.build(
        dict(type="AnchorNetClassifier", backbone=net, head=head, window_cells=3)
    ).eval()
    images = torch.randn(2, 3, 192, 160, generator=torch.Generator().manual_seed(3))
    found = model.localise(images)
    assert (found.window.side, found.window.stride, found.grid) == (96, 32, (4, 3))
    cam = model.head.cam(model.extract(images), found.logits.argmax(1))
    assert torch.allclose(found.cam[1, 2, 1], cam[1, 2:5, 1:4].mean(), atol=1e-6)
    assert model.select(images).boxes[..., 2:].max() <= 192
    with pytest.raises(DataError, match="2 x 2 cells is smaller than one window of 3 x 3"):
        model.localise(images[..., :64, :64])
    # Cells that are no squares, or stick out, would give crops that are not their boxes.
    for height, width in ((192, 150), (150, 192)):
        with pytest.raises(DataError, match="does not divide an image of"):
            model.localise(torch.zeros(1, 3, height, width))
    patch = dict(
        type="AnchorNetPatchClassifier",
        backbone=dict(type="TorchvisionBackbone", model_name="resnet18", num_classes=9),
        anchor=dict(type="AnchorNetClassifier", backbone=net, head=head, window_cells=3),
    )
    with pytest.raises(ConfigError, match="use evaluation='localised'"):
        MODELS.build(patch)
    assert MODELS.build(dict(patch, evaluation="localised")).eval()(images).shape == (2, 9)
    with pytest.raises(ConfigError, match="give window_cells"):
        MODELS.build(dict(type="AnchorNetClassifier", backbone=net, head=head))


def test_views_are_the_published_ones() -> None:
    file = golden("crop_resize")
    cam, boxes = file["cam"], file["boxes"]
    model = localiser()
    cells = model.selector(cam, model.backbone.window)
    assert torch.equal(inclusive(window_boxes(cells, 17, model.backbone.window)), boxes)
    rows = torch.arange(2).repeat_interleave(4)
    assert torch.equal(rows.int(), file["patch_order_image_index"])
    if "images_u8" not in file:
        return
    images = normalised(file["images_u8"])
    crops = crop_windows(images, rows, cells.flatten(), model.backbone.window)
    assert crops.shape == (8, 3, 95, 95)
    assert close(crops[:, :, [0, 47, 94]], file["patch_rows_0_47_94"], 1e-6)
    assert close(crops.mean((2, 3)), file["patch_mean"], 1e-5)
    assert close(crops.std((2, 3), unbiased=False), file["patch_std"], 1e-5)
    small = resized_view(images, 95)
    assert close(small[:1], file["resized95"], 1e-5)
    assert close(small.mean((2, 3)), file["resized95_mean"], 1e-5)
    limits = torch.stack((small.flatten(1).amin(1), small.flatten(1).amax(1)), 1)
    assert close(limits, file["resized_min_max"], 1e-5)


@pytest.mark.parametrize(
    ("name", "seed", "scale"),
    [("resnet18", 31, 0.1), ("resnet50", 32, 0.003), ("densenet201", 33, 1.0)],
)
def test_downstream_networks_are_torchvision_s(name: str, seed: int, scale: float) -> None:
    file = golden("downstream_forward")
    model = recipe_network(name, seed, scale)
    net = model.backbone.model
    state = {k: v for k, v in sorted(net.state_dict().items()) if v.is_floating_point()}
    keys = list(state)
    for key, row in zip((keys[0], keys[len(keys) // 2], keys[-1]), file[f"{name}.weight_check"]):
        sums = torch.stack((state[key].double().sum(), state[key].double().abs().sum()))
        assert torch.allclose(sums, row, rtol=1e-6)
    counts = [sum(v.numel() for v in net.parameters())]
    counts += [int(model.view_macs((3, side, side))) for side in (95, 224)]
    assert counts == file[f"{name}.params_macs95_macs224"].tolist()
    if "images_u8" not in file:
        return
    images = normalised(file["images_u8"])
    with torch.inference_mode():
        assert close(model(resized_view(images, 95)), file[f"{name}.logits_resized"], 1e-4)
        crop = model.view_logits(images[..., 16:111, 40:135])
    assert close(crop, file[f"{name}.logits_crop"], 1e-4)


def test_networks_of_timm_take_the_place_of_torchvision_s() -> None:
    pytest.importorskip("timm", reason="a network of timm is built: pip install timm")
    ours = recipe_network("resnet18", 31, 0.1)
    backbone = dict(type="TimmBackbone", model_name="resnet18", num_classes=1000)
    other = MODELS.build(dict(type="AnchorNetViewClassifier", backbone=backbone)).eval()
    other.backbone.model.load_state_dict(ours.backbone.model.state_dict())
    images = torch.randn(2, 3, 95, 95, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert close(other(images), ours(images), 1e-5)
    assert other.view_macs((3, 95, 95)) == ours.view_macs((3, 95, 95)) == 333_615_104


def test_losses_and_five_crops_on_logits() -> None:
    file = golden("downstream_train")
    head = HEADS.build(dict(type="AnchorNetLogitsHead"))
    logits = file["a.patch_logits"].clone().requires_grad_()
    targets = file["a.target"].repeat_interleave(4)
    assert torch.equal(targets, file["a.patch_targets"])
    loss = head.loss(TokenFeatures(logits.unsqueeze(1), (1, 1), 0), targets)["loss_cls"]
    loss.backward()
    assert close(loss, file["a.loss"], 1e-5)
    assert close(logits.grad, file["a.grad_patch_logits"], 1e-5)
    mean = file["a.fivecrop_logits"].unflatten(0, (5, 5)).mean(1)
    assert close(mean, file["a.fivecrop_avg"], 1e-5)
    again = head.loss(TokenFeatures(mean.unsqueeze(1), (1, 1), 0), file["a.target"])["loss_cls"]
    assert close(again, file["a.fivecrop_loss"], 1e-5)
    best = mean.topk(5).indices == file["a.target"][:, None]
    hits = [best[:, 0].sum().item(), best.any(1).sum().item()]
    assert hits == file["a.fivecrop_top1_top5"].tolist()
    expected = [[y, x, y + 94, x + 94] for y, x in five_crop_origins(224, 224, 95)]
    assert expected == file["fivecrop_boxes_224_95"].tolist()


class Given(nn.Module):
    """A localiser whose windows are known."""

    def __init__(self, cells: Tensor) -> None:
        super().__init__()
        self.inner = localiser(8)
        self.backbone, self.cells, self.macs = self.inner.backbone, cells, self.inner.macs

    def localise(self, images: Tensor) -> Any:
        found = self.inner.localise(images)
        found.cells = self.cells
        return found


def patch_model(cells: Tensor, **kwargs: Any) -> Any:
    """A patch-stage model of ResNet-18 with given windows."""
    anchor = dict(
        type="AnchorNetClassifier",
        backbone=dict(type="AnchorNetBackbone"),
        head=dict(type="AnchorNetCAMHead", num_classes=8),
    )
    backbone = dict(type="TorchvisionBackbone", model_name="resnet18", num_classes=1000)
    model = MODELS.build(
        dict(type="AnchorNetPatchClassifier", anchor=anchor, backbone=backbone, **kwargs)
    )
    model.anchor = Given(cells).eval()
    return model


def test_both_downstream_stages_train_as_published() -> None:
    file = golden("downstream_train", "b.images_u8")
    images, batch = normalised(file["b.images_u8"]), samples(file["b.target"])
    boxes = file["b.boxes"]
    cells = (boxes[..., 0] // 8 * 17 + boxes[..., 1] // 8).long()
    start = recipe_network("resnet18", 21, 0.1).state_dict()
    backbone = dict(type="TorchvisionBackbone", model_name="resnet18", num_classes=1000)
    resized = MODELS.build(dict(type="AnchorNetResizedClassifier", backbone=backbone))
    for stage, model in (("patch", patch_model(cells)), ("resized", resized)):
        model.load_state_dict(start, strict=False)
        model.train()
        optimiser = torch.optim.SGD(
            model.backbone.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4
        )
        loss = model(images, batch, mode="loss")["loss_cls"]
        assert close(loss, file[f"b.{stage}.loss0"], 1e-3)
        loss.backward()
        net = model.backbone.model
        grads = {name: value.grad for name, value in net.named_parameters()}
        for key in [key for key in file if key.startswith(f"b.{stage}.grad.")]:
            # Noise up to 4e-3: BatchNorm over few samples, and kinks of the ReLU.
            assert close(grads[key.split(".grad.")[1]], file[key], 2e-2), key
        optimiser.step()
        optimiser.zero_grad()
        loss = model(images, batch, mode="loss")["loss_cls"]
        assert close(loss, file[f"b.{stage}.loss1"], 1e-3)
        loss.backward()
        optimiser.step()
        after = net.state_dict()
        for key in [key for key in file if key.startswith(f"b.{stage}.after.")]:
            assert close(after[key.split(".after.")[1]], file[key], 1e-2), key
        model.load_state_dict(start, strict=False)
        if stage == "patch":
            rows = torch.arange(3).repeat_interleave(4)
            views = crop_windows(images, rows, cells.flatten(), model.anchor.backbone.window)
        else:
            views = resized_view(images, 95)
        assert close(model.view_logits(views), file[f"b.{stage}.logits0"], 1e-3)
    model = patch_model(cells)
    model.load_state_dict(start, strict=False)
    with torch.inference_mode():
        mean = model.eval()(images)
    assert close(mean, file["b.fivecrop_eval_avg_logits"], 1e-4)


def test_windows_that_are_missing_count_neither_in_the_loss_nor_in_the_mean() -> None:
    images = torch.randn(2, 3, 127, 127, generator=torch.Generator().manual_seed(4))
    labels = torch.tensor([3, 5])
    short = patch_model(torch.tensor([[6, 1], [3, -1]]), evaluation="localised").eval()
    window = short.anchor.backbone.window
    crops = crop_windows(images, torch.tensor([0, 0, 1]), torch.tensor([6, 1, 3]), window)
    with torch.inference_mode():
        logits = short.view_logits(crops)
        loss = short(images, samples(labels), mode="loss")["loss_cls"]
        mean = short(images)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 3, 5]))
    assert close(loss, expected, 1e-5)
    assert close(mean, torch.stack((logits[:2].mean(0), logits[2])), 1e-5)
    selection = short.select(images)
    per_view = short.view_macs((3, 95, 95))
    assert (selection.macs[0] - selection.macs[1]).item() == per_view
    assert selection.order.tolist() == [[6, 1], [3, -1]]


def test_the_localiser_is_frozen_and_not_saved() -> None:
    model = patch_model(torch.tensor([[0, 24], [5, 6]]))
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    model.anchor = MODELS.build(
        dict(
            type="AnchorNetClassifier",
            backbone=dict(type="AnchorNetBackbone"),
            head=dict(type="AnchorNetCAMHead", num_classes=8),
        )
    )
    model.train()
    assert not model.anchor.training
    assert not any(key.startswith("anchor.") for key in model.state_dict())
    assert any(name.startswith("backbone.") for name in trainable)
    five = five_crops(torch.arange(2 * 3 * 100 * 97).float().view(2, 3, 100, 97), 95)
    assert five.shape == (10, 3, 95, 95)
    assert five[1, 0, 0, 0] == 2
    with pytest.raises(ConfigError, match="'central' is unknown"):
        patch_model(torch.zeros(1, 1), evaluation="central")
