"""The shared contract of data modules: the same batches for any number of workers, a place to go on from."""

from __future__ import annotations

import pytest
from missing_modal.backbones.small import small_text
from missing_modal.datamodule import MMDataModule
from missing_modal.inputs import ArrayInput, ByteTokens, TextInput
from missing_modal.settings import LoaderConfig
from missing_modal.tables import draw_masks
from missing_modal.world import World
from polymodal import checks


def data_module(workers=0, simulate=False, **transforms):
    reader = World(sizes=(23, 8, 9))
    sizes = dict(zip(("train", "val", "test"), reader.sizes, strict=True))
    masks = {split: draw_masks(count, "both", 0.5, 0, "world", split).tolist() for split, count in sizes.items()}
    config = LoaderConfig(batch_size=5, eval_batch_size=4, num_workers=workers)
    found = {"image": ArrayInput(), "text": ArrayInput(), **transforms}
    towers = (small_text(27, 5, width=4, depth=1, heads=1, features=2),)
    return MMDataModule(reader, masks, found, config, towers=towers, seed=3, simulate=simulate)


def test_training_sampler_can_go_on_in_mid_epoch():
    checks.check_train_sampler(data_module())


def test_epochs_can_be_drawn_in_any_order():
    checks.check_same_batches(lambda workers: data_module(workers, simulate=True), workers=(0, 0))


@pytest.mark.slow
def test_workers_change_nothing():
    text = TextInput(ByteTokens(5))  # travels to the workers
    checks.check_same_batches(lambda workers: data_module(workers, simulate=True, text=text), workers=(0, 2))
