"""Speed of federated LoRA: aggregation of unequal ranks, ILoRA's round against FedIT's, an adapted layer and PEFT's.

python benchmarks/fedcore_lora.py                   # all sections, about four minutes on two idle cores
python benchmarks/fedcore_lora.py aggregate rounds  # some of them
python benchmarks/fedcore_lora.py --quick           # does it run?
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its folder would hide the package fedcore behind this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks._bench import Options, Row, interleave, overhead, parse, run_sections, speedup

RANKS = (2, 4, 6)


def aggregate(options: Options) -> list[Row]:
    """Ten clients of rank 8 on one layer: thin path against the d x k matrix; then next to bare factorisations."""
    import torch
    from fedcore.lora import aggregate_concat_qr

    side, clients = (16, 2) if options.quick else (1024, 10)
    rows = []
    for name, dtype, target in (("qr", "float32", 10.0), ("qr", "float64", 10.0), ("svd", "float32", None)):
        factors = _factors(side, [8] * clients, getattr(torch, dtype), options.device)
        given = (factors, [1 / clients] * clients, [8] * clients, name)
        functions = {"thin": partial(aggregate_concat_qr, *given), "dense": partial(aggregate_concat_qr, *given, False)}
        found = interleave(functions, options.times(10), sync=options.sync)
        what = f"{clients} clients of rank 8, {side} x {side}, {name}, {dtype}: thin against dense"
        rows.append(speedup(what, found["thin"], found["dense"], at_least=target))
    return rows


def large(options: Options) -> list[Row]:
    """Ranks 8, 8 and 16 on a large layer, against QR of (4096, 32), (4096, 32) and (32, 4096) and nothing else."""
    import torch
    from fedcore.lora import aggregate_concat_qr

    side, ranks = (64, (2, 2, 4)) if options.quick else (4096, (8, 8, 16))
    total, rows = sum(ranks), []
    for name in ("qr", "qr_pivoted", "svd"):
        factors = _factors(side, ranks, torch.float32, options.device)
        tall, wide = torch.cat([b for _, b in factors], dim=1), torch.cat([a for a, _ in factors])

        def bare(tall: torch.Tensor = tall, wide: torch.Tensor = wide) -> None:
            for matrix in (tall, tall, wide):
                torch.linalg.qr(matrix)

        ours = partial(aggregate_concat_qr, factors, [0.25, 0.25, 0.5], list(ranks), name)
        found = interleave({"ours": ours, "bare": bare}, options.times(40), sync=options.sync)
        what = f"ranks {', '.join(map(str, ranks))} on {side} x {side}, {name}, over three bare QR of width {total}"
        rows.append(overhead(what, found["ours"], found["bare"], at_most=3.0 if name == "qr" else None))
    return rows


def _factors(side: int, ranks: Any, dtype: Any, device: str) -> list[tuple[Any, Any]]:
    import torch

    draw = torch.Generator().manual_seed(0)
    made = [(torch.randn(r, side, generator=draw), torch.randn(side, r, generator=draw)) for r in ranks]
    return [(a.to(device, dtype), b.to(device, dtype)) for a, b in made]


def rounds(options: Options) -> list[Row]:
    """Rounds of ILoRA against FedIT's on the same model, clients and batches; both with AdamW."""
    rows = []
    for name, model, samples, batch, runs in (
        ("ViT of 4 blocks, width 96, 32 px", _vit, 256, 32, 10),
        ("MLP 64-64-64-10", _mlp, 512, 16, 30),
    ):
        if options.quick:
            samples, batch, model = 8, 4, _mlp
        made = partial(_simulation, options, model, samples, batch)
        kinds: dict[str, dict[str, Any]] = {
            "control_batches full": {"control_batches": 0},
            "one control batch": {"control_batches": 1},
            "no control variates": {"cv": False},
            "residual=fold, no control variates": {"cv": False, "residual": "fold"},
        }
        functions = {"fedit": made("fedit").round}
        functions |= {kind: made("ilora", **given).round for kind, given in kinds.items()}
        found = interleave(functions, options.times(runs), sync=options.sync)
        targets = (2.2, 1.2, None, None)
        for kind, target in zip(kinds, targets, strict=True):
            what = f"ILoRA over FedIT, {kind}: 3 clients, {-(-samples // batch)} steps of {batch}, {name}"
            rows.append(overhead(what, found[kind], found["fedit"], at_most=target))
    return rows


