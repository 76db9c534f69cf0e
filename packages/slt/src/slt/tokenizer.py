"""Texts to token ids and back: a word or character table of one's own, or the tokenizer of an mBART folder."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import UserError
from polymodal.files import write_json

from slt.config import VocabInfo
from slt.ops.corrupt import MASK

if TYPE_CHECKING:
    import tokenizers

__all__ = ["MASK", "Tokenizer", "read_backend", "trim_vocabulary"]

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
META_FILE = "slt_tokenizer.json"
SCHEMA = "slt.tokenizer"
SCHEMA_VERSION = 1
KINDS = ("word", "char", "pretrained")


class Tokenizer:
    """Encoder form of a text: ``tokens </s> <tag>``, as mBART has it.

    Args:
        backend: a tokenizer of the ``tokenizers`` library.
        kind: ``word`` (blank-separated words), ``char`` (single characters, blanks dropped) or ``pretrained``.
        language: language tag, e.g. ``de_DE``.

    Raises:
        UserError: a special token or the language tag is not in the vocabulary.
    """

    def __init__(self, backend: tokenizers.Tokenizer, kind: str, language: str) -> None:
        if kind not in KINDS:
            raise UserError(f"tokenizer kind {kind!r}; known: {', '.join(KINDS)}")
        # Texts may hold "</s>" or a language tag as plain characters; they must not become control tokens.
        backend.encode_special_tokens = True
        self._backend = backend
        self.kind = kind
        self.language = language
        self._special: dict[str, int] = {}
        for name in (*SPECIALS, MASK):
            if (index := backend.token_to_id(name)) is not None:
                self._special[name] = index
        missing = [name for name in (*SPECIALS, MASK) if name not in self._special]
        if missing:
            raise UserError(f"the tokenizer has no {', '.join(missing)}; an mBART tokenizer is needed")
        self.pad_id = self._special["<pad>"]
        self.eos_id = self._special["</s>"]
        self.unk_id = self._special["<unk>"]
        self.mask_id = self._special[MASK]
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = self._special_ids()
        self._skip = frozenset(self.special_ids)
        self._tag = self.tag_id(language)
        self.sha: str = hashlib.sha256(f"{kind}\n{backend.to_str()}".encode()).hexdigest()[:16]

    @classmethod
    def build(cls, kind: str, texts: Iterable[str], language: str, min_count: int = 1) -> Tokenizer:
        """Make a table of all words or characters of the training texts.

        Args:
            kind: ``word`` or ``char``.
            texts: questions and sentences.
            language: language tag.
            min_count: rarer units become ``<unk>``.

        Returns:
            The tokenizer; ids are sorted by frequency, then alphabet, so that text order does not matter.

        Raises:
            UserError: another kind, or no text.
        """
        if kind not in ("word", "char"):
            raise UserError(f"tokenizer kind {kind!r} cannot be built from texts; known: word, char")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(_units(text, kind))
        taken = {*SPECIALS, language, MASK}
        units = [
            unit for unit, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count >= min_count
        ]
        units = [unit for unit in units if unit not in taken]
        if not units:
            raise UserError("no text to build a vocabulary from; check the training split")
        return cls(_word_level([*SPECIALS, *units, language, MASK], language), kind, language)

    @classmethod
    def from_pretrained(cls, folder: str | Path, language: str) -> Tokenizer:
        """The tokenizer of an mBART folder (``tokenizer.json``, or ``sentencepiece.bpe.model``, which is converted).

        Raises:
            UserError: no tokenizer file, or no mBART tokenizer.
        """
        return cls(read_backend(folder), "pretrained", language)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer that ``save`` wrote.

        Raises:
            UserError: a file is missing or changed, or comes from a newer version.
        """
        folder = Path(folder)
        path = folder / META_FILE
        try:
            meta = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; give a folder that Tokenizer.save wrote") from error
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        if meta.get("schema") != SCHEMA or meta.get("schema_version", 0) > SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema {meta.get('schema')} {meta.get('schema_version')}; this version reads {SCHEMA} up "
                f"to {SCHEMA_VERSION}: update polymodal-slt"
            )
        tokenizer = cls(read_backend(folder), meta["kind"], meta["language"])
        if tokenizer.sha != meta["sha"]:
            raise UserError(
                f"{folder}/tokenizer.json was changed after it was saved (sha {tokenizer.sha} != {meta['sha']})"
            )
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and a small file about it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        meta = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "language": self.language,
            "sha": self.sha,
        }
        write_json(folder / META_FILE, meta)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer of the ``tokenizers`` library underneath."""
        return self._backend

    @property
    def vocab(self) -> VocabInfo:
        """What the model must know."""
        return VocabInfo(self.vocab_size, self.pad_id, self.eos_id, self._tag, self.special_ids, self.sha)

    def tag_id(self, language: str) -> int:
        """Id of a language tag.

        Raises:
            UserError: the vocabulary does not have it.
        """
        index: int | None = self._backend.token_to_id(language)
        if index is None:
            tags = [name for name in self._names(self.special_ids) if "_" in name]
            raise UserError(f"no language tag {language!r} in the tokenizer; it has {', '.join(tags) or 'none'}")
        return index

    def encode(self, text: str) -> list[int]:
        """``tokens </s> <tag>`` of a text."""
        return [*self._tokens(text), self.eos_id, self._tag]

    def encode_words(self, words: Sequence[str], unit: str) -> list[int]:
        """Encoder form of a corrupted text.

        Args:
            words: words or characters; ``"<mask>"`` items become the mask token.
            unit: ``word`` (items are joined by blanks) or ``char`` (joined by nothing).

        Returns:
            ``tokens </s> <tag>``.
        """
        joint = " " if unit == "word" else ""
        ids: list[int] = []
        run: list[str] = []
        for word in words:
            if word != MASK:
                run.append(word)
                continue
            ids += self._tokens(joint.join(run))
            ids.append(self.mask_id)
            run = []
        return [*ids, *self._tokens(joint.join(run)), self.eos_id, self._tag]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids: up to the first ``</s>``, special tokens left out."""
        kept = []
        for index in ids:
            if index == self.eos_id:
                break
            if index not in self._skip:
                kept.append(int(index))
        if self.kind == "pretrained":
            text: str = self._backend.decode(kept, skip_special_tokens=False)
            return text.strip()
        return (" " if self.kind == "word" else "").join(self._names(kept))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # not part of the library's own pickle

    def _tokens(self, text: str) -> list[int]:
        if self.kind == "pretrained":
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids if text.strip() else []
            return [index if index not in self._skip else self.unk_id for index in ids]
        find = self._backend.token_to_id
        found = [find(unit) for unit in _units(text, self.kind)]
        return [self.unk_id if index is None or index in self._skip else index for index in found]

    def _names(self, ids: Iterable[int]) -> list[str]:
        return [self._backend.id_to_token(index) or "" for index in ids]

    def _special_ids(self) -> tuple[int, ...]:
        added = self._backend.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special}
        return tuple(sorted(special | set(self._special.values())))


