"""DomainNet, MNIST, STL-10 and SVHN on small files in the official layouts."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from fedcore.data.domainnet import DOMAINS, DomainNet
from fedcore.data.mnist import MNIST
from fedcore.data.picture_cache import check_memory, open_picture
from fedcore.data.stl10 import STL10
from fedcore.data.svhn import SVHN
from fedcore.data.tiny_imagenet import TinyImageNet
from fedcore.data_command import find_problems
from fedcore.partition import by_column
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("fed_layouts_pictures", Path(__file__).parents[1] / "_data_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------ DomainNet


def test_domainnet_has_six_natural_clients(tmp_path):
    data = DomainNet(root=layouts.domainnet(tmp_path / "d"), image_size=16)
    data.check()
    train, test = data.load("train"), data.load("test")
    assert train.group_names == DOMAINS == layouts.DOMAINS
    assert by_column(train.groups.numpy(), train.group_names).sizes == [6] * 6
    assert data.class_names() == list(layouts.THINGS)
    for found in (train, test):
        assert found.inputs.shape[1:] == (3, 16, 16)
        level = 10 + 40 * found.groups + 10 * found.targets
        assert found.inputs.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx(level.tolist(), abs=1.5)
    assert (len(train), len(test)) == (36, 18)
    assert train.targets[:6].tolist() == [0, 0, 1, 1, 2, 2]
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    expected = (test.inputs[0] / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(test[0][0], expected, rtol=1e-5, atol=1e-5)
    assert test.augment is None
    assert train.augment is not None


def test_domains_can_be_chosen_and_cut(tmp_path):
    root = layouts.domainnet(tmp_path / "d")
    data = DomainNet(root=root, image_size=8, domains="sketch, clipart", per_class=1, augment=False)
    train = data.load("train")
    assert train.group_names == ("clipart", "sketch")
    assert (len(train), len(data.load("test"))) == (6, 6)
    assert train.augment is None
    one = DomainNet(root=root, image_size=8, domains="real")
    assert one.load("train").groups.unique().tolist() == [0]
    assert one.fingerprint() != data.fingerprint()
    (root / "splits").mkdir()
    for path in root.glob("*.txt"):
        path.rename(root / "splits" / path.name)
    assert DomainNet(root=root, image_size=8, domains="real").fingerprint() == one.fingerprint()


def test_a_class_without_pictures_keeps_its_number(tmp_path):
    root = layouts.domainnet(tmp_path / "d")
    for split in ("train", "test"):
        path = root / f"painting_{split}.txt"
        path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.endswith(" 1\n")))
    data = DomainNet(root=root, image_size=8, domains="painting")
    assert data.class_names() == ["aircraft_carrier", "class 1", "alarm_clock"]
    assert find_problems(data.load("train"), data, "train") == []  # the official lists have such classes
    assert DomainNet(root=root, image_size=8).class_names() == list(layouts.THINGS)


def test_domainnet_says_what_is_missing_or_broken(tmp_path):
    root = layouts.domainnet(tmp_path / "d")
    path = root / "infograph_test.txt"
    for line, said in (
        ("infograph/bee/x.jpg", r"infograph_test\.txt, line 1: .*expected infograph/CLASS/FILE\.jpg LABEL"),
        ("clipart/bee/x.jpg 3", "expected infograph/CLASS"),
        ("infograph/../x.jpg 3", "expected infograph/CLASS"),
        ("infograph/bee/x.jpg 1", r"label 1 is airplane and, in infograph_test\.txt, bee; take all lists from one"),
        ("", r"infograph_test\.txt has no lines"),
    ):
        path.write_text(line + "\n")
        with pytest.raises(UserError, match=said):
            DomainNet(root=root, image_size=8).class_names()
    path.write_text("infograph/airplane/none.jpg 1\n")
    with pytest.raises(UserError, match=r"none\.jpg is missing; give the folder with clipart_train"):
        DomainNet(root=root, image_size=8).load("test")
    (root / "infograph" / "airplane" / "none.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"none\.jpg cannot be decoded"):
        DomainNet(root=root, image_size=8).load("test")
    path.unlink()
    with pytest.raises(UserError, match=r"infograph_test\.txt is missing; give the folder"):
        DomainNet(root=root, image_size=8).load("test")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"domains": "skech"}, "unknown domain 'skech'; did you mean sketch"),
        ({"image_size": 0}, "image_size=0; expected a side of at least 8"),
        ({"per_class": -1}, "per_class=-1"),
    ],
)
def test_domainnet_refuses_other_options(options, said):
    with pytest.raises(UserError, match=said):
        DomainNet(**options)


def test_pictures_beyond_the_memory_are_refused_before_any_is_read():
    check_memory("domainnet", 1000, 64, "choose fewer")
    with pytest.raises(UserError, match=r"10000000000 pictures of 224x224 need \d+ GiB of memory.*; choose fewer"):
        check_memory("domainnet", 10**10, 224, "choose fewer")


@pytest.mark.parametrize("size", [(64, 40), (40, 64), (33, 33), (9, 300)])
def test_the_centre_of_the_resized_picture_is_kept(tmp_path, size):
    functional = pytest.importorskip("torchvision.transforms.functional")
    rng = np.random.default_rng(0)
    picture = layouts.Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    picture.save(tmp_path / "p.png")
    expected = functional.center_crop(functional.resize(picture, 16), [16, 16])
    np.testing.assert_array_equal(open_picture(tmp_path / "p.png", "x", 16), np.asarray(expected))
    assert open_picture(tmp_path / "p.png", "x").shape == (size[1], size[0], 3)


def test_tiny_imagenet_can_be_numbered_by_sorted_ids(tmp_path):
    root = layouts.tiny_imagenet(tmp_path)
    path = root / "tiny-imagenet-200" / "wnids.txt"
    path.write_text("".join(f"{wnid}\n" for wnid in reversed(layouts.WNIDS)))
    assert TinyImageNet(root=root).wnids() == list(reversed(layouts.WNIDS))
    data = TinyImageNet(root=root, class_order="sorted")
    assert data.wnids() == list(layouts.WNIDS)
    assert data.load("train").targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(UserError, match="class_order='other'; expected wnids or sorted"):
        TinyImageNet(root=root, class_order="other").wnids()


# ------------------------------------------------------------------ MNIST, STL-10, SVHN


@pytest.mark.parametrize(("made", "write"), [(STL10, layouts.stl10), (SVHN, layouts.svhn)])
def test_arrays_are_those_of_the_files(made, write, tmp_path):
    root, arrays = write(tmp_path / "files")
    data = made(root=root)
    data.check()
    for split, (images, labels) in arrays.items():
        np.testing.assert_array_equal(data.load(split).inputs.numpy(), images)
        assert data.load(split).targets.tolist() == labels.tolist()
    assert len(data.class_names()) == 10
    assert (data.load("train").augment is None) == (made is SVHN)


def test_mnist_reads_the_four_files(tmp_path):
    root, arrays = layouts.fashion(tmp_path / "MNIST" / "raw")
    for given in (root, tmp_path):
        found = MNIST(root=given).load("test")
        np.testing.assert_array_equal(found.inputs.numpy(), arrays["test"][0][:, None])
    assert MNIST().class_names() == [str(digit) for digit in range(10)]
    (root / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"mnist: .*t10k-labels-idx1-ubyte\.gz is missing; give the folder"):
        MNIST(root=root).load("test")
    with pytest.raises(UserError, match="mnist: no root folder"):
        MNIST().load("test")


def test_stl10_says_what_is_missing_or_broken(tmp_path):
    root, _ = layouts.stl10(tmp_path)
    labels = root / "stl10_binary" / "test_y.bin"
    for content, said in (
        (bytes(10), r"labels 0\.\.0; expected 1\.\.10"),
        (bytes([1] * 9), r"test_X\.bin has 276480 bytes, test_y\.bin 9; expected 27648 and 1 a picture"),
    ):
        labels.write_bytes(content)
        with pytest.raises(UserError, match=said):
            STL10(root=root).load("test")
    labels.unlink()
    with pytest.raises(UserError, match=r"test_y\.bin is missing; unpack stl10_binary"):
        STL10(root=root / "stl10_binary").load("test")


def test_svhn_says_what_is_missing_or_broken(tmp_path):
    from scipy.io import savemat

    root, _ = layouts.svhn(tmp_path)
    path = root / "test_32x32.mat"
    good = {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [10]], np.uint8)}
    for change, said in (
        ({"X": np.zeros((32, 32, 3, 3), np.uint8)}, r"holds X \(32, 32, 3, 3\) and 2 labels"),
        ({"X": np.zeros((32, 32, 3, 2))}, r"other numbers than bytes and labels 1\.\.10"),
        ({"y": np.array([[0], [1]], np.uint8)}, r"other numbers than bytes and labels 1\.\.10"),
    ):
        savemat(path, {**good, **change})
        with pytest.raises(UserError, match=said):
            SVHN(root=root).load("test")
    savemat(path, {"X": good["X"]})
    with pytest.raises(UserError, match=r"cannot be read \('y'\); copy it again"):
        SVHN(root=root).load("test")
    path.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(UserError, match="cannot be read"):
        SVHN(root=root).load("test")
    path.unlink()
    with pytest.raises(UserError, match=r"test_32x32\.mat is missing; give the folder with"):
        SVHN(root=root).load("test")
