"""Pairs of pictures and masks: folders, lists, class names."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
from css.data.pairs import Pairs
from PIL import Image
from polymodal.errors import UserError

_spec = importlib.util.spec_from_file_location("css_layouts_pairs", Path(__file__).parents[1] / "_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)
SETS = [(1, 2), (2, 3), (3, 4), (1, 4)]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folders(tmp_path):
    return layouts.write_pairs(tmp_path / "folders")


@pytest.fixture
def listed(tmp_path):
    return layouts.write_pairs(tmp_path / "listed", form="csv")


@pytest.mark.parametrize("form", ["folders", "csv"])
def test_both_forms(tmp_path, form):
    reader = Pairs(root=layouts.write_pairs(tmp_path, train=8, test=4, val=2, form=form))
    reader.check()
    for split, count in (("train", 8), ("val", 2), ("test", 4)):
        items = reader.items(split)
        assert [item.id for item in items] == [f"{split}{k}" for k in range(count)]
        assert all(item.image.is_file() and item.mask.stem == item.id for item in items)
        assert reader.class_sets(split) == [SETS[k % 4] for k in range(count)]
    assert reader.class_names() == ["disc", "ring", "bar", "star"]
    assert reader.num_classes == 4


def test_names_sort_as_numbers(tmp_path):
    root = layouts.write_pairs(tmp_path, train=12)
    assert [item.id for item in Pairs(root=root).items("train")][-3:] == ["train9", "train10", "train11"]


def test_images_of_every_suffix_and_files_that_are_none(folders):
    images = folders / "train" / "images"
    with Image.open(images / "train0.jpg") as picture:
        picture.save(images / "train0.PNG", format="PNG")
    (images / "train0.jpg").unlink()
    for name in (".train1.jpg", "Thumbs.db", "notes.txt"):
        (images / name).write_bytes(b"")
    items = Pairs(root=folders).items("train")
    assert len(items) == 8
    assert items[0].image.name == "train0.PNG"


def test_a_list_is_used_where_there_is_one(folders):
    text = '\ufeffmask, image ,id\r\ntrain/masks/train3.png, "train/images/train3.jpg",x\r\n'
    (folders / "train.csv").write_bytes(text.encode())
    (item,) = Pairs(root=folders).items("train")
    assert (item.id, item.image.name, item.mask.name) == ("x", "train3.jpg", "train3.png")
    assert len(Pairs(root=folders).items("test")) == 4
    (folders / "train.csv").write_text("picture,mask\na,b\n")
    with pytest.raises(UserError, match=r"train\.csv, line 1: 'picture,mask'; expected the columns image,mask"):
        Pairs(root=folders).items("train")


def test_a_held_out_share(tmp_path):
    root = layouts.write_pairs(tmp_path / "a", train=20)
    part = Pairs(root=root, val_share=0.3)
    train, val = ([item.id for item in part.items(split)] for split in ("train", "val"))
    assert 0 < len(val) < len(train)
    assert sorted(train + val) == sorted(item.id for item in Pairs(root=root).items("train"))
    assert Pairs(root=root).items("val") == []
    both = layouts.write_pairs(tmp_path / "b", val=2)
    for split in ("train", "val"):
        with pytest.raises(UserError, match=r"val_share=0\.3, but pairs has validation pictures in .*val; give one"):
            Pairs(root=both, val_share=0.3).items(split)
    with pytest.raises(UserError, match="val_share=-1"):
        Pairs(root=both, val_share=-1)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("pictures/gone.jpg,labels/train0.png", r"line 10: .*gone\.jpg is missing; mend or remove the line"),
        ("pictures/train0.jpg,labels/gone.png,", r"line 10: expected a path in each of the columns"),
        ("pictures/train0.jpg", r"line 10: expected a path in each of the columns"),
        (",labels/train0.png", r"line 10: expected a path in each of the columns"),
        ("pictures/train0.jpg,labels/train0.png", r"line 10: id train0 is also that of line 2; add a column id"),
        ("none/train0.jpg,labels/x.png", r"line 10: id train0 is also"),
        ("none/x.jpg,labels/x.png", r"line 10: .*none does not exist; mend"),
    ],
)
def test_bad_rows_are_named(listed, row, says):
    with (listed / "train.csv").open("a") as handle:
        handle.write(f"{row}\n")
    with pytest.raises(UserError, match=says):
        Pairs(root=listed).items("train")


def test_ids_are_file_names(listed):
    text = "image,mask,id\npictures/train0.jpg,labels/train0.png,a/b\n"
    (listed / "train.csv").write_text(text)
    with pytest.raises(UserError, match="line 2: id 'a/b' is no file name"):
        Pairs(root=listed).items("train")


def test_files_without_a_partner_are_named(folders):
    (folders / "train" / "masks" / "train2.png").unlink()
    with pytest.raises(UserError, match=r"train2\.jpg has no mask of the same name; add it or remove"):
        Pairs(root=folders).items("train")
    (folders / "train" / "images" / "train1.jpg").unlink()
    with pytest.raises(UserError, match=r"train1\.png has no image of the same name \(2 such files\)"):
        Pairs(root=folders).items("train")
    shutil.copy(folders / "test" / "images" / "test0.jpg", folders / "test" / "images" / "test0.jpeg")
    with pytest.raises(UserError, match=r"test0\.jpeg and test0\.jpg have the same stem; keep one"):
        Pairs(root=folders).items("test")


def test_missing_parts_are_named(folders):
    shutil.rmtree(folders / "test" / "masks")
    with pytest.raises(UserError, match=r"pairs masks: .*masks does not exist; give a folder with classes\.txt"):
        Pairs(root=folders).items("test")
    shutil.rmtree(folders / "test")
    with pytest.raises(UserError, match=r"has neither the folder test nor test\.csv"):
        Pairs(root=folders).check()
    for path in (folders / "train").rglob("train*"):
        path.unlink()
    with pytest.raises(UserError, match="the training split is empty"):
        Pairs(root=folders).check()


@pytest.mark.parametrize("first", ["", "background\n", "_background_\n", "Background\n"])
def test_a_first_line_background_is_id_0(tmp_path, first):
    path = tmp_path / "names.txt"
    path.write_text(f"{first}disc\n two words \n\n\n")
    assert Pairs(root=tmp_path, classes=path).class_names() == ["disc", "two words"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\n\nb\n", r"names\.txt, line 2 is empty; ids are places in the list"),
        ("a\nb\na\n", r"names\.txt, line 3: 'a' is there already"),
        ("background\na\na\n", r"names\.txt, line 3: 'a' is there already"),
        ("", r"names\.txt has 0 names; expected 1\.\.254"),
        ("background\n", r"names\.txt has 0 names"),
        ("".join(f"c{k}\n" for k in range(255)), r"names\.txt has 255 names"),
    ],
)
def test_bad_class_names_are_refused(tmp_path, text, says):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UserError, match=says):
        Pairs(root=tmp_path, classes=tmp_path / "names.txt").class_names()


def test_missing_class_names_are_named(folders):
    (folders / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"classes\.txt is missing"):
        Pairs(root=folders).class_sets("train")


def test_an_unknown_id_is_named(folders):
    path = folders / "train" / "masks" / "train3.png"
    Image.fromarray(np.full((4, 4), 5, np.uint8)).save(path)
    with pytest.raises(UserError, match=r"train3\.png: unknown id 5 in 16 pixels; .*1\.\.4"):
        Pairs(root=folders).fingerprint()
