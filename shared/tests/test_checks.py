"""Each contract check passes what keeps its promise and catches what breaks it."""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import dataclass

import lightning as L
import numpy as np
import pytest
import torch
from polymodal import checks
from polymodal.data import LengthBucketBatchSampler
from polymodal.nested import difference
from polymodal.registry import MethodInfo, Registry
from polymodal.seeding import generator
from polymodal.task import TaskModule
from torch.utils.data import DataLoader, Dataset


@dataclass
class Points:
    """A batch: ids, (B, 4) inputs, (B,) labels."""

    ids: list[str]
    x: torch.Tensor
    y: torch.Tensor


def points(count=8, start=0):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(32, 4, generator=g)[start : start + count]
    return Points([f"p{start + i}" for i in range(count)], x, (x[:, 0] > 0).long())


class Good(TaskModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(16, 2),
        )

    def loss(self, batch, generator):
        noise = 0.01 * torch.randn(batch.x.shape, generator=generator)
        value = torch.nn.functional.cross_entropy(self.net(batch.x + noise), batch.y)
        return value, {"cross_entropy": value.detach()}

    def evaluate(self, batch):
        chosen = self.net(batch.x).float().log_softmax(-1)
        return {i: {"score": float(c[y]), "label": int(y)} for i, c, y in zip(batch.ids, chosen, batch.y, strict=True)}

    def metrics(self, records):
        return {"nll": -sum(r["score"] for r in records.values()) / len(records)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def variant(**methods):
    """A module like ``Good`` with some methods replaced."""
    return type("Flawed", (Good,), methods)()


def fails(words, function, *arguments, **options):
    with pytest.raises(AssertionError, match=words):
        function(*arguments, **options)


# ------------------------------------------------------------------ difference


@pytest.mark.parametrize(
    ("left", "right", "found"),
    [
        ({"a": [1, (2.0, "x")]}, {"a": [1, (2.0, "x")]}, ""),
        (points(), points(), ""),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, ""),
        (float("nan"), float("nan"), ""),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), ""),
        (np.array([1, 2]), np.array([1, 3]), "value[1]: 2 against 3"),
        (torch.tensor([True, False]), torch.tensor([True, True]), "value[1]: False against True"),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 2.0]), "value[1]: 1.0 against 2.0"),
        ({"a": [1, (2.0, "x")]}, {"a": [1, (2.0, "y")]}, "value.a[1][1]: 'x' against 'y'"),
        ({"a": 1}, {"b": 1}, "value: only one has a, b"),
        ([1], [1, 2], "value: 1 entries against 2"),
        (1, 1.0, "value: int against float"),
        (torch.zeros(2), torch.zeros(3), "value: (2,) torch.float32 against (3,) torch.float32"),
        (0.5, 0.25, "value: 0.5 against 0.25"),
    ],
)
def test_difference_names_the_place(left, right, found):
    assert difference(left, right) == found


def test_difference_tolerates_what_it_is_told():
    assert difference([0.5, torch.tensor([1.0])], [0.5001, torch.tensor([1.0001])], 1e-3) == ""
    assert difference(points(8), points(8, start=1)) == "value.ids[0]: 'p0' against 'p1'"
    assert difference([0.5], [0.5001], 1e-5).startswith("value[0]")


# ------------------------------------------------------------------ task modules


def test_a_good_module_passes(tmp_path):
    checks.check_loss_is_pure(Good(), points())
    checks.check_deterministic_eval(Good(), points())
    checks.check_eval_batch_size(Good(), [points(8)], [points(1, i) for i in range(8)], tolerance=1e-6)
    checks.check_checkpoint_round_trip(Good, points(), tmp_path)
    checks.check_bf16_stays_finite(Good(), points())
    assert checks.check_one_batch_overfit(Good(), points(), steps=60, ratio=0.4, lr=2e-2) < 0.4


def test_impure_losses_are_caught():
    good = Good.loss

    def logging(self, batch, generator):
        self.log("x", 1.0)
        return good(self, batch, generator)

    def python_random(self, batch, generator):
        return good(self, batch, generator)[0] * (1 + random.random()), {}

    def moving(self, batch, generator):
        with torch.no_grad():
            self.net[0].weight.mul_(0.5)
        return good(self, batch, generator)

    def backward(self, batch, generator):
        value, logs = good(self, batch, generator)
        value.backward(retain_graph=True)
        return value, logs

    def attached(self, batch, generator):
        value, _ = good(self, batch, generator)
        return value, {"x": 2 * value}

    def in_place(self, batch, generator):
        batch.x += 0.0
        batch.y.zero_()
        return good(self, batch, generator)

    def trainer(self, batch, generator):
        return good(self, batch, generator)[0] / (1 + self.trainer.global_step), {}

    flaws = {
        "must not log": logging,
        "same generator must give the same loss": python_random,
        "leave the parameters alone|same generator": moving,
        "must not run the backward pass": backward,
        "'x' of loss.. must be a detached scalar": attached,
        "leave the batch alone": in_place,
        "finite scalar with gradient": lambda self, batch, generator: (torch.tensor(float("nan")), {}),
    }
    for words, loss in flaws.items():
        fails(words, checks.check_loss_is_pure, variant(loss=loss), points())
    with pytest.raises(RuntimeError, match="not attached to a"):
        checks.check_loss_is_pure(variant(loss=trainer), points())


