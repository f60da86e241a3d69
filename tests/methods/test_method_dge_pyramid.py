"""The pyramid models: parity with the authors' code, and what it leaves open."""

from __future__ import annotations

from math import cos, pi, sin
from typing import Any

import pytest
import torch
from dge_helpers import error, force_choice, samples, spread_routers, total
from golden_reader import load
from mmengine.config import Config
from patchreg_ops import row_lengths, row_plan
from torch import nn

from patchreg.methods.dge.convert import convert, from_official, to_official
from patchreg.methods.dge.cost import BlockRouting, Routing
from patchreg.methods.dge.loss import DGEBudgetLoss
from patchreg.methods.dge.model import spread_regions
from patchreg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from patchreg.utils.errors import CheckpointError, ConfigError, DataError
from patchreg.utils.random import batch_random

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)
SPLITS = (4, 2, 1)
KINDS = {
    "pvt": "PyramidVisionTransformerBackbone",
    "dge": "DGEPyramidVisionTransformerBackbone",
    "dpvt": "DGEDeformablePyramidBackbone",
}


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """Tolerance of outputs and of gradients."""
    return (1e-9, 1e-9) if dtype == torch.float64 else (1e-5, 1e-4)


def pyramid(
    kind: str, depths: tuple[int, ...] = (1, 1, 2, 1), size: int = 128, **kwargs: Any
) -> nn.Module:
    """A small classifier with the sizes of the golden files; `model_` arguments go to it."""
    model = {key[6:]: kwargs.pop(key) for key in list(kwargs) if key.startswith("model_")}
    arch = dict(
        depths=depths,
        embed_dims=(8, 16, 24, 32),
        num_heads=(1, 2, 3, 4),
        mlp_ratios=(2, 2, 2, 2),
        sr_ratios=(8, 4, 2, 1),
    )
    backbone = dict(type=KINDS[kind], arch=arch, img_size=size, **kwargs)
    pool = "cls" if kwargs.get("cls_token", kind != "dpvt") else "mean"
    cfg = dict(
        type="DGEClassifier" if kind == "dge" else "PatchClassifier",
        backbone=backbone,
        head=dict(type="LinearHead", num_classes=10, in_channels=32, pool=pool),
        **model,
    )
    if kind == "dge":
        cfg.setdefault("budget_loss", dict(type="DGEBudgetLoss", budget=0.5))
    return MODELS.build(cfg)


def lively(kind: str = "dge", **kwargs: Any) -> nn.Module:
    return spread_routers(pyramid(kind, **kwargs)).double()


