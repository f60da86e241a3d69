"""Exported parts against PyTorch, without this package where the format allows it, and refusals in words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchreg.methods.patchdrop.selector import PatchDropFixedSelector
from patchreg.runner import export
from patchreg.runner.api import Model, load
from patchreg.runner.export import choose_part, export_file, parts_of
from patchreg.utils.errors import ConfigError
from patchreg.utils.files import write_through

ROOT = Path(__file__).resolve().parent.parent
DENSE = {"model.backbone.eval_path": "dense"}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CIFAR-10: the embedded set gives the real images."""
    monkeypatch.chdir(tmp_path)


def localiser_config(folder: Path) -> tuple[str, str]:
    """A config of the localiser alone, with the weights that the shipped ensemble has for it."""
    whole = torch.load(ROOT / "configs/anchornet/checkpoints/quick_dynamic.pth", weights_only=True)
    state = {
        key.removeprefix("anchor."): value
        for key, value in whole["state_dict"].items()
        if key.startswith("anchor.")
    }
    torch.save({"state_dict": state}, folder / "anchor.pth")
    return "anchornet/quick_anchornet", str(folder / "anchor.pth")


def noise(count: int) -> torch.Tensor:
    """Images as exported graphs take them, of other values than those of the exporter's own check."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=generator).float()


def answers(model: Model, part: str, pixels: torch.Tensor) -> dict[str, np.ndarray]:
    """What the functions of the API give for the same images."""
    images = pixels.to(torch.uint8)
    if part == "model":
        inputs = torch.cat(list(model.batches(images)))
        with torch.no_grad():
            return {"logits": model.network(inputs).numpy()}
    if part == "backbone":
        return {"feature": model.features(images).numpy()}
    selection = model.select(images)
    score = selection.score
    if part == "policy":
        return {"probability": score.numpy(), "keep": selection.keep.numpy()}
    if part == "ranker":
        return {"score": score.numpy()}
    assert part == "localiser"
    assert selection.grid is not None
    return {"map": score.unflatten(1, selection.grid).numpy(), "boxes": selection.boxes.numpy()}


CASES: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "policy": ("patchdrop/quick_finetune", "policy", None),
    "localiser": ("", "localiser", None),
    "ranker": ("patchgame/quick", "ranker", None),
    "dge": ("dge/quick", "model", DENSE),
    "features": ("pwself/quick", "backbone", None),
    "patchdrop": ("patchdrop/quick_finetune", "model", None),
}


def exported(case: str, kind: str, folder: Path) -> tuple[Path, dict[int, dict[str, np.ndarray]]]:
    """Export one case; return the file and what it has to give for batches of several sizes."""
    config, part, options = CASES[case]
    checkpoint = None
    if case == "localiser":
        config, checkpoint = localiser_config(folder)
    out = folder / f"{case}{export.FORMATS[kind]}"
    text = export_file(config, checkpoint, part, str(out), kind, options=options)
    assert "checked against PyTorch on 6 random images and 4 of the test set" in text
    model = load(config, checkpoint, device="cpu", options=options)
    return out, {count: answers(model, part, noise(count)) for count in (1, 3, 7)}


def same(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Equal within 1e-4 of the largest value; decisions are equal."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if expected.dtype == bool or name == "boxes":
        assert np.array_equal(found, expected), name
    else:
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max(), name


@pytest.mark.parametrize("case", ["policy", "localiser", "ranker", "dge", "features"])
def test_onnx_files_give_what_pytorch_gives(case: str, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="ONNX: pip install onnx onnxscript onnxruntime")
    import onnx
    import onnxruntime

    out, expected = exported(case, "onnx", tmp_path)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, 32, 32])
    names = [one.name for one in session.get_outputs()]
    for count, values in expected.items():
        found = dict(zip(names, session.run(None, {"images": noise(count).numpy()}), strict=True))
        for name, value in values.items():
            same(found[name], value, name)
    facts = {item.key: item.value for item in onnx.load(str(out)).metadata_props}
    assert facts["images"] == "float32 RGB, 0 to 255, [B, 3, 32, 32]"
    assert list(json.loads(facts["outputs"])) == names
    assert json.loads(facts["classes"])[:2] in (
        ["airplane", "automobile"],
        ["T-shirt/top", "Trouser"],
    )
    assert [item.name for item in tmp_path.iterdir() if "partial" in item.name] == []


ALONE = """
import sys, torch
graph = torch.export.load(sys.argv[1])
given, wanted = torch.load(sys.argv[2]).values()
assert not any(name.startswith("patchreg") for name in sys.modules)
with torch.no_grad():
    found = graph.module()(given)[0]
