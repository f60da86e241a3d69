"""Data sets: the same images from every layout, labels by rule, and errors that name file and "
"remedy."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from patchreg.datasets import quick_start
from patchreg.datasets.base import balanced_subset
from patchreg.datasets.cifar import (
    CIFAR100_CLASSES,
    CIFAR10Dataset,
    CIFAR100Dataset,
    _CIFARDataset,
    read_pickled_batch,
)
from patchreg.datasets.fashion_mnist import FILE, FashionMNISTMiniDataset
from patchreg.datasets.image_files import CSVImageDataset, ImageFolderDataset, ImageNetDataset
from patchreg.datasets.inaturalist import INaturalistDataset
from patchreg.datasets.keyed import KeyedDataset
from patchreg.datasets.quick_start import QuickStartDataset
from patchreg.registry import DATASETS
from patchreg.utils.errors import ConfigError, DataError, MissingFileError, message_of

COUNTS = {"train": 50, "test": 20}


@pytest.fixture
def small_cifar(monkeypatch):
    """Shrink the expected sizes of CIFAR; return its images and labels per split."""
    monkeypatch.setattr(_CIFARDataset, "COUNTS", COUNTS)
    rng = np.random.default_rng(3)
    return {
        split: (
            rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
            np.arange(count) % 10,
        )
        for split, count in COUNTS.items()
    }


def write_prepared(root, arrays):
    for split, (images, labels) in arrays.items():
        np.save(root / f"{split}_images.npy", images)
        np.save(root / f"{split}_labels.npy", labels)


def planar(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_binary(root, arrays, coarse=False):
    reader = CIFAR100Dataset if coarse else CIFAR10Dataset
    folder = root / reader.BINARY_DIR
    folder.mkdir()
    for split, (images, labels) in arrays.items():
        names = [entry[2] for entry in reader.FILES[split]]
        for name, rows in zip(names, np.split(np.arange(len(labels)), len(names)), strict=True):
            columns = [labels[rows, None].astype(np.uint8), planar(images[rows])]
            if coarse:
                columns.insert(0, np.full((len(rows), 1), 19, np.uint8))
            np.concatenate(columns, 1).tofile(folder / name)


def write_pickled(root, arrays, monkeypatch):
    folder = root / CIFAR10Dataset.PYTHON_DIR
    folder.mkdir()
    files = {}
    for split, (images, labels) in arrays.items():
        names = [entry[0] for entry in CIFAR10Dataset.FILES[split]]
        files[split] = []
        for name, rows in zip(names, np.split(np.arange(len(labels)), len(names)), strict=True):
            batch = {b"data": planar(images[rows]), b"labels": labels[rows].tolist()}
            # The official files were written by an old NumPy, under its old module name.
            content = pickle.dumps(batch, protocol=2).replace(b"numpy._core", b"numpy.core")
            (folder / name).write_bytes(content)
            files[split].append((name, hashlib.md5(content).hexdigest(), name + ".bin"))
    monkeypatch.setattr(CIFAR10Dataset, "FILES", {k: tuple(v) for k, v in files.items()})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layout", ["prepared", "binary", "pickled"])
def test_cifar10_layouts_agree(layout, small_cifar, tmp_path, monkeypatch):
    if layout == "prepared":
        write_prepared(tmp_path, small_cifar)
    elif layout == "binary":
        write_binary(tmp_path, small_cifar)
    else:
        write_pickled(tmp_path, small_cifar, monkeypatch)
    for split, (images, labels) in small_cifar.items():
        data = CIFAR10Dataset(data_root=str(tmp_path), split=split)
        assert len(data) == COUNTS[split]
        for i in (0, 11, len(data) - 1):
            info = data.get_data_info(i)
            assert np.array_equal(info["img"], images[i])
            assert (info["gt_label"], info["sample_idx"]) == (labels[i], i)
        assert data.get_data_info(-1)["sample_idx"] == len(data) - 1
        assert data.metainfo["classes"][3] == "cat"


def test_prepared_images_stay_on_disk_and_are_not_changed_by_a_sample(small_cifar, tmp_path):
    write_prepared(tmp_path, small_cifar)
    data = CIFAR10Dataset(data_root=str(tmp_path), split="test")
    assert isinstance(data.images, np.memmap)
    data.get_data_info(4)["img"][:] = 0
    assert np.array_equal(data.get_data_info(4)["img"], small_cifar["test"][0][4])


def test_cifar100_takes_the_fine_label(small_cifar, tmp_path):
    write_binary(tmp_path, small_cifar, coarse=True)
    data = CIFAR100Dataset(data_root=str(tmp_path), split="train")
    assert np.array_equal(data.get_gt_labels(), small_cifar["train"][1])
    assert np.array_equal(data.get_data_info(7)["img"], small_cifar["train"][0][7])
    # Known pairs of the official label file.
    assert len(CIFAR100_CLASSES) == 100
    assert [CIFAR100_CLASSES[i] for i in (0, 49, 99)] == ["apple", "mountain", "worm"]


def test_cifar_missing_says_layout_and_command(tmp_path):
    with pytest.raises(MissingFileError, match=r"prepare_data\.py cifar10 --out") as error:
        CIFAR10Dataset(data_root=str(tmp_path / "data" / "cifar10"))
    assert "cifar-10-batches-bin/ with data_batch_1.bin" in str(error.value)
    assert f"--out {tmp_path / 'data'}" in str(error.value)


def test_cifar_damaged_files(small_cifar, tmp_path):
    write_binary(tmp_path, small_cifar)
    broken = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin.*30729 bytes"):
        CIFAR10Dataset(data_root=str(tmp_path))
    np.save(tmp_path / "train_images.npy", np.zeros((4, 32, 32, 3), np.uint8))
    np.save(tmp_path / "train_labels.npy", np.zeros(4, np.int64))
    with pytest.raises(DataError, match=r"\(4, 32, 32, 3\); expected uint8 \(50, 32, 32, 3\)"):
        CIFAR10Dataset(data_root=str(tmp_path))
    (tmp_path / "train_images.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="cannot be read"):
        CIFAR10Dataset(data_root=str(tmp_path))


def test_pickle_is_opened_only_after_its_checksum_and_holds_arrays_only(tmp_path):
    class Payload:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": Payload()}, protocol=2))
    with pytest.raises(DataError, match="not the official file"):
        read_pickled_batch(path, "c99cafc152244af753f735de768cd75f")
    with pytest.raises(DataError, match="refers to .*exec"):
        read_pickled_batch(path, hashlib.md5(path.read_bytes()).hexdigest())
    assert not (tmp_path / "ran").exists()


def test_balanced_subset():
    labels = np.random.default_rng(0).permutation(
        np.repeat(np.arange(7), [90, 5, 90, 90, 90, 90, 90])
    )
    rows = balanced_subset(labels, 140, seed=4)
    counts = Counter(labels[rows].tolist())
    # Class 1 has only 5; the other six share what is left as evenly as possible.
    assert counts[1] == 5
    assert sorted(counts[c] for c in (0, 2, 3, 4, 5, 6)) == [22, 22, 22, 23, 23, 23]
    assert len(set(rows.tolist())) == 140
    assert set(balanced_subset(labels, 60, seed=4)) < set(rows)
    assert np.array_equal(rows, balanced_subset(labels, 140, seed=4))
    assert not np.array_equal(rows, balanced_subset(labels, 140, seed=5))
    # Not sorted by class: a reader without shuffling sees all classes early.
    assert len(set(labels[rows[:20]].tolist())) > 3


def test_embedded_set():
    content = FILE.read_bytes()
    assert hashlib.sha256(content).hexdigest() == (
        "0c6c4b2f5ee9fbf5f326f31791a60a6055cc4907064e13517e35ec26e2345a6a"
    )
    assert "MIT License" in FILE.with_name("fashion_mnist_COPYRIGHT.txt").read_text()
    train, test = (FashionMNISTMiniDataset(split=split) for split in ("train", "test"))
    assert Counter(train.get_gt_labels().tolist()) == dict.fromkeys(range(10), 200)
    assert Counter(test.get_gt_labels().tolist()) == dict.fromkeys(range(10), 50)
    with np.load(FILE, allow_pickle=False) as arrays:
        grey = arrays["train_images"][17]
    image = train.get_data_info(17)["img"]
    assert image.shape == (32, 32, 3)
    assert all(np.array_equal(image[2:30, 2:30, c], grey) for c in range(3))
    assert image.sum() == 3 * int(grey.sum())


def test_subset_and_indices():
    data = FashionMNISTMiniDataset(subset=40)
    assert Counter(data.get_gt_labels().tolist()) == dict.fromkeys(range(10), 4)
    assert data.get_cat_ids(3) == [data.get_data_info(3)["gt_label"]]
    assert len(FashionMNISTMiniDataset(indices=7)) == 7
    with pytest.raises(ConfigError, match="subset=9999 is more than the 2000 images"):
        FashionMNISTMiniDataset(subset=9999)
    with pytest.raises(ConfigError, match="split='val' does not exist"):
        FashionMNISTMiniDataset(split="val")


def test_quick_start_takes_cifar_else_the_embedded_set(small_cifar, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(QuickStartDataset, "note", lambda self, text: lines.append(text))
    monkeypatch.setattr(quick_start, "_announced", set())
    absent = str(tmp_path / "absent")
    data = QuickStartDataset(data_root=absent, split="train", subset=5000)
    assert len(data) == 2000
    assert data.metainfo["classes"][9] == "Ankle boot"
    QuickStartDataset(data_root=absent, split="test")
    assert len(lines) == 1
    assert "embedded cut of Fashion-MNIST" in lines[0]
    assert "prepare_data.py cifar10" in lines[0]

    write_prepared(tmp_path, small_cifar)
    data = QuickStartDataset(data_root=str(tmp_path), split="test", subset=10)
    assert data.metainfo["classes"][9] == "truck"
    assert len(data) == 10
    assert len(lines) == 2
    assert "CIFAR-10 from" in lines[1]

    np.save(tmp_path / "test_images.npy", np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(DataError, match=r"test_images\.npy"):
        QuickStartDataset(data_root=str(tmp_path), split="test")


def save_image(path, colour=(200, 10, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), colour).save(path)


def test_image_folder(tmp_path):
    for name in ("dog/b.png", "dog/a.jpg", "cat/deep/c.PNG", ".cache/d.png"):
        save_image(tmp_path / "train" / name)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    data = ImageFolderDataset(str(tmp_path), split="train", pipeline=[dict(type="LoadImage")])
    assert data.metainfo["classes"] == ("cat", "dog")
    found = [
        (data.get_data_info(i)["img_path"], data.get_data_info(i)["gt_label"]) for i in range(3)
    ]
    root = str(tmp_path / "train")
    assert found == [
        (f"{root}/cat/deep/c.PNG", 0),
        (f"{root}/dog/a.jpg", 1),
        (f"{root}/dog/b.png", 1),
    ]
    assert len(data) == 3
    assert data[2]["img"][0, 0].tolist() == [200, 10, 30]

    # A split without one class keeps the labels when the classes are named.
    save_image(tmp_path / "val" / "dog" / "x.png")
    save_image(tmp_path / "val" / "eel" / "x.png")
    named = ImageFolderDataset(str(tmp_path), split="val", classes=["eel", "dog"])
    assert named.get_gt_labels().tolist() == [0, 1]
    with pytest.raises(MissingFileError, match="the first is 'cat'"):
        ImageFolderDataset(str(tmp_path), split="val", classes=["cat", "dog"])


def test_image_folder_errors(tmp_path):
    with pytest.raises(MissingFileError, match="does not exist; expected one folder per class"):
        ImageFolderDataset(str(tmp_path), split="train")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="it has no class folders"):
        ImageFolderDataset(str(tmp_path), split="train")
    save_image(tmp_path / "train" / "loose.png")
    with pytest.raises(DataError, match=r"holds images such as 'loose\.png' but no class folders"):
        ImageFolderDataset(str(tmp_path), split="train")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"class folder '.*/train/empty' holds no image"):
        ImageFolderDataset(str(tmp_path), split="train")


def test_broken_image_is_named_and_can_be_skipped(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        save_image(tmp_path / name)
    broken = tmp_path / "a" / "2.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = ImageFolderDataset(str(tmp_path), pipeline=[dict(type="LoadImage")])
    with pytest.raises(DataError, match=r"a/2\.png' cannot be read"):
        KeyedDataset(data, seed=0)[1]
    sample = KeyedDataset(data, seed=0, bad_samples="skip")[1]
    assert sample["img_path"] != str(broken)

    from torch.utils.data import DataLoader

    loader = DataLoader(KeyedDataset(data, 0), num_workers=1, collate_fn=list, batch_size=3)
    with pytest.raises(DataError) as error:
        next(iter(loader))
    assert message_of(error.value).startswith(f"image '{broken}' cannot be read")


def test_imagenet_needs_its_1000_folders(tmp_path, monkeypatch):
    with pytest.raises(MissingFileError, match="prepare_data.py imagenet --val-images") as error:
        ImageNetDataset(str(tmp_path), split="val")
    assert f"{tmp_path}/train/<wnid>" in str(error.value)
    for i in range(3):
        save_image(tmp_path / "val" / f"n0000000{2 - i}" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DataError, match="has 3 class folders.*with 1000 folders"):
        ImageNetDataset(str(tmp_path), split="val")
    monkeypatch.setattr(ImageNetDataset, "CLASS_COUNT", 3)
    data = ImageNetDataset(str(tmp_path), split="val")
    assert data.metainfo["wnids"] == ("n00000000", "n00000001", "n00000002")
    assert data.get_data_info(2)["img_path"].endswith("val/n00000002/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(ConfigError, match="split='test'"):
        ImageNetDataset(str(tmp_path), split="test")


def write_table(root, *lines):
    (root / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(root / "table.csv")


def test_csv(tmp_path):
    for name in ("x.png", "y, z.png", "w.png"):
        save_image(tmp_path / "img" / name)
    table = write_table(
        tmp_path, "id,path,label", "1,img/x.png,wolf", '2,"img/y, z.png",ape', "3,img/w.png,wolf"
    )
    data = CSVImageDataset(table)
    assert data.metainfo["classes"] == ("ape", "wolf")
    assert data.get_gt_labels().tolist() == [1, 0, 1]
    assert data.get_data_info(1)["img_path"] == str(tmp_path / "img" / "y, z.png")
    assert CSVImageDataset("table.csv", data_root=str(tmp_path)).get_gt_labels().tolist() == [
        1,
        0,
        1,
    ]
    named = CSVImageDataset(table, classes=["wolf", "bear", "ape"])
    assert named.get_gt_labels().tolist() == [0, 2, 0]
    numbers = write_table(tmp_path, "path,label", "img/x.png,3", "img/w.png,0")
    data = CSVImageDataset(numbers)
    assert data.get_gt_labels().tolist() == [3, 0]
    assert len(data.metainfo["classes"]) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,label", "x.png,0"], r"table\.csv:1: column 'path' is missing"),
        (["path,label", "x.png,0", ",1"], r"table\.csv:3: path is empty"),
        (["path,label", "x.png"], r"table\.csv:2: label is empty"),
        (
            ["path,label", "x.png,0", "", "gone.png,1"],
            r"table\.csv:4: image '.*gone\.png' does not exist",
        ),
        (["path,label", "x.png,0", "x.png,1"], r"table\.csv:3: 'x\.png' already has the label '0'"),
        (["path,label"], r"table\.csv' holds no samples"),
    ],
)
def test_csv_errors_name_the_line(lines, message, tmp_path):
    save_image(tmp_path / "x.png")
    with pytest.raises((DataError, MissingFileError), match=message):
        CSVImageDataset(write_table(tmp_path, *lines))


def test_csv_unknown_class_and_missing_table(tmp_path):
    save_image(tmp_path / "x.png")
    table = write_table(tmp_path, "path,label", "x.png,cow")
    with pytest.raises(DataError, match=r"table\.csv:2: label 'cow' is none of the 2 classes"):
        CSVImageDataset(table, classes=["ape", "bee"])
    with pytest.raises(MissingFileError, match="expected a CSV file with the header path,label"):
        CSVImageDataset(str(tmp_path / "none.csv"))
    (tmp_path / "table.csv").write_bytes(b"path,label\nx.png,caf\xe9\n")
    with pytest.raises(DataError, match="UTF-8"):
        CSVImageDataset(table)


def test_inaturalist_labels_by_first_appearance_in_training(tmp_path):
    genus = ["Bos", "Apis", "Canis", "Apis"]
    (tmp_path / "categories.json").write_text(
        json.dumps([{"genus": g, "name": str(i)} for i, g in enumerate(genus)])
    )

    def write(split, ids):
        content = {
            "images": [
                {"file_name": f"train_val2018/Animals/{c}/{n}.jpg"} for n, c in enumerate(ids)
            ],
            "annotations": [{"category_id": c} for c in ids],
        }
        (tmp_path / f"{split}2018.json").write_text(json.dumps(content))

    write("train", [2, 3, 0, 1])
    write("val", [0, 1, 2, 3])
    train = INaturalistDataset(str(tmp_path), category="genus")
    assert train.metainfo["classes"] == ("Canis", "Apis", "Bos")
    assert train.get_gt_labels().tolist() == [0, 1, 2, 1]
    # The super-category is left out of the path.
    assert train.get_data_info(1)["img_path"] == str(tmp_path / "train_val2018" / "3" / "1.jpg")
    val = INaturalistDataset(str(tmp_path), split="val", category="genus")
    assert val.get_gt_labels().tolist() == [2, 1, 0, 1]
    assert INaturalistDataset(str(tmp_path), split="val").get_gt_labels().tolist() == [2, 3, 0, 1]

    with pytest.raises(ConfigError, match="category='colour' is not a level"):
        INaturalistDataset(str(tmp_path), category="colour")
    with pytest.raises(DataError, match="do not fit together"):
        INaturalistDataset(str(tmp_path), category="family")
    with pytest.raises(MissingFileError, match=r"train2019\.json"):
        INaturalistDataset(str(tmp_path), year=2019)


def test_every_data_set_is_registered_under_its_name():
    for cls in (
        CIFAR10Dataset,
        CIFAR100Dataset,
        FashionMNISTMiniDataset,
        QuickStartDataset,
        ImageFolderDataset,
        ImageNetDataset,
        CSVImageDataset,
        INaturalistDataset,
    ):
        assert DATASETS.get(cls.__name__) is cls