def images(height: int = 128, width: int = 128, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def check_gradients(model: nn.Module, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    found = {name: value.grad for name, value in model.named_parameters()}
    assert set(found) == set(from_official(expected))
    for name, gradient in from_official(expected).items():
        assert error(found[name], gradient) < tolerance, name


# ---- parity ----


@DTYPES
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_golden_evaluation(dtype, path):
    golden, (outputs, _) = load("dge", "model_pvt_dge"), limits(dtype)
    model = pyramid("dge", eval_path=path, model_accounting="upstream").to(dtype).eval()
    model.load_state_dict(from_official(golden.group("sd")))
    with torch.no_grad():
        features = model.extract(golden["images"].to(dtype))
        assert error(model.head(features), golden["eval/logits"]) < outputs
    for index, record in enumerate(features.routing.blocks):
        check_block(golden, index, record, outputs, SPLITS, extra=int(index == 4))
    dynamic = features.routing.dynamic("upstream")
    executed, static = model.cost(features)
    assert [static, float(dynamic.mean())] == golden["eval/complexity"].tolist()
    assert torch.equal(executed, dynamic) == (path == "sparse")


def check_block(
    golden: Any,
    index: int,
    record: BlockRouting,
    tolerance: float,
    splits: tuple[int, ...],
    extra: int,
) -> None:
    name = f"eval/block{index}"
    assert error(record.logits, golden[f"{name}/router_logits"]) < tolerance
    plan = row_plan(record.choice, splits, *record.grid, extra)
    assert torch.equal(plan.rows, golden[f"{name}/patches"])
    assert torch.equal(plan.lengths, golden[f"{name}/batch_lengths"])
    assert torch.equal(record.queries, plan.lengths.double())


@DTYPES
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_golden_training(dtype, path):
    golden, (outputs, gradients) = load("dge", "model_pvt_dge"), limits(dtype)
    model = pyramid("dge", sparse_train=path == "sparse").to(dtype).train()
    model.load_state_dict(from_official(golden.group("sd")))
    batch, targets = golden["images"].to(dtype), samples(golden["targets"])
    noise = [golden[f"train/block{index}/gumbel"] for index in range(5)]
    features = model.extract(batch, noise)
    for index, record in enumerate(features.routing.blocks):
        soft = (record.logits + noise[index].to(dtype)).softmax(-1)
        assert torch.equal(record.choice, golden[f"train/block{index}/choice"])
        assert error(soft, golden[f"train/block{index}/soft"]) < outputs
    assert error(model.head(features), golden[f"train_{path}/logits"]) < outputs
    losses = model.loss(batch, targets, noise=noise)
    names = ("loss_cls", "loss_dge", "dge_ratio", "comp_static", "comp_dynamic")
    found = torch.stack([losses[name].double() for name in names])
    assert torch.allclose(found, golden[f"train_{path}/losses"], rtol=outputs, atol=0)
    total(losses).backward()
    check_gradients(model, golden.group(f"train_{path}/grad"), gradients)


@DTYPES
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_golden_feature_maps(dtype, path):
    golden, (outputs, _) = load("dge", "model_pvt_dge_features"), limits(dtype)
    arch = dict(
        depths=(1, 1, 1, 1),
        embed_dims=(8, 8, 16, 16),
        num_heads=(1, 1, 2, 2),
        mlp_ratios=(2, 2, 2, 2),
        sr_ratios=(8, 4, 2, 1),
    )
    backbone = dict(
        type=KINDS["dge"],
        arch=arch,
        img_size=64,
        splits=(2, 1),
        out_indices=(0, 1, 2, 3),
        eval_path=path,
    )
    model = MODELS.build(backbone).to(dtype).eval()
    model.load_state_dict(golden.group("sd"))
    with torch.no_grad():
        features = model(golden["images"].to(dtype))
    for number, found in enumerate(features.maps, start=2):
        assert error(found, golden[f"eval/res{number}"]) < outputs
    assert len(features.maps) == 4
    for index, record in enumerate(features.routing.blocks):
        check_block(golden, index, record, outputs, (2, 1), extra=int(index == 3))
    static = features.routing.static("upstream")
    mean = float(features.routing.dynamic("upstream").mean())
    assert [static, mean] == golden["eval/complexity"].tolist()


@DTYPES
@pytest.mark.parametrize("kind", ["pvt", "dpvt"])
def test_golden_models_without_routers(dtype, kind):
    outputs, gradients = limits(dtype)
    golden = load("dge", "model_standard" if kind == "pvt" else "model_dpvt")
    start = "pvt/" if kind == "pvt" else ""
    depths = (1, 1, 2, 1) if kind == "pvt" else (1, 1, 1, 1)
    model = pyramid(kind, depths, 64).to(dtype).eval()
    model.load_state_dict(from_official(golden.group(f"{start}sd")))
    batch = golden[f"{start}images"].to(dtype)
    with torch.no_grad():
        assert error(model(batch), golden[f"{start}eval/logits"]) < outputs
        other = model(golden[f"{start}images2"].to(dtype))
        assert error(other, golden[f"{start}eval/logits2"]) < outputs
        if kind == "dpvt":
            for index, tokens in enumerate(model.backbone(batch, out_blocks=range(4)).blocks):
                assert error(tokens, golden[f"eval/block{index}/tokens"]) < outputs
    losses = model.train().loss(batch, samples(golden[f"{start}targets"]))
    assert error(losses["loss_cls"], golden[f"{start}train/loss"]) < outputs
    losses["loss_cls"].backward()
    check_gradients(model, golden.group(f"{start}train/grad"), gradients)


@pytest.mark.parametrize(("case", "leaf"), [("wd_pvt_dge", "pvt_small"), ("wd_dpvt", "dpvt_small")])
def test_weight_decay_groups(case, leaf, project_root):
    expected = load("dge", "schedules").group(f"{case}/wd")
    cfg = Config.fromfile(str(project_root / f"configs/dge/{leaf}.py")).optim_wrapper
    cfg.type = "OptimWrapper"
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get(cfg.pop("constructor"))
    kind = "dge" if case == "wd_pvt_dge" else "dpvt"
    model = pyramid(kind, (1, 1, 1, 1), 64)
    wrapper = constructor(cfg, cfg.pop("paramwise_cfg"))(model)
    decay = {id(p): g["weight_decay"] for g in wrapper.param_groups for p in g["params"]}
    found = to_official({name: decay[id(value)] for name, value in model.named_parameters()})
    # The golden pyramid is a feature extractor, without final norm and head.
    tail = {"norm.weight": 0.0, "norm.bias": 0.0, "head.weight": 0.05, "head.bias": 0.0}
    wanted = {name: float(value) for name, value in expected.items()}
    assert found == pytest.approx(tail | wanted, rel=1e-7)


# ---- sizes and costs ----


def full_size(kind: str, arch: str, classes: int = 1000) -> nn.Module:
    width = 768 if arch == "huge_v2" else 512
    pool = "mean" if kind == "dpvt" else "cls"
    with torch.device("meta"):
        return MODELS.build(
            dict(
                type="DGEClassifier",
                backbone=dict(type=KINDS[kind], arch=arch, img_size=256),
                head=dict(type="LinearHead", num_classes=classes, in_channels=width, pool=pool),
            )
        )


@pytest.mark.parametrize(
    ("kind", "arch", "count"),
    [
        ("pvt", "tiny", 13_348_328),
        ("pvt", "small", 24_604_904),
        ("pvt", "medium", 44_327_144),
        ("pvt", "large", 61_488_360),
        ("pvt", "huge_v2", 305_172_072),
        ("dge", "tiny", 13_354_496),
        ("dge", "small", 24_617_432),
        ("dge", "medium", 44_351_228),
        ("dge", "large", 61_522_659),
        ("dpvt", "tiny", 10_077_032),
        ("dpvt", "small", 17_615_796),
        ("dpvt", "medium", 30_177_156),
        ("dpvt", "large", 40_797_888),
    ],
)
def test_parameter_counts(kind, arch, count):
    assert sum(value.numel() for value in full_size(kind, arch).parameters()) == count


def routing_of(model: nn.Module, choices: list[torch.Tensor]) -> Routing:
    """The record of a pass at 256 px with given choices."""
    backbone = model.backbone
    grids = backbone.grids((256, 256))
    routing = Routing(constants=backbone.constants(grids))
    routing.add_constant(model.head.macs())
    left = iter(choices)
    for stage, grid in enumerate(grids):
        extra = backbone.stage_extra(stage)
        for block in backbone.blocks(stage):
            cost = block.cost(extra + grid[0] * grid[1])
            choice = next(left)
            queries = row_lengths(choice, SPLITS, *grid, extra).double()
            routing.blocks.append(BlockRouting(cost, cost, queries, choice, None, grid, SPLITS))
    return routing


def test_golden_complexity():
    golden, name = load("dge", "complexity"), "pvt_dge_s124_small_256"
    choices = [golden[f"{name}/block{index}/choice"] for index in range(16)]
    routing = routing_of(full_size("dge", "small"), choices)
    for accounting in ("upstream", "corrected"):
        static, dynamic = routing.static(accounting), routing.dynamic(accounting)
        loss, mean = DGEBudgetLoss(0.5)(dynamic, static), float(dynamic.mean())
        assert [static, mean, mean / static, float(loss)] == pytest.approx(
            golden[f"{name}/{accounting}"].tolist(), rel=1e-12
        )
    blocks = Routing(blocks=routing.blocks)
    assert torch.equal(blocks.dynamic("upstream"), golden[f"{name}/blocks_dynamic"])
    assert [blocks.static("upstream")] * 2 == golden[f"{name}/blocks_static"].tolist()


@pytest.mark.parametrize(
    ("arch", "upstream", "at_2x2", "at_1x1", "corrected"),
    [
        ("tiny", 2_371_992_688, 764_646_256, 362_809_648, 2_566_138_160),
        ("small", 4_810_426_120, 1_562_630_536, 750_681_640, 5_061_260_744),
        ("medium", 8_500_266_760, 2_840_828_296, 1_425_968_680, 8_814_015_944),
        ("large", 12_591_638_280, 4_188_006_792, 2_087_098_920, 12_986_127_816),
    ],
)
def test_static_and_extreme_costs(arch, upstream, at_2x2, at_1x1, corrected):
    model = full_size("dge", arch)
    grids = model.backbone.grids((256, 256))
    depths = zip(model.backbone.depths, grids, strict=True)
    shapes = [(1, height // 4, width // 4) for n, (height, width) in depths for _ in range(n)]
    found = []
    for candidate in range(3):
        routing = routing_of(model, [torch.full(shape, candidate) for shape in shapes])
        assert routing.static("upstream") == upstream
        assert routing.static("corrected") == corrected
        found.append(routing.dynamic("upstream").item())
    assert found == [upstream, at_2x2, at_1x1]
    assert model.backbone.macs(grids) + model.head.macs() == corrected
    # The plain PVT does the same work without routers.
    plain = full_size("pvt", arch)
    routers = sum(block.cost.fixed - block_without_router(block.cost) for block in routing.blocks)
    assert plain.backbone.macs(grids) + plain.head.macs() == corrected - routers


def block_without_router(cost: Any) -> float:
    return type(cost)(**{**vars(cost), "region": 0}).fixed


def test_cost_of_sampled_attention():
    backbone = pyramid("dpvt", (1, 0, 0, 0), 32).backbone
    grids = [(8, 8), (4, 4), (2, 2), (1, 1)]
    embedding = sum(
        n * cout * (cin * p * p + 1)
        for n, cin, cout, p in ((64, 3, 8, 4), (16, 8, 16, 2), (4, 16, 24, 2), (1, 24, 32, 2))
    )
    # 8 channels, 1 head, 4 points: v and proj, offsets and weights, softmax, samples; norms, MLP.
    block = 64 * (2 * 64 + 12 * 8 + 3 * 4 + 4 * 4 * 8 + 2 * 8 + 2 * 8 * 16 + 16)
    assert backbone.macs(grids) == embedding + block


# ---- behaviour ----


@pytest.mark.parametrize(
    ("height", "width", "options"),
    [
        (128, 128, {}),
        (128, 256, {}),
        (96, 64, dict(splits=(1, 2))),
        (96, 160, dict(region_padding=True)),
        (128, 128, dict(cls_token=False)),
    ],
)
def test_sparse_equals_dense_and_training_without_noise(height, width, options):
    if "splits" in options:  # A region of 2 at stride 32.
        height, width = 64, 128
    model = lively(**options).eval()
    batch = images(height, width)
    with torch.no_grad():
        sparse = model.extract(batch)
        model.backbone.eval_path = "dense"
        dense = model.extract(batch)
        model.train()
        zero = [torch.zeros_like(block.logits) for block in sparse.routing.blocks]
        trained = model.extract(batch, zero)
        model.backbone.sparse_train = True
        packed = model.extract(batch, zero)
    chosen = {int(value) for block in sparse.routing.blocks for value in block.choice.unique()}
    assert chosen == set(range(len(model.backbone.splits)))
    for other in (dense, trained, packed):
        assert error(other.tokens, sparse.tokens) < 1e-12


def test_all_fine_is_the_plain_pyramid():
    routed = lively(region_padding=True).eval()
    force_choice(routed, 0)
    plain = pyramid("pvt").double().eval()
    state = {name: value for name, value in routed.state_dict().items() if ".dge." not in name}
    plain.load_state_dict(state)
    with torch.no_grad():
        for batch in (images(), images(96, 224)):
            assert error(routed(batch), plain(batch)) < 1e-12


def test_skipping_the_last_patch_queries_changes_no_logit():
    model = lively().eval()
    batch = images()
    with torch.no_grad():
        expected, whole = model(batch), model.extract(batch)
        model.backbone.skip_last_queries = True
        assert error(model(batch), expected) < 1e-13
        assert bool((model.extract(batch).macs < whole.macs).all())


@pytest.mark.parametrize("kind", ["pvt", "dge", "dpvt"])
def test_position_embeddings_follow_height_and_width(kind):
    """An input of the design's area but another shape is resampled (D13)."""
    model = lively(kind, size=128).eval()
    backbone = model.backbone
    with torch.no_grad():
        for stage in range(4):  # A column pattern must stay a column pattern.
            side = backbone.design[stage][0]
            value = getattr(backbone, f"pos_embed{stage + 1}")
            ramp = torch.arange(side, dtype=torch.float64).repeat(side)
            value.zero_()
            value[0, -side * side :, 0] = ramp
        flat = images(64, 256, batch=1) * 0
        patch = backbone.patch_embed1
        base, grid = patch(flat)
        seen = []

        def run(stage, number, block, x):
            seen.append(x)
            return x

        backbone.encode(flat, run)
        first = (seen[0] - base)[0, :, 0].view(grid)
    assert grid == (16, 64)
    assert torch.allclose(first, first[:1].expand(16, -1))
    assert bool((first[0].diff() >= 0).all())
    assert float(first[0, -1]) == 31


@pytest.mark.parametrize(
    ("kind", "options", "size", "message"),
    [
        ("dge", {}, (224, 224), "multiples of 128 px; use images of 128 x 128 or 256 x 256"),
        ("dge", {}, (224, 224), "region_padding=True for any multiple of 32 px"),
        ("dge", dict(splits=(2, 1)), (128, 96), "use images of 128 x 64 or 128 x 128 px"),
        ("pvt", {}, (100, 64), "multiples of 32 px; use images of 96 x 64 or 128 x 64 px"),
        ("dpvt", {}, (16, 32), "use images of 32 x 32 px"),
    ],
)
def test_sizes_that_do_not_fit_name_those_that_do(kind, options, size, message):
    with pytest.raises(DataError, match=message):
        pyramid(kind, **options)(images(*size).float())


@pytest.mark.parametrize("kind", ["pvt", "dge", "dpvt"])
def test_maps_are_the_stages_without_class_token(kind):
    model = lively(kind).backbone.eval()
    ends = (0, 1, 3, 4)
    with torch.no_grad():
        whole = model(images(), out_blocks=ends)
    cfg = dict(type=KINDS[kind], arch=dict(vars_of(model)), img_size=128, out_indices=(3, 1))
    features = MODELS.build(cfg).double().eval()
    missing = features.load_state_dict(model.state_dict(), strict=False)
    assert missing.unexpected_keys == ["norm.weight", "norm.bias"]
    with torch.no_grad():
        maps = features(images()).maps
    assert [tuple(m.shape) for m in maps] == [(2, 16, 16, 16), (2, 32, 4, 4)]
    last = whole.blocks[3][:, model.extra :].transpose(1, 2)
    assert torch.equal(maps[1].flatten(2), last)
    assert torch.equal(maps[0].flatten(2), whole.blocks[1].transpose(1, 2))


def vars_of(model: nn.Module) -> dict[str, Any]:
    return dict(
        depths=model.depths,
        embed_dims=model.embed_dims,
        num_heads=model.num_heads,
        mlp_ratios=model.mlp_ratios,
        sr_ratios=model.sr_ratios,
    )


@pytest.mark.parametrize("mode", ["query", "sample"])
@pytest.mark.parametrize("sparse", [False, True])
def test_draws_of_a_split_batch_equal_those_of_the_whole(mode, sparse):
    model = lively(sparse_train=sparse, drop_path_rate=0.3, drop_path_mode=mode).train()
    batch = images(batch=4)
    batch_random.begin(seed=3, step=1)
    whole = model.extract(batch).tokens
    parts = torch.empty_like(whole)
    for rank in range(2):
        batch_random.begin(seed=3, step=1, rank=rank, world=2)
        parts[rank::2] = model.extract(batch[rank::2]).tokens
    assert error(parts, whole) < 1e-12
    batch_random.begin(seed=3, step=2)
    assert error(model.extract(batch).tokens, whole) > 1e-3


@pytest.mark.parametrize("kind", ["pvt", "dpvt"])
def test_drop_path_drops_images(kind):
    model = lively(kind, drop_path_rate=0.5).train()
    batch = images(batch=1).expand(6, -1, -1, -1)
    batch_random.begin(seed=3, step=1)
    tokens = model.extract(batch).tokens
    assert len({row.sum().item() for row in tokens}) > 2
    assert (
        error(model.eval().extract(batch).tokens[:1], lively(kind).eval().extract(batch[:1]).tokens)
        < 1e-12
    )


def test_routers_start_with_the_finest_and_offsets_with_directions():
    model = pyramid("dge")
    for stage in range(4):
        for block in model.backbone.blocks(stage):
            assert block.dge.router.gate.bias.softmax(0)[0].item() == pytest.approx(0.95, rel=1e-6)
    backbone = pyramid("dpvt").backbone
    for stage, heads in enumerate((1, 2, 3, 4)):
        layer = backbone.blocks(stage)[0].attn.offsets
        expected = []
        for head in range(heads):
            x, y = cos(2 * pi * head / heads), sin(2 * pi * head / heads)
            longest = max(abs(x), abs(y))
            for step in (1, 2, 3, 4):
                expected += [x / longest * step, y / longest * step]
        assert layer.bias.tolist() == pytest.approx(expected, abs=1e-6)
        assert layer.weight.abs().max() == 0
    published = pyramid("dpvt", offset_init="published").backbone.blocks(3)[0].attn.offsets
    assert published.bias.abs().max() == 0
    assert published.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_gradient_scale_acts_on_the_sampling_point_only():
    found = {}
    for scale in (1.0, 0.1, 0.0):
        model = lively("dpvt", depths=(1, 1, 1, 1), gradient_scale=scale)
        loss = (model(images(64, 64)) ** 2).sum()
        loss.backward()
        attn = model.backbone.blocks(3)[0].attn
        found[scale] = (loss.item(), attn.offsets.weight.grad, attn.attn_weight.weight.grad)
    assert found[0.1][0] == found[1.0][0]
    assert error(found[0.1][1], 0.1 * found[1.0][1]) < 1e-12
    assert found[0.0][1].abs().max() == 0
    assert error(found[0.1][2], found[1.0][2]) < 1e-12


@pytest.mark.parametrize("kind", ["pvt", "dge", "dpvt"])
def test_half_precision_by_autocast(kind):
    model = spread_routers(pyramid(kind)).train()
    batch = images().float()
    noise = {}
    if kind == "dge":
        shapes = [(8, 8), (4, 4), (2, 2), (2, 2), (1, 1)]
        noise = dict(noise=[20.0 * torch.randn(2, *shape, 3) for shape in shapes])
    exact = model.head(model.extract(batch, **noise))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model.head(model.extract(batch, **noise))
    assert error(low, exact) < 5e-2
    low.float().sum().backward()
    assert all(value.grad is not None for value in model.parameters() if value.ndim > 2)


def test_selection_spreads_coarse_regions_over_the_finest():
    values = torch.tensor([[[1.0, 2], [3, 4]]])
    found = spread_regions(values, (8, 8), (16, 16), (4, 4))
    assert found.tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]]
    # Grids of 14 and 7 tokens with regions of 4, cut off: the third coarse region does not exist.
    found = spread_regions(torch.tensor([[[1.0, 2], [3, 4]]]), (7, 7), (14, 14), (4, 4))
    assert found[0, 0].tolist() == [1, 1, 2, 2]

    model = lively().eval()
    batch = images(128, 256)
    selection = model.select(batch)
    selection.validate()
    assert selection.grid == (8, 16)
    assert selection.image_size == (128, 256)
    with torch.no_grad():
        blocks = model.extract(batch).routing.blocks
    shares = torch.tensor([1, 0.25, 0.0625])
    expected = torch.zeros(2, 8, 16)
    for block in blocks:
        factor = 8 // block.choice.shape[1]
        share = shares[block.choice]
        expected += share.repeat_interleave(factor, 1).repeat_interleave(factor, 2) / len(blocks)
    assert torch.allclose(selection.resolution.view(2, 8, 16).float(), expected)

    padded = lively(region_padding=True).eval().select(images(224, 224))
    padded.validate()
    assert padded.grid == (14, 14)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["pvt", "dge", "dpvt"])
def test_empty_batch(kind, training):
    model = lively(kind, drop_path_rate=0.1).train(training)
    assert model(images()[:0]).shape == (0, 10)


def test_predictions_tell_granularities_of_all_blocks():
    model = lively(model_accounting="upstream").eval()
    targets = samples(torch.tensor([1, 2]))
    predicted = model.predict(images(), targets)
    assert predicted[0].granularity.shape == (5, 3)
    assert predicted[0].granularity.sum(1).tolist() == pytest.approx([1] * 5)
    assert 0 < predicted[0].macs < predicted[0].dense_macs


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("pvt", dict(out_indices=(4,)), "expected stages 0 to 3"),
        ("pvt", dict(size=100), "multiples of 32"),
        ("pvt", dict(depths=(1, 1)), "one entry for every stage"),
        ("dge", dict(splits=(4, 3)), "3 does not divide"),
        ("dge", dict(eval_path="packed"), "eval_path='packed'"),
        ("dge", dict(drop_path_mode="row"), "drop_path_mode='row'"),
        ("dge", dict(skip_last_queries=True, cls_token=False), "needs a class token"),
        ("dge", dict(skip_last_queries=True, out_indices=(3,)), "no out_indices"),
        ("dpvt", dict(offset_init="grid"), "offset_init='grid'"),
        ("dpvt", dict(num_points=0), "num_points=0"),
        ("dpvt", dict(cls_token=True), "a DPVT has none"),
    ],
)
def test_bad_configurations(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        pyramid(kind, **options)


def test_unknown_architecture_and_noise_that_does_not_fit():
    with pytest.raises(ConfigError, match="'smal' is unknown.*small"):
        MODELS.build(dict(type=KINDS["pvt"], arch="smal"))
    with pytest.raises(DataError, match="one for each of 5 blocks"):
        lively().extract(images(), [torch.zeros(2, 8, 8, 3)])


# ---- checkpoints ----


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("leaf", "entries", "layout"),
    [
        ("pvt_tiny", None, "official"),
        ("pvt_small", 349, "official"),
        ("dense_pvt_small", 301, "plain"),
        ("dense_pvt_large", None, "plain"),
        ("dpvt_small", 280, "plain"),
    ],
)
def test_published_layouts_go_round_bit_exact(leaf, entries, layout, project_root):
    config = Config.fromfile(str(project_root / f"configs/dge/{leaf}.py")).model
    with torch.device("meta"):
        model = MODELS.build(config)
    official = {
        name: torch.tensor(SPLITS)
        if name.endswith("splits")
        else torch.rand(()).expand(value.shape)
        for name, value in to_official(model.state_dict()).items()
    }
    assert entries in (None, len(official))
    ours, report = convert(dict(model=official, epoch=7), "x.pth", "ours")
    assert (report["from"], len(report["used"])) == (layout, len(official))
    assert not report["missing"] + report["unexpected"] + report["changed"]
    backbone = report["model"]["backbone"]
    assert {name: backbone[name] for name in ("type", "arch")} == {
        name: config.backbone[name] for name in ("type", "arch")
    }
    assert backbone["img_size"] == [256, 256]
    assert report["model"]["head"]["pool"] == config.head.get("pool", "cls")
    if leaf == "dpvt_small":
        assert backbone["num_points"] == 4
    model.load_state_dict(ours["state_dict"], assign=True)
    back, _ = convert(ours, "ours.pth", layout)
    same(back["model"], official)
    assert back["epoch"] == 7
    there, _ = convert(dict(model=official, epoch=7), "x.pth", "backbone")
    assert list(there["model"])[0].startswith("backbone.bottom_up.model.")
    again, report = convert(there, "detector.pth", "ours")
    assert report["from"] == "backbone"
    same(again["state_dict"], ours["state_dict"])


