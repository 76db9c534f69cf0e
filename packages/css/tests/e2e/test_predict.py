"""``css-predict``: the very segmentation of the test, at the picture's own size; files, broken files, mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from css import predict_command
from css.checkpoint import load_network
from css.data.files import palette, read_image, read_mask
from css.data.pairs import Pairs
from css.data.transforms import normalise
from css.pictures import overlay
from css.predict_command import plan, segment_image, upsampled_labels
from css.task import Task
from PIL import Image
from polymodal.errors import UserError

ORDER = (3, 1, 4, 2)


@pytest.fixture
def pairs(tmp_path, layouts):
    """Eight and four pictures of 48 x 64, two classes each."""
    return Pairs(root=layouts.write_pairs(tmp_path / "pairs"))


@pytest.fixture
def step(pairs, untrained):
    """Step folder of a random network that knows classes 3, 1 and 4 as channels 1, 2 and 3."""
    return untrained(pairs, Task("2-1", 4, ORDER), 1)


def index_mask(path):
    """Mode and values of a PNG, without the code under test."""
    with Image.open(path) as image:
        return image.mode, image.getpalette()[:15], np.asarray(image)


def by_hand(folder, image, short_side):
    """Raw ids of a picture: resize, normalise, segment, resize logits, sigmoid above one half."""
    loaded = load_network(folder)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    height, width = image.shape[:2]
    if short_side:
        small = (
            (short_side, int(short_side * width / height))
            if height <= width
            else (int(short_side * height / width), short_side)
        )
        tensor = F.interpolate(tensor[None].float(), small, mode="bilinear", antialias=True)[0].round().byte()
    with torch.no_grad():
        logits = loaded.net(normalise(tensor)[None]).logits
        logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)[0]
    scores, places = logits[1:].sigmoid().max(0)
    return np.where(scores > 0.5, np.array((0, *ORDER))[places.numpy() + 1], 0)


def test_masks_are_the_networks_segmentation_in_the_ids_of_the_data(pairs, step, css_predict, tmp_path):
    items = pairs.items("test")
    for short, options in ((32, []), (0, ["--short_side", 0]), (24, ["--short_side=24"])):
        out = tmp_path / f"out{short}"
        result = css_predict(step, "--images", *(item.image for item in items), "--out", out, *options)
        assert result.code == 0, result.err
        for item in items:
            mode, colours, mask = index_mask(out / "masks" / f"{item.image.stem}.png")
            image = read_image(item.image)
            assert mode == "P"
            assert colours == palette()[:5].ravel().tolist()
            assert mask.shape == image.shape[:2]
            assert set(np.unique(mask)) <= {0, 3, 1, 4}
            assert len(np.unique(mask)) > 1
            agree = (mask == by_hand(step, image, short)).mean()
            assert agree > (0.98 if short else 0.9999)  # resized bytes may differ by one
            with Image.open(out / "overlays" / f"{item.image.stem}.png") as drawn:
                assert np.array_equal(np.asarray(drawn), overlay(image, mask))


def test_the_trained_run_segments_test_pictures_as_css_train_drew_them(css_run, css_predict, css_data, tmp_path):
    """Pictures of the training crop's size: the confusion that these masks have is that of the run."""
    from css.eval_settings import run_config_of
    from css.metrics import confusion_matrix
    from css.report import read_confusion

    data, task = run_config_of(css_run).data, Task("2-1", 4)
    folder = data.items("test")[0].image.parent
    assert css_predict(css_run, "--images", folder, "--out", tmp_path / "out").code == 0
    total = np.zeros((5, 5), np.int64)
    for item, found in zip(data.items("test"), data.class_sets("test"), strict=True):
        mask = read_mask(tmp_path / "out" / "masks" / f"{item.image.stem}.png")
        if found:
            total += confusion_matrix(task.test_lut(2)[data.load_mask(item)], task.test_lut(2)[mask], 5)
    assert np.array_equal(total, read_confusion(css_run / "steps" / "02" / "confusion.json"))


def test_bands_of_rows_are_the_whole(step, monkeypatch):
    loaded = load_network(step)
    logits = torch.randn(1, 4, 7, 9, generator=torch.Generator().manual_seed(0)) * 3
    for size in ((31, 50), (7, 9), (5, 4), (28, 9), (7, 36)):
        whole = loaded.method.predict(loaded.net.upsample(logits, size))[0].numpy()
        for values in (1, 500, 10**9):
            monkeypatch.setattr(predict_command, "_BAND_VALUES", values)
            assert (upsampled_labels(loaded, logits, size) == whole).mean() > 0.998, (size, values)


