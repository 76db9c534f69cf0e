"""Readers of pictures on small files in the official layouts; what they say of missing and broken ones."""

import gzip
import importlib.util
import io
import os
import pickle
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fedcore.data import READERS, reader_class
from fedcore.data.array_pickle import load_array_pickle
from fedcore.data.cifar import CIFAR10, CIFAR100
from fedcore.data.digits import Digits
from fedcore.data.fashion import DEBIAN, FashionMNIST
from fedcore.data.tiny_imagenet import TinyImageNet
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("fed_layouts_images", Path(__file__).parents[1] / "_data_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)

REAL_FASHION = Path(os.environ.get("FASHION_MNIST", DEBIAN))
"""the real files, where they are installed or named"""


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------ digits


def test_digits_are_split_once_and_for_all():
    data = Digits()
    train, test = data.load("train"), data.load("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.input_shape == (1, 8, 8)
    assert (float(train.inputs.min()), float(train.inputs.max())) == (0.0, 1.0)
    assert test.targets[:10].tolist() == Digits().load("test").targets[:10].tolist()
    other = Digits(split_seed=1)
    assert other.fingerprint() != data.fingerprint() == Digits().fingerprint()
    both = torch.cat([train.inputs, test.inputs]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 1797  # nothing lost, nothing twice


def test_digits_are_those_of_scikit_learn(monkeypatch):
    from sklearn.datasets import load_digits

    known = load_digits()
    rows = {image.astype(int).tobytes(): label for image, label in zip(known.images, known.target, strict=True)}
    found = Digits().load("test")
    pictures = (found.inputs * 16).squeeze(1).numpy().round().astype(int)
    assert [rows[picture.tobytes()] for picture in pictures] == found.targets.tolist()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # the file is elsewhere: ask the library
    assert Digits().fingerprint() == "74a3097dd0538296"


def test_digits_refuse_to_test_on_everything():
    with pytest.raises(UserError, match=r"test_samples=1797; expected 1\.\.1796"):
        Digits(test_samples=1797)


# ------------------------------------------------------------------ Fashion-MNIST


def test_fashion_reads_the_four_files(tmp_path):
    root, arrays = layouts.fashion(tmp_path / "f")
    data = FashionMNIST(root=root)
    for split, (images, labels) in arrays.items():
        found = data.load(split)
        np.testing.assert_array_equal(found.inputs.numpy(), images[:, None])
        assert found.targets.tolist() == labels.tolist()
    assert data.load("train").augment is None
    assert FashionMNIST(root=root, augment=True).load("train").augment is not None
    assert FashionMNIST(root=root, augment=True).load("test").augment is None
    assert FashionMNIST(root=root, image_size=32).load("test").input_shape == (3, 32, 32)
    x, _ = data.load("test").batch(torch.tensor([4]))
    np.testing.assert_allclose(x[0, 0].numpy(), (arrays["test"][0][4] / 255 - 0.286) / 0.353, rtol=1e-4, atol=1e-5)


def test_fashion_reads_unpacked_files_too(tmp_path):
    root, arrays = layouts.fashion(tmp_path)
    for path in list(root.glob("*.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert FashionMNIST(root=root).load("train").targets.tolist() == arrays["train"][1].tolist()


def test_fashion_says_what_is_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match=r"does not exist; give the folder with its four idx files"):
        FashionMNIST(root=tmp_path / "nothing").check()
    root, _ = layouts.fashion(tmp_path)
    path = root / "t10k-labels-idx1-ubyte.gz"
    good = gzip.decompress(path.read_bytes())
    for content, said in (
        (b"no gzip", "cannot be read"),
        (gzip.compress(good)[:-4], "cannot be read"),
        (gzip.compress(b"text"), "no idx file"),
        (gzip.compress(good[:-1]), "its header says"),
        (gzip.compress(good[:6]), "cut short"),
        (gzip.compress(good[:-1] + b"\x0b"), r"label 11; expected 0\.\.9"),
        (gzip.compress(layouts.idx(np.zeros(3))), "expected"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            FashionMNIST(root=root).load("test")
    path.unlink()
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is missing"):
        FashionMNIST(root=root).load("test")


@pytest.mark.skipif(not REAL_FASHION.is_dir(), reason="Fashion-MNIST is not installed ($FASHION_MNIST)")
def test_the_real_fashion_mnist():
    data = FashionMNIST(root=REAL_FASHION)
    assert (len(data.load("train")), len(data.load("test"))) == (60000, 10000)
    pixels = data.load("train").inputs.float() / 255
    assert float(pixels.mean()) == pytest.approx(data.mean[0], abs=1e-4)
    assert float(pixels.std()) == pytest.approx(data.std[0], abs=1e-4)


# ------------------------------------------------------------------ CIFAR


def test_the_layout_is_what_pickle_itself_reads(tmp_path):
    root, arrays = layouts.cifar10(tmp_path)
    with (root / "cifar-10-batches-py" / "test_batch").open("rb") as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy.core is an old name
        batch = pickle.load(handle, encoding="latin1")
    np.testing.assert_array_equal(batch["data"].reshape(-1, 3, 32, 32), arrays["test"][0])


@pytest.mark.parametrize(("reader", "layout"), [(CIFAR10, layouts.cifar10), (CIFAR100, layouts.cifar100)])
def test_cifar_reads_the_official_batches(tmp_path, reader, layout):
    root, arrays = layout(tmp_path)
    for folder in (root, root / reader.folder):
        data = reader(root=folder)
        for split, (images, labels) in arrays.items():
            np.testing.assert_array_equal(data.load(split).inputs.numpy(), images)
            assert data.load(split).targets.tolist() == labels.tolist()
        assert data.num_classes == len(data.class_names()) == (10 if reader is CIFAR10 else 100)
    assert data.load("train").augment.padding == 4
    assert data.load("test").augment is None


def test_cifar_reads_batches_that_python_3_wrote_again(tmp_path):
    root, arrays = layouts.cifar10(tmp_path)
    path = root / "cifar-10-batches-py" / "test_batch"
    images, labels = arrays["test"]
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({"data": images.reshape(-1, 3072), "labels": labels.tolist()}, protocol=protocol))
        np.testing.assert_array_equal(CIFAR10(root=root).load("test").inputs.numpy(), images)


def test_cifar_says_what_is_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match="no root folder; unpack cifar-10-python"):
        CIFAR10().check()
    root, _ = layouts.cifar10(tmp_path)
    path = root / "cifar-10-batches-py" / "data_batch_3"
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]}
    for content, said in (
        (layouts.pickled({**batch, "labels": [1, 10]}), r"label 10; expected 0\.\.9"),
        (layouts.pickled({**batch, "labels": [1]}), "2 pictures and not as many labels"),
        (layouts.pickled({**batch, "data": np.zeros((2, 99), np.uint8)}), r"data of .* is \(2, 99\)"),
        (layouts.pickled({"data": batch["data"], "fine_labels": [1, 2]}), "has no 'labels' but data, fine_labels"),
        (layouts.pickled([1]), "holds list"),
        (b"", "not a pickle"),
        (path.read_bytes()[:500], "not a pickle"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            CIFAR10(root=root).load("train")
    path.unlink()
    with pytest.raises(UserError, match=r"data_batch_3 is missing; unpack"):
        CIFAR10(root=root).load("train")
    (root / "cifar-10-batches-py" / "batches.meta").unlink()
    with pytest.raises(UserError, match=r"batches\.meta is missing"):
        CIFAR10(root=root).class_names()


class _Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_nothing_in_a_pickle_is_ever_called(tmp_path):
    target, path = tmp_path / "touched", tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": _Bomb(target)}))
    with pytest.raises(UserError, match="it asks for pathlib"):
        load_array_pickle(path, "cifar10")
    for opcodes in (b"cos\nsystem\n(U\x04trueltR.", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."):
        path.write_bytes(opcodes)
        with pytest.raises(UserError, match=r"it asks for os\.system"):
            load_array_pickle(path, "cifar10")
    assert not target.exists()


@pytest.mark.parametrize("dtype", [np.float32, object, np.uint16])
def test_only_arrays_of_bytes_are_read(tmp_path, dtype):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(np.zeros(3, dtype), protocol=2))
    with pytest.raises(UserError, match="not a pickle of plain values and bytes"):
        load_array_pickle(path, "cifar10")


# ------------------------------------------------------------------ Tiny-ImageNet


def test_tiny_imagenet_reads_the_official_layout(tmp_path):
    root = layouts.tiny_imagenet(tmp_path)
    data = TinyImageNet(root=root)
    assert data.class_names() == ["Egyptian cat", "reel", "volleyball"]
    train, test = data.load("train"), data.load("test")
    assert train.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert test.targets.tolist() == [1, 0, 2, 1]
    for found in (train, test):
        assert found.inputs.shape[1:] == (3, 64, 64)
        levels = found.inputs.float().mean(dim=(1, 2, 3))
        assert levels.tolist() == pytest.approx([40 + 80 * int(label) for label in found.targets], abs=1.5)
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    torch.testing.assert_close(test[0][0], (test.inputs[0] / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_tiny_imagenet_decodes_once_and_again_where_a_file_changed(tmp_path, monkeypatch):
    root = layouts.tiny_imagenet(tmp_path)
    first = TinyImageNet(root=root).fingerprint()

    def refuse(files, side, picture):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr("fedcore.data.picture_cache.decode", refuse)
        assert TinyImageNet(root=root).fingerprint() == first
    path = root / "tiny-imagenet-200" / "train" / layouts.WNIDS[0] / "images" / f"{layouts.WNIDS[0]}_1.JPEG"
    content = io.BytesIO()
    layouts.Image.new("RGB", (64, 64), (1, 2, 250)).save(content, "JPEG")
    time.sleep(0.01)
    path.write_bytes(content.getvalue())
    assert TinyImageNet(root=root).fingerprint() != first


def test_tiny_imagenet_says_what_is_missing_or_broken(tmp_path):
    root = layouts.tiny_imagenet(tmp_path)
    inside = root / "tiny-imagenet-200"
    (inside / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(UserError, match=r"val_2\.JPEG is missing; unpack"):
        TinyImageNet(root=root).load("test")
    annotations = inside / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn999\t0\t0\t1\t1\n")
    with pytest.raises(UserError, match=r"val_annotations\.txt, line 1: .*expected FILE, a wnid"):
        TinyImageNet(root=root).load("test")
    images = inside / "train" / layouts.WNIDS[1] / "images"
    (images / f"{layouts.WNIDS[1]}_0.JPEG").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"_0\.JPEG cannot be decoded"):
        TinyImageNet(root=root).load("train")
    layouts.Image.new("RGB", (32, 64)).save(images / f"{layouts.WNIDS[1]}_0.JPEG")
    with pytest.raises(UserError, match="is 32x64; expected 64x64"):
        TinyImageNet(root=root).load("train")
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"has no \.JPEG files"):
        TinyImageNet(root=root).load("train")
    (inside / "wnids.txt").write_text("a\na\n")
    with pytest.raises(UserError, match="empty or has an id twice"):
        TinyImageNet(root=root).load("train")


# ------------------------------------------------------------------ table


def test_unknown_readers_get_a_hint():
    assert reader_class("cifar10") is CIFAR10
    with pytest.raises(UserError, match=r"unknown data 'cifar'; did you mean cifar10.*known: digits"):
        reader_class("cifar")
    assert len(READERS) == len(set(READERS.values()))
