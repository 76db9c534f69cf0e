"""Speed of the federated simulation: engines and methods against plain training, start-up and memory, peers, a GPU.

python benchmarks/fedcore.py                  # all sections, about a quarter of an hour on two idle cores
python benchmarks/fedcore.py serial batched   # some of them
python benchmarks/fedcore.py --quick          # does it run?
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder would hide the package fedcore behind this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._bench import Options, Row, Samples, interleave, overhead, parse, run_sections, speedup, value
from benchmarks._fedcore_inputs import CNN_100, MLP_100, MLP_500, MLP_SMALL, PLAIN, Workload, measured, quick


def _sizes(options: Options, *workloads: Workload) -> list[Workload]:
    return [quick(workload) for workload in workloads] if options.quick else list(workloads)


def serial(options: Options) -> list[Row]:
    """FedAvg on the serial engine against the floor."""
    rows = []
    for workload, target in zip(_sizes(options, MLP_100, MLP_500, CNN_100), (1.2, 1.25, 1.08), strict=True):
        data = workload.data()
        functions = {
            "floor": workload.floor(data),
            "ours": workload.simulation(data, **PLAIN).round,
            "full floor": workload.floor(data, decay=1e-3, clip=10.0),
            "full": workload.simulation(data).round,
        }
        found = interleave(functions, options.times(workload.runs))
        rows.append(overhead(f"FedAvg, {workload.name}", found["ours"], found["floor"], at_most=target))
        what = f"FedAvg, both with clipping and decay, {workload.name}"
        rows.append(overhead(what, found["full"], found["full floor"]))
    return rows


def pool(options: Options) -> list[Row]:
    """FedAvg in two worker processes against the floor, which has one core."""
    rows = []
    for workload, target in zip(_sizes(options, MLP_500, CNN_100), (0.58, 0.56), strict=True):
        data = workload.data()
        with workload.simulation(data, engine="pool", workers=2, **PLAIN) as simulation:
            functions = {"floor": workload.floor(data), "ours": simulation.round}
            found = interleave(functions, options.times(workload.runs))
        rows.append(overhead(f"FedAvg, 2 workers, {workload.name}", found["ours"], found["floor"], at_most=target))
    return rows


def batched(options: Options) -> list[Row]:
    """Ten clients in one computation against the floor, and the serial engine on the same."""
    (workload,) = _sizes(options, MLP_SMALL)
    data = workload.data()
    simulation = workload.simulation(data, engine="batched", **PLAIN)
    functions = {
        "floor": workload.floor(data),
        "batched": simulation.round,
        "serial": workload.simulation(data, **PLAIN).round,
    }
    found = interleave(functions, options.times(workload.runs))
    if simulation.engine != "batched":
        raise RuntimeError("the batched engine stepped back")
    return [
        overhead(f"FedAvg, batched, {workload.name}", found["batched"], found["floor"], at_most=0.5),
        overhead(f"FedAvg, serial, {workload.name}", found["serial"], found["floor"]),
    ]


def methods(options: Options) -> list[Row]:
    """Rounds of the papers' methods against FedAvg's, all with their defaults, on the serial engine."""
    rows = []
    for workload in _sizes(options, MLP_500, CNN_100):
        data = workload.data()
        average = workload.simulation(data)
        functions: dict[str, Callable[[], Any]] = {
            "fedavg": average.round,
            "both": _in_turn(average.round, _orthogonalising(average, workload)),
        }
        for name in ("fedmoswa", "fedadamw", "fedmuon"):
            functions[name] = workload.simulation(data, name).round
        found = interleave(functions, options.times(workload.runs))
        for name in ("fedmoswa", "fedadamw"):
            rows.append(overhead(f"{name} over fedavg, {workload.name}", found[name], found["fedavg"], at_most=1.15))
        what = f"fedmuon over fedavg and its own Newton-Schulz, {workload.name}"
        rows.append(overhead(what, found["fedmuon"], found["both"], at_most=1.05))
    return rows


def _in_turn(*functions: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        for function in functions:
            function()

    return call


def _orthogonalising(simulation: Any, workload: Workload) -> Callable[[], None]:
    """The Newton-Schulz iterations of a FedMuon round and nothing else, matrices of one shape at once."""
    import torch
    from fedcore.ops.matrices import matrix_layout
    from fedcore.ops.newton_schulz import orthogonalise

    groups = [
        torch.randn(sum(matrix.batch for matrix in group), *group[0].size)
        for group in matrix_layout(simulation.learner.spec).groups
    ]
    steps = -(-workload.samples // workload.batch) * max(1, workload.clients // 10)

    def call() -> None:
        for _ in range(steps):
            for matrices in groups:
                orthogonalise(matrices)

    return call


def start(options: Options) -> list[Row]:
    """Start-up after the imports and peak memory, each in processes of their own."""
    (workload,) = _sizes(options, MLP_500)
    rounds, runs = (2, 2) if options.quick else (12, options.times(5))
    rows = []
    floor = [measured(workload, "floor", rounds) for _ in range(runs)]
    for kind in ("fedavg/serial", "fedavg/pool", "fedmoswa/serial"):
        found = [measured(workload, kind, rounds) for _ in range(runs)]
        waits = [one["first"] - one["later"] for one in found]
        rows.append(value(f"{kind}, {workload.name}: first round, beyond a later one", "s", waits, below=0.5))
        more = [one["peak"] - base["peak"] - one["state"] for one, base in zip(found, floor, strict=True)]
        states = statistics.median(one["state"] for one in found)
        label = f"{kind}, {workload.name}: peak memory over the floor's and {states:.0f} MiB of states"
        rows.append(value(label, "MiB", more, below=50))
    return rows


def peers(options: Options) -> list[Row]:
    """Other simulators, where they are installed, in processes of their own; the floor runs before each."""
    from benchmarks._fedcore_peers import have, peer_rounds

    known = [("pfl", "pfl-research", have("pfl")), ("flwr", "Flower, 2 cores", have("flwr") and have("ray"))]
    rows: list[Row] = []
    for workload in _sizes(options, MLP_100, MLP_500, CNN_100):
        data = workload.data()
        runs = options.times(max(3, workload.runs // 5))
        for peer, name, here in known:
            floor = interleave({"floor": workload.floor(data)}, runs)["floor"] if here else Samples()
            found = peer_rounds(peer, workload, runs) if here else None
            if found is not None:
                rows.append(overhead(f"{name}, {workload.name}", found[0], floor))
            if found is not None and peer == "flwr":
                rows.append(value(f"{name}, {workload.name}: start-up and first round", "s", [found[1]]))
    return rows


def device(options: Options) -> list[Row]:
    """For a GPU: Newton-Schulz of many matrices at once against a loop, and a round of ResNet-18."""
    rows = [_newton_schulz(options, width) for width in ((8,) if options.quick else (64, 128, 192, 384, 576))]
    if options.device != "cpu" or options.quick:
        rows.append(_resnet(options))
    return rows


def _newton_schulz(options: Options, width: int) -> Row:
    import torch
    from fedcore.ops.newton_schulz import orthogonalise

    count = 4 if options.quick else 60  # ten clients, six matrices of a shape
    matrices = torch.randn(count, width, width, device=options.device)

    def loop() -> None:
        for matrix in matrices:
            orthogonalise(matrix)

    found = interleave({"batch": lambda: orthogonalise(matrices), "loop": loop}, options.times(20), 3, options.sync)
    what = f"Newton-Schulz of {count} matrices of {width}, at once against a loop"
    return speedup(what, found["batch"], found["loop"], at_least=3.0 if options.device != "cpu" else None)


def _resnet(options: Options) -> Row:
    """FedMuon on ResNet-18 of 32 px, 10 clients, 50 steps of 50 pictures: against the limit of the arithmetic."""
    import torch
    from fedcore import Simulation
    from fedcore.algorithms import create
    from fedcore.models import build
    from torch.utils.data import Subset, TensorDataset

    clients, steps, batch = (2, 1, 2) if options.quick else (10, 50, 50)
    each, classes = steps * batch, 100
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randn(clients * each, 3, 32, 32, generator=draw).to(options.device)
    labels = torch.randint(classes, (clients * each,), generator=draw).to(options.device)
    whole = TensorDataset(pictures, labels)
    parts = [Subset(whole, range(i * each, (i + 1) * each)) for i in range(clients)]
    torch.manual_seed(0)
    model = build("resnet18_gn", num_classes=classes, input_shape=(3, 32, 32)).to(options.device)
    settings = {"batch_size": batch, "fraction": 1.0, "rounds": 1000, "engine": "batched"}
    simulation = Simulation(model, parts, create("fedmuon"), **settings)
    simulation.round()
    seconds = []
    for _ in range(options.times(5)):
        options.sync()
        began = time.perf_counter()
        simulation.round()
        options.sync()
        seconds.append(time.perf_counter() - began)
    limit = 0.45 * clients * each / (10 * 50 * 50)
    what = f"FedMuon, ResNet-18, {clients} clients, {steps} steps of {batch}, engine {simulation.engine}"
    label = f"{what}: round over the limit of {limit:.2g} s at 300 TFLOP/s"
    return value(label, "x", [one / limit for one in seconds], below=5)


SECTIONS = {
    "serial": ("A round of FedAvg, one client after the other, against plain training", serial),
    "pool": ("A round of FedAvg in two worker processes against plain training on one core", pool),
    "batched": ("A round of FedAvg, ten clients at once, against plain training", batched),
    "methods": ("Rounds of other methods against FedAvg's", methods),
    "start": ("Start-up and memory", start),
    "peers": ("Other simulators against plain training", peers),
    "device": ("Orthogonalisation of many matrices, and a large model on a GPU", device),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse((__doc__ or "").splitlines()[0], list(SECTIONS), argv)
    run_sections("fedcore", options, SECTIONS)


if __name__ == "__main__":
    main()