@pytest.mark.parametrize("kind", ["pvt", "dge", "dpvt"])
def test_report_tells_a_model_that_gives_the_same_logits(kind):
    model = lively(kind)
    ours, report = convert(dict(model=to_official(model.state_dict())), "x.pth", "ours")
    config = report["model"]
    assert config["backbone"]["arch"]["num_heads"] is None
    config["backbone"]["arch"]["num_heads"] = (1, 2, 3, 4)  # A checkpoint does not tell them.
    if kind == "dpvt":
        config["backbone"]["num_points"] = 4
    built = MODELS.build(dict(type="PatchClassifier", **config)).double().eval()
    built.load_state_dict(ours["state_dict"])
    with torch.no_grad():
        assert torch.equal(built(images()), model.eval()(images()))


def test_plain_and_routed_pyramids_convert_both_ways():
    plain = to_official(lively("pvt").state_dict())
    routed, report = convert(dict(model=plain), "x.pth", "ours", splits=(4, 2, 1), seed=3)
    assert len(report["made"]) == 3 * 5
    model = pyramid("dge").double().eval()
    model.load_state_dict(routed["state_dict"])
    force_choice(model, 0)
    other = pyramid("pvt").double().eval()
    other.load_state_dict(from_official(plain))
    with torch.no_grad():
        assert error(model(images()), other(images())) < 1e-12
    back, report = convert(routed, "ours.pth", "plain")
    same(back["model"], plain)
    assert len(report["dropped"]) == 3 * 5
    mixed = dict(sorted(plain.items(), reverse=True))  # Draws do not follow the order of the file.
    shuffled, _ = convert(dict(model=mixed), "x.pth", "ours", splits=(4, 2, 1), seed=3)
    same(dict(sorted(shuffled["state_dict"].items())), dict(sorted(routed["state_dict"].items())))


