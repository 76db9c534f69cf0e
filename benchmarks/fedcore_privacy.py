"""Cost of client-level privacy: private rounds against their non-private twins, noise, accounting.

python benchmarks/fedcore_privacy.py                  # all sections, about three minutes on an idle core
python benchmarks/fedcore_privacy.py rounds           # some of them
python benchmarks/fedcore_privacy.py --quick          # does it run?
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder would hide the package fedcore behind this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._bench import Options, Row, interleave, overhead, parse, run_sections, value

TWINS = {
    "dp_fedavg": ({}, "fedavg", {}),
    "dp_fedpgn": ({"gamma": 0.2}, "fedcm", {"beta": 0.2}),
}
"""Private methods and what they are without clip and noise."""
WIDTHS = (784, 1024, 192, 10)
"""an MLP of a million parameters"""


def _network(widths: tuple[int, ...]) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rounds(options: Options) -> list[Row]:
    """Rounds of ten clients, the ledger in a file; a twin's cohort has the same size."""
    import torch
    from fedcore import federate
    from fedcore.privacy import PrivacyConfig
    from torch.utils.data import TensorDataset

    widths, clients, epochs = ((8, 4, 2), 10, (1,)) if options.quick else (WIDTHS, 100, (5, 1))
    draw = torch.Generator().manual_seed(1)
    data = [
        TensorDataset(torch.randn(100, widths[0], generator=draw), torch.randint(widths[-1], (100,), generator=draw))
        for _ in range(clients)
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for passes in epochs:
            for name, (own, twin, its) in TWINS.items():

                def make(algorithm: str, chosen: dict[str, Any], privacy: Any = None, passes: int = passes) -> Any:
                    from fedcore.algorithms import create

                    settings = {"batch_size": 50, "local_epochs": passes, "fraction": 0.1, "engine": "serial"}
                    return federate(
                        _network(widths), data, create(algorithm, **chosen), privacy=privacy, rounds=100_000, **settings
                    )

                functions = {"twin": make(twin, its).round}
                for kind, secure in (("private", False), ("secure", True)):
                    # Of one size: a Poisson cohort would compare the luck of the draw.
                    privacy = PrivacyConfig(clip=0.1, noise_multiplier=1.0, sampling="fixed", secure_noise=secure)
                    simulation = make(name, own, privacy)
                    simulation.open_ledger(Path(folder) / f"{name}-{passes}-{kind}.jsonl")
                    functions[kind] = simulation.round
                found = interleave(functions, options.times(20))
                size = sum(p.numel() for p in _network(widths).parameters())
                what = f"{name} over {twin}, {size:,} parameters, {2 * passes} steps of 50"
                target = 1.1 if passes == 5 else None
                rows.append(overhead(what, found["private"], found["twin"], at_most=target))
                rows.append(overhead(f"{what}, secure noise", found["secure"], found["twin"]))
    return rows


def noise(options: Options) -> list[Row]:
    """A million normals of either kind against torch's generator, which is no source of privacy noise."""
    import torch
    from fedcore.privacy import NoiseSource

    count = 1000 if options.quick else 10**6
    total = torch.zeros(count, dtype=torch.float64)
    functions: dict[str, Callable[[], Any]] = {
        "torch": lambda: total.add_(torch.randn(count, dtype=torch.float64)),
        "os": lambda: NoiseSource().add([total], 1.0, 0),
        "secure": lambda: NoiseSource(secure=True).add([total], 1.0, 0),
    }
    found = interleave(functions, options.times(20))
    return [
        overhead(f"{count:,} normals, seeded by the system, over torch.randn", found["os"], found["torch"]),
        overhead(f"{count:,} normals, secure, over torch.randn", found["secure"], found["torch"]),
    ]


def accounting(options: Options) -> list[Row]:
    """Seconds of one epsilon, of the bound by rounds, and of a calibration; nothing is kept between runs."""
    from fedcore.privacy import accounting as module

    rate, sigma, count = (1.0, 5.0, 3) if options.quick else (0.1, 0.8, 301)
    functions: dict[str, Callable[[], Any]] = {
        "epsilon by PLD": lambda: module.epsilon(rate, sigma, count, 1 / 500),
        "epsilon by RDP": lambda: module.epsilon(rate, sigma, count, 1 / 500, accountant="rdp"),
        "calibration for epsilon 8": lambda: module.calibrate(8.0, rate, count, 1 / 5000),
    }
    rows = []
    for what, function in functions.items():
        seconds = []
        for _ in range(options.times(5)):
            module._epsilon.cache_clear()
            began = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - began)
        rows.append(value(f"{what}, q {rate}, {count} rounds", "s", seconds))
    return rows


SECTIONS = {
    "rounds": ("Private rounds against their non-private twins", rounds),
    "noise": ("Noise", noise),
    "accounting": ("Accounting", accounting),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse((__doc__ or "").splitlines()[0], list(SECTIONS), argv)
    run_sections("fedcore_privacy", options, SECTIONS)


if __name__ == "__main__":
    main()
