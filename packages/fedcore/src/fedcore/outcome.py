"""What a run ends in: metrics, pictures, the closing table."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from polymodal.files import write_bytes
from polymodal.seeding import numpy_rng
from polymodal.tables import markdown

from fedcore.private_run import gated

if TYPE_CHECKING:
    from polymodal.run import Run

    from fedcore.module import FederatedModule
    from fedcore.prepare import Prepared
    from fedcore.privacy.report import PrivacyReport
    from fedcore.settings import FedConfig

__all__ = ["Outcome", "closing_table"]

log = logging.getLogger(__name__)
QUANTILES = {"min": 0.0, "q10": 0.1, "median": 0.5, "q90": 0.9}
TAIL = 10
"""evaluations at the end whose mean is reported"""


class Outcome:
    """Measures and draws what is known after the last round.

    Args:
        config: of the run.
        prepared: its clients and splits.
        module: as it was tested.
        run: receives files and metrics.
    """

    def __init__(self, config: FedConfig, prepared: Prepared, module: FederatedModule, run: Run) -> None:
        self.config, self.prepared, self.module, self.run = config, prepared, module, run
        self.folder = run.folder / "figures"

    def finish(self, report: PrivacyReport | None = None) -> dict[str, float]:
        """Final metrics by their full names; figures and the table of clients are written.

        Args:
            report: of a private run, of which little else is shown.
        """
        module, run = self.module, self.run
        final = {name: value for name, value in module.last_metrics.items() if name.startswith("test/")}
        for split in sorted(module.splits.keys() - {"val", "test"}):
            suffix = split.removeprefix("test_")
            final |= {f"test/{name}_{suffix}": value for name, value in module.measure(module.splits[split]).items()}
        curves = self._curves()
        final |= self._of_curves(curves)
        clients, flatness = ([], {}) if self._gated else (self._clients(), self._flatness())
        by_client = _quantiles([row["accuracy"] for row in clients if "accuracy" in row])
        final |= by_client | flatness
        if not self._gated:
            final |= {f"comm/{name}_total": float(module.totals[name]) for name in ("up_bytes", "down_bytes")}
        final |= {} if report is None else {"privacy/epsilon": report.epsilon, "privacy/delta": report.delta}
        run.log(by_client | flatness, module.simulation.done)
        self._write(curves, clients)
        run.note(metric_signatures=self._signatures(final))
        return final

    @property
    def _gated(self) -> bool:
        return gated(self.module.simulation)

    def _curves(self) -> dict[str, list[tuple[int, float]]]:
        """(round, value) by metric, of the whole run, from ``metrics.csv``."""
        from polymodal.run_reader import read_run

        found = read_run(self.run.folder).curves
        return {name: [(point.step, point.value) for point in points] for name, points in found.items()}

    def _of_curves(self, curves: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, float]:
        """Best value, mean of the last, rounds to the target, of every split that was followed; last validation."""
        found = {name: points[-1][1] for name, points in curves.items() if name.startswith("val/")}
        for split in ("val", "test"):
            name = f"{split}/accuracy"
            points = curves.get(name, [])
            if split == "test" and self.module.tested_step is None:
                continue
            if not points:
                continue
            values = [value for _, value in points]
            found[f"{name}_best"] = max(values)
            found[f"{name}_mean{TAIL}"] = float(np.mean(values[-TAIL:]))
            target = self.config.federation.target
            reached = next((round for round, value in points if value >= target), None)
            if target and reached is not None:
                found[f"{split}/rounds_to_target"] = float(reached)
        return found

    def _clients(self) -> list[dict[str, Any]]:
        """Metrics of the global model on each client's own training samples, or some of them."""
        most = self.config.federation.client_samples
        rows: list[dict[str, Any]] = []
        if not most:
            return rows
        for client, data in enumerate(self.prepared.clients):
            if not len(data):
                continue
            try:
                measured = self.module.measure(_some(data, most, client))
            except Exception as error:  # whatever a client's data raises: it has dropped the client in training too
                what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                log.warning("client %d is left out of the metrics by client: %s", client, what)
                continue
            rows.append({"client": client, "samples": len(data), **measured})
        columns = list(dict.fromkeys(key for row in rows for key in row))
        self.run.log_table("client/metrics", columns, [[row.get(key) for key in columns] for row in rows])
        return rows

    def _flatness(self) -> dict[str, float]:
        """Largest Hessian eigenvalue and sharpness on some training samples."""
        samples, train = self.config.federation.flatness, self.prepared.train
        if not samples or train is None:
            return {}
        from fedcore.landscape import DatasetLoss, hessian_eigenvalue, sharpness

        module = self.module
        order = np.sort(numpy_rng(0, "landscape").permutation(len(train))[:samples])
        module.export()
        loss = DatasetLoss(module.net, train.subset(order), self.prepared.loss)
        try:
            top = hessian_eigenvalue(loss, loss.flat, tolerance=1e-2)
            rise = sharpness(loss, loss.flat, loss.spec)
        except NotImplementedError as error:  # an operation without a second derivative
            log.warning("flatness is not measured: %s", " ".join(str(error).split())[:120])
            return {}
        return {"landscape/hessian": top.value, "landscape/sharpness": rise.mean}

    def _write(self, curves: Mapping[str, Sequence[tuple[int, float]]], clients: Sequence[Mapping[str, Any]]) -> None:
        from fedcore import figures

        self.folder.mkdir(exist_ok=True)
        title, target = self.run.manifest["name"], self.config.federation.target or None
        for metric in ("accuracy", "loss"):
            lines = {s: [curves[f"{s}/{metric}"]] for s in ("test", "val") if curves.get(f"{s}/{metric}")}
            if lines:
                aim = target if metric == "accuracy" else None
                content = figures.curves(lines, y_label=metric, title=title, target=aim)
                write_bytes(self.folder / f"{metric}.png", content)
        accuracies = [row["accuracy"] for row in clients if "accuracy" in row]
        if accuracies:
            what = "accuracy on each client's own samples"
            write_bytes(
                self.folder / "clients.png", figures.client_accuracy({self.config.algorithm: accuracies}, title=what)
            )
        world = self.prepared.world
        if world is not None and not self._gated:
            classes = np.unique(world.labels)
            counts = np.array([[int(np.sum(world.labels[i] == c)) for c in classes] for i in world.partition])
            names = [str(label) for label in classes]
            write_bytes(self.folder / "labels.png", figures.label_counts(counts, class_names=names))

    def _signatures(self, final: Mapping[str, float]) -> dict[str, str]:
        """How each final metric was measured."""
        federation = self.config.federation
        which = "last model" if federation.test_with == "last" else "best model on validation"
        rules = {
            "client/": f"{which}, each client's own training samples, {federation.client_samples} at most",
            "landscape/": f"{which}, {federation.flatness} training samples",
            "comm/": "sum over rounds, every client of a cohort counted",
            "privacy/": "of all rounds together, see privacy.json",
            "val/": "last model",
            "test/": which,
        }
        return {name: "curve over rounds" if _of_curve(name) else rules[f"{name.partition('/')[0]}/"] for name in final}


