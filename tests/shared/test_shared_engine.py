"""The engine: exact resume, keyed draws, samplers against the reference, stages, checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_reader import load

from patchreg.datasets.keyed import KeyedDataset
from patchreg.datasets.samplers import (
    DefaultSampler,
    RepeatedAugmentationSampler,
    SampleIndex,
)
from patchreg.runner import run as engine
from patchreg.runner.build import build_runner, latest_checkpoint, load_config
from patchreg.runner.checkpoint import load_state
from patchreg.utils.errors import CheckpointError, ConfigError, DataError
from patchreg.utils.random import BatchRandom, kept_generators, mix_seed, seed_sample
from patchreg.utils.weights import load_file, load_weights

sys.path.insert(0, str(Path(__file__).parent.parent))
import toy


@pytest.fixture(scope="session")
def toy_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy method, registered in this process."""
    folder = tmp_path_factory.mktemp("toy")
    toy.register()
    toy.write(folder)
    return folder


def train_toy(project: Path, work_dir: Path, **options: object) -> dict:
    """Train the toy and return its last checkpoint."""
    config = options.pop("config", project / "configs/toy/quick.py")
    resume = options.pop("resume", None)
    engine.train(str(config), work_dir=str(work_dir), options=options, resume=resume)
    newest = latest_checkpoint(work_dir)
    assert newest is not None
    return load_file(newest)


def scalars_of(work_dir: Path) -> list[dict]:
    """All logged training scalars of the newest log folder, without time fields."""
    folder = sorted(item for item in work_dir.iterdir() if (item / "vis_data").is_dir())[-1]
    rows = []
    for line in (folder / "vis_data" / "scalars.json").read_text().splitlines():
        row = json.loads(line)
        rows.append({key: value for key, value in row.items() if "time" not in key})
    return rows


def test_resume_inside_an_epoch_is_bit_identical(toy_project: Path, tmp_path: Path) -> None:
    whole = train_toy(toy_project, tmp_path / "whole")
    first = tmp_path / "whole" / "iter_6.pth"
    assert first.is_file()
    resumed_dir = tmp_path / "resumed"
    resumed = train_toy(toy_project, resumed_dir, resume=str(first))
    assert resumed["meta"]["iter"] == whole["meta"]["iter"] == 12
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][key])
    state, again = whole["optimizer"]["state"], resumed["optimizer"]["state"]
    assert torch.equal(state[0]["exp_avg_sq"], again[0]["exp_avg_sq"])
    whole_rows = [row for row in scalars_of(tmp_path / "whole") if row.get("step", 0) > 6]
    assert whole_rows
    assert whole_rows == [row for row in scalars_of(resumed_dir) if row.get("step", 0) > 6]


def test_workers_and_seed_decide_what_they_should(toy_project: Path, tmp_path: Path) -> None:
    alone = train_toy(toy_project, tmp_path / "a")["state_dict"]["fc.weight"]
    workers = train_toy(toy_project, tmp_path / "b", **{"train_dataloader.num_workers": 2})[
        "state_dict"
    ]["fc.weight"]
    other = train_toy(toy_project, tmp_path / "c", **{"randomness.seed": 4})["state_dict"][
        "fc.weight"
    ]
    assert torch.equal(alone, workers)
    assert not torch.equal(alone, other)


def test_iteration_loop_resumes_inside_an_epoch(toy_project: Path, tmp_path: Path) -> None:
    config = tmp_path / "by_iteration.py"
    config.write_text(
        (toy_project / "configs/toy/quick.py")
        .read_text()
        .replace(
            "dict(by_epoch=True, max_epochs=3)",
            "dict(by_epoch=False, max_iters=10, val_interval=100)",
        )
    )
    whole = train_toy(toy_project, tmp_path / "whole", config=config)
    resumed = train_toy(
        toy_project, tmp_path / "again", config=config, resume=str(tmp_path / "whole/iter_7.pth")
    )
    assert torch.equal(whole["state_dict"]["fc.weight"], resumed["state_dict"]["fc.weight"])


def test_own_checkpoints_come_before_the_weights_a_run_began_with(
    toy_project: Path, tmp_path: Path
) -> None:
    begun = train_toy(toy_project, tmp_path / "other", **{"train_cfg.max_epochs": 1})
    start = {"load_from": str(tmp_path / "other/iter_4.pth"), "optim_wrapper.optimizer.lr": 1e-9}
    # Nothing to resume yet: the run begins with the weights it names.
    one = train_toy(
        toy_project, tmp_path / "run", resume="auto", **{**start, "train_cfg.max_epochs": 1}
    )
    assert torch.allclose(
        one["state_dict"]["fc.weight"], begun["state_dict"]["fc.weight"], atol=1e-6
    )
    assert one["meta"]["iter"] == 4
    (tmp_path / "other/iter_4.pth").write_bytes(b"no longer needed")
    two = train_toy(
        toy_project, tmp_path / "run", resume="auto", **{**start, "train_cfg.max_epochs": 2}
    )
    assert two["meta"]["iter"] == 8


