"""The parts of PatchGame against the official code: ranks, selection, symbols, heads, networks, loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_reader import load
from patchgame_helpers import (
    cases,
    error,
    fill,
    filled,
    images,
    near,
    official_name,
    relative,
    uniform01,
    vit,
)
from torch import nn

from patchreg.losses.contrastive import ContrastiveLoss, Embedding, matching_accuracy
from patchreg.methods.patchgame.listener import PatchGameListener, SymbolEmbedding
from patchreg.methods.patchgame.speaker import PatchGameResNetBackbone, PatchGameSymbols
from patchreg.models.heads.projection import ProjectionHead
from patchreg.models.selectors.rank import RankSelector, top_mask
from patchreg.models.selectors.soft_rank import (
    _pool_halves,
    _pool_runs,
    isotonic,
    soft_rank,
    torchsort_kernels,
)
from patchreg.registry import MODELS
from patchreg.utils.errors import ConfigError, DataError
from patchreg.utils.random import batch_random
from patchreg.utils.schedules import linear_warmup, warmup_cosine

BACKENDS = ["torch"] + (["torchsort"] if torchsort_kernels("cpu") else [])


def test_fill_is_the_documented_one() -> None:
    found = fill("vit.cls_token", (1, 1, 3)).flatten().tolist()
    assert found == pytest.approx([0.11394866, -0.10069595, 0.10099681], abs=1e-7)
    assert uniform01("a", 2).tolist() == pytest.approx([0.9612407088, 0.0549398065], abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_rank_golden(backend: str) -> None:
    golden = load("patchgame", "soft_rank")
    names = sorted({key.split(".")[0] for key in golden})
    assert len(names) >= 4
    for name in names:
        x = golden[f"{name}.x"].clone().requires_grad_()
        strength = float(golden[f"{name}.strength"])
        rank = soft_rank(x, strength, backend)
        near(rank, golden[f"{name}.rank"], 1e-4, 2e-4)
        rank.backward(golden[f"{name}.cotangent"])
        near(x.grad, golden[f"{name}.grad_x"], 1e-4, 1e-4 / strength)
        count = x.shape[1]
        total = torch.full((len(x),), count * (count + 1) / 2)
        assert error(rank.sum(1), total) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_rank_is_exact(backend: str) -> None:
    drawn = torch.randn(5, 9, dtype=torch.float64)
    assert error(soft_rank(drawn * 1e4, 1.0, backend), drawn.argsort().argsort() + 1.0) < 1e-11
    close = drawn * 1e-3
    expected = 5 + (close - close.mean(1, keepdim=True)) / 0.5
    assert error(soft_rank(close, 0.5, backend), expected) < 1e-12
    x = drawn.clone().requires_grad_()
    torch.autograd.gradcheck(lambda values: soft_rank(values, 0.7, backend), x)
    assert error(soft_rank(drawn + 7, 1.0, backend), soft_rank(drawn, 1.0, backend)) < 1e-12
    soft_rank(x, 1.0, backend).backward(torch.randn(5, 9, dtype=torch.float64))
    assert float(x.grad.sum(1).abs().max()) < 1e-12
    assert soft_rank(drawn[:, :1], 1.0, backend).tolist() == [[1.0]] * 5
    assert soft_rank(drawn.bfloat16(), 1.0, backend).dtype == torch.bfloat16


@pytest.mark.parametrize("count", [1, 2, 3, 17, 49, 196])
@pytest.mark.parametrize("kind", ["normal", "wide", "rising", "falling", "walk", "ties"])
def test_both_ways_of_pooling_equal_isotonic_regression(count: int, kind: str) -> None:
    from scipy.optimize import isotonic_regression

    values = torch.randn(6, count, dtype=torch.float64)
    if kind == "wide":
        values *= 100
    elif kind in ("rising", "falling"):
        values = values.sort(1, descending=kind == "falling").values
    elif kind == "walk":
        values = values.cumsum(1)
    elif kind == "ties":
        values = (2 * values).round()
    rows = [isotonic_regression(row.numpy(), increasing=False).x for row in values]
    expected = torch.stack([torch.tensor(row.copy()) for row in rows])
    for pool in (isotonic, _pool_runs, _pool_halves):
        assert error(pool(values), expected) < 1e-11
    if kind != "ties":
        assert torch.equal(_pool_runs(values).diff() == 0, _pool_halves(values).diff() == 0)


def test_soft_rank_refuses_what_it_cannot_rank() -> None:
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match="not finite"):
        soft_rank(x.masked_fill(x == x.max(), torch.nan), 1.0)
    with pytest.raises(ValueError, match="not finite"):
        soft_rank(x.masked_fill(x == x.max(), -torch.inf), 1.0)
    for strength in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="strength"):
            soft_rank(x, strength)
    with pytest.raises(TypeError, match="floating"):
        soft_rank(x.long())
    with pytest.raises(ValueError, match="rows, scores"):
        soft_rank(x[0])
    with pytest.raises(ValueError, match="backend='numpy'"):
        soft_rank(x, backend="numpy")


def test_auto_works_without_torchsort(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchreg.models.selectors import soft_rank as module

    x = torch.randn(3, 20)
    expected = soft_rank(x, backend="torch")
    monkeypatch.setattr(module, "torchsort_kernels", lambda device: None)
    assert torch.equal(soft_rank(x), expected)
    with pytest.raises(ImportError, match="pip install"):
        soft_rank(x, backend="torchsort")


def test_benchmark_compares_with_torchsort(monkeypatch: pytest.MonkeyPatch) -> None:
    from patchreg.benchmarks import softrank

    monkeypatch.setattr(softrank, "SIZES", (9,))
    monkeypatch.setattr(softrank, "ROUNDS", 2)
    if "torchsort" in BACKENDS:
        rows = softrank.run("cpu")
        assert [row["ok"] for row in rows if "error" in row["metric"]] == [True, True]
        assert [row["unit"] for row in rows] == ["ms", "1e-6", "1e-6", "ms"]
    monkeypatch.setattr(softrank, "torchsort_kernels", lambda device: None)
    with pytest.raises(ConfigError, match="torchsort is not installed"):
        softrank.run("cpu")


@pytest.mark.parametrize("case", cases("selection"), ids=lambda case: case["name"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_selection_golden(case: dict[str, Any], backend: str) -> None:
    golden, name = load("patchgame", "selection"), case["name"]
    features = golden[f"{name}.feature_map"].flatten(2).transpose(1, 2)
    weight, bias = (golden[f"{name}.ranker_{part}"] for part in ("weight", "bias"))
    score = nn.functional.linear(features, weight, bias).squeeze(-1)
    near(score, golden[f"{name}.score"], 1e-4, 1e-5)
    score = score.requires_grad_()
    selector = RankSelector(case["norm"], topk=case["topk"], backend=backend)
    uniform = golden[f"{name}.uniform"] if case["topk"] is None else None
    rank, selected = selector(score, uniform)
    near(rank, golden[f"{name}.normalised"], 1e-4, 1e-5)
    near(selected, golden[f"{name}.selected"], 1e-4, 1e-5)
    selected.backward(golden[f"{name}.cotangent"])
    near(score.grad, golden[f"{name}.grad_score"], 1e-3, 1e-5)
    assert relative(score.grad, golden[f"{name}.grad_score"]) < 1e-4
    if case["topk"]:
        assert (selected == 0).sum(1).tolist() == [49 - case["topk"]] * len(score)


def test_selection_options() -> None:
    score = torch.randn(4, 49, dtype=torch.float64)
    uniform = torch.rand(4, 49, 2, dtype=torch.float64)
    rank, plain = RankSelector()(score)
    assert error(plain, (2 * rank - 1).sigmoid()) < 1e-12
    _, used = RankSelector(logits="log")(score)
    assert error(used, rank.clamp(1e-6, 1 - 1e-6)) < 1e-12
    _, hard = RankSelector(hard=True)(score, uniform)
    _, soft = RankSelector()(score, uniform)
    assert torch.equal(hard > 0.5, soft > 0.5)
    assert error(hard, hard.round()) < 1e-12
    _, cold = RankSelector(temperature=0.5)(score, uniform)
    assert error(cold.logit(), 2 * soft.logit()) < 1e-9
    assert error(RankSelector(count=7)(score)[0], rank * 49 / 7) < 1e-12
    image, _ = RankSelector("minmax_image")(score)
    assert image.amin(1).tolist() == [0.0] * 4
    assert image.amax(1).tolist() == [1.0] * 4
    batch, _ = RankSelector("minmax")(score)
    assert (batch.amax(1) == 1).sum() == 1
    assert torch.isfinite(RankSelector("minmax")(torch.ones(2, 9))[0]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(norm="softmax"), "norm='softmax'"),
        (dict(topk=0), "topk=0"),
        (dict(temperature=0.0), "temperature=0.0"),
        (dict(strength=-1.0), "strength=-1.0"),
        (dict(logits="probit"), "logits='probit'"),
    ],
)
def test_selection_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RankSelector(**options)
    with pytest.raises(DataError, match="cannot keep 50 of 49"):
        RankSelector(topk=50)(torch.randn(2, 49))


@pytest.mark.parametrize("case", cases("gumbel"), ids=lambda case: case["name"])
def test_symbols_golden(case: dict[str, Any]) -> None:
    golden, name = load("patchgame", "gumbel"), case["name"]
    symbols = PatchGameSymbols(
        case["hidden"], case["vocab"], case["max_len"], case["hard"], 1.0, False
    )
    symbols.set_temperature(float(golden[f"{name}.temperature"]))
    assert symbols.temperature == case["T"]
    with torch.no_grad():
        symbols.logits.weight.copy_(golden[f"{name}.weight"])
        symbols.logits.bias.copy_(golden[f"{name}.bias"])
    x = golden[f"{name}.x"].clone().requires_grad_()
    _, out = symbols(x, golden[f"{name}.uniform"])
    near(out, golden[f"{name}.out"], 1e-4, 1e-5)
    assert torch.equal(out.argmax(-1), golden[f"{name}.symbol"])
    out.backward(golden[f"{name}.cotangent"])
    near(x.grad, golden[f"{name}.grad_x"], 1e-4, 1e-5)
    near(symbols.logits.weight.grad, golden[f"{name}.grad_weight"], 1e-4, 1e-5)
    near(symbols.logits.bias.grad, golden[f"{name}.grad_bias"], 1e-4, 1e-5)


def test_symbols_options() -> None:
    trained = PatchGameSymbols(8, 5, 2, False, 2.0, True)
    trained.set_temperature(9.0)
    _, out = trained(torch.randn(2, 3, 8), torch.rand(2, 3, 2, 5))
    out.square().sum().backward()
    assert float(trained.temperature.grad.abs()) > 0
    assert trained.temperature.item() == 2.0
    for vocab, length, temperature in ((1, 1, 1.0), (5, 0, 1.0), (5, 1, 0.0)):
        with pytest.raises(ConfigError):
            PatchGameSymbols(8, vocab, length, True, temperature, False)


@pytest.mark.parametrize("case", cases("head"), ids=lambda case: case["name"])
def test_head_golden(case: dict[str, Any]) -> None:
    golden, name = load("patchgame", "head"), case["name"]
    head = ProjectionHead(
        case["in_dim"],
        case["out_dim"],
        case["norm_last_layer"],
        case["nlayers"],
        case["hidden_dim"],
        case["bottleneck_dim"],
        use_bn=case.get("use_bn", False),
    )
    state = {
        key.split(".state.")[1]: golden[key] for key in golden if key.startswith(f"{name}.state.")
    }
    assert set(state) == set(head.state_dict())
    filled(head, f"head.{name}.")
    x = golden[f"{name}.x"].clone().requires_grad_()
    out = head.train()(x)
    near(out, golden[f"{name}.out"], 1e-4, 1e-5)
    for key, value in head.state_dict().items():
        near(value, state[key], 1e-4, 1e-5)
    out.backward(golden[f"{name}.cotangent"])
    near(x.grad, golden[f"{name}.grad_x"], 1e-4, 1e-5)
    near(head.last_layer.weight_v.grad, golden[f"{name}.grad_weight_v"], 1e-4, 1e-5)
    if f"{name}.grad_weight_g" in golden:
        near(head.last_layer.weight_g.grad, golden[f"{name}.grad_weight_g"], 1e-4, 1e-5)
    else:
        assert head.last_layer.weight_g.grad is None


def test_schedules_golden() -> None:
    golden = load("patchgame", "schedules")
    for lengths, end in ((dict(epochs=10, size=7, warmup=3), ""), (None, "_default_epochs100_it5")):
        lengths = lengths or dict(epochs=100, size=5, warmup=30)
        size, steps = lengths["size"], lengths["epochs"] * lengths["size"]
        warm = lengths["warmup"] * size
        arrays = {
            "lr": [warmup_cosine(step, steps, 2e-4, 1e-5, warm) for step in range(steps)],
            "wd": [warmup_cosine(step, steps, 0.04, 0.4) for step in range(steps)],
            "temperature": [linear_warmup(step, 5.0, 1.0, steps // 2) for step in range(steps)],
        }
        for name in [item for item in arrays if item + end in golden]:
            found, expected = arrays[name], golden[name + end]
            assert float((torch.tensor(found, dtype=torch.float64) - expected).abs().max()) < 1e-12


def test_in_batch_accuracy_golden() -> None:
    golden = load("patchgame", "metrics")
    logits, labels = golden["acc.logits"], golden["acc.labels"]
    top1, top5, most = matching_accuracy(logits, labels, (1, 5, 99))
    assert float(top1) == pytest.approx(golden["acc.top1"].item(), abs=1e-3)
    assert float(top5) == pytest.approx(golden["acc.top5"].item(), abs=1e-3)
    assert float(most) == 100.0


def test_knn_golden() -> None:
    from patchreg.metrics.knn import knn_votes, nearest_neighbours

    golden = load("patchgame", "metrics")
    bank, labels = golden["knn.train_features"], golden["knn.train_labels"]
    queries, targets = golden["knn.test_features"], golden["knn.test_labels"]
    ks = sorted({int(key.split("_")[0][5:]) for key in golden if key.startswith("knn.k")})
    similarity, index = nearest_neighbours(queries, bank, ks[-1])
    for temperature in (0.07, 1.0):
        votes = knn_votes(similarity, labels[index], ks, 10, temperature)
        for k, vote in zip(ks, votes, strict=True):
            name = f"knn.k{k}_T{temperature}"
            assert torch.equal(vote.argmax(1), golden[f"{name}_pred"])
            found = matching_accuracy(vote, targets)
            expected = golden[name].tolist()
            assert float(found[0]) == pytest.approx(expected[0], abs=1e-3)
            # For smaller k classes without a vote share the five best places, in no defined order.
            if k == ks[-1]:
                assert float(found[1]) == pytest.approx(expected[1], abs=1e-3)


def embeddings(golden: Any, rows: int | None = None) -> tuple[Any, ...]:
    im, message, scale = (golden[name].clone() for name in ("im_embed", "m_embed", "logit_scale"))
    parts = (im[:rows].clone(), message[:rows].clone(), scale)
    return tuple(part.requires_grad_() for part in parts)


@pytest.mark.parametrize(("tag", "gather"), [("local", "none"), ("world1", "detached")])
def test_contrastive_golden(tag: str, gather: str) -> None:
    golden = load("patchgame", "contrastive")
    im, message, scale = embeddings(golden, len(golden[f"{tag}.grad_im"]))
    loss, logits, target = ContrastiveLoss(gather)(Embedding(im), Embedding(message), scale.exp())
    near(logits, golden[f"{tag}.logits"], 1e-4, 1e-6)
    near(loss, golden[f"{tag}.loss"], 1e-4, 1e-6)
    assert torch.equal(target, golden[f"{tag}.labels"])
    loss.backward()
    near(im.grad, golden[f"{tag}.grad_im"], 1e-4, 1e-6)
    near(message.grad, golden[f"{tag}.grad_m"], 1e-4, 1e-6)
    near(scale.grad, golden[f"{tag}.grad_logit_scale"], 1e-4, 1e-6)
    top1, top5 = matching_accuracy(logits, target)
    assert float(top1) == pytest.approx(golden[f"{tag}.acc1"].item(), abs=1e-3)
    assert float(top5) == pytest.approx(golden[f"{tag}.acc5"].item(), abs=1e-3)


def test_gradients_of_the_gathered_loss_are_separate() -> None:
    golden = load("patchgame", "contrastive")
    grads = {}
    for gather in ("detached", "own", "full", "none"):
        im, message, scale = embeddings(golden, 6)
        loss_module = ContrastiveLoss(gather)
        loss_module(Embedding(im), Embedding(message), scale.exp())[0].backward()
        grads[gather] = im.grad
        im, message, scale = embeddings(golden, 6)
        logits, target = loss_module.logits(Embedding(im), Embedding(message), scale.exp())
        nn.functional.cross_entropy(logits[:6], target[:6]).backward()
        assert bool(message.grad.any()) == (gather != "detached")
    assert error(grads["own"], grads["none"]) < 1e-6
    assert error(grads["full"], grads["none"]) < 1e-6
    assert relative(grads["detached"], grads["full"]) > 0.3


@pytest.mark.parametrize("gather", ["detached", "own", "full"])
def test_bottleneck_gather_equals_the_full_one(gather: str) -> None:
    torch.manual_seed(0)
    heads = [ProjectionHead(12, 50, False, 2, 16, 8).double() for _ in range(2)]
    x = [torch.randn(6, 12, dtype=torch.float64) for _ in range(2)]
    scale = torch.tensor(14.0, dtype=torch.float64)
    found = []
    for bottleneck in (False, True):
        sides = []
        for head, part in zip(heads, x, strict=True):
            head.zero_grad()
            narrow, weight = head.bottleneck(part), head.last_layer.weight()
            sides.append(Embedding(narrow @ weight.T, narrow, weight))
        loss, logits, _ = ContrastiveLoss(gather, bottleneck)(*sides, scale)
        loss.backward()
        grads = [value.grad.clone() for head in heads for value in head.parameters()]
        found.append([loss, logits, *grads])
    for wide, narrow in zip(*found, strict=True):
        assert error(narrow, wide) < 1e-9


def test_scale_has_a_bound_on_request() -> None:
    side = Embedding(torch.randn(4, 8))
    logits, _ = ContrastiveLoss(max_scale=100.0).logits(side, side, torch.tensor(500.0))
    assert float(logits.max()) == pytest.approx(100.0, abs=1e-3)
    with pytest.raises(ConfigError, match="gather='all'"):
        ContrastiveLoss("all")


def golden_vit(**kwargs: Any) -> Any:
    arch = dict(embed_dims=48, depth=3, num_heads=3)
    return filled(MODELS.build(vit(arch, 16, 64, **kwargs)), "vit.").eval()


def test_vit_golden() -> None:
    golden = load("patchgame", "vit")
    model, x = golden_vit(), images(golden, "x_u8").requires_grad_()
    out = model(x).tokens
    near(out[:, 0], golden["cls.out"], 1e-3, 1e-4)
    near(out[:, 1:], golden["tokens.out"], 1e-3, 1e-4)
    (out[:, 0] * golden["cls.cotangent"]).sum().backward()
    grads = {
        "block0_qkv_weight": model.blocks[0].attn.qkv.weight.grad,
        "cls_token": model.cls_token.grad,
        "patch_proj_bias": model.patch_embed.proj.bias.grad,
        "pos_embed": model.pos_embed.grad,
        "x_slice": x.grad[:, :, :8, :8],
    }
    for name, grad in grads.items():
        near(grad, golden[f"cls.grad_{name}"], 1e-3, 1e-4)
        assert relative(grad, golden[f"cls.grad_{name}"]) < 1e-4
    with torch.no_grad():
        blocks = model.last_blocks(x, 2)
        read = torch.cat((blocks[0][:, 0], blocks[1][:, 0], blocks[1][:, 1:].mean(1)), dim=1)
        near(read, golden["last_blocks_n2_avg"], 1e-3, 1e-4)
        big = images(golden, "x_big_u8")
        near(model.position_embedding((6, 6)), golden["interp.pos_embed"], 1e-3, 1e-4)
        near(model(big).tokens[:, 0], golden["interp.out_cls"], 1e-3, 1e-4)
        near(model(big).tokens[:, 1:], golden["interp.out_tokens"], 1e-3, 1e-4)
        many = torch.cat((model(x).tokens[:, 0], model(big).tokens[:, 0]))
        near(many, golden["multi.out_cls"], 1e-3, 1e-4)
        near(
            model.last_attention(images(golden, "x_rect_u8")),
            golden["rect.last_attention"],
            1e-3,
            1e-4,
        )


def test_stochastic_depth_golden(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load("patchgame", "vit")
    model = golden_vit(drop_path_rate=0.5).train()
    rates = torch.tensor([block.drop_path_rate for block in model.blocks])
    near(rates, golden["droppath.rates"], 1e-6, 1e-7)
    # The official blocks draw once per branch and not at all at rate 0.
    drawn = golden["droppath.uniform"].view(2, 2, 2).permute(2, 0, 1)
    uniform = torch.cat((torch.zeros(2, 1, 2), drawn), dim=1)
    monkeypatch.setattr(batch_random, "uniform", lambda *args: uniform)
    near(model(images(golden, "x_u8")).tokens[:, 0], golden["droppath.out"], 1e-3, 1e-4)


@pytest.mark.parametrize(("name", "stride"), [("p32", 32), ("p16", 16)])
def test_rank_network_golden(name: str, stride: int) -> None:
    golden = load("patchgame", "resnet9")
    model = filled(PatchGameResNetBackbone(stride), "resnet9.")
    x = images(golden, "x_u8").requires_grad_()
    expected = golden[f"{name}.eval_out"]
    with torch.no_grad():
        near(model.eval()(x)[:, :: 512 // expected.shape[1]], expected, 1e-3, 1e-4)
    assert not any(
        layer.dilation != (1, 1) for layer in model.modules() if isinstance(layer, nn.Conv2d)
    )
    if f"{name}.cotangent" not in golden:
        return
    out = model.train()(x)
    near(out[:, :64], golden[f"{name}.train_out_c0_64"], 1e-3, 1e-4)
    out.backward(golden[f"{name}.cotangent"])
    assert relative(model.model.conv1.weight.grad, golden[f"{name}.grad_conv1"]) < 1e-3
    assert relative(x.grad[:, :, ::16], golden[f"{name}.grad_x_rows"]) < 1e-3
    state = {official_name(key): value for key, value in model.state_dict().items()}
    for key in ("bn1_running_mean", "bn1_running_var", "layer4_bn2_running_var"):
        part = key.replace("layer4_", "layer4.0.").replace("_running", ".running")
        near(state[part], golden[f"{name}.{key}"], 1e-3, 1e-4)


def listener(case: dict[str, Any]) -> Any:
    vision: dict[str, Any] = dict(
        type="TorchvisionBackbone", model_name=case["arch"], output="features"
    )
    if case["arch"].startswith("vit"):
        vision = vit(case["arch"][4:], case["patch_size"])
    side = case["image_size"] // case["patch_size"]
    return PatchGameListener(
        vision,
        case["image_size"],
        dict(out_dim=case["dim"]),
        (side, side),
        case["max_len"],
        case["vocab_size"],
        case["hidden_size"],
        case["num_heads"],
        case["num_layers"],
        True,
    )


@pytest.mark.parametrize("case", cases("listener"), ids=lambda case: case["name"])
def test_listener_golden(case: dict[str, Any]) -> None:
    golden, name = load("patchgame", "listener"), case["name"]
    model = filled(listener(case), case["fill_prefix"]).eval()
    x = images(golden, f"{name}.x_u8").requires_grad_()
    message = golden[f"{name}.message"].clone().requires_grad_()
    text = model.text_fc(model.read(message))
    image = model.vision_fc(model.look(x))
    near(text, golden[f"{name}.eval_text"], 1e-3, 1e-5)
    near(image, golden[f"{name}.eval_image"], 1e-3, 1e-5)
    ids = golden[f"{name}.symbol_ids"]
    for kind in (torch.int64, torch.int32):
        found = model.embedding(ids[:1].to(kind)).flatten(1, 2)
        near(found, golden[f"{name}.embed_from_ids"], 1e-6, 1e-7)
    if f"{name}.cot_text" not in golden:
        return
    total = (text * golden[f"{name}.cot_text"]).sum() + (image * golden[f"{name}.cot_image"]).sum()
    total.backward()
    grads = {
        "cls_token": model.cls_token.grad,
        "embedding": model.embedding.weight.grad,
        "enc0_in_proj": model.encoder.layers[0].self_attn.in_proj_weight.grad,
        "image_weight_g": model.vision_fc.last_layer.weight_g.grad,
        "message": message.grad,
        "position_encoding": model.position_encoding.grad,
        "text_weight_g": model.text_fc.last_layer.weight_g.grad,
        "x_rows": x.grad[:, :, ::24],
    }
    for key, grad in grads.items():
        assert relative(grad, golden[f"{name}.grad_{key}"]) < 1e-3, key
    if f"{name}.train_image" not in golden:
        return
    model.train()
    with torch.no_grad():
        near(model.vision_fc(model.look(x)), golden[f"{name}.train_image"], 1e-3, 1e-5)
        near(model.text_fc(model.read(message)), golden[f"{name}.train_text"], 1e-3, 1e-5)
        mean = model.vision.model.bn1.running_mean
        near(mean, golden[f"{name}.bn1_running_mean_after"], 1e-3, 1e-5)
        feature = model.eval().look(x)
        near(feature, golden[f"{name}.vision_feature_after"], 1e-3, 1e-5)


def test_a_collapsed_or_broken_model_matches_by_chance_or_never() -> None:
    target = torch.arange(4)
    assert matching_accuracy(torch.zeros(4, 4), target)[0] == 25
    assert matching_accuracy(torch.full((4, 4), torch.nan), target)[1] == 0
    half = torch.eye(4)
    half[0, 3] = torch.nan
    assert matching_accuracy(half, target)[0] == 75


@pytest.mark.parametrize("outlier", [1e6, 1e10, 1e13, 1e18, 1e30])
def test_one_large_score_leaves_the_other_ranks_alone(outlier: float) -> None:
    others = torch.tensor([[0.3, 0.1, 0.2, -5.0]], dtype=torch.float64)
    scores = torch.cat((others, torch.tensor([[outlier]])), dim=1).requires_grad_()
    found = soft_rank(scores, backend="torch")
    assert torch.allclose(found, torch.tensor([[3.1, 2.9, 3.0, 1.0, 5.0]]).double(), atol=1e-6)
    (gradient,) = torch.autograd.grad((found * torch.arange(5.0)).sum(), scores)
    assert torch.allclose(gradient[0], torch.tensor([-1.0, 0, 1, 0, 0]).double(), atol=1e-6)


def test_symbols_of_any_integer_type_are_looked_up() -> None:
    table = SymbolEmbedding(7, 3)
    torch.nn.init.normal_(table.weight)
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(table(torch.arange(7, dtype=kind)), table.weight)


def test_the_mask_of_equal_scores_is_the_beginning_of_their_order() -> None:
    score = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0] * 20])
    order = score.argsort(dim=1, descending=True, stable=True)
    for count in (1, 7, 40, 41, 99):
        assert set(top_mask(score, count)[0].nonzero()[:, 0].tolist()) == set(
            order[0, :count].tolist()
        )


@pytest.mark.parametrize("options", [dict(count=0), dict(count=-3), dict(strength=math.inf)])
def test_rank_selectors_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="count=|strength="):
        RankSelector(**options)
