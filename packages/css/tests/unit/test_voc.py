"""PASCAL VOC 2012 in every form of its layout."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from css.data.names import VOC_NAMES
from css.data.voc import VOC
from PIL import Image
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("css_layouts_voc", Path(__file__).parents[1] / "_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)
INSIDE = "VOCdevkit/VOC2012"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return layouts.write_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture
def root(official, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(official, tmp_path / "voc"))


def lists(root):
    return root / INSIDE / "ImageSets" / "Segmentation"


def test_the_official_layout(official):
    reader = VOC(root=official)
    reader.check()
    train, test = reader.items("train"), reader.items("test")
    assert [item.id for item in train] == list(layouts.voc_classes(20))
    assert [item.id for item in test] == [f"2008_{k:06d}" for k in range(20)]
    assert reader.items("val") == []
    assert train[0].image == official / INSIDE / "JPEGImages" / "2007_000000.jpg"
    assert {item.mask.parent.name for item in train + test} == {"SegmentationClassAug"}
    assert reader.class_sets("train") == [tuple(sorted(ids)) for ids in layouts.voc_classes(20).values()]
    assert reader.class_sets("test") == [tuple(sorted(ids)) for ids in layouts.voc_classes(20, 3).values()]
    assert reader.class_names()[:2] + reader.class_names()[14:15] + reader.class_names()[-1:] == [
        "aeroplane",
        "bicycle",
        "person",
        "tvmonitor",
    ]
    assert reader.num_classes == 20


def test_pixels_of_picture_and_mask(official):
    image, mask = layouts.scene(layouts.voc_classes(20)["2007_000004"], 4)
    reader = VOC(root=official)
    item = reader.items("train")[4]
    np.testing.assert_array_equal(reader.load_mask(item), mask)
    assert 255 in mask
    found = reader.load_image(item)
    assert (found.shape, found.dtype) == (image.shape, np.uint8)
    for number in layouts.voc_classes(20)["2007_000004"]:  # JPEG blurs; swapped colours differ by 40
        assert np.abs(found[mask == number].mean(0) - image[mask == number].mean(0)).max() < 12


@pytest.mark.parametrize("inside", ["VOCdevkit/VOC2012", "VOC2012", ""])
@pytest.mark.parametrize("form", ["pairs", "prefixed", "ids"])
def test_every_root_and_every_list(tmp_path, inside, form):
    layouts.write_voc(tmp_path, 6, 3, inside=inside, form=form)
    roots = [tmp_path, *[tmp_path / part for part in (inside, inside.split("/")[0]) if part]]
    for root in roots:
        items = VOC(root=root).items("train")
        assert [item.id for item in items] == list(layouts.voc_classes(6))
        assert all(item.mask.parent.name == "SegmentationClassAug" and item.mask.is_file() for item in items)
        assert len(VOC(root=root).items("test")) == 3


def test_the_list_of_mmseg_goes_by_another_name(root):
    (lists(root) / "train_aug.txt").rename(lists(root) / "trainaug.txt")
    assert len(VOC(root=root).items("train")) == 20


def test_without_augmentation_palette_masks_are_read_as_indices(official):
    reader = VOC(root=official, augmented=False)
    train = reader.items("train")
    assert [item.id for item in train] == [f"2007_{k:06d}" for k in range(1, 20, 2)]
    assert {item.mask.parent.name for item in train + reader.items("test")} == {"SegmentationClass"}
    with Image.open(train[0].mask) as stored:
        assert stored.mode == "P"
    for item in train[:3] + reader.items("test")[:3]:
        grey = np.array(Image.open(item.mask.parents[1] / "SegmentationClassAug" / item.mask.name))
        np.testing.assert_array_equal(reader.load_mask(item), grey)
    assert reader.class_sets("test") == VOC(root=official).class_sets("test")


def test_test_masks_come_from_the_official_ones_where_there_are_no_others(root):
    for path in (root / INSIDE / "SegmentationClassAug").glob("2008_*"):
        path.unlink()
    reader = VOC(root=root)
    assert {item.mask.parent.name for item in reader.items("test")} == {"SegmentationClass"}
    assert {item.mask.parent.name for item in reader.items("train")} == {"SegmentationClassAug"}
    assert reader.class_sets("test") == [tuple(sorted(ids)) for ids in layouts.voc_classes(20, 3).values()]


def test_nothing_but_the_official_archive(tmp_path):
    layouts.write_voc(tmp_path, 8, 4, augmented=False)
    with pytest.raises(UserError, match=r"train_aug\.txt is missing; .* or train on .*--data\.augmented false"):
        VOC(root=tmp_path).items("train")
    assert len(VOC(root=tmp_path, augmented=False).items("train")) == 4
    (lists(tmp_path) / "train_aug.txt").write_text("2007_000000\n")
    with pytest.raises(UserError, match=r"line 1: .*SegmentationClassAug.* SegmentationClassAug there, or use"):
        VOC(root=tmp_path).items("train")


def test_a_held_out_share(official):
    whole, part = VOC(root=official), VOC(root=official, val_share=0.3)
    train, val = ([item.id for item in part.items(split)] for split in ("train", "val"))
    assert 0 < len(val) < len(train)
    assert sorted(train + val) == [item.id for item in whole.items("train")]
    assert part.items("test") == whole.items("test")
    more = {item.id for item in VOC(root=official, val_share=0.6).items("val")}
    assert set(val) < more
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match=r"val_share=.*expected 0 <= val_share < 1"):
            VOC(root=official, val_share=share)


def test_the_order_of_the_list_is_kept_and_decides_nothing_else(root):
    path = lists(root) / "train_aug.txt"
    held_out = {item.id for item in VOC(root=root, val_share=0.3).items("val")}
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n\n")
    reader = VOC(root=root, val_share=0.3)
    assert {item.id for item in reader.items("val")} == held_out
    assert VOC(root=root).items("train")[0].id == "2007_000019"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("2007_000000 1", r"line 21: '2007_000000 1'; expected ID, or /JPEGImages/ID\.jpg"),
        ("/JPEGImages/2007_000000.jpg", r"line 21: .*expected ID, or"),
        ("/JPEGImages/a.jpg /SegmentationClassAug/a.png x", r"line 21: .*expected ID, or"),
        ("/JPEGImages/a.jpg /SegmentationClassAug/a.png", r"line 21: .*JPEGImages/a\.jpg is missing; unpack"),
        ("2009_000001", r"line 21: .*JPEGImages/2009_000001\.jpg is missing; unpack"),
        ("2007_000003", r"voc train: 2007_000003 occurs twice"),
    ],
)
def test_bad_lines_are_named(root, line, says):
    with (lists(root) / "train_aug.txt").open("a") as handle:
        handle.write(f"{line}\n")
    with pytest.raises(UserError, match=says):
        VOC(root=root).items("train")


def test_missing_parts_are_named(root, tmp_path):
    (root / INSIDE / "JPEGImages" / "2007_000002.jpg").unlink()
    with pytest.raises(UserError, match=r"train_aug\.txt, line 3: .*2007_000002\.jpg is missing"):
        VOC(root=root).items("train")
    (root / INSIDE / "SegmentationClassAug" / "2008_000001.png").unlink()
    (root / INSIDE / "SegmentationClass" / "2008_000001.png").unlink()
    with pytest.raises(UserError, match=r"val\.txt, line 2: .*2008_000001\.png is missing; copy SegmentationClassAug"):
        VOC(root=root).items("test")
    (lists(root) / "val.txt").write_text("\n")
    with pytest.raises(UserError, match=r"val\.txt has no lines"):
        VOC(root=root).items("test")
    (lists(root) / "val.txt").unlink()
    with pytest.raises(UserError, match=r"val\.txt is missing"):
        VOC(root=root).items("test")
    shutil.rmtree(root / INSIDE / "JPEGImages")
    with pytest.raises(UserError, match=r"JPEGImages does not exist; unpack"):
        VOC(root=root).items("train")


def test_a_wrong_root_is_named(tmp_path):
    with pytest.raises(UserError, match=r"voc root: .*Segmentation is missing; give the folder VOC2012"):
        VOC(root=tmp_path).items("train")
    with pytest.raises(UserError, match=r"voc root: .*nothing does not exist"):
        VOC(root=tmp_path / "nothing").items("train")
    with pytest.raises(UserError, match=r"voc: no root folder; .*--data\.root DIR"):
        VOC().items("train")
    with pytest.raises(UserError, match="split 'dev'; expected one of train, val, test"):
        VOC(root=tmp_path).items("dev")


def test_a_mask_of_another_data_set_is_named(root):
    path = root / INSIDE / "SegmentationClassAug" / "2007_000007.png"
    Image.fromarray(np.full(layouts.SIZE, 21, np.uint8)).save(path)
    with pytest.raises(UserError, match=r"2007_000007\.png: unknown id 21 in 3072 pixels"):
        VOC(root=root).class_sets("train")


def test_names_agree_with_mmseg():
    module = pytest.importorskip("mmseg.datasets.voc", exc_type=ImportError)
    assert ["background", *VOC_NAMES] == list(module.PascalVOCDataset.METAINFO["classes"])