print((found - wanted).abs().max().item(), wanted.abs().max().item())
"""


@pytest.mark.parametrize("case", ["policy", "localiser", "dge", "patchdrop"])
def test_torch_files_run_without_this_package(case: str, tmp_path: Path) -> None:
    out, expected = exported(case, "torch", tmp_path)
    graph = torch.export.load(out).module()
    for count, values in expected.items():
        with torch.no_grad():
            found = graph(noise(count))
        named = dict(zip(parts(case), (value.numpy() for value in found), strict=True))
        for name, value in values.items():
            same(named[name], value, name)
    if case != "dge":
        return
    # Its operators are spelt out: another process needs torch only.
    torch.save({"given": noise(3), "wanted": torch.from_numpy(expected[3]["logits"])}, "pair.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(out), "pair.pt"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    largest, scale = map(float, done.stdout.split())
    assert largest <= 1e-5 * scale


def parts(case: str) -> tuple[str, ...]:
    """Names of the outputs of a case."""
    names = {
        "policy": ("probability", "keep"),
        "localiser": ("logits", "map", "boxes"),
    }
    return names.get(case, ("logits",))


def test_what_depends_on_the_image_is_refused_in_words() -> None:
    sparse = load("dge/quick", device="cpu").network
    for name in ("model", "backbone"):
        with pytest.raises(ConfigError, match=r"depends on the image.*eval_path=dense"):
            choose_part(sparse, name)
    ensemble = load("anchornet/quick_dynamic", device="cpu").network
    assert list(parts_of(ensemble)) == ["localiser", "model", "backbone"]
    with pytest.raises(ConfigError, match=r"stops early.*what can be exported: localiser"):
        choose_part(ensemble, "model")
    game = load("patchgame/quick", device="cpu").network
    with pytest.raises(ConfigError, match="classifies nothing"):
        choose_part(game, "model")
    with pytest.raises(ConfigError, match=r"has no part 'rankr'.*'ranker'"):
        choose_part(game, "rankr")
    with pytest.raises(
        ConfigError, match=r"name a part .*ranker \(score of every patch\); not model"
    ):
        choose_part(game, None)
    policy = load("patchdrop/quick_finetune", device="cpu").network
    policy.classifier.classify = lambda *arguments: None
    with pytest.raises(ConfigError, match="kept patches only"):
        choose_part(policy, "model")
    policy.selector = PatchDropFixedSelector("centre")
    with pytest.raises(ConfigError, match="policy is fixed and looks at no image"):
        choose_part(policy, "policy")


def test_files_that_cannot_be_written_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(out: str, kind: str = "torch") -> None:
        export_file("dge/dense_quick", None, "model", out, kind)

    with pytest.raises(ConfigError, match=r"a torch file ends in \.pt2"):
        attempt("model.onnx")
    with pytest.raises(ConfigError, match="in a folder that exists"):
        attempt("gone/model.pt2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"need onnx and onnxscript: pip install .*--format torch"
    ):
        attempt("model.onnx", "onnx")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "model.pt2"
    old.write_bytes(b"old")
    correct = export.Logits.forward
    for factor, text in (
        (1.0005, r"'logits' .* differs by"),
        (float("nan"), "'logits' .* differs by nan"),
    ):

        def wrong(self: Any, images: torch.Tensor, factor: float = factor) -> tuple[torch.Tensor]:
            return (correct(self, images)[0] * factor,)

        monkeypatch.setattr(export.Logits, "forward", wrong)
        with pytest.raises(ConfigError, match=rf"was not written: its output {text}"):
            export_file("dge/dense_quick", None, "model", str(old), "torch")
        assert old.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [old]


def test_differences_are_measured_on_every_batch() -> None:
    part = export.Part(
        "x", torch.nn.Identity(), {"score": "[B, 2]", "keep": "[B, 2]"}, lambda images: ()
    )
    batches = [torch.zeros(2, 1), torch.zeros(1, 1)]
    right = torch.tensor([[4.0, -8.0], [2.0, 1.0]])
    expected = [(right, right > 0), (right[:1], right[:1] > 0)]

    def run(images: torch.Tensor) -> list[np.ndarray]:
        rows = len(images)
        keep = right[:rows] > 0
        return [(right[:rows] + 0.5 * (rows == 1)).numpy(), (keep ^ (rows == 1)).numpy()]

    score, keep = export.compare_outputs(run, part, batches, expected)
    assert (score.largest, score.scale) == (0.5, 8.0)
    assert keep.flipped == pytest.approx(2 / 6)
    with pytest.raises(ConfigError, match=r"'score' .* differs by 0\.5, its largest value being 8"):
        export.refuse_far([score], "x.onnx")
    with pytest.raises(ConfigError, match=r"33\.3% of its values differ"):
        export.refuse_far([keep], "x.onnx")
    score.largest, keep.flipped = 7.9e-4, 0.01
    export.refuse_far([score, keep], "x.onnx")
    with pytest.raises(ConfigError, match=r"shape \(1, 2\), PyTorch \(2, 2\)"):
        export.compare_outputs(lambda images: run(images[:1]), part, batches, expected)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.onnx"
    target.write_text("old")

    def fail(path: str) -> None:
        Path(path).write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_through(target, fail)
    assert target.read_text() == "old"
    write_through(target, lambda path: Path(path).write_text("new"))
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_the_tool_lists_parts(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/export.py"), "pwself/quick", "--out", "x.pt2"]
    done = subprocess.run(
        [*command, "--format", "torch"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 2
    assert "error: name a part of PWSelfPretrainer with --part" in done.stderr
    assert "backbone (images to features)" in done.stderr
    assert list(tmp_path.iterdir()) == []
