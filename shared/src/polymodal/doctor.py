"""`polymodal doctor`: is this installation whole, and what would mend it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import platform
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlparse

from packaging.requirements import InvalidRequirement, Requirement

from polymodal.discovery import Package, import_name, installed_packages

__all__ = ["Finding", "examine", "report_text"]

State = Literal["ok", "note", "warn", "fail"]
_FEW_GIB, _TOO_FEW_GIB = 5.0, 0.5


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        state: ``ok``; ``note`` (fine, worth knowing); ``warn`` (works, may surprise); ``fail`` (broken).
        topic: what was looked at.
        detail: what was found.
        remedy: what to do; empty where there is nothing to do.
    """

    state: State
    topic: str
    detail: str
    remedy: str = ""


def examine(runs: Path = Path("runs")) -> list[Finding]:
    """Look at everything; nothing is changed and nothing is sent.

    Args:
        runs: folder that training commands would write to.
    """
    packages = installed_packages()
    family = ["polymodal", *(p.name for p in packages)]
    checks = (
        _python(),
        _distributions(family),
        _modules(packages),
        _extras(family),
        _devices(),
        _account(),
        _folders(runs),
    )
    return list(itertools.chain.from_iterable(checks))


def report_text(findings: list[Finding]) -> str:
    """One line a finding, remedies below theirs, a summary at the end."""
    width = max(len(f.topic) for f in findings)
    lines = []
    for f in findings:
        indent = " " * (width + 8)
        text = f"{f.state:<4}  {f.topic:<{width}}  {f.detail}"
        wrapped = textwrap.wrap(
            text, width + 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        lines.append("\n".join(wrapped))
        if f.remedy:
            lines.append(f"{indent}-> {f.remedy}")
    broken = sum(f.state == "fail" for f in findings)
    warned = sum(f.state == "warn" for f in findings)
    lines.append("")
    lines.append(f"{broken} broken, {warned} to look at" if broken or warned else "all well")
    return "\n".join(lines)


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} at {sys.executable}"
    requires = _metadata_of("polymodal", "Requires-Python")
    problem = bool(requires) and not Requirement(f"python{requires}").specifier.contains(platform.python_version())
    remedy = f"polymodal needs Python {requires}: uv python install 3.12" if problem else ""
    yield Finding("fail" if problem else "ok", "python", found, remedy)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("ok", "system", f"{platform.platform()}, {cores} cores{_memory()}")


def _memory() -> str:
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return ""
    return f", {size / 2**30:.1f} GiB memory"


def _metadata_of(distribution: str, field: str) -> str:
    try:
        return metadata.metadata(distribution)[field] or ""
    except metadata.PackageNotFoundError:
        return ""


def _requirements(distribution: str) -> Iterator[Requirement]:
    for line in metadata.requires(distribution) or ():
        try:
            yield Requirement(line)
        except InvalidRequirement:
            continue


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _state_of(requirement: Requirement) -> str:
    """What is wrong with an installed requirement; empty if nothing."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "missing"
    if requirement.specifier and not requirement.specifier.contains(version, prereleases=True):
        return f"version {version}, needs {requirement.specifier}"
    return ""


def _distributions(family: Sequence[str]) -> Iterator[Finding]:
    """Versions of what each package needs without extras."""
    needed: dict[str, set[str]] = {}
    for distribution in family:
        if not _installed(distribution):
            yield Finding("fail", "packages", f"{distribution} is not installed", "uv sync, or pip install polymodal")
            continue
        for requirement in _requirements(distribution):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            problem = _state_of(requirement)
            needed.setdefault(requirement.name, set())
            if problem:
                needed[requirement.name].add(f"{problem} (for {distribution})")
    for name, problems in needed.items():
        if problems:
            yield Finding("fail", name, "; ".join(sorted(problems)), f"uv sync, or pip install --upgrade {name}")
    good = [f"{n} {metadata.version(n)}" for n, problems in sorted(needed.items()) if not problems]
    yield Finding("ok", "libraries", ", ".join(good))


def _modules(packages: Sequence[Package]) -> Iterator[Finding]:
    """Whether the short import names lead to our files: the bare names belong to strangers on the public index."""
    for names in [("polymodal", "polymodal"), *((p.name, p.module) for p in packages)]:
        yield check_module(*names)
    for listed in packages:
        if listed.problem:
            yield Finding("fail", listed.module, listed.problem, f"reinstall {listed.name}")


def check_module(distribution: str, module: str) -> Finding:
    """Whether ``import <module>`` would take the files of ``distribution``; nothing is imported.

    Args:
        distribution: e.g. ``polymodal-slt``.
        module: e.g. ``slt``.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return Finding("fail", module, f"cannot be imported, though {distribution} is installed", "uv sync --reinstall")
    origin = Path(spec.origin).resolve()
    installed = metadata.distribution(distribution)
    owned = {Path(str(installed.locate_file(f))).resolve() for f in installed.files or ()}
    source = _editable_source(installed)
    if origin in owned or (source is not None and source in origin.parents):
        return Finding("ok", module, f"{distribution} {installed.version} at {origin.parent}")
    strangers = sorted(set(metadata.packages_distributions().get(module, ())) - {distribution})
    who = f", which belongs to {', '.join(strangers)}" if strangers else ""
    remedy = f"pip uninstall {' '.join(strangers)}" if strangers else f"move {origin.parent} away or leave that folder"
    return Finding("fail", module, f"import {module} takes {origin}{who}, not {distribution}", remedy)