def test_a_picture_of_any_form_is_read(step, css_predict, tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    folder = tmp_path / "pictures"
    folder.mkdir()
    image.save(folder / "rgb.png")
    image.convert("L").save(folder / "grey.png")
    image.convert("RGBA").save(folder / "alpha.png")
    image.quantize(16).save(folder / "palette.png")
    image.resize((3, 2)).save(folder / "tiny.bmp")
    (folder / "notes.txt").write_text("no picture")
    result = css_predict(step, "--images", folder, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == [
        "alpha.png",
        "grey.png",
        "palette.png",
        "rgb.png",
        "tiny.png",
    ]
    assert index_mask(tmp_path / "out" / "masks" / "tiny.png")[2].shape == (2, 3)
    same = [index_mask(tmp_path / "out" / "masks" / f"{name}.png")[2] for name in ("rgb", "alpha")]
    assert np.array_equal(*same)


def test_the_list_of_classes_says_what_values_and_colours_mean(step, pairs, css_predict, tmp_path):
    css_predict(step, "--images", pairs.items("test")[0].image, "--out", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert [(c["id"], c["name"], c["learnt_in"]) for c in told["classes"]] == [
        (3, "bar", 0),
        (1, "disc", 0),
        (4, "star", 1),
    ]
    assert all(c["colour"] == palette()[c["id"]].tolist() for c in told["classes"])
    assert (told["task"], told["step"], told["background"]["id"]) == ("2-1", 1, 0)


def test_a_broken_picture_is_named_and_the_others_are_written(step, pairs, tmp_path, cache_folder):
    whole = [item.image for item in pairs.items("test")[:2]]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(whole[0].read_bytes()[:300])
    command = [
        Path(sys.executable).with_name("css-predict"),
        step,
        "--images",
        whole[0],
        broken,
        whole[1],
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "POLYMODAL_CACHE": str(cache_folder), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert str(broken) in lines[0]
    assert "2 of 3 pictures segmented, 1 could not be read" in done.stdout
    assert {path.stem for path in (tmp_path / "out" / "masks").iterdir()} == {path.stem for path in whole}
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_what_is_there_is_kept(step, pairs, css_predict, complains, tmp_path):
    image, out = pairs.items("test")[0].image, tmp_path / "out"
    assert css_predict(step, "--images", image, "--out", out).code == 0
    mask = out / "masks" / f"{image.stem}.png"
    before = mask.read_bytes()
    complains(css_predict(step, "--images", image, "--out", out), str(mask), "--overwrite true")
    complains(css_predict(step, "--images", out / "masks", "--out", out, "--overwrite", "true"), "its own mask")
    assert mask.read_bytes() == before
    assert css_predict(step, "--images", image, "--out", out, "--overwrite", "true", "--short_side", 20).code == 0
    assert mask.read_bytes() != before


def test_files_and_folders_mean_each_picture_once_in_order(tmp_path):
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    for name in ("p10.jpg", "p2.JPG", "p1.png", "below/p3.png", "readme.md"):
        (folder / name).touch()
    targets = plan([str(folder), str(folder / "p2.JPG")], tmp_path / "out")
    assert [target.image.name for target in targets] == ["p1.png", "p2.JPG", "p10.jpg"]
    assert targets[1].mask == tmp_path / "out" / "masks" / "p2.png"
    (folder / "p1.jpg").touch()
    with pytest.raises(UserError, match="would both become"):
        plan([str(folder)], tmp_path / "out")


def test_mistakes_are_one_line(step, pairs, css_predict, complains, tmp_path):
    image, out = pairs.items("test")[0].image, tmp_path / "out"
    complains(css_predict("--images", image, "--out", out), "no checkpoint given")
    complains(css_predict(step, "--out", out), "--images is missing")
    complains(css_predict(step, "--images", image), "--out is missing")
    complains(css_predict(step, "--images", tmp_path / "gone.png", "--out", out), "gone.png", "no such file")
    (tmp_path / "empty").mkdir()
    complains(css_predict(step, "--images", tmp_path / "empty", "--out", out), "empty", "no pictures")
    complains(css_predict(step, "--images", image, "--out", out, "--short_side", -1), "--short_side -1")
    complains(css_predict(tmp_path / "empty", "--images", image, "--out", out), "no finished step")
    assert not out.exists()


@pytest.mark.parametrize("size", [(30, 200), (200, 30)])
def test_a_picture_longer_than_the_crop_is_segmented_whole(step, size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    found = segment_image(load_network(step), image, 32)
    assert found.shape == size
    assert found.dtype == np.uint8
    assert (found == by_hand(step, image, 32)).mean() > 0.98


def test_help_and_settings_come_without_torch():
    code = (
        "import sys, css.evaluate, css.predict_command, css.data_command\n"
        "sys.argv = ['css-predict', '--help']\n"
        "assert css.predict_command.main() == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--short_side" in done.stdout
