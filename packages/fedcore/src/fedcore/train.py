"""``fed-train``: train one model over many clients, round by round; report what came out."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, Any

from polymodal.cli import command
from polymodal.errors import UserError

from fedcore.algorithms import ALGORITHMS
from fedcore.data import READERS
from fedcore.settings import FedConfig

if TYPE_CHECKING:
    from polymodal.run import Run

__all__ = ["DEFAULT_PRESETS", "list_methods", "main", "train"]

EXAMPLE = """
fed-train                                           # digits, 40 clients, FedMoSWA: about a minute
fed-train --algorithm scaffold --seed 1             # a rival on the same data
fed-train --alpha 0.6 --clients 100 --rounds 200 --lr 0.2 --model.options '{hidden: [200]}'
fed-train --data cifar100 --data.root DIR --model resnet18_gn --algorithm fedadamw
fed-train --lora.ranks 2,4,6                        # ILoRA: adapters of unequal ranks on a frozen base
fed-train --algorithm dp_fedpgn --privacy.target_epsilon 5           # client-level differential privacy
fed-train --module my_task.py:MyTask --datasets my_task.py:clients     # any TaskModule
fed-train --resume runs/fedcore/RUN                 # go on after Ctrl-C or a crash
"""
DEFAULT_PRESETS = {
    "": "digits",
    "digits": "digits",
    "fashion_mnist": "fashion_mnist",
    "text_domains": "text_domains",
    "cifar10": "fedswa_cifar10",
    "cifar100": "fedswa_cifar100",
    "tiny_imagenet": "fedswa_tiny_imagenet",
    "mnist": "fashion_mnist",
    "svhn": "small_pictures",
    "stl10": "small_pictures",
    "domainnet": "domainnet",
    **dict.fromkeys(("imdb", "ag_news", "dbpedia", "yahoo_answers", "yelp", "hatexplain"), "text_sets"),
    **dict.fromkeys(("newsgroups20", "emotion", "sst5", "mr"), "text_sets"),
    **{name: "fedadamw_glue" for name in READERS if name.partition(":")[0] == "glue"},
}
PICTURES = ("mnist", "svhn", "stl10", "cifar10", "cifar100", "tiny_imagenet", "domainnet")
OWN_FORMATS = ("npz", "csv")
LORA_PRESETS = {
    **{name: "ilora_nlp" for name in READERS if name not in OWN_FORMATS},
    **dict.fromkeys(PICTURES, "ilora_cv"),
    "": "ilora",
    "digits": "ilora",
    "fashion_mnist": "ilora_fashion",
    "text_domains": "ilora_text",
}
"""presets where ranks or an adapter are given, by data"""
PRIVATE_PRESETS = {
    "": "dp_digits",
    "digits": "dp_digits",
    "cifar10": "dp_fedpgn_cifar10",
    "cifar100": "dp_fedpgn_cifar100",
}
"""presets where a private algorithm is named"""
ALIASES = {
    "model": "model.name",
    "partition": "partition.scheme",
    "clients": "partition.clients",
    "alpha": "partition.alpha",
    "rounds": "federation.rounds",
    "fraction": "federation.fraction",
    "lr": "federation.lr",
    "engine": "federation.engine",
}


def main() -> int:
    """Entry point of ``fed-train``; returns the exit code."""
    arguments, presets = _with_adapters(sys.argv[1:])
    if _is_private(arguments):
        presets = {**presets, **PRIVATE_PRESETS}
    return command(
        train,
        FedConfig,
        prog="fed-train",
        example=EXAMPLE,
        presets="fedcore",
        choices={"data": READERS},
        default_presets=presets,
        aliases=ALIASES,
        list_methods=list_methods,
        argv=arguments,
    )


def _with_adapters(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments and presets: those of adapters where ranks or an adapter are given.

    Data that no preset is for, and clients of a function of one's own, get only the presets' method.
    """
    given = {argument.partition("=")[0].replace("-", "_") for argument in arguments}
    if not given & {"__lora.ranks", "__lora.adapter"}:
        return arguments, DEFAULT_PRESETS
    pairs = [
        *itertools.pairwise(arguments),
        *(tuple(argument.split("=", 1)) for argument in arguments if "=" in argument),
    ]
    if "__lora.ranks" not in given and not given & {"__config", "__resume"}:
        arguments = [*arguments, "--lora.ranks", "[]"]  # the adapter's own, not the preset's
    if "__datasets" not in given and not any(("--data", name) in pairs for name in OWN_FORMATS):
        return arguments, LORA_PRESETS
    return (arguments if given & {"__algorithm", "__config", "__resume"} else ["--algorithm", "ilora", *arguments]), {}