def _units(text: str, kind: str) -> list[str]:
    return text.split() if kind == "word" else [c for c in text if not c.isspace()]


def _word_level(names: Sequence[str], language: str) -> tokenizers.Tokenizer:
    import tokenizers

    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([*SPECIALS, language, MASK])
    return backend


def read_backend(folder: str | Path) -> tokenizers.Tokenizer:
    """The ``tokenizers`` object of a folder.

    Raises:
        UserError: no tokenizer in the folder, or it cannot be read.
    """
    import tokenizers

    folder = Path(folder)
    try:
        if (folder / "tokenizer.json").is_file():
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "sentencepiece.bpe.model").is_file():
            from transformers import MBartTokenizer

            converted: Any = MBartTokenizer.from_pretrained(str(folder), local_files_only=True)
            return tokenizers.Tokenizer.from_str(converted.backend_tokenizer.to_str())
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"cannot read the tokenizer in {folder}: {str(error).splitlines()[0]}") from error
    raise UserError(f"no tokenizer.json or sentencepiece.bpe.model in {folder}; give the folder of an mBART checkpoint")


def trim_vocabulary(model_dir: str | Path, texts: Iterable[str], out: str | Path, language: str) -> Tokenizer:
    """Cut an mBART checkpoint down to the pieces that some texts use.

    Special tokens and language tags stay. The best segmentation of each text under the full vocabulary uses kept
    pieces only, so that it stays the best one; other words are spelled with the pieces that are left.

    Writes into ``out``: ``tokenizer.json`` and the file about it, ``config.json``, ``model.safetensors`` (embedding
    matrices cut, everything else as it was) and ``vocabulary.safetensors`` with ``kept_ids``: old id of each new id.

    Args:
        model_dir: folder of an mBART checkpoint.
        texts: questions and sentences of the training split.
        out: folder to write; it must not hold a checkpoint yet.
        language: language tag of the texts, e.g. ``de_DE``.

    Returns:
        The trimmed tokenizer.

    Raises:
        UserError: no mBART checkpoint, another kind of tokenizer, or ``out`` is taken.
    """
    import tokenizers

    out = Path(out)
    if (out / "model.safetensors").exists():
        raise UserError(f"{out} already holds a checkpoint; choose another folder")
    full = Tokenizer.from_pretrained(model_dir, language)
    spec = json.loads(full.backend.to_str())
    if spec["model"].get("type") != "Unigram":
        raise UserError(f"{model_dir} has a {spec['model'].get('type')} tokenizer; trimming needs mBART's Unigram")
    used = set(full.special_ids)
    for text in texts:
        used.update(full.encode(text))
    kept = sorted(used)
    new_id = {old: new for new, old in enumerate(kept)}
    vocabulary = spec["model"]["vocab"]
    spec["model"]["vocab"] = [vocabulary[old] for old in kept if old < len(vocabulary)]
    spec["model"]["unk_id"] = new_id[full.unk_id]
    spec["added_tokens"] = [
        {**token, "id": new_id[token["id"]]} for token in spec["added_tokens"] if token["id"] in used
    ]
    spec["post_processor"] = None  # it holds old ids; end and tag are appended by Tokenizer
    trimmed = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)), "pretrained", language)
    _trim_weights(Path(model_dir), out, kept, trimmed)
    trimmed.save(out)
    return trimmed