def test_pyramid_is_fitted_to_another_size_and_other_classes():
    plain = to_official(lively("pvt").state_dict())
    made, report = convert(
        dict(model=plain), "x.pth", "ours", img_size=[64, 96], num_classes=7, new_head=True
    )
    assert report["changed"] == [
        "pos_embed1: 32 x 32 -> 16 x 24 cells, bilinear",
        "pos_embed2: 16 x 16 -> 8 x 12 cells, bilinear",
        "pos_embed3: 8 x 8 -> 4 x 6 cells, bilinear",
        "pos_embed4: 4 x 4 -> 2 x 3 cells, bilinear",
    ]
    assert report["model"]["backbone"]["img_size"] == [64, 96]
    model = pyramid("pvt", size=(64, 96)).double().eval()
    model.head.head = nn.Linear(32, 7).double()
    model.load_state_dict(made["state_dict"])
    features = pyramid("pvt").double().eval()
    features.load_state_dict(from_official(plain))
    with torch.no_grad():
        batch = images(64, 96)
        found, expected = model.extract(batch).tokens, features.extract(batch).tokens
    assert error(found, expected) < 1e-12


def test_feature_extractor_has_maps_and_no_head():
    state = load("dge", "model_pvt_dge_features").group("sd")
    ours, report = convert(dict(model=state), "x.pth", "ours")
    assert report["model"]["backbone"]["out_indices"] == [0, 1, 2, 3]
    assert report["missing"] == ["head.weight", "head.bias"]
    same(convert(ours, "ours.pth", "official")[0]["model"], state)
    with pytest.raises(CheckpointError, match="has no final norm"):
        convert(dict(model=state), "x.pth", "ours", num_classes=3, new_head=True)