def _is_private(arguments: list[str]) -> bool:
    """Whether the arguments name an algorithm with client-level privacy."""
    pairs = itertools.zip_longest(arguments, arguments[1:], fillvalue="")
    named = [word.partition("=")[2] or after for word, after in pairs if word.partition("=")[0] == "--algorithm"]
    return bool(named) and any(row.name == named[-1] and "dp" in row.tags for row in ALGORITHMS)


def list_methods() -> str:
    """Algorithms with paper and fidelity, one line each."""
    width = max(len(row.name) for row in ALGORITHMS)
    return "\n".join(f"{row.name:<{width}}  {row.fidelity:<14}  {row.summary}  [{row.paper}]" for row in ALGORITHMS)


def train(config: FedConfig) -> None:
    """Run all rounds and print the result.

    Raises:
        UserError: bad data, options, model or checkpoint.
        RoundError: a round in which no client reported; the last checkpoint stands.
    """
    from polymodal.run import Run
    from polymodal.seeding import set_threads

    from fedcore.job import Job
    from fedcore.outcome import closing_table
    from fedcore.private_run import GatedRun, gated

    set_threads(config.threads)
    job = Job(config)
    if not config.datasets:
        config.data.fit_to_model(config.model.name)
        config.data.check()
    job.check()
    if config.dry_run:
        sys.stdout.write(job.plan() + "\n")
        return
    _refuse_other_run(config, job.facts())
    with (GatedRun if gated(job.simulation) else Run).start(
        "fedcore",
        config,
        name=job.name,
        method=job.info.name,
        fidelity=job.info.fidelity,
        data=job.facts(),
        step_name="round",
    ) as run:
        module = job.run(run)
        final = job.finish(run, module)
        run.finish(final)
    sys.stdout.write("\n" + closing_table(final, config, module.totals, module.simulation.done) + "\n")
    if job.report is not None:
        sys.stdout.write("\n" + job.report.text() + "\n")
    _show(run, job.exported)


def _refuse_other_run(config: FedConfig, facts: dict[str, Any]) -> None:
    """Before a run goes on: what its rounds were trained for must be what this command asks for.

    Raises:
        UserError: another algorithm, model, partition or seed.
    """
    from polymodal.run import find_resume, read_manifest

    if not config.resume:
        return
    folder, _ = find_resume(config.resume, "fedcore", config)
    manifest = read_manifest(folder)
    if manifest["task"] != "fedcore":
        return  # Run.start says so
    before = {**manifest["data"], "algorithm": manifest["method"], "seed": manifest["seed"]}
    now = {"algorithm": config.algorithm, "seed": config.seed, "model": facts["model"], "clients": facts["clients"]}
    for key, value in now.items():
        if before.get(key, value) != value:
            raise UserError(
                f"--resume {folder}: a run with {key} {before[key]}, not {value}; leave that option out to continue "
                "it, or --resume to start a new run"
            )
    if before.get("partition") != facts.get("partition"):
        raise UserError(f"--resume {folder}: its clients have other samples; leave the options of partition out")
    if before.get("lora") or facts.get("lora"):
        from fedcore.lora.job import refuse_other_adapters

        refuse_other_adapters(folder, before.get("lora"), facts.get("lora"))


def _show(run: Run, exported: str) -> None:
    """The run folder, the command that shows more, adapters for other programs, the W&B upload command."""
    from fedcore.private_run import GatedRun

    sys.stdout.write(f"\nrun folder  {run.folder}\npictures    {run.folder / 'figures'}\n")
    sys.stdout.write(f"more        polymodal report {run.folder} --html\n")
    split = " --split test" if isinstance(run, GatedRun) else ""
    sys.stdout.write(f"surface     fed-landscape {run.folder}{split}\n")
    if exported:
        sys.stdout.write(f"adapters    {exported}\n")
    if run.sync_command:
        sys.stdout.write(f"upload      {run.sync_command}\n")