def test_checkpoints_are_plain_and_no_partial_file_stays(toy_project: Path, tmp_path: Path) -> None:
    checkpoint = train_toy(toy_project, tmp_path)
    assert not list(tmp_path.glob(".*partial"))
    buffer = checkpoint["message_hub"]["log_scalars"]["train/loss"]
    assert buffer["values"].dtype == torch.float64
    assert len(buffer["values"]) == 12


def test_wrong_checkpoints_are_refused_in_words(toy_project: Path, tmp_path: Path) -> None:
    config = str(toy_project / "configs/toy/quick.py")
    other = tmp_path / "other.pth"
    torch.save(dict(state_dict={"backbone.weight": torch.zeros(3)}), other)
    with pytest.raises(CheckpointError, match=r"does not belong to this model \(0 of 2 keys match"):
        engine.evaluate(config, str(other), work_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    shape = tmp_path / "shape.pth"
    torch.save(dict(state_dict={"fc.weight": torch.zeros(3, 8), "fc.bias": torch.zeros(3)}), shape)
    with pytest.raises(CheckpointError, match=r"fc\.weight is \(3, 8\), the model's is \(2, 8\)"):
        engine.evaluate(config, str(shape), work_dir=str(tmp_path / "run"))
    pickled = tmp_path / "pickled.pth"
    torch.save(dict(state_dict=Path("x")), pickled)
    with pytest.raises(CheckpointError, match="unpickling can run code"):
        load_file(pickled)
    text = tmp_path / "text.pth"
    text.write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.pth"):
        load_file(text)
    whole = torch.zeros(1000)
    torch.save(dict(state_dict={"a": whole}), other)
    other.write_bytes(other.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="truncated"):
        load_file(other)
    torch.save(dict(epoch=1), other)
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_weights(other)


def test_partial_load_changes_nothing_on_a_shape_mismatch() -> None:
    model = torch.nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(CheckpointError):
        load_state(model, {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)}, "x", strict=False)
    assert torch.equal(model.weight, before)


