"""PatchDrop against reference numbers recorded with the official code; tolerances of its README."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_reader import folder, load
from mmengine.registry import init_default_scope
from patchdrop_helpers import (
    feed_draws,
    hash_image,
    hash_u,
    hash_weights,
    labelled,
    load_official,
    patchdrop,
    policy,
    wide,
)
from safetensors import safe_open
from torch import Tensor

from patchreg.methods.patchdrop.convert import from_official, to_official
from patchreg.methods.patchdrop.hook import active_patches
from patchreg.methods.patchdrop.mask import mask_patches
from patchreg.methods.patchdrop.metric import performance_stats
from patchreg.methods.patchdrop.selector import bounded_probability, log_probability
from patchreg.models.backbones.cifar_resnet import ZeroPadShortcut
from patchreg.registry import MODELS
from patchreg.utils.random import batch_random

METHOD = "patchdrop"


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("patchreg")


def part(file: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors below `prefix.`, named without it."""
    start = prefix + "."
    return {name[len(start) :]: file[name] for name in file if name.startswith(start)}


def metadata(name: str) -> dict[str, str]:
    with safe_open(folder(METHOD) / f"{name}.safetensors", framework="pt") as file:
        return file.metadata() or {}


def close(found: Tensor, expected: Tensor, relative: float, absolute: float = 0.0) -> None:
    """Largest difference within absolute + relative * largest expected value."""
    assert found.shape == expected.shape
    found, expected = found.detach().double(), expected.double()
    bound = absolute + relative * expected.abs().max().item()
    assert (found - expected).abs().max().item() <= bound


def view(images: Tensor, size: int, enlarge_to: int | None = None) -> Tensor:
    module = MODELS.build(
        dict(type="LowResolutionViewPreprocessor", size=size, enlarge_to=enlarge_to)
    )
    return module(images)


def test_low_resolution_view() -> None:
    file = load(METHOD, "01_lr_view")
    for name in file:
        if name.startswith("lr_32_to_"):
            assert torch.equal(view(file["image32"], int(name.split("_")[-1])), file[name])
        elif name == "lr_then_back_32":
            assert torch.equal(view(file["image32"], 8, 32), file[name])
        elif name.startswith("index_"):
            _, source, _, target = name.split("_")
            ramp = torch.arange(float(source)).view(1, 1, 1, -1).expand(1, 1, int(source), -1)
            if int(target) > int(source):
                found = view(ramp, int(source), int(target))
            else:
                found = view(ramp, int(target))
            assert torch.equal(found[0, 0, 0].long(), file[name])


