"""ADE20K in its official layout."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from css.data.ade import ADE20K
from css.data.names import ADE20K_NAMES
from PIL import Image
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("css_layouts_ade", Path(__file__).parents[1] / "_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)
INSIDE = "ADEChallengeData2016"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return layouts.write_ade(tmp_path_factory.mktemp("ade"))


@pytest.fixture
def root(official, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(official, tmp_path / "ade"))


def test_the_official_layout(official):
    reader = ADE20K(root=official)
    reader.check()
    train, test = reader.items("train"), reader.items("test")
    assert [item.id for item in train] == [f"ADE_train_{k:08d}" for k in range(1, 13)]
    assert [item.id for item in test] == [f"ADE_val_{k:08d}" for k in range(1, 7)]
    assert reader.items("val") == []
    assert train[0].image == official / INSIDE / "images" / "training" / "ADE_train_00000001.jpg"
    assert test[0].mask == official / INSIDE / "annotations" / "validation" / "ADE_val_00000001.png"
    assert reader.class_sets("train") == [tuple(sorted(ids)) for ids in layouts.ade_classes(12).values()]
    assert ADE20K(root=official / INSIDE).items("train") == train
    assert reader.num_classes == 150


def test_id_0_stays_background(official):
    reader = ADE20K(root=official)
    mask = reader.load_mask(reader.items("train")[0])
    expected = layouts.scene(layouts.ade_classes(1)["ADE_train_00000001"], 0, ignore=False)[1]
    np.testing.assert_array_equal(mask, expected)
    assert 0 in mask
    assert 255 not in mask


def test_a_held_out_share(official):
    part = ADE20K(root=official, val_share=0.3)
    train, val = ([item.id for item in part.items(split)] for split in ("train", "val"))
    assert 0 < len(val) < len(train)
    assert sorted(train + val) == [item.id for item in ADE20K(root=official).items("train")]
    with pytest.raises(UserError, match="val_share=2"):
        ADE20K(root=official, val_share=2)


def test_missing_parts_are_named(root, tmp_path):
    home = root / INSIDE
    (home / "images" / "training" / "Thumbs.db").write_bytes(b"")
    assert len(ADE20K(root=root).items("train")) == 12
    (home / "annotations" / "training" / "ADE_train_00000005.png").unlink()
    with pytest.raises(UserError, match=r"ADE_train_00000005\.png is missing, ADE_train_00000005\.jpg is there"):
        ADE20K(root=root).items("train")
    for path in (home / "images" / "validation").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"validation has no \.jpg files"):
        ADE20K(root=root).items("test")
    shutil.rmtree(home / "images" / "validation")
    with pytest.raises(UserError, match=r"ade20k images: .*validation does not exist; unpack"):
        ADE20K(root=root).items("test")
    with pytest.raises(UserError, match=r"ade20k root: .*annotations is missing; give the folder ADEChallengeData2016"):
        ADE20K(root=tmp_path).items("train")


def test_an_unknown_id_is_named(root):
    path = root / INSIDE / "annotations" / "validation" / "ADE_val_00000002.png"
    Image.fromarray(np.full((4, 4), 151, np.uint8)).save(path)
    with pytest.raises(UserError, match=r"ADE_val_00000002\.png: unknown id 151 in 16 pixels; .*1\.\.150"):
        ADE20K(root=root).class_sets("test")


def test_names_agree_with_mmseg():
    module = pytest.importorskip("mmseg.datasets.ade", exc_type=ImportError)
    assert [name.strip() for name in module.ADE20KDataset.METAINFO["classes"]] == ADE20K_NAMES
