"""Contract checks that the tests of every package call: task modules, data modules, tables of methods.

Plain functions without a test framework. Each stands for one promise and raises ``AssertionError`` with what was
promised, what was found, and where. A package's contract tests call them for every method by its registered name.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from polymodal.errors import UserError
from polymodal.files import atomic_write
from polymodal.nested import difference
from polymodal.registry import MethodInfo, Registry
from polymodal.seeding import generator, seed_step
from polymodal.task import TaskModule

__all__ = [
    "check_bf16_stays_finite",
    "check_checkpoint_round_trip",
    "check_deterministic_eval",
    "check_disjoint_splits",
    "check_eval_batch_size",
    "check_loss_is_pure",
    "check_one_batch_overfit",
    "check_registry",
    "check_same_batches",
    "check_stable_fingerprint",
    "check_train_sampler",
]

_ARXIV = re.compile(r"\d{4}\.\d{4,5}")


def _few(names: Iterable[Any]) -> str:
    shown = list(map(str, itertools.islice(names, 7)))
    return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "")


def _hold(promise: str, found: str) -> None:
    if found:
        raise AssertionError(f"{promise}; {found}")


# ------------------------------------------------------------------ task modules


@contextmanager
def _without_logging(module: TaskModule) -> Iterator[None]:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"loss() must not log; it logged {arguments[:1] or options}: return the term instead")

    module.__dict__["log"] = module.__dict__["log_dict"] = refuse
    try:
        yield
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]


def _loss(module: TaskModule, batch: Any, seed: int, *names: str | int) -> tuple[Tensor, dict[str, Tensor]]:
    return module.loss(batch, seed_step(seed, "check", *names))


def _copy_state(module: TaskModule) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def check_loss_is_pure(module: TaskModule, batch: Any, seed: int = 0) -> None:
    """``loss`` is a function of module, batch and generator: others than Lightning can call it.

    It logs nothing, needs no trainer, leaves parameters, their gradients and the batch alone, draws from nothing but
    torch's generators (not from Python's or NumPy's), and returns a finite scalar with gradient and detached scalar
    terms. Running statistics (buffers) may change.

    Args:
        module: not attached to a trainer; left in training mode.
        batch: one training batch.
        seed: seed of both calls.

    Raises:
        AssertionError: whatever was broken first.
    """
    module.train()
    parameters = {name: value.detach().clone() for name, value in module.named_parameters()}
    untouched = copy.deepcopy(batch)
    results = []
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global state is what must not matter)
    try:
        for disturb in (1, 2):
            random.seed(disturb)
            np.random.seed(disturb)  # noqa: NPY002
            with _without_logging(module):
                results.append(_loss(module, batch, seed))
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
    (loss, logs), again = results
    if loss.ndim or not loss.requires_grad or not bool(torch.isfinite(loss)):
        raise AssertionError(f"loss() must return a finite scalar with gradient; it is {loss}")
    for name, term in logs.items():
        if term.numel() != 1 or term.requires_grad:
            raise AssertionError(f"term {name!r} of loss() must be a detached scalar; it is {term}")
    _hold(
        "the same generator must give the same loss", difference((loss.detach(), logs), (again[0].detach(), again[1]))
    )
    _hold("loss() must leave the batch alone", difference(untouched, batch, where="batch"))
    now = {name: value.detach() for name, value in module.named_parameters()}
    _hold("loss() must leave the parameters alone", difference(parameters, now, where="parameter"))
    graded = [name for name, value in module.named_parameters() if value.grad is not None]
    _hold("loss() must not run the backward pass", f"these have gradients: {_few(graded)}" if graded else "")


def check_one_batch_overfit(
    module: TaskModule,
    batch: Any,
    *,
    steps: int,
    ratio: float,
    lr: float = 1e-3,
    clip: float = 1.0,
    seed: int = 0,
) -> float:
    """A model that cannot learn one batch by heart has a broken loss, graph or mask.

    Args:
        module: left in training mode, trained.
        batch: the one batch.
        steps: AdamW steps.
        ratio: the last loss must be at most this share of the first, 0..1.
        lr: learning rate of each step.
        clip: largest gradient norm.
        seed: seed of the draws.

    Returns:
        The share that was reached.

    Raises:
        AssertionError: the loss stayed above the share, or became NaN.
    """
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.0)
    values: list[float] = []
    for step in range(steps + 1):
        loss, _ = _loss(module, batch, seed, step)
        values.append(float(loss.detach()))
        if not math.isfinite(values[-1]):
            raise AssertionError(f"overfitting one batch: the loss is {values[-1]} after {step} steps")
        if step < steps:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
    reached = values[-1] / values[0]
    if reached > ratio:
        raise AssertionError(
            f"{steps} steps on one batch must bring the loss to {ratio:g} of its start; it went from {values[0]:.4g} "
            f"to {values[-1]:.4g} ({reached:.3g})"
        )
    return reached


def _evaluate(module: TaskModule, batches: Iterable[Any]) -> dict[str, Any]:
    """Records of batches, as the shared trainer collects them."""
    module.eval()
    records: dict[str, Any] = {}
    with torch.no_grad():
        for batch in batches:
            found = module.evaluate(batch)
            twice = records.keys() & found.keys()
            _hold("evaluate() must give each sample its own id", f"met twice: {_few(twice)}" if twice else "")
            records.update(found)
    if not records:
        raise AssertionError("evaluate() must return a record for each sample; there is none")
    return records


def check_deterministic_eval(module: TaskModule, batch: Any) -> None:
    """``evaluate`` and ``metrics`` draw nothing at random and change nothing; records can travel between processes.

    Args:
        module: left in evaluation mode.
        batch: one batch.

    Raises:
        AssertionError: two evaluations differ, a weight or running statistic changed, the mode was switched, a record
            cannot be pickled, or a metric is not a finite number.
    """
    state = _copy_state(module)
    torch.manual_seed(1)
    records = _evaluate(module, [batch])
    torch.manual_seed(2)
    again = _evaluate(module, [batch])
    _hold("two evaluations must agree", difference(records, again, where="record"))
    _hold("evaluate() must change no state", difference(state, _copy_state(module), where="state"))
    _hold("evaluate() must leave the module in eval mode", "it is in training mode" if module.training else "")
    _hold("records must survive pickle", difference(records, pickle.loads(pickle.dumps(records)), where="record"))
    metrics = module.metrics(records)
    _hold("metrics() must be a function of the records", difference(metrics, module.metrics(again), where="metric"))
    bad = [f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)]
    _hold("metrics must be finite numbers", ", ".join(bad) if metrics else "there are none")
    slashed = [name for name in metrics if "/" in name]
    _hold("metric names come without the split", f"found {_few(slashed)}" if slashed else "")


def check_eval_batch_size(module: TaskModule, *splits: Sequence[Any], tolerance: float = 0.0) -> None:
    """Records and metrics of a split do not depend on how it is cut into batches.

    Args:
        module: left in evaluation mode.
        splits: two or more lists of batches that hold the same samples, e.g. batches of 1 and one batch of all.
        tolerance: largest absolute difference of floating-point numbers in records and metrics.

    Raises:
        AssertionError: another set of ids, or a record or metric that differs.
    """
    found = [_evaluate(module, batches) for batches in splits]
    for number, other in enumerate(found[1:], start=2):
        promise = f"batches must not change the result (way 1 against way {number})"
        _hold(promise, difference(found[0], other, tolerance, "record"))
        _hold(promise, difference(module.metrics(found[0]), module.metrics(other), tolerance, "metric"))


def check_checkpoint_round_trip(make: Callable[[], TaskModule], batch: Any, folder: Path) -> None:
    """Weights that went through a file give the same records and metrics, and the file needs no code to be read.

    Args:
        make: builds the module; called twice.
        batch: one batch.
        folder: receives the file.

    Raises:
        AssertionError: a weight, record or metric differs after the round trip.
    """
    module, other = make(), make()
    draw = generator(0, "check", "checkpoint")
    with torch.no_grad():  # away from the initial weights, which the second module has anyway
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.device, parameter.dtype))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    path = Path(folder) / "check.ckpt"
    atomic_write(path, lambda handle: torch.save(checkpoint, handle))
    loaded = torch.load(path, weights_only=True)
    other.on_load_checkpoint(loaded)
    other.load_state_dict(loaded["state_dict"])
    _hold(
        "a checkpoint must bring back every weight", difference(_copy_state(module), _copy_state(other), where="state")
    )
    records = _evaluate(module, [batch])
    again = _evaluate(other, [batch])
    _hold("a loaded module must give the same records", difference(records, again, where="record"))
    before, after = module.metrics(records), other.metrics(again)
    _hold("a loaded module must give the same metrics", difference(before, after, where="metric"))


def check_bf16_stays_finite(module: TaskModule, batch: Any, device_type: str = "cpu", seed: int = 0) -> None:
    """Under bfloat16 autocast, loss, gradients and metrics are finite numbers.

    Args:
        module: left in evaluation mode with gradients.
        batch: one batch.
        device_type: ``cpu`` or ``cuda``.
        seed: seed of the draws.

    Raises:
        AssertionError: a loss, gradient or metric is NaN or infinite.
    """
    module.train()
    with torch.autocast(device_type, dtype=torch.bfloat16):
        loss, logs = _loss(module, batch, seed)
    loss.backward()  # type: ignore[no-untyped-call]
    bad = [name for name, term in {"loss": loss, **logs}.items() if not bool(torch.isfinite(term))]
    graded = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    bad += [f"gradient of {name}" for name, grad in graded.items() if not bool(torch.isfinite(grad).all())]
    with torch.autocast(device_type, dtype=torch.bfloat16):
        metrics = module.metrics(_evaluate(module, [batch]))
    bad += [f"metric {name}" for name, value in metrics.items() if not math.isfinite(value)]
    _hold("bfloat16 must stay finite", f"not finite: {_few(bad)}" if bad else "")


# ------------------------------------------------------------------ data modules


def _epoch(data: Any, epoch: int) -> list[Any]:
    data.train_sampler.set_epoch(epoch)
    return list(data.train_dataloader())


def check_same_batches(
    make: Callable[[int], L.LightningDataModule], workers: Sequence[int] = (0, 2), epochs: int = 2
) -> None:
    """The same seed gives the same batches for any number of workers, in any order of epochs.

    Args:
        make: builds the data module with so many loader workers.
        workers: the numbers compared.
        epochs: training epochs compared; the first one is drawn again after the others.

    Raises:
        AssertionError: names loader, batch and field that differ.
    """
    first: dict[str, list[Any]] = {}
    for count in workers:
        data = make(count)
        data.prepare_data()
        data.setup("fit")
        found = {f"train epoch {epoch}": _epoch(data, epoch) for epoch in range(epochs)}
        _hold(
            "an epoch's batches must not depend on earlier epochs",
            difference(found["train epoch 0"], _epoch(data, 0), where="train epoch 0"),
        )
        data.setup("test")
        found |= {"val": list(data.val_dataloader()), "test": list(data.test_dataloader())}
        promise = f"{count} loader workers must give the batches of {workers[0]}"
        for name, batches in found.items():
            _hold(promise, difference(first.setdefault(name, batches), batches, where=name))


def check_train_sampler(data: L.LightningDataModule) -> None:
    """The training loader can go on in mid-epoch: what the shared trainer's resume needs.

    After ``setup("fit")`` the data module has ``train_sampler`` with ``set_epoch``, ``start_batch`` and a length that
    does not change; its batches are a function of the epoch; ``start_batch = k`` gives the epoch's batches from k on,
    once; ``set_epoch`` of the same epoch keeps the place, of another epoch starts it anew.

    Args:
        data: a fresh data module.

    Raises:
        AssertionError: whatever does not hold first.
    """
    data.prepare_data()
    data.setup("fit")
    sampler = getattr(data, "train_sampler", None)
    missing = [name for name in ("set_epoch", "start_batch", "__len__") if not hasattr(sampler, name)]
    promise = "setup('fit') must make a train_sampler that a resumed run can point at its place"
    _hold(promise, f"{type(sampler).__name__} has no {', '.join(missing)}" if missing else "")
    assert sampler is not None  # it has a length
    sampler.set_epoch(1)
    whole, length = list(sampler), len(sampler)
    _hold("a pass must have as many batches as the sampler's length", difference(len(whole), length, where="batches"))
    for start in {0, 1 % length, length // 2, length - 1}:
        sampler.set_epoch(1)
        sampler.start_batch = start
        sampler.set_epoch(1)  # the trainer does this at the start of the epoch
        where = f"batches from {start} on"
        _hold("start_batch must skip what was trained on", difference(whole[start:], list(sampler), where=where))
        _hold("start_batch must count for one pass", difference(whole, list(sampler), where="the pass after it"))
        _hold("the length must stay that of a whole epoch", difference(length, len(sampler), where="length"))
    sampler.start_batch = length - 1
    sampler.set_epoch(2)
    _hold("another epoch must start at its first batch", difference(length, len(list(sampler)), where="batches"))


def check_disjoint_splits(ids: Mapping[str, Iterable[Any]]) -> None:
    """No sample is in two splits or twice in one.

    Args:
        ids: split -> ids of its samples.

    Raises:
        AssertionError: names the sample and both splits, or an empty split.
    """
    owner: dict[Any, str] = {}
    for split, names in ids.items():
        count = 0
        for name in names:
            if name in owner:
                raise AssertionError(f"a sample belongs to one split; {name} is in {owner[name]} and {split}")
            owner[name] = split
            count += 1
        _hold("a split must have samples", "" if count else f"{split} has none")


def check_stable_fingerprint(make: Callable[[], Any], *changed: Callable[[], Any]) -> str:
    """``fingerprint()`` is the same for the same data and another one for other data.

    Args:
        make: builds the reader; called twice.
        changed: build readers of other data each (one sample less, another text, another option).

    Returns:
        The fingerprint, for a comparison with another process.

    Raises:
        AssertionError: two readers of the same data differ, or two of other data agree.
    """
    reader = make()
    found: str = reader.fingerprint()
    form = "" if re.fullmatch(r"[0-9a-f]{12,}", found) else f"it is {found!r}"
    _hold("a fingerprint is a hexadecimal digest of at least 12 digits", form)
    _hold("asking twice must give the same fingerprint", difference(found, reader.fingerprint(), where="fingerprint"))
    _hold(
        "a second reader must give the same fingerprint", difference(found, make().fingerprint(), where="fingerprint")
    )
    seen = {found: "the data"}
    for number, build in enumerate(changed, start=1):
        other = build().fingerprint()
        same = f"change {number} has that of {seen[other]}" if other in seen else ""
        _hold("other data must have another fingerprint", same)
        seen[other] = f"change {number}"
    return found


# ------------------------------------------------------------------ tables of methods


def check_registry(
    registry: Registry,
    args: Sequence[Any] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    base: type[Any] = object,
) -> None:
    """A table of methods agrees with its classes.

    Each row's class can be imported, is defined in the module the row names, derives from ``base``, and is created by
    ``create`` with ``args`` and its ``options``; its docstring has a ``Source``, with the arXiv number that the row's
    paper has; a reconstruction says "our reading"; an unknown option and a repeated name are refused.

    Args:
        registry: the table.
        args: positional arguments of every method.
        options: name -> keyword options of that method.
        base: class that all of them derive from.

    Raises:
        AssertionError: names the row and what is wrong.
    """
    _hold("a table must have rows", "" if len(registry) else f"the table of {registry.kind} is empty")
    for row in registry:
        _hold(f"{registry.kind} {row.name!r}", _row_problem(registry, row, base))
        settings = dict((options or {}).get(row.name, {}))
        made = registry.create(row.name, *args, **settings)
        made_of = f"create() gave {type(made).__name__}" if not isinstance(made, registry.load(row.name)) else ""
        _hold(f"{registry.kind} {row.name!r}", made_of)
        try:
            registry.create(row.name, *args, **settings, no_such_option=1)
        except UserError:
            pass
        else:
            raise AssertionError(f"{registry.kind} {row.name!r}: an unknown option must be a UserError")
    try:
        Registry(registry.kind, [*registry, next(iter(registry))])
    except ValueError:
        return
    raise AssertionError(f"table of {registry.kind}: a repeated name must be a ValueError")


def _row_problem(registry: Registry, row: MethodInfo, base: type[Any]) -> str:
    """What is wrong with a row before anything is created; empty where nothing is."""
    if not row.paper.strip() or not row.summary.strip() or "\n" in row.paper + row.summary:
        return "paper and summary must be one line each"
    module, _, attribute = row.target.partition(":")
    try:
        cls = registry.load(row.name)
    except (ImportError, AttributeError) as error:
        return f"the target {row.target} cannot be imported ({type(error).__name__}: {error})"
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        return f"{row.target} is no {base.__name__}"
    if (cls.__module__, cls.__name__) != (module, attribute):
        return f"{row.target} is defined in {cls.__module__}:{cls.__name__}; name that place"
    if not inspect.getdoc(sys.modules[module]):
        return f"module {module} has no docstring"
    text = cls.__doc__ or ""
    if not re.search(r"^\s*Source:", text, re.MULTILINE):
        return f"the docstring of {attribute} has no Source: paper, equation, deviation"
    lost = [number for number in _ARXIV.findall(row.paper) if number not in text]
    if lost:
        return f"the row's paper is arXiv {lost[0]}, the docstring of {attribute} does not name it"
    if row.fidelity == "reconstruction" and "our reading" not in text:
        return f"fidelity is reconstruction, but the docstring of {attribute} does not say 'our reading'"
    return ""