def _simulation(
    options: Options,
    model: Callable[[], tuple[Any, tuple[int, ...]]],
    samples: int,
    batch: int,
    name: str,
    **given: Any,
) -> Any:
    """Three clients of ranks 2, 4 and 6."""
    import torch
    from fedcore import Simulation
    from fedcore.algorithms import create
    from fedcore.lora import inject
    from torch.utils.data import TensorDataset

    base, shape = model()
    draw = torch.Generator().manual_seed(1)
    data = [
        TensorDataset(torch.randn(samples, *shape, generator=draw), torch.randint(10, (samples,), generator=draw))
        for _ in RANKS
    ]
    init: Any = "qr_scaled" if name == "ilora" else "kaiming"

    def adapted(rank: int) -> Any:
        return inject(base, rank, init=init).to(options.device)

    algorithm = create(name, **given)
    common: dict[str, Any] = {"batch_size": batch, "fraction": 1.0, "rounds": 100_000, "engine": "serial"}
    return Simulation(adapted, data, algorithm, ranks=RANKS, weighting="samples", **common)


def _vit() -> tuple[Any, tuple[int, ...]]:
    import torch
    from fedcore.models import build

    torch.manual_seed(0)
    shape = (3, 32, 32)
    return build("deit_tiny", num_classes=10, input_shape=shape, dim=96, depth=4, heads=3), shape


def _mlp() -> tuple[Any, tuple[int, ...]]:
    import torch
    from fedcore.models import build

    torch.manual_seed(0)
    return build("mlp", num_classes=10, input_shape=(64,), hidden=(64, 64)), (64,)


def layers(options: Options) -> list[Row]:
    """Forward and backward pass of an adapted layer against PEFT's, and against the layer without an adapter."""
    import torch
    from fedcore.lora import LoraLinear
    from torch import nn

    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        return []
    rows = []
    for side, count in ((16, 4),) if options.quick else ((192, 2048), (768, 2048)):
        torch.manual_seed(0)
        x = torch.randn(count, side, device=options.device, requires_grad=True)
        bare = nn.Linear(side, side).requires_grad_(False)
        ours = LoraLinear(nn.Linear(side, side), 4, 2.0).to(options.device)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
        theirs = get_peft_model(nn.Sequential(nn.Linear(side, side)), config).base_model.model[0].to(options.device)
        functions = {
            "ours": partial(_pass, ours, x),
            "peft": partial(_pass, theirs, x),
            "bare": partial(_pass, bare.to(options.device), x),
        }
        found = interleave(functions, options.times(40), 5, options.sync)
        what = f"adapter of rank 4 on {side} x {side}, {count} rows, forward and backward"
        rows.append(overhead(f"{what}, over PEFT's layer", found["ours"], found["peft"], at_most=1.05))
        rows.append(overhead(f"{what}, over the frozen layer alone", found["ours"], found["bare"]))
    return rows


def _pass(layer: Any, x: Any) -> None:
    layer(x).sum().backward()


SECTIONS = {
    "aggregate": ("Aggregation of low-rank factors, without the matrix against with it", aggregate),
    "large": ("Aggregation on a large layer against bare QR factorisations", large),
    "rounds": ("A round of ILoRA against a round of FedIT", rounds),
    "layers": ("An adapted layer", layers),
}


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    options = parse((__doc__ or "").splitlines()[0], list(SECTIONS), argv)
    run_sections("fedcore_lora", options, SECTIONS)


if __name__ == "__main__":
    main()
