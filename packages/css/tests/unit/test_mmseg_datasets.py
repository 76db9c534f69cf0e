"""Steps of a continual task inside mmsegmentation's pipelines."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from css.data.ade import ADE20K
from css.data.voc import VOC
from css.task import Task
from polymodal.errors import UserError

pytest.importorskip("mmseg")
from css.data.mmseg_datasets import CSSADE20K, CSSPascalVOC
from mmseg.registry import DATASETS

_spec = importlib.util.spec_from_file_location("_layouts", Path(__file__).parents[1] / "_layouts.py")
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)

LOAD = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
PACK = [{"type": "RandomFlip", "prob": 1.0}, {"type": "PackSegInputs"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def voc(tmp_path):
    return layouts.write_voc(tmp_path / "voc")


def expected(reader, task, step, split, keep_old=False, unseen_as=0):
    """Id -> labels by channel, worked out class by class."""
    new, seen = set(task.steps[step]), set(task.seen(step))
    wanted = seen if split == "test" or keep_old else new
    result = {}
    for item in reader.items(split):
        raw = reader.load_mask(item)
        if not (seen if split == "test" else new) & set(np.unique(raw).tolist()):
            continue
        label = np.where(raw == 255, 255, 0)
        for number in range(1, reader.num_classes + 1):
            value = task.channel(number) if number in wanted else (unseen_as if split == "test" else 0)
            label[raw == number] = value
        result[str(item.image)] = label
    return result


@pytest.mark.parametrize(
    ("split", "step", "options"),
    [
        ("train", 0, {}),
        ("train", 1, {}),
        ("train", 2, {"keep_old": True}),
        ("test", 1, {}),
        ("test", 1, {"unseen_as": 255}),
    ],
)
def test_pictures_and_labels_of_a_step(voc, split, step, options):
    order = tuple(range(20, 0, -1))
    dataset = DATASETS.build(
        {"type": "CSSPascalVOC", "data_root": str(voc), "task": "10-5", "order": order, "step": step, "split": split}
        | {"pipeline": LOAD}
        | options
    )
    task = Task("10-5", 20, order)
    labels = expected(VOC(root=voc), task, step, split, **options)
    assert len(dataset) == len(labels) > 0
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample["gt_seg_map"].dtype == np.uint8
        assert np.array_equal(sample["gt_seg_map"], labels[sample["img_path"]])
        assert sample["img"].shape[:2] == sample["gt_seg_map"].shape


def test_classes_and_colours_follow_the_learning_order(voc):
    order = (3, 1, 2, *range(4, 21))
    dataset = CSSPascalVOC(voc, task="15-1", order=order, step=0, test_mode=True)
    assert dataset.metainfo["classes"][:4] == ("background", "bird", "aeroplane", "bicycle")
    assert len(dataset.metainfo["classes"]) == 16
    assert dataset.metainfo["palette"][1] == layouts.color_map()[3]
    assert len(CSSPascalVOC(voc, task="15-1", order=order, step=1).metainfo["classes"]) == 17


def test_settings_reach_the_selection(voc):
    overlap = CSSPascalVOC(voc, task="10-5", setting="overlap", step=0)
    disjoint = CSSPascalVOC(voc, task="10-5", setting="disjoint", step=0)
    assert {d["img_path"] for d in disjoint} < {d["img_path"] for d in overlap}
    whole = CSSPascalVOC(voc, task="offline")
    parts = [CSSPascalVOC(voc, task="10-5", setting="partitioned", step=step, seed=3) for step in range(3)]
    assert sum(map(len, parts)) == len(whole)


def test_sequential_keeps_old_labels(voc):
    dataset = CSSPascalVOC(voc, task="10-5", setting="sequential", step=2, pipeline=LOAD)
    found = set().union(*(np.unique(sample["gt_seg_map"]).tolist() for sample in dataset))
    assert min(found - {0}) <= 10


def test_ade_keeps_0_as_background_and_runs_a_whole_pipeline(tmp_path):
    root = layouts.write_ade(tmp_path / "ade")
    dataset = DATASETS.build(
        {"type": "CSSADE20K", "data_root": str(root), "task": "100-50", "step": 1, "pipeline": LOAD + PACK}
    )
    labels = expected(ADE20K(root=root), Task("100-50", 150), 1, "train")
    assert len(dataset.metainfo["classes"]) == 151
    for index in range(len(dataset)):
        packed = dataset[index]
        sample = packed["data_samples"]
        label = labels[sample.img_path][:, ::-1]
        assert np.array_equal(sample.gt_sem_seg.data[0].numpy(), label)
        assert packed["inputs"].shape[1:] == label.shape
        assert 0 in label


def test_reader_options_and_refusals(voc):
    held = CSSPascalVOC(voc, task="10-5", split="val", reader={"val_share": 0.5})
    train = CSSPascalVOC(voc, task="10-5", reader={"val_share": 0.5})
    assert not {d["img_path"] for d in held} & {d["img_path"] for d in train}
    with pytest.raises(UserError, match="steps 0..2"):
        CSSPascalVOC(voc, task="10-5", step=3)
    with pytest.raises(UserError, match="does not fit 20 classes"):
        CSSPascalVOC(voc, task="10-7")
    with pytest.raises(UserError, match="setting 'both'"):
        CSSPascalVOC(voc, task="10-5", setting="both")
    with pytest.raises(UserError, match="does not exist"):
        CSSADE20K(voc / "nothing", task="100-50")
