"""The shared contract of data: readers of every layout that can be generated, and the loaders on top of one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from polymodal import checks
from slt.data import SPLITS, reader_class
from slt.data.datamodule import SLTDataModule
from slt.data.options import LoaderConfig
from slt.tokenizer import Tokenizer

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("slt_test_layouts", HERE.parent / "e2e" / "_layouts.py")
layouts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layouts)

SMALL = (21, 26)
SCRIPT = """
import json, sys
from slt.data import reader_class
name, options = json.loads(sys.argv[1])
print(reader_class(name)(**options).fingerprint())
assert "torch" not in sys.modules, "reading annotations loads torch"
"""


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Reader name -> options of a reader on generated data, and options under which the data count as other data."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("data")
        patch.setenv("POLYMODAL_CACHE", str(folder / "cache"))
        shorter = {**layouts.GERMAN, "train": layouts.GERMAN["train"][:3]}
        shorter_chinese = {**layouts.CHINESE, "train": layouts.CHINESE["train"][:3]}
        phoenix = layouts.phoenix(folder / "a" / "PHOENIX-2014-T", size=SMALL)
        less = layouts.phoenix(folder / "b" / "PHOENIX-2014-T", shorter, size=SMALL)
        csl, less_csl = (
            layouts.csl_daily(folder / "c", size=SMALL),
            layouts.csl_daily(folder / "d", shorter_chinese, SMALL),
        )
        own, less_own = layouts.manifest(folder / "e"), layouts.manifest(folder / "f", shorter)
        asked = str(folder / "a" / "questions")
        yield {
            "synthetic": (
                {"root": str(folder / "worlds"), "sizes": (12, 6, 6)},
                [{"root": str(folder / "worlds"), "sizes": (12, 6, 6), "world_seed": 1}],
            ),
            "phoenix2014t": (
                {"root": str(phoenix), "questions": asked},
                [{"root": str(phoenix)}, {"root": str(phoenix), "lowercase": False}, {"root": str(less)}],
            ),
            "csl_daily": ({"root": str(csl)}, [{"root": str(csl), "append_period": True}, {"root": str(less_csl)}]),
            "manifest": ({"root": str(own)}, [{"root": str(own), "append_period": True}, {"root": str(less_own)}]),
        }


every_reader = pytest.mark.parametrize("name", ["synthetic", "phoenix2014t", "csl_daily", "manifest"])


@every_reader
def test_splits_are_disjoint(readers, name):
    reader = reader_class(name)(**readers[name][0])
    checks.check_disjoint_splits({split: [item.id for item in reader.items(split)] for split in SPLITS})


@every_reader
def test_fingerprint_is_stable(readers, name):
    options, changed = readers[name]
    build = reader_class(name)
    here = checks.check_stable_fingerprint(lambda: build(**options), *(lambda o=o: build(**o) for o in changed))
    settings = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", SCRIPT, json.dumps([name, options])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == here


def data_module(readers, name, workers=0):
    reader = reader_class(name)(**readers[name][0])
    texts = [text for item in reader.items("train") for text in (item.sentence, item.question)]
    tokenizer = Tokenizer.build(reader.level, texts, reader.language)
    config = LoaderConfig(
        batch_size=3, eval_batch_size=4, frame_size=20, resize=24, question_dropout=0.4, num_workers=workers
    )
    return SLTDataModule(reader, tokenizer, config, seed=3)


@every_reader
def test_training_sampler_can_go_on_in_mid_epoch(readers, name):
    checks.check_train_sampler(data_module(readers, name))


def test_workers_change_nothing(readers):
    checks.check_same_batches(lambda workers: data_module(readers, "synthetic", workers), workers=(0, 2))


@pytest.mark.parametrize("name", ["phoenix2014t", "csl_daily", "manifest"])
def test_epochs_can_be_drawn_in_any_order(readers, name):
    checks.check_same_batches(lambda workers: data_module(readers, name, workers), workers=(0, 0))