def test_logging_works_again_after_the_check():
    module = Good()
    checks.check_loss_is_pure(module, points())
    assert "log" not in module.__dict__


def test_random_or_changing_evaluation_is_caught():
    good = Good.evaluate

    def dropping(self, batch):
        self.net[3].train()
        return good(self, batch)

    def training(self, batch):
        self.train()
        return good(self, batch)

    def counting(self, batch):
        self.net[1].running_mean.add_(1e-3)
        return {i: {"score": 0.0, "label": 0} for i in batch.ids}

    check = checks.check_deterministic_eval
    fails("two evaluations must agree", check, variant(evaluate=dropping), points())
    fails("eval mode|change no state|must agree", check, variant(evaluate=training), points())
    fails("must change no state", check, variant(evaluate=counting), points())
    fails("finite numbers", check, variant(metrics=lambda self, records: {"nll": float("nan")}), points())
    fails("there are none", check, variant(metrics=lambda self, records: {}), points())
    fails("without the split", check, variant(metrics=lambda self, records: {"val/nll": 1.0}), points())
    fails("a record for each sample", check, variant(evaluate=lambda self, batch: {}), points())


def test_results_that_depend_on_the_batch_are_caught():
    def normalised(self, batch):
        centred = batch.x - batch.x.mean(0)
        return {i: {"score": float(c)} for i, c in zip(batch.ids, centred[:, 0], strict=True)}

    def same_ids(self, batch):
        return {k: {"score": 0.0} for k in range(len(batch.ids))}

    splits = [points(8)], [points(4), points(4, 4)]
    fails("way 1 against way 2.*record.p0", checks.check_eval_batch_size, variant(evaluate=normalised), *splits)
    fails("its own id; met twice: 0", checks.check_eval_batch_size, variant(evaluate=same_ids), *splits)
    fails("only one has p7", checks.check_eval_batch_size, Good(), [points(8)], [points(7)])


def test_state_that_a_checkpoint_forgets_is_caught(tmp_path):
    class Forgetful(Good):
        def __init__(self):
            super().__init__()
            self.scale = [1.0]  # not a parameter, not a buffer

        def on_save_checkpoint(self, checkpoint):
            self.scale[0] = 3.0

        def evaluate(self, batch):
            return {i: {"score": float(x[0]) * self.scale[0]} for i, x in zip(batch.ids, batch.x, strict=True)}

    fails("the same records", checks.check_checkpoint_round_trip, Forgetful, points(), tmp_path)

    class Code(Good):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["batch"] = points()  # a class of ours: reading it would run code

    with pytest.raises(Exception, match=r"[Ww]eights"):
        checks.check_checkpoint_round_trip(Code, points(), tmp_path)


def test_overflow_in_bf16_is_caught():
    def huge(self, batch, generator):
        value = (self.net[0](batch.x) * 3e38).square().sum()
        return value, {}

    fails("not finite: loss", checks.check_bf16_stays_finite, variant(loss=huge), points())


def test_a_model_that_does_not_learn_is_caught():
    def cut(self, batch, generator):
        return torch.nn.functional.cross_entropy(self.net(batch.x).detach() + 0 * self.net(batch.x), batch.y), {}

    options = {"steps": 20, "ratio": 0.5, "lr": 2e-2}
    fails(
        "must bring the loss to 0.5 of its start",
        checks.check_one_batch_overfit,
        variant(loss=cut),
        points(),
        **options,
    )

    def diverging(self, batch, generator):
        return (self.net[0](batch.x)).square().sum() * float("inf"), {}

    fails("the loss is inf", checks.check_one_batch_overfit, variant(loss=diverging), points(), **options)


# ------------------------------------------------------------------ data modules


class Samples(Dataset):
    def __init__(self, flaw=""):
        self.flaw, self.calls = flaw, 0

    def __len__(self):
        return 20

    def __getitem__(self, key):
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        self.calls += 1
        extra = self.calls if self.flaw == "order of calls" else 0
        return torch.rand(2, generator=generator(0, "sample", epoch, index)) + extra