def test_stages_hand_checkpoints_forward_and_resume(
    toy_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = toy_project / "configs/toy"
    (folder / "second.py").write_text(
        '_base_ = ["quick.py"]\n'
        'model = dict(init_cfg=dict(type="Pretrained", checkpoint="work_dirs/toy/quick/last.pth"))\n'
        "train_cfg = dict(max_epochs=1)\n"
        "optim_wrapper = dict(optimizer=dict(lr=0.0, weight_decay=0.0))\n"
    )
    (folder / "all.py").write_text('stages = ["quick.py", "second.py"]\n')
    engine.train(str(folder / "all.py"), work_dir=str(tmp_path))
    first = load_file(latest_checkpoint(tmp_path / "quick"))["state_dict"]
    second = load_file(latest_checkpoint(tmp_path / "second"))["state_dict"]
    assert torch.equal(first["fc.weight"], second["fc.weight"])
    record = json.loads((tmp_path / "stages.json").read_text())
    assert len(record) == 2
    reached = [result["metrics"]["top1"] for result in record.values()]
    assert reached[0] == reached[1] > 50
    table = capsys.readouterr().out.split("all stages are finished\n")[1].splitlines()
    assert table == [f"  {name}: top1 {reached[0]:.4g}" for name in ("quick", "second")]
    stamp = latest_checkpoint(tmp_path / "quick")
    engine.train(str(folder / "all.py"), work_dir=str(tmp_path), resume="auto")
    assert latest_checkpoint(tmp_path / "quick") == stamp


def rows(rank: int, world: int, part: int = 0, parts: int = 1, batch: int = 12) -> torch.Tensor:
    """One keyed draw of a process."""
    draws = BatchRandom()
    draws.begin(5, 7, part=part, parts=parts, rank=rank, world=world)
    draws.gumbel(batch // world // parts, (2,), "cpu")
    return draws.uniform(batch // world // parts, (3,), "cpu")


def test_keyed_draws_are_rows_of_one_global_batch() -> None:
    whole = rows(0, 1)
    assert whole.unique().numel() == 36
    for rank in range(3):
        assert torch.equal(rows(rank, 3), whole[rank::3])
    parts = torch.cat([rows(0, 1, part, 2) for part in range(2)])
    assert torch.equal(parts, whole)
    assert torch.equal(rows(1, 2, 1, 2), whole[7::2])


def test_gumbel_draws_have_the_right_distribution() -> None:
    draws = BatchRandom()
    draws.begin(0, 0)
    sample = draws.gumbel(200_000, (), "cpu").double()
    assert abs(sample.mean().item() - 0.5772156649) < 0.01
    assert abs(sample.var().item() - np.pi**2 / 6) < 0.03
    assert torch.isfinite(sample).all()


def test_sample_keys_restore_the_global_generators() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    with kept_generators():
        seed_sample(0, 0, 0)
        first = torch.rand(2), np.random.rand()
    assert torch.equal(torch.rand(1), expected[0])
    assert np.random.rand() == expected[1]
    with kept_generators():
        seed_sample(0, 0, 0)
        assert torch.equal(torch.rand(2), first[0])
        assert np.random.rand() == first[1]
    seen = {
        mix_seed(0, epoch, index, view)
        for epoch in range(9)
        for index in range(9)
        for view in range(9)
    }
    assert len(seen) == 9**3


class Numbers:
    """A data set of random numbers in which one sample is broken."""

    metainfo = dict(classes=("one",))

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> float:
        if index == 3:
            raise DataError("file three.jpg is broken")
        return float(torch.rand(1))


def test_keyed_dataset_draws_by_epoch_and_view_and_handles_broken_samples() -> None:
    data = KeyedDataset(Numbers(), seed=1)
    draws = {data[SampleIndex(2, epoch, view)] for epoch in range(3) for view in range(3)}
    assert len(draws) == 9
    assert data[SampleIndex(2, 1, 1)] == data[SampleIndex(2, 1, 1)]
    assert data.__getitems__([SampleIndex(2, 1, 1)]) == [data[SampleIndex(2, 1, 1)]]
    assert data.metainfo == dict(classes=("one",))
    with pytest.raises(DataError, match=r"three\.jpg"):
        data[3]
    skipping = KeyedDataset(Numbers(), seed=1, bad_samples="skip")
    assert skipping[3] == skipping[3]
    with pytest.raises(ConfigError, match="error, skip"):
        KeyedDataset(Numbers(), seed=1, bad_samples="ignore")


def sharded(sampler: object, rank: int, world: int) -> list[int]:
    """Indices of one process; rounds the length the way the constructor does."""
    sampler.rank = rank
    return [int(index) for index in sampler]


@pytest.fixture
def world_size(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    monkeypatch.setattr("patchreg.datasets.samplers.get_dist_info", lambda: (0, request.param))
    return request.param


@pytest.mark.parametrize(
    ("world_size", "size", "epoch", "name"),
    [(2, 1000, 0, "ra_n1000_r2"), (2, 1000, 1, "ra_n1000_r2"), (3, 700, 5, "ra_n700_r3")],
    indirect=["world_size"],
)
def test_repeated_augmentation_matches_the_reference(
    world_size: int, size: int, epoch: int, name: str
) -> None:
    golden = load("dge", "schedules")
    perm = torch.randperm(size, generator=torch.Generator().manual_seed(epoch))
    assert torch.equal(perm, golden[f"{name}/e{epoch}/perm"])
    sampler = RepeatedAugmentationSampler(range(size), num_repeats=3, selected_round=256)
    sampler.set_epoch(epoch)
    keys = set()
    for rank in range(world_size):
        expected = golden[f"{name}/e{epoch}/rank{rank}"].tolist()
        assert sharded(sampler, rank, world_size) == expected
        assert len(sampler) == len(expected)
        keys |= {(int(item), item.view) for item in sampler}
    assert len(keys) == world_size * len(sampler)


@pytest.mark.parametrize("world_size", [4], indirect=True)
def test_evaluation_shards_match_the_reference(world_size: int) -> None:
    golden = load("dge", "schedules")
    sampler = DefaultSampler(range(10), shuffle=False)
    for rank in range(4):
        assert sharded(sampler, rank, 4) == golden[f"eval_dist_n10_r4/rank{rank}"].tolist()


def test_samplers_skip_once_and_know_their_epoch() -> None:
    sampler = DefaultSampler(range(6), shuffle=True, seed=2)
    sampler.set_epoch(1)
    whole = list(sampler)
    assert sorted(whole) == list(range(6))
    assert all(item.epoch == 1 for item in whole)
    sampler.skip(4)
    assert list(sampler) == whole[4:]
    assert list(sampler) == whole
    sampler.set_epoch(2)
    assert list(sampler) != whole


def test_too_few_images_for_repeated_augmentation_is_a_message() -> None:
    with pytest.raises(ConfigError, match="100 images gives empty epochs"):
        RepeatedAugmentationSampler(range(100))
    with pytest.raises(ConfigError, match="data set is empty"):
        DefaultSampler(range(0))


def test_grouped_constructor_merges_equal_groups(toy_project: Path, tmp_path: Path) -> None:
    config = load_config(
        toy_project / "configs/toy/quick.py",
        {
            "optim_wrapper.constructor": "GroupedOptimWrapperConstructor",
            "optim_wrapper.paramwise_cfg": dict(bias_decay_mult=0.0),
            "optim_wrapper.optimizer.weight_decay": 0.01,
        },
        str(tmp_path),
    )
    runner = build_runner(config)
    groups = runner.build_optim_wrapper(runner.optim_wrapper).optimizer.param_groups
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.01]
