"""Commands from typed dataclasses: parse first, import torch after; one-line errors, exit codes, presets by name."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
import json
import logging
import os
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from polymodal.errors import UserError, did_you_mean

__all__ = ["Interrupted", "command", "join_lists", "parse_config", "preset_names", "run_guarded", "subcommands"]

PACKAGES = ("polymodal", "fedcore", "vlm_accel", "slt", "css", "missing_modal")
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after the state was saved. The message says how to go on."""


def command(
    main: Callable[[Any], Any],
    config_class: type[Any],
    *,
    prog: str,
    example: str = "",
    presets: str | None = None,
    choices: Mapping[str, Mapping[str, str]] | None = None,
    default_presets: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    list_methods: Callable[[], str] | None = None,
    lists: Collection[str] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """Run one command: parse ``argv`` into ``config_class``, call ``main(config)``, return the exit code.

    Args:
        main: receives the parsed configuration; imports torch itself.
        config_class: a dataclass, typically a subclass of ``RunConfig``, importable without torch.
        prog: name of the command, for help and messages.
        example: lines shown at the top of ``--help``.
        presets: import path of the package whose ``configs/`` folder holds YAML presets.
        choices: class-typed options: option name -> short name -> dotted class path, so that ``--data NAME`` works
            next to ``--data.root DIR``.
        default_presets: preset used without ``--config``, by the name given to ``--data`` (``""``: without one).
        aliases: short option -> dotted option, e.g. ``{"fusion": "model.fusion"}``.
        list_methods: makes the text of ``--list-methods``.
        lists: options that take several words, see ``join_lists``.
        argv: arguments without the program's name; ``sys.argv[1:]`` by default.

    Returns:
        0 done, 1 failed, 2 usage (bad input), 130 interrupted.
    """
    arguments = join_lists(sys.argv[1:] if argv is None else argv, lists)
    debug = "--debug" in arguments
    arguments = [_spell(a, aliases or {}) for a in arguments if a != "--debug"]

    def run() -> None:
        if any(a in ("--list-methods", "--list_methods") for a in arguments) and list_methods is not None:
            sys.stdout.write(list_methods() + "\n")
            return
        if any(a in ("-h", "--help") for a in arguments):
            sys.stdout.write(help_text(config_class, prog, example, presets, choices or {}, arguments))
            return
        chosen = _with_default_preset(arguments, default_presets or {}, prog)
        config = parse_config(config_class, chosen, prog=prog, presets=presets, choices=choices)
        if config is None:
            return
        threads = getattr(config, "threads", None) or 1
        # Read by OpenMP when torch is imported, which happens inside main.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        main(config)

    return run_guarded(run, prog=prog, debug=debug)


def join_lists(argv: Sequence[str], lists: Collection[str]) -> list[str]:
    """``--seeds 0 1 2``, ``--seeds 0,1,2`` and ``--seeds=[0, 1, 2]`` are the same.

    Args:
        argv: arguments of a command.
        lists: names of the options with several values, with underscores.

    Returns:
        The arguments, each such option and its values in one word.
    """
    joined: list[str] = []
    waiting = list(argv)
    while waiting:
        word = waiting.pop(0)
        option, eq, value = word.partition("=")
        if not option.startswith("--") or option[2:].replace("-", "_") not in lists:
            joined.append(word)
            continue
        words = [value] if eq else []
        while not eq and waiting and not waiting[0].startswith("--"):
            words.append(waiting.pop(0))
        if not words or words[0].startswith("["):
            joined.append(f"{option}={' '.join(words)}" if words else option)
        else:
            values = [part.strip() for word in words for part in word.split(",") if part.strip()]
            joined.append(f"{option}={json.dumps([_number(part) for part in values])}")
    return joined


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def subcommands(
    table: Mapping[str, tuple[str, Callable[[Sequence[str]], int]]], *, prog: str, example: str = ""
) -> int:
    """Dispatch ``prog NAME ...``: ``table`` maps a name to (summary, function of the remaining arguments)."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, table))
        rows = [f"  {name:<{width}}  {summary}" for name, (summary, _) in table.items()]
        head = f"Example:\n{textwrap.indent(example.strip(), '  ')}\n\n" if example else ""
        sys.stdout.write(f"usage: {prog} COMMAND [options]\n\n{head}Commands (COMMAND --help shows the options):\n")
        sys.stdout.write("\n".join(rows) + "\n")
        return 0 if arguments else EXIT_USAGE
    if arguments[0] not in table:
        sys.stderr.write(f"{prog}: error: unknown command {arguments[0]!r}; known: {', '.join(table)}\n")
        return EXIT_USAGE
    return table[arguments[0]][1](arguments[1:])


def run_guarded(function: Callable[[], Any], *, prog: str, debug: bool = False) -> int:
    """Call ``function`` and turn what it raises into one line on stderr and an exit code."""
    _log_to_stderr(prog)
    try:
        function()
    except UserError as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"{prog}: error: {' '.join(str(error).split())}\n")
        return EXIT_USAGE
    except Interrupted as stop:
        sys.stderr.write(f"{prog}: {stop}\n")
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) went away: not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        detail = " ".join(str(error).split()) or "no message"
        sys.stderr.write(f"{prog}: failed: {type(error).__name__}: {detail} (--debug shows the traceback)\n")
        return EXIT_FAILED
    return 0


class _StderrHandler(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _log_to_stderr(prog: str) -> None:
    """Show messages of our own packages; the rest of Python's logging stays as it is."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"{prog}: %(message)s"))
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [handler]


def preset_names(presets: str | None) -> list[str]:
    """Names of the YAML presets in the ``configs/`` folder of the package ``presets``."""
    if presets is None:
        return []
    folder = importlib.resources.files(presets) / "configs"
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml")) if folder.is_dir() else []


def parse_config(
    config_class: type[Any],
    arguments: Sequence[str],
    *,
    prog: str = "command",
    presets: str | None = None,
    choices: Mapping[str, Mapping[str, str]] | None = None,
) -> Any:
    """Parse arguments into an instance of ``config_class``; None after ``--print_config``.

    Raises:
        UserError: unknown option, wrong type, unreadable or unknown configuration file.
    """
    import jsonargparse

    choices = choices or {}
    arguments = [_spell(a, {}) for a in arguments]
    arguments = _expand(arguments, presets, choices)
    print_config = [a for a in arguments if a.startswith("--print_config")]
    arguments = [a for a in arguments if a not in print_config]
    bases: list[type | str] = list(_class_typed(config_class).values())
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True, subclasses_enabled=bases)
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class, None)
    try:
        namespace = parser.parse_args(arguments)
        values = parser.instantiate(namespace)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise UserError(_one_line(error)) from error
    fields = {f.name for f in dataclasses.fields(config_class)}
    config = config_class(**{k: v for k, v in vars(values).items() if k in fields})
    if print_config:
        from polymodal.config import to_yaml

        sys.stdout.write(to_yaml(config))
        return None
    return config


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).replace("tip: For details of accepted options run:", "").split())
    return text.removeprefix("error: ")