def _editable_source(distribution: metadata.Distribution) -> Path | None:
    """Source folder of an editable installation."""
    text = distribution.read_text("direct_url.json")
    if text is None:
        return None
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not record.get("dir_info", {}).get("editable"):
        return None
    path = unquote(urlparse(str(record.get("url", ""))).path)
    if os.name == "nt":
        path = path.lstrip("/")
    return Path(path).resolve()


def _extras(family: Sequence[str]) -> Iterator[Finding]:
    """What is missing for which extra; an extra is optional, so this never fails."""
    for distribution in family:
        if not _installed(distribution):
            continue
        missing: dict[str, list[str]] = {}
        for requirement in _requirements(distribution):
            for extra in metadata.metadata(distribution).get_all("Provides-Extra") or ():
                marker = requirement.marker
                if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
                    continue
                missing.setdefault(extra, [])
                if _state_of(requirement):
                    missing[extra].append(requirement.name)
        for extra, names in missing.items():
            topic = f"{import_name(distribution)}[{extra}]"
            if names:
                remedy = f"pip install '{distribution}[{extra}]' (in a clone: uv sync --all-packages --extra {extra})"
                yield Finding("note", topic, f"not installed: {', '.join(names)}", remedy)
            else:
                yield Finding("ok", topic, "installed")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("fail", "torch", f"cannot be imported: {' '.join(str(error).split())}", "reinstall torch")
        return
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            size = f"{properties.total_memory / 2**30:.0f} GiB"
            yield Finding("ok", f"cuda:{index}", f"{properties.name}, {size}, bf16 {torch.cuda.is_bf16_supported()}")
    elif torch.backends.mps.is_available():
        yield Finding("ok", "mps", "Apple GPU")
    else:
        driver = shutil.which("nvidia-smi") is not None
        remedy = "an NVIDIA driver is here but torch does not see a GPU: check the driver and torch's build"
        yield Finding("warn" if driver else "note", "device", f"CPU only ({kind})", remedy if driver else "")
    asked = os.environ.get("OMP_NUM_THREADS", "not set")
    detail = f"torch by itself: {torch.get_num_threads()} (OMP_NUM_THREADS {asked}); training commands: --threads"
    yield Finding("ok", "threads", f"{detail}, default 1")


def _account() -> Iterator[Finding]:
    """State of the W&B account as the loggers see it; nothing is contacted."""
    try:
        from polymodal.config import LoggingConfig
        from polymodal.wandb_mode import wandb_mode

        mode = wandb_mode(LoggingConfig())
    except ImportError as error:
        yield Finding("fail", "wandb", f"the loggers cannot be imported: {error}", "uv sync, or reinstall polymodal")
        return
    forced = os.environ.get("WANDB_MODE")
    why = f"WANDB_MODE={forced}" if forced else "an account is configured" if mode == "online" else "no account"
    remedy = "" if mode == "online" else "nothing to do; `wandb login` to log online, `wandb sync` uploads later"
    yield Finding("ok" if mode == "online" else "note", "wandb", f"runs are logged {mode} ({why})", remedy)


def _folders(runs: Path) -> Iterator[Finding]:
    from polymodal.paths import cache_dir

    for topic, folder in (("runs", runs.absolute()), ("cache", cache_dir())):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free / 2**30
        detail = f"{folder}: {free:.1f} GiB free"
        problem = _not_writable(existing)
        if problem:
            yield Finding("fail", topic, f"{detail}, {problem}", "choose another folder or mend its permissions")
        elif free < _TOO_FEW_GIB:
            yield Finding("fail", topic, f"{detail}: too little for a checkpoint", "free some space")
        elif free < _FEW_GIB:
            yield Finding("warn", topic, detail, "large models write checkpoints of several GiB")
        else:
            yield Finding("ok", topic, detail)


def _not_writable(folder: Path) -> str:
    """Why nothing can be written into an existing folder; empty if it can."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"