@pytest.mark.parametrize(
    ("kind", "change", "options", "message"),
    [
        ("dge", {"block1.0.dge.splits": torch.tensor([2, 1])}, {}, "has 2 different splits"),
        ("dge", {}, dict(splits=[2, 1]), r"routers for splits \[4, 2, 1\]"),
        ("dpvt", {}, dict(splits=[2, 1]), "a DPVT, which has no routers"),
        ("pvt", {"pos_embed2": None}, {}, "no PVT, PVT-DGE or DPVT: check pos_embed2"),
        ("pvt", {"block3.1.attn.kv.bias": None}, {}, "missing: block3.1.attn.kv.bias$"),
        ("pvt", {"block4.0.ls": torch.zeros(1)}, {}, "not in the model: block4.0.ls$"),
        ("pvt", {"norm.bias": torch.zeros(3)}, {}, r"norm.bias is \(3,\) instead of \(32,\)"),
        ("pvt", {}, dict(img_size=[100]), "--img-size 100: expected one or two multiples of 32"),
    ],
)
def test_pyramid_weights_that_do_not_fit_are_refused(kind, change, options, message):
    state = to_official(pyramid(kind).state_dict()) | change
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises((CheckpointError, ConfigError), match=message):
        convert(dict(model=state), "x.pth", "ours", **options)