def test_masking() -> None:
    file = load(METHOD, "02_masking")
    for dtype in (torch.float32, torch.float64):
        found = mask_patches(file["image"].to(dtype), file["policy"])
        assert torch.equal(found, file["masked"].to(dtype))
    for name, step in (("mappings_32", 8), ("mappings_224", 56)):
        for index, (row, column) in enumerate((file[name] // step).tolist()):
            assert index == 4 * row + column
    large = mask_patches(hash_image("mask224", (2, 3, 224, 224)), file["policy224"])
    rows = large[:, :, [0, 55, 56, 111, 168, 223]][:, :, :, ::7]
    close(rows, file["masked224_rows"], 0, 1e-7)
    close(F.avg_pool2d(large, 56), file["masked224_patch_mean"], 0, 1e-6)


def test_a_grid_that_does_not_cover_the_image_drops_the_rest() -> None:
    file = load(METHOD, "02_masking")
    images = F.pad(file["image"], (0, 3, 0, 5), value=1.0)
    found = mask_patches(images, file["policy"], (4, 4), patch_size=8)
    assert torch.equal(found[:, :, :32, :32], file["masked"])
    assert found[:, :, 32:].abs().sum() == found[..., 32:].abs().sum() == 0


def small_model(file: Mapping[str, Tensor]) -> torch.nn.Module:
    model = MODELS.build(wide(8))
    load_official(model, part(file, "state"))
    return model


def test_small_network_forward_and_backward() -> None:
    file = load(METHOD, "03_cifar_resnet_small")
    assert torch.equal(view(file["image_hr"], 8), file["image_lr"])
    target = file["target"]
    loss = F.cross_entropy(file["logits_train_hr"], target)
    close(loss, file["ce_train_hr"], 1e-5)
    if not part(file, "state"):
        return
    for size in ("hr", "lr"):
        model = small_model(file).eval()
        close(model(file[f"image_{size}"]), file[f"logits_eval_{size}"], 1e-5, 1e-6)
    close(small_model(file).train()(file["image_lr"]), file["logits_train_lr"], 1e-5, 1e-6)
    model = small_model(file).train()
    image = file["image_hr"].requires_grad_()
    logits = model(image)
    close(logits, file["logits_train_hr"], 1e-5, 1e-6)
    F.cross_entropy(logits, target).backward()
    close(image.grad, file["grad_image"], 2e-4, 1e-6)
    check_gradients(model, part(file, "grad"), 1e-6)
    after = to_official(model.state_dict())
    for key, expected in part(file, "after").items():
        close(after[key], expected, 0, 1e-6)


def check_gradients(
    model: torch.nn.Module, expected: dict[str, Tensor], absolute: float, is_policy: bool = False
) -> None:
    dummy = {"conv1.weight": torch.zeros(1, 3, 3, 3)}
    ours = from_official({**dummy, **expected}, "golden", policy=is_policy)
    if "conv1.weight" not in expected:
        del ours["backbone.conv1.weight"]
    for name, value in ours.items():
        close(model.get_parameter(name).grad, value, 2e-4, absolute)


FULL = {
    "R32_C10.hr": (wide(64, (3, 4, 6, 3)), 218, 21_282_122),
    "R32_C10.lr": (wide(64, (3, 4, 6, 3)), 218, 21_282_122),
    "R32_C100.hr": (wide(64, (3, 4, 6, 3), 100), 218, 21_328_292),
    "R32_C10.agent": (policy(64), 74, 4_906_320),
}
INPUTS = {
    "hr": ("in32", (2, 3, 32, 32)),
    "lr": ("in8", (2, 3, 8, 8)),
    "agent": ("in8", (2, 3, 8, 8)),
}


def large(depth: int, classes: int, channels: int) -> dict:
    return dict(
        type="PatchClassifier",
        backbone=dict(type="TorchvisionBackbone", model_name=f"resnet{depth}", output="tokens"),
        head=dict(
            type="LinearHead",
            num_classes=classes,
            in_channels=channels,
            pool="mean",
            init="torch",
        ),
    )


def large_policy() -> dict:
    return dict(
        type="PatchDropSelector",
        backbone=dict(type="TorchvisionBackbone", model_name="resnet18", output="tokens"),
        in_channels=512,
    )


FULL |= {
    "in.agent18": (large_policy(), 122, 11_184_720),
    "in.fmow34.hr": (large(34, 62, 512), 218, 21_316_478),
    "in.fmow34.lr": (large(34, 62, 512), 218, 21_316_478),
    "in.imagenet50.hr": (large(50, 1000, 2048), 320, 25_557_032),
}


@pytest.mark.parametrize("tag", FULL)
def test_networks_of_the_official_factory(tag: str) -> None:
    file = load(METHOD, "04_full_models")
    close(torch.tensor(hash_u("check", 8)), file["hash_check"], 1e-7)
    config, entries, parameters = FULL[tag]
    model = MODELS.build(config).eval()
    assert sum(value.numel() for value in model.parameters()) == parameters
    state = to_official(model.state_dict())
    assert len(state) == entries
    is_policy = "agent" in tag
    load_official(model, hash_weights(tag, state), is_policy)
    size = tag.split(".")[-1]
    name, shape = INPUTS.get(size, ("in56", (2, 3, 56, 56)))
    if tag.startswith("in."):
        name, shape = ("in224", (1, 3, 224, 224)) if size == "hr" else ("in56", (2, 3, 56, 56))
    with torch.no_grad():
        found = model(hash_image(name, shape))
    close(found[0] if is_policy else found, file[f"{tag}.logits"], 2e-5)


def test_policy_probabilities_actions_and_gradients() -> None:
    file = load(METHOD, "05_policy")
    selector = MODELS.build(policy())
    logits = file["logits"].requires_grad_()
    close(logits.sigmoid(), file["probs"], 0, 1e-6)
    assert torch.equal(selector.decide(logits.sigmoid()).float(), file["policy_test"])
    for alpha in file["alphas"].tolist():
        name = f"a{alpha:.4g}"
        name = name if f"{name}.bounded" in file else f"a{round(alpha, 4)}"
        bounded = bounded_probability(logits.sigmoid(), round(alpha, 4))
        close(bounded, file[f"{name}.bounded"], 0, 1e-6)
        sampled = selector.sample(bounded, file["u"])
        assert torch.equal(sampled, file[f"{name}.policy_sample"])
        assert torch.equal(selector.greedy(bounded), file[f"{name}.policy_map"])
        log_prob = log_probability(sampled, bounded)
        close(log_prob, file[f"{name}.log_prob"], 0, 1e-5)
        (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
        close(gradient, file[f"{name}.grad_sum_log_prob"], 0, 1e-5)


def policy_loss(**kwargs: Any) -> Any:
    return MODELS.build(dict(type="PatchDropPolicyLoss", **kwargs))


def test_reward() -> None:
    file = load(METHOD, "06_reward")
    for name in file:
        if name.startswith("reward_pen"):
            loss = policy_loss(penalty=float(name.removeprefix("reward_pen")))
            reward, right = loss.reward(file["preds"], file["target"], file["policy"])
            close(reward, file[name], 0, 1e-6)
            assert torch.equal(right.float(), file["match"])


@pytest.mark.parametrize("mode", ["pretrain", "finetune", "twostream"])
def test_losses_and_gradients(mode: str) -> None:
    file = load(METHOD, "07_losses")
    alpha = round(file["alpha"].item(), 4)
    selector = MODELS.build(policy(alpha=alpha))
    prefixes = sorted({name.rsplit(".", 1)[0] for name in file if name.startswith(mode + ".")})
    assert prefixes
    for prefix in prefixes:
        logits = file["logits"].requires_grad_()
        preds = file["preds_sample"].requires_grad_()
        extra = file["preds_lr"] if mode == "twostream" else 0.0
        reduction = "patch_mean" if mode == "pretrain" else "patch_sum"
        loss = policy_loss(penalty=float(prefix.split("pen")[1]), reduction=reduction)
        bounded = bounded_probability(logits.sigmoid(), alpha)
        sampled, greedy = selector.sample(bounded, file["u"]), selector.greedy(bounded)
        assert torch.equal(sampled, file[f"{prefix}.policy_sample"])
        assert torch.equal(greedy, file[f"{prefix}.policy_map"])
        target = file["target"]
        reward, _ = loss.reward(preds + extra, target, sampled)
        baseline, right = loss.reward(file["preds_map"] + extra, target, greedy)
        assert torch.equal(right.float(), file[f"{prefix}.match"])
        policy_term = loss(log_probability(sampled, bounded), reward - baseline)
        entropy = torch.zeros(()) if mode == "pretrain" else F.cross_entropy(preds + extra, target)
        found = {
            "reward_sample": reward,
            "reward_map": baseline,
            "advantage": reward - baseline,
            "loss_pg": policy_term,
            "loss_ce": entropy,
            "loss": policy_term + entropy,
        }
        for name, value in found.items():
            close(value, file[f"{prefix}.{name}"], 2e-6, 1e-6)
        found["loss"].backward()
        close(logits.grad, file[f"{prefix}.grad_logits"], 2e-6, 1e-6)
        if mode != "pretrain":
            close(preds.grad, file[f"{prefix}.grad_preds_sample"], 2e-6, 1e-6)


RUNS = {
    "08_run_pretrain": ("pretrain", 1e-3, -0.5, 3),
    "09_run_finetune": ("finetune", 1e-4, -10.0, 2),
    "10_run_twostream": ("twostream", 1e-4, -10.0, 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_recorded_steps_follow_the_formulas(name: str) -> None:
    """Rewards and losses from the recorded logits and draws, without a network."""
    file = load(METHOD, name)
    stage, _, penalty, _ = RUNS[name]
    loss = policy_loss(
        penalty=penalty, reduction="patch_mean" if stage == "pretrain" else "patch_sum"
    )
    steps = len(part(file, "step0") and {key.split(".")[0] for key in file if ".loss" in key})
    for index in range(steps):
        step = part(file, f"step{index}")
        target = file["train_targets"].view(-1, 8)[index % (len(file["train_targets"]) // 8)]
        sampled = (step["u"] < step["probs"]).float()
        greedy = (step["probs"] >= 0.5).float()
        assert torch.equal(sampled, step["policy_sample"])
        assert torch.equal(greedy, step["policy_map"])
        reward, _ = loss.reward(step["preds_sample"], target, sampled)
        baseline, right = loss.reward(step["preds_map"], target, greedy)
        close(reward, step["reward_sample"], 1e-4)
        close(baseline, step["reward_map"], 1e-4)
        assert torch.equal(right.float(), step["match"])
        total = loss(log_probability(sampled, step["probs"]), reward - baseline)
        if stage != "pretrain":
            total = total + F.cross_entropy(step["preds_sample"], target)
        close(total, step["loss"], 1e-4, 1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_complete_runs(name: str) -> None:
    """Every step and every evaluation of the official scripts; as many as the set in use holds."""
    file = load(METHOD, name)
    if "train_images" not in file:
        return
    stage, rate, penalty, per_epoch = RUNS[name]
    model = patchdrop(stage, penalty=penalty)
    load_official(model.classifier, part(file, "init.hr"))
    load_official(model.selector, part(file, "init.agent"), True)
    if stage == "twostream":
        load_official(model.lr_classifier, part(file, "init.lr"))
    frozen = [
        (value, value.clone())
        for part_ in model.frozen_parts()
        for value in part_.state_dict().values()
    ]
    trained = [value for value in model.parameters() if value.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=rate)
    images, targets = file["train_images"], file["train_targets"]
    steps = 2 * per_epoch if len(images) == 8 * per_epoch else len(images) // 8
    feed_draws(model, [file[f"step{index}.u"] for index in range(steps)])
    train_stats: list[dict[str, float]] = []
    tests: list[dict[str, float]] = []
    gathered: list[Any] = []
    for index in range(steps):
        model.train()
        rows = slice(8 * (index % per_epoch), 8 * (index % per_epoch) + 8)
        losses = model.loss(images[rows], labelled(targets[rows]))
        total = sum(value for key, value in losses.items() if "loss" in key)
        step, found = part(file, f"step{index}"), model.last_step
        close(total, step["loss"], 1e-4, 1e-4)
        close(found.probability, step["probs"], 1e-4, 1e-4)
        assert torch.equal(found.sampled, step["policy_sample"])
        assert torch.equal(found.greedy, step["policy_map"])
        assert torch.equal(found.greedy_right.float(), step["match"])
        pairs = {
            "preds_map": found.greedy_logits,
            "preds_sample": found.sampled_logits,
            "reward_map": found.greedy_reward,
            "reward_sample": found.sampled_reward,
        }
        for key, value in pairs.items():
            close(value, step[key], 1e-4, 1e-4)
        optimiser.zero_grad()
        total.backward()
        if index == 0:
            check_gradients(model.selector, part(file, "step0.grad.agent"), 1e-7, True)
            check_gradients(model.classifier, part(file, "step0.grad.hr"), 1e-7)
        optimiser.step()
        gathered.append((found.sampled, found.sampled_reward, found.greedy_right))
        if (index + 1) % per_epoch == 0:
            train_stats.append(
                performance_stats(*(torch.cat(x) for x in zip(*gathered, strict=True)))
            )
            gathered = []
            if "test_images" in file:
                tests.append(evaluate(model, file, len(tests)))
    for value, before in frozen:
        assert torch.equal(value, before)
    check_final(model, file)
    check_log(name, train_stats, tests)


def evaluate(model: Any, file: Mapping[str, Tensor], epoch: int) -> dict[str, float]:
    """One evaluation of a run, against the record."""
    model.eval()
    images, targets = file["test_images"].split(8), file["test_targets"].split(8)
    seen = []
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        expected = part(file, f"test{epoch * len(images) + index}")
        with torch.no_grad():
            out = model.run(image)
        assert torch.equal(out.actions.float(), expected["policy"])
        close(out.probability, expected["probs"], 1e-4, 1e-4)
        close(out.logits, expected["preds"], 1e-4, 1e-4)
        reward, right = model.policy_loss.reward(out.logits, target, out.actions.float())
        close(reward, expected["reward"], 1e-4)
        assert torch.equal(right.float(), expected["match"])
        seen.append((out.actions, reward, right))
    return performance_stats(*(torch.cat(x) for x in zip(*seen, strict=True)))


def check_final(model: Any, file: Mapping[str, Tensor]) -> None:
    """Weights and BatchNorm buffers after the last step."""
    parts = {"agent": getattr(model, "selector", None), "hr": getattr(model, "classifier", model)}
    for name, ours in parts.items():
        for key, expected in part(file, f"final.{name}").items():
            close(to_official(ours.state_dict())[key], expected, 0, 5e-4)


TAGS = {
    "accuracy": "accuracy",
    "reward": "reward",
    "sparsity": "kept_patches_mean",
    "variance": "kept_patches_std",
    "unique_policies": "unique_policies",
}


def check_log(name: str, train: list[dict[str, float]], test: list[dict[str, float]]) -> None:
    """The scalars that the official scripts logged, from our statistics."""
    logged = json.loads(metadata(name).get("log", "[]"))
    seen = {"train": train, "test": test}
    for tag, value, epoch in logged:
        kind, what = tag.split("_", 1)
        if what in TAGS and epoch < len(seen[kind]):
            assert abs(seen[kind][epoch][TAGS[what]] - value) <= 1e-4


def test_stage_zero_runs() -> None:
    options = {
        "11_run_classifier_sgd": lambda p: torch.optim.SGD(
            p, lr=0.01, momentum=0.9, weight_decay=5e-4
        ),
        "11b_run_classifier_adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    }
    for name, make in options.items():
        file = load(METHOD, name)
        target = file["train_targets"].view(-1, 8)
        epochs = 2 if name.startswith("11_") else 3
        for index in range(epochs * len(target)):
            if f"step{index}.preds" in file:
                loss = F.cross_entropy(file[f"step{index}.preds"], target[index % len(target)])
                close(loss, file[f"step{index}.loss"], 1e-5, 1e-6)
        if "train_images" in file:
            replay_classifier(file, make, epochs)


def replay_classifier(file: Mapping[str, Tensor], make: Any, epochs: int) -> None:
    """The scripts of stage 0: the schedule steps after the test of an epoch."""
    model = MODELS.build(wide(4))
    load_official(model, part(file, "init.hr"))
    optimiser = make(model.parameters())
    milestones = [150, 250] if isinstance(optimiser, torch.optim.SGD) else [2]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, 0.1)
    images, targets = file["train_images"].split(8), file["train_targets"].split(8)
    whole, tested = len(images) == len(targets), 0
    for index in range(epochs * len(images) if whole else len(images)):
        model.train()
        logits = model(view(images[index % len(images)], 32))
        loss = model.head.loss_module(logits, targets[index % len(images)])
        close(logits, file[f"step{index}.preds"], 1e-4, 1e-4)
        close(loss, file[f"step{index}.loss"], 1e-5, 1e-5)
        optimiser.zero_grad()
        loss.backward()
        if index == 0:
            check_gradients(model, part(file, "step0.grad.hr"), 1e-7)
        optimiser.step()
        if (index + 1) % len(images) == 0 and "test_images" in file:
            model.eval()
            rows = zip(file["test_images"].split(8), file["test_targets"].split(8), strict=True)
            for image, target in rows:
                with torch.no_grad():
                    found = model(view(image, 32))
                close(found, file[f"test{tested}.preds"], 1e-4, 1e-4)
                assert torch.equal(found.argmax(1) == target, file[f"test{tested}.match"].bool())
                tested += 1
            schedule.step()
    check_final(model, file)


@pytest.mark.parametrize(
    ("name", "rate", "milestones"),
    [
        ("cifar_sgd_lr", 0.1, [150, 250]),
        ("other_adam_lr", 1e-3, [10000]),
        ("other_adam_lr_step40", 1e-3, [40]),
    ],
)
def test_schedules(name: str, rate: float, milestones: list[int]) -> None:
    from mmengine.optim.scheduler import MultiStepLR

    expected = load(METHOD, "11c_schedules")[name].double()
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    schedule = MultiStepLR(optimiser, milestones=milestones, gamma=0.1)
    found = []
    for _ in expected:
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    close(torch.tensor(found, dtype=torch.float64), expected, 0, 1e-8)


def test_performance_stats() -> None:
    file = load(METHOD, "12_performance_stats")
    names = ("policies", "rewards", "matches")
    gathered = [torch.cat([file[f"{name}{i}"] for i in range(3)]) for name in names]
    found = performance_stats(*gathered)
    pairs = {
        "accuracy": "accuracy",
        "reward": "reward",
        "kept_patches_mean": "patches_mean",
        "kept_patches_std": "patches_std",
    }
    for ours, theirs in pairs.items():
        assert abs(found[ours] - file[theirs].item()) <= 1e-6
    assert found["unique_policies"] == file["unique"].item()
    alone = performance_stats(torch.ones(1, 16), torch.zeros(1), torch.ones(1))
    assert alone["kept_patches_std"] == 0


NORMS = {
    "cifar": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "ImgNet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "fMoW": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}


def normalise(image: Tensor, kind: str) -> Tensor:
    mean, std = NORMS[kind]
    module = MODELS.build(dict(type="ImagePreprocessor", mean=mean, std=std))
    return module(dict(inputs=image.permute(2, 0, 1)[None]))["inputs"][0]


def prepared(image: Tensor, steps: list[dict]) -> Tensor:
    """An image through transforms of a test pipeline."""
    import numpy as np
    from mmengine.dataset import Compose

    init_default_scope("patchreg")
    found = Compose(steps)(dict(img=image.numpy(), img_shape=tuple(image.shape[:2])))["img"]
    return torch.from_numpy(np.ascontiguousarray(found))


def resize(size: int) -> dict:
    return dict(
        type="mmpretrain.ResizeEdge",
        scale=size,
        edge="short",
        backend="pillow",
        interpolation="bilinear",
    )


def test_transforms() -> None:
    file = load(METHOD, "13_transforms")
    names = sorted({name.split(".")[0] for name in file})
    for name in names:
        kind = name.rstrip("0123456789")
        row = part(file, name)
        image, (top, left) = row["image_u8"], row["crop_ij"].tolist()
        flip = row["flip_u"].item() < 0.5 and kind != "fMoW"
        if kind == "cifar":
            test = image
            train = F.pad(image.permute(2, 0, 1), (4, 4, 4, 4)).permute(1, 2, 0)
            train = train[top : top + 32, left : left + 32]
        else:
            step = resize(256 if kind == "ImgNet" else 224)
            resized = prepared(image, [step])
            assert list(resized.shape[:2]) == row["resized_hw"].tolist()
            test = prepared(image, [step, dict(type="mmpretrain.CenterCrop", crop_size=224)])
            train = resized[top : top + 224, left : left + 224]
        train = train.flip(1) if flip else train
        for stage, found in (("test", test), ("train", train)):
            check_pixels(normalise(found, kind), row, stage)


def check_pixels(found: Tensor, row: dict[str, Tensor], stage: str) -> None:
    if stage in row:
        close(found, row[stage], 0, 1e-6)
        return
    close(found[:, ::5, ::5], row[f"{stage}_sub5"], 0, 0.02)
    close(F.avg_pool2d(found, 16), row[f"{stage}_block16"], 0, 2e-3)


def test_curriculum_reward_and_fusion_of_the_first_version() -> None:
    file = load(METHOD, "15_legacy")
    close(ZeroPadShortcut()(file["ds_in"]), file["ds_out"], 0, 1e-6)
    model = patchdrop("twostream", fusion="weighted")
    found = model.fuse(file["ws_hr"], file["ws_lr"], file["ws_policy_map"])
    close(found, file["ws_combined"], 0, 1e-6)
    loss = policy_loss(form="legacy")
    reward, _ = loss.reward(file["old_preds"], file["old_target"], file["old_policy"])
    close(reward, file["old_reward"], 0, 1e-6)
    epochs = {name.split(".")[0] for name in file if name.startswith("cur_epoch")}
    for name in sorted(epochs):
        model.active = active_patches(int(name.removeprefix("cur_epoch")), 16)
        forced = model.force_inactive(file["cur_policy"])
        assert torch.equal(forced, file[f"{name}.policy"])
        mask = torch.ones(16) if model.active is None else model.active
        assert torch.equal(mask.expand(2, -1), file[f"{name}.loss_mask"])


def thin_policy() -> dict:
    return dict(
        type="PatchDropSelector",
        backbone=dict(type="ThinCIFARResNetBackbone", depth=8),
        in_channels=64,
        value_outputs=16,
    )


def test_networks_of_the_first_version() -> None:
    file = load(METHOD, "15_legacy")
    classifier = dict(
        type="PatchClassifier",
        backbone=dict(type="ThinCIFARResNetBackbone", depth=32),
        head=dict(type="LinearHead", num_classes=10, in_channels=64, pool="mean", init="torch"),
    )
    model = MODELS.build(classifier).eval()
    state = to_official(model.state_dict())
    assert len(state) == 188
    assert sum(value.numel() for value in model.parameters()) == 464_154
    load_official(model, hash_weights("legacy32", state))
    with torch.no_grad():
        close(model(hash_image("in32", (2, 3, 32, 32))), file["flat32_logits"], 2e-5)
    large_policy = dict(
        type="PatchDropSelector",
        backbone=dict(type="PatchDropResNet10Backbone"),
        in_channels=512,
        value_outputs=1,
    )
    selector = MODELS.build(large_policy).eval()
    assert sum(value.numel() for value in selector.parameters()) == 4_914_513
    state = to_official(selector.state_dict())
    load_official(selector, hash_weights("legacy224", state), True)
    image = hash_image("in224", (1, 3, 224, 224))
    with torch.no_grad():
        close(selector(image)[0].sigmoid(), file["policy224_probs"], 2e-5)
        close(selector.values(image), file["policy224_value"], 2e-5)
    assert selector.backbone.macs((3, 224, 224)) + 17 * 512 == 235_950_592
    stored = part(file, "policy32")
    if not stored:
        return
    assert torch.equal(view(file["image"], 8, 32), file["agent_view"])
    selector = MODELS.build(thin_policy()).eval()
    assert sum(value.numel() for value in selector.parameters()) == 76_720
    load_official(selector, stored, True)
    with torch.no_grad():
        close(selector(file["agent_view"])[0].sigmoid(), file["policy32_probs"], 0, 1e-5)
        close(selector.values(file["agent_view"]), file["policy32_value"], 0, 1e-5)
        train = selector.train()(file["agent_view"])[0].sigmoid()
    close(train, file["policy32_probs_train"], 0, 1e-5)


MACS = {
    "R32_C10.hr": (32, 1_159_402_496),
    "R32_C100.hr": (32, 1_159_448_576),
    "R32_C10.lr": (8, 72_467_456),
    "R32_C10.agent": (8, 15_847_424),
    "in.fmow34.hr": (224, 3_663_281_152),
    "in.fmow34.lr": (56, 266_831_872),
    "in.imagenet50.hr": (224, 4_089_184_256),
    "in.agent18": (56, 129_084_416),
}


@pytest.mark.parametrize("tag", MACS)
def test_multiply_accumulates_of_the_table(tag: str) -> None:
    size, expected = MACS[tag]
    model = MODELS.build(FULL[tag][0])
    last = model.logit if "agent" in tag else model.head.head
    found = model.backbone.macs((3, size, size)) + last.weight.numel()
    assert found == expected


def test_multiply_accumulates_of_the_first_version() -> None:
    def macs(depth: int) -> float:
        return MODELS.build(dict(type="ThinCIFARResNetBackbone", depth=depth)).macs((3, 32, 32))

    assert macs(32) + 640 == 68_862_592
    # The value head counts as well, as large as the last layer.
    assert macs(8) + 2 * 1024 == 12_240_896


def test_draws_come_from_the_step() -> None:
    model = patchdrop()
    images = torch.zeros(4, 3, 32, 32)
    batch_random.begin(seed=3, step=7)
    first = model.selector.draws(images, torch.float32)
    batch_random.begin(seed=3, step=7)
    assert torch.equal(first, model.selector.draws(images, torch.float32))
    assert first.shape == (4, 16)
