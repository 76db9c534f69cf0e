"""A language model from a folder or a GGUF file, so that cache methods run on any small model that a user has.

Nothing is downloaded, no code of the folder is run, weights are read from safetensors or GGUF only (never a pickle).
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.devices import pick_device
from polymodal.errors import UserError, did_you_mean

from vlm_accel.families import FAMILIES, family_of
from vlm_accel.loading import AUTO

if TYPE_CHECKING:
    from torch import nn

__all__ = ["load_language_model"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_language_model(
    folder: Path | str, dtype: str = "auto", device: str = "auto", attn: str = "sdpa"
) -> tuple[nn.Module, Any]:
    """The language model in ``folder``, in eval mode, and its tokenizer.

    Args:
        folder: a folder with config.json and *.safetensors, or with one *.gguf, or a GGUF file itself.
        dtype: auto (as stored; GGUF files are unpacked to float32), float32, bfloat16, float16.
        device: auto, cpu, cuda, mps.
        attn: sdpa, eager or flash_attention_2.

    Returns:
        (model, tokenizer); the tokenizer pads on the left, and is None where the folder has none.

    Raises:
        UserError: nothing to load there, a family that is not known, a package that is missing, damaged files.
    """
    path = Path(folder).expanduser()
    if dtype not in _DTYPES:
        raise UserError(f"dtype={dtype!r}; use one of {', '.join(_DTYPES)}")
    if not path.exists():
        raise UserError(f"{path}: no such folder or file; give a model's folder or a .gguf file")
    file = _gguf_file(path)
    where = path if path.is_dir() else path.parent
    if file is None:
        _check_folder(where)
    else:
        _check_gguf(where / file)
    model = _load(where, file, dtype, attn)
    family_of(model)
    model = model.to(pick_device(device, auto=AUTO)).eval()
    return model, _tokenizer(where, file)


def _gguf_file(path: Path) -> str | None:
    """Name of the GGUF file that is meant; None: a folder of safetensors."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path}: not a .gguf file; give the folder of a checkpoint, or a .gguf file")
        return path.name
    if (path / "config.json").is_file():
        return None
    files = sorted(file.name for file in path.glob("*.gguf"))
    if not files:
        raise UserError(f"{path}: neither config.json nor a .gguf file there; give a model's folder or a .gguf file")
    if len(files) > 1:
        raise UserError(f"{path}: {len(files)} .gguf files ({', '.join(files[:4])}); give the path of one of them")
    return files[0]


def _language_types() -> list[str]:
    return [kind for family in FAMILIES if family.decoder and family.encoder is None for kind in family.model_types]


def _check_folder(folder: Path) -> None:
    """Refuse what cannot work before any weight is read."""
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read as a model's config ({error})") from error
    _check_type(str(kind), folder)
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no .safetensors file there; save the model with save_pretrained(...) first")


def _check_type(kind: str, where: Path) -> None:
    if kind not in _language_types():
        raise UserError(
            f"{where}: model type {kind!r} is no language model known here; {did_you_mean(kind, _language_types())}"
            f"known: {', '.join(_language_types())}"
        )


def _check_gguf(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{file}: reading GGUF needs a package; install polymodal-vlm-accel[gguf]")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{file}: not a GGUF file (its first four bytes say so); download or convert it again")


def _load(folder: Path, file: str | None, dtype: str, attn: str) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    more: dict[str, Any] = {"gguf_file": file} if file else {"use_safetensors": True}
    if file:
        dtype = "float32" if dtype == "auto" else dtype
    name = folder / file if file else folder
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype, attn_implementation=attn, trust_remote_code=False, **more
        )
    except (SafetensorError, OSError, ValueError, KeyError, IndexError, RuntimeError, ImportError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{name}: cannot be loaded ({type(error).__name__}: {first}); is the file whole?") from error
    return model


def _tokenizer(folder: Path, file: str | None) -> Any:
    from transformers import AutoTokenizer

    if file is None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    more = {"gguf_file": file} if file else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **more)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, ImportError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder}: its tokenizer cannot be loaded ({first}); remove its files or mend them") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