class Data(L.LightningDataModule):
    def __init__(self, workers=0, flaw=""):
        super().__init__()
        self.workers, self.flaw = workers, flaw
        self.samples = Samples(flaw)

    def setup(self, stage):
        if stage != "fit" or self.flaw == "no sampler":
            return
        kind = {"forgets the place": Forgetting, "place for good": Sticky}.get(self.flaw, LengthBucketBatchSampler)
        self.train_sampler = kind([1 + i % 5 for i in range(20)], batch_size=4)

    def train_dataloader(self):
        return DataLoader(self.samples, batch_sampler=self.train_sampler, num_workers=self.workers)

    def val_dataloader(self):
        return DataLoader(self.samples, batch_size=5, num_workers=self.workers)

    test_dataloader = val_dataloader


class Forgetting(LengthBucketBatchSampler):
    def set_epoch(self, epoch):
        self.epoch, self.start_batch = epoch, 0


class Sticky(LengthBucketBatchSampler):
    def __iter__(self):
        start = self.start_batch
        yield from super().__iter__()
        self.start_batch = start


def test_loaders():
    checks.check_same_batches(lambda workers: Data(workers), workers=(0, 2))
    words = "must not depend on earlier epochs|loader workers must give"
    fails(words, checks.check_same_batches, lambda workers: Data(workers, "order of calls"), workers=(0, 2))


def test_samplers():
    checks.check_train_sampler(Data())
    fails("no set_epoch, start_batch, __len__", checks.check_train_sampler, Data(flaw="no sampler"))
    fails("must skip what was trained on", checks.check_train_sampler, Data(flaw="forgets the place"))
    fails("must count for one pass", checks.check_train_sampler, Data(flaw="place for good"))


def test_splits():
    checks.check_disjoint_splits({"train": ["a", "b"], "test": ["c"]})
    fails("b is in train and test", checks.check_disjoint_splits, {"train": ["a", "b"], "test": ["b"]})
    fails("a is in train and train", checks.check_disjoint_splits, {"train": ["a", "a"]})
    fails("dev has none", checks.check_disjoint_splits, {"train": ["a"], "dev": []})


def test_fingerprints():
    class Reader:
        def __init__(self, text, broken=False):
            self.text, self.broken = text, broken

        def fingerprint(self):
            return f"{id(self):016x}"[-16:] if self.broken else self.text.encode().hex()

    kept = []  # so that no two readers share an address

    def broken():
        kept.append(Reader("x", broken=True))
        return kept[-1]

    check = checks.check_stable_fingerprint
    assert check(lambda: Reader("some data"), lambda: Reader("other data")) == b"some data".hex()
    fails("second reader", check, broken)
    fails("change 1 has that of the data", check, lambda: Reader("some data"), lambda: Reader("some data"))
    fails("hexadecimal digest", check, lambda: Reader("short"))


# ------------------------------------------------------------------ tables


class Method:
    """Adds up.

    Source: A et al. 2025 (arXiv 2501.00001), our reading, equation 3.
    """

    def __init__(self, dim: int, mode: str = "a") -> None:
        self.dim, self.mode = dim, mode


class Sourceless:
    """Says nothing of where it is from."""


class OpenEnded:
    """Takes anything.

    Source: B et al. 2025.
    """

    def __init__(self, dim: int, **options: object) -> None:
        self.options = options


@pytest.fixture
def row(monkeypatch):
    """Rows that point at the classes above through a module with a plain name."""
    import sys

    module = type(sys)("polymodal_test_table", "Methods of a test.")
    for cls in (Method, Sourceless, OpenEnded):
        monkeypatch.setattr(cls, "__module__", module.__name__)
        setattr(module, cls.__name__, cls)
    module.Alias = OrderedDict
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def make(name="adding", target="Method", paper="A et al. 2025, arXiv 2501.00001", fidelity="reconstruction"):
        return MethodInfo(name, f"polymodal_test_table:{target}", paper, "adds up", fidelity=fidelity)

    return make


def test_tables(row):
    checks.check_registry(Registry("sum", [row(), row("other")]), (3,), {"other": {"mode": "b"}}, base=Method)
    flaws = [
        ("the table of sum is empty", []),
        ("cannot be imported", [row(target="Missing")]),
        ("has no Source", [row(target="Sourceless", paper="C")]),
        ("is no Method", [row(target="OpenEnded")]),
        ("defined in collections:OrderedDict", [row(target="Alias", paper="C")]),
        ("paper is arXiv 2501.99999", [row(paper="A et al. 2025, arXiv 2501.99999")]),
        ("does not say 'our reading'", [row(target="OpenEnded", paper="B")]),
        ("an unknown option must be a UserError", [row(target="OpenEnded", paper="B", fidelity="paper")]),
    ]
    for words, rows in flaws:
        base = Method if "no Method" in words else object
        fails(words, checks.check_registry, Registry("sum", rows), (3,), base=base)