def _spell(argument: str, aliases: Mapping[str, str]) -> str:
    """Underscores for dashes in an option's name, long names for aliases."""
    if not argument.startswith("--"):
        return argument
    name, eq, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    return "--" + aliases.get(name, name) + eq + value


def _with_default_preset(arguments: list[str], presets: Mapping[str, str], prog: str) -> list[str]:
    """Put the resumed run's own configuration, or the preset of the chosen data, in front unless one was named."""
    if any(a == "--config" or a.startswith("--config=") for a in arguments):
        return arguments
    resumed = Path(_value_of("resume", arguments) or ".nothing")
    for folder in (resumed, resumed.parent.parent):
        if (folder / "manifest.json").is_file() and (folder / "config.yaml").is_file():
            return ["--config", str(folder), *arguments]
    data = _value_of("data", arguments)
    preset = presets.get(data)
    if preset is None:
        return arguments
    if not any(a.startswith("--print_config") for a in arguments):
        sys.stderr.write(f"{prog}: preset {preset} (another one: --config NAME)\n")
    return ["--config", preset, *arguments]


def _value_of(key: str, arguments: Sequence[str]) -> str:
    for index, argument in enumerate(arguments):
        if argument.startswith(f"--{key}="):
            return argument.partition("=")[2]
        if argument == f"--{key}" and index + 1 < len(arguments):
            return arguments[index + 1]
    return ""