def _of_curve(name: str) -> bool:
    """Whether a final metric sums up a curve."""
    return name.endswith(("_best", f"_mean{TAIL}", "/rounds_to_target"))


def _some(data: Any, most: int, client: int) -> Any:
    """At most so many samples of a client, always the same ones."""
    if len(data) <= most:
        return data
    chosen = np.sort(numpy_rng(0, "client metrics", client).permutation(len(data))[:most])
    if hasattr(data, "subset"):
        return data.subset(chosen)
    from torch.utils.data import Subset

    return Subset(data, chosen.tolist())


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = {f"client/accuracy_{name}": float(np.quantile(values, q)) for name, q in QUANTILES.items()}
    return {**found, "client/accuracy_mean": float(np.mean(values))}


def closing_table(final: Mapping[str, float], config: FedConfig, totals: Mapping[str, int], rounds: int) -> str:
    """The table that a run ends in: a row a quantity.

    Args:
        final: final metrics by their full names.
        config: of the run.
        totals: of ``FederatedModule``.
        rounds: rounds done.
    """
    rows = [["rounds", str(rounds)]]
    if totals["local_steps"]:
        rows.append(["local steps", f"{totals['local_steps']:,}"])
    if totals["dropped"]:
        rows.append(["clients dropped", str(totals["dropped"])])
    for name, value in final.items():
        split, _, metric = name.partition("/")
        if split in ("val", "test") and not _of_curve(name):
            rows.append([f"{metric} ({split})", f"{value:.4f}"])
    for split in ("val", "test"):
        best, mean = final.get(f"{split}/accuracy_best"), final.get(f"{split}/accuracy_mean{TAIL}")
        if best is not None and mean is not None:
            rows.append([f"accuracy ({split}), mean of last {TAIL}; best", f"{mean:.4f}; {best:.4f}"])
    target = config.federation.target
    for split in ("val", "test"):
        if target and f"{split}/accuracy_best" in final:
            reached = final.get(f"{split}/rounds_to_target")
            rows.append([f"rounds to {target:g} ({split})", "not reached" if reached is None else str(int(reached))])
    clients = [final[f"client/accuracy_{name}"] for name in QUANTILES if f"client/accuracy_{name}" in final]
    if clients:
        rows.append(["accuracy by client: least, 10 %, median, 90 %", ", ".join(f"{v:.3f}" for v in clients)])
    for way in ("up", "down") if totals["clients"] else ():
        total = totals[f"{way}_bytes"]
        rows.append(
            [f"bytes {way}: all; a client and round", f"{_mib(total)}; {_mib(total / max(1, totals['clients']))}"]
        )
    if "landscape/hessian" in final:
        rows.append(["largest Hessian eigenvalue", f"{final['landscape/hessian']:.4g}"])
        rows.append(["sharpness at radius 0.1", f"{final['landscape/sharpness']:.4g}"])
    return markdown(["quantity", config.algorithm], rows)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.2f} MiB" if count >= 2**17 else f"{count / 2**10:,.2f} KiB"