def _trim_weights(model_dir: Path, out: Path, kept: list[int], trimmed: Tokenizer) -> None:
    """Write config and weights with the rows ``kept`` of every matrix over the vocabulary."""
    import torch
    from safetensors.torch import save_file

    from slt.models.weights import load_folder, read_config

    config = read_config(model_dir)
    rows = torch.tensor(kept)
    tensors = {}
    for name, value in load_folder(model_dir).items():
        if name.endswith(("shared.weight", "embed_tokens.weight", "lm_head.weight")):
            value = _take(value, rows, 0, name)
        elif name.endswith("final_logits_bias"):
            value = _take(value, rows, 1, name)
        tensors[name] = value.clone().contiguous()
    config |= {
        "vocab_size": len(kept),
        "pad_token_id": trimmed.pad_id,
        "eos_token_id": trimmed.eos_id,
        "bos_token_id": trimmed.backend.token_to_id("<s>"),
        "decoder_start_token_id": trimmed.tag_id(trimmed.language),
        "forced_eos_token_id": trimmed.eos_id,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config)
    save_file({"kept_ids": rows}, out / "vocabulary.safetensors")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _take(value: Any, rows: Any, dim: int, name: str) -> Any:
    if int(rows.max()) >= value.shape[dim]:
        raise UserError(
            f"{name} has {value.shape[dim]} rows but the tokenizer needs {int(rows.max()) + 1}; mixed folders?"
        )
    return value.index_select(dim, rows)