def _expand(arguments: list[str], presets: str | None, choices: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Replace preset names by their content and short class names by class paths."""
    result: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, eq, value = argument.partition("=")
        key = name[2:] if name.startswith("--") else ""
        if key != "config" and key not in choices:
            result.append(argument)
            continue
        if not eq:
            value = next(waiting, "")
        if not value or value.startswith("--"):
            raise UserError(f"--{key} needs a value")
        if key == "config":
            result += ["--config", json.dumps(_load_config(value, presets, choices))]
        else:
            result += [f"--{key}", _class_path(value, key, choices[key])]
    return result


def _class_path(value: str, key: str, table: Mapping[str, str]) -> str:
    if value in table:
        return table[value]
    if "." in value:
        return value
    raise UserError(f"--{key} {value}: unknown name; {did_you_mean(value, table)}known: {', '.join(table)}")


def _load_config(value: str, presets: str | None, choices: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    path = Path(value)
    if path.is_dir() and (path / "config.yaml").is_file():
        path = path / "config.yaml"
    if path.is_file():
        text, where = path.read_text(encoding="utf-8"), str(path)
    elif presets is not None and value in preset_names(presets):
        text = (importlib.resources.files(presets) / "configs" / f"{value}.yaml").read_text(encoding="utf-8")
        where = f"preset {value}"
    else:
        known = ", ".join(preset_names(presets)) or "none"
        raise UserError(f"--config {value}: no such file or preset; presets: {known}")
    try:
        loaded = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{where}: expected options by name (key: value), found {type(loaded).__name__}")
    for key, table in choices.items():
        node = loaded.get(key)
        if isinstance(node, str):
            loaded[key] = {"class_path": _class_path(node, key, table)}
        elif isinstance(node, dict) and "class_path" in node:
            node["class_path"] = _class_path(str(node["class_path"]), key, table)
    return loaded


def _class_typed(config_class: type[Any]) -> dict[str, type[Any]]:
    hints = typing.get_type_hints(config_class)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_class) if f.metadata.get("class_typed")}


# ------------------------------------------------------------------ help


def help_text(
    config_class: type[Any],
    prog: str,
    example: str,
    presets: str | None,
    choices: Mapping[str, Mapping[str, str]],
    arguments: Sequence[str],
) -> str:
    """Help of a command, one line an option.

    ``--help`` fits two screens: example, top options, the groups ``trainer`` and ``log`` and the chosen class-typed
    options; further groups are named with their size. ``--help GROUP`` shows one group, ``--help all`` everything.
    """
    position = next(i for i, a in enumerate(arguments) if a in ("-h", "--help"))
    wanted = arguments[position + 1] if position + 1 < len(arguments) else ""
    wanted = "" if wanted.startswith("-") else wanted
    groups = _groups(config_class, choices, arguments)
    if wanted and wanted != "all":
        if wanted not in groups:
            raise UserError(f"--help {wanted}: no such group; groups: {', '.join(groups)}")
        return "\n".join(groups[wanted]) + "\n"
    lines = [f"usage: {prog} [options]", ""]
    if example:
        lines += ["Example:", textwrap.indent(example.strip(), "  "), ""]
    lines += ["Options (any can stand in a YAML file for --config; dotted names are nested keys):"]
    names = preset_names(presets)
    what = "YAML file, run folder, or preset:" if names else "YAML file or run folder"
    lines += [_row("--config FILE|NAME" if names else "--config FILE", what)]
    lines += textwrap.wrap(", ".join(names), 76, initial_indent=" " * 41, subsequent_indent=" " * 41)
    lines += [_row("--print_config", "print the complete configuration and exit")]
    lines += [_row("--debug", "show the traceback of an error")]
    if any(f.name == "trainer" for f in dataclasses.fields(config_class)):
        lines += [_row("--list-methods", "methods with paper and fidelity")]
    hints, documentation = typing.get_type_hints(config_class), _field_docs(config_class)
    for item in dataclasses.fields(config_class):
        if item.name in choices:
            lines.append(
                _row(f"--{item.name} NAME", f"{documentation.get(item.name, '')}: {'|'.join(choices[item.name])}")
            )
        elif not dataclasses.is_dataclass(hints[item.name]):
            lines.append(_row(*_option(item, hints[item.name], documentation, "")))
    shown = set(groups) if wanted == "all" else {"trainer", "log", *choices}
    for name, group in groups.items():
        if name in shown:
            lines += ["", *group]
    rest = [name for name in groups if name not in shown]
    if rest:
        lines += ["", "More groups (--help GROUP, or --help all):"]
        lines += [
            _row(f"{name} ({len(groups[name]) - 1} options)", groups[name][0].partition(": ")[2]) for name in rest
        ]
    return "\n".join(lines) + "\n"


def _groups(
    config_class: type[Any], choices: Mapping[str, Mapping[str, str]], arguments: Sequence[str]
) -> dict[str, list[str]]:
    """Title and option lines of each nested group."""
    groups: dict[str, list[str]] = {}
    hints = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        hint = hints[item.name]
        if item.name in choices:
            cls = _chosen(item.name, arguments, choices) or type(_default(item))
            title = f"{item.name}: {cls.__name__} (--{item.name} NAME --help shows another one's)"
            groups[item.name] = [title, *_rows(cls, item.name + ".")]
        elif dataclasses.is_dataclass(hint):
            title = (hint.__doc__ or "").strip().split("\n")[0]
            groups[item.name] = [f"{item.name}: {title}", *_rows(typing.cast(type, hint), item.name + ".")]
    return groups


def _chosen(key: str, arguments: Sequence[str], choices: Mapping[str, Mapping[str, str]]) -> type[Any] | None:
    value = _value_of(key, arguments)
    if not value:
        return None
    module, _, name = _class_path(value, key, choices[key]).rpartition(".")
    loaded: type[Any] = getattr(importlib.import_module(module), name)
    return loaded


def _rows(cls: type[Any], prefix: str) -> list[str]:
    hints, documentation = typing.get_type_hints(cls), _field_docs(cls)
    return [_row(*_option(f, hints[f.name], documentation, prefix)) for f in dataclasses.fields(cls) if f.init]


def _option(item: dataclasses.Field[Any], hint: Any, documentation: dict[str, str], prefix: str) -> tuple[str, str]:
    default = _default(item)
    shown = "" if default in (None, "", {}, []) or default is dataclasses.MISSING else f" [{default}]"
    text = documentation.get(item.name, "")
    return f"--{prefix}{item.name} {_type_name(hint)}", textwrap.shorten(
        text.rstrip("."), 110, placeholder=" …"
    ) + shown


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def _type_name(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_name(a) for a in typing.get_args(hint) if a is not type(None))
    if origin in (list, tuple, dict):
        return {list: "[...]", tuple: "[...]", dict: "{...}"}[origin]
    return {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}.get(
        hint, getattr(hint, "__name__", "X")
    )


def _row(option: str, text: str) -> str:
    return f"  {option:<38} {text}" if len(option) <= 38 else f"  {option}  {text}"


def _field_docs(cls: type[Any]) -> dict[str, str]:
    """What a dataclass and its bases say of their fields: strings under the fields, or the docstring's ``Args``."""
    import ast
    import inspect

    import docstring_parser

    documentation: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        for argument in docstring_parser.parse(inspect.getdoc(base) or "").params:
            documentation[argument.arg_name] = " ".join((argument.description or "").split())
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        previous: str | None = None
        for node in getattr(body, "body", []):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                previous = node.target.id
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and previous:
                documentation[previous] = " ".join(str(node.value.value).split())
                previous = None
            else:
                previous = None
    return documentation
