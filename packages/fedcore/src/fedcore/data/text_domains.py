"""Sentiment of short texts of four kinds (VADER's ground truth): four natural clients."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from polymodal.errors import UserError
from polymodal.paths import cache_dir, read_text_lines, require_files
from polymodal.seeding import numpy_rng

from fedcore.data.array_type import ArrayData
from fedcore.data.text import TextData

__all__ = ["DOMAINS", "TextDomains"]

DOMAINS = {
    "tweets": "tweets_GroundTruth.txt",
    "films": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}
_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
_MAX_BYTES = 64 << 20


@dataclass
class TextDomains(TextData):
    """23,700 tweets and sentences of film reviews, product reviews and editorials; positive or negative by score.

    ``<root>/[hutto_ICWSM_2014/]*_GroundTruth.txt`` (id, score, text by tabs), the archive ``hutto_ICWSM_2014.tar.gz``
    or the folder that holds it, as in the source archive of vaderSentiment. Texts with a score of exactly 0 are left
    out. The domain is the natural client of each text (``--partition.scheme column``). Sentences of one document, whose
    ids are ``DOCUMENT_SENTENCE``, are all in one split.

    Args:
        root: the folder or archive.
        tokenizer: local folder with a tokenizer of transformers; none: hashed words.
        ngrams: longest run of words that counts as one token.
        buckets: number of ids that words are hashed into.
        max_length: most words of a text; 0: 64.
        trim: cut each batch to its longest text; false: batches of one width, for the batched engine.
        test_share: share of the documents of each domain that are for testing, 0..1.
        split_seed: which those are; the seed of a run does not change the data.

    Source: Hutto and Gilbert, VADER, ICWSM 2014.
    """

    test_share: float = 0.2
    split_seed: int = 0

    name: ClassVar[str] = "text_domains"
    remedy: ClassVar[str] = (
        "give the folder with the four *_GroundTruth.txt files, or hutto_ICWSM_2014.tar.gz of vaderSentiment's sources"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.test_share < 1:
            raise UserError(f"test_share={self.test_share}; expected 0 < test_share < 1")

    def class_names(self) -> list[str]:
        """Negative, positive."""
        return ["negative", "positive"]

    def home(self) -> Path:
        """The folder with the four files; an archive is unpacked into the user's cache.

        Raises:
            UserError: no root given, or nothing of the kind there.
        """
        if self.root is not None and self.root.is_file():
            return _unpacked(self.root, self.remedy)
        root = super().home()
        for folder in (root, root / "hutto_ICWSM_2014", root / "additional_resources"):
            if any((folder / file).is_file() for file in DOMAINS.values()):
                return folder
            if (folder / _ARCHIVE).is_file():
                return _unpacked(folder / _ARCHIVE, self.remedy)
        return root

    def read_split(self, split: str) -> ArrayData:
        """Token ids (N, L) with the domain of each text in ``groups``.

        Raises:
            UserError: a missing file or a broken line.
        """
        import numpy as np
        import torch

        paths = require_files(self.home(), DOMAINS.values(), self.name, self.remedy)
        texts: list[tuple[str, ...]] = []
        labels: list[int] = []
        groups: list[int] = []
        for number, (domain, path) in enumerate(zip(DOMAINS, paths, strict=True)):
            rows = self._rows(path)
            documents = sorted({document for document, _, _ in rows})
            order = numpy_rng(self.split_seed, "text_domains", domain).permutation(len(documents))
            tested = {documents[place] for place in order[: round(self.test_share * len(documents))]}
            chosen = [row for row in rows if (row[0] in tested) == (split == "test")]
            texts += [(text,) for _, _, text in chosen]
            labels += [int(score > 0) for _, score, _ in chosen]
            groups += [number] * len(chosen)
        natural = torch.tensor(groups, dtype=torch.long)
        return self.encode(texts, np.asarray(labels, dtype=np.int64), groups=natural, group_names=list(DOMAINS))

    def _rows(self, path: Path) -> list[tuple[str, float, str]]:
        """Document, score and text of each line with a score other than 0."""
        rows = []
        for number, line in enumerate(read_text_lines(path, f"{self.name} file"), start=1):
            cells = line.split("\t", 2)
            try:
                name, score, text = cells[0], float(cells[1]), cells[2]
            except (IndexError, ValueError) as error:
                raise UserError(
                    f"{self.name}: {path}, line {number}: {line[:60]!r}; expected id, score and text with tabs between"
                ) from error
            if score:
                rows.append((name.partition("_")[0], score, text))
        return rows


def _unpacked(archive: Path, remedy: str) -> Path:
    """The four files of the archive, and nothing else of it, in the user's cache."""
    found = archive.stat()
    folder = cache_dir("fedcore", "text_domains", f"{found.st_size}-{found.st_mtime_ns}")
    if all((folder / file).is_file() for file in DOMAINS.values()):
        return folder
    try:
        with tarfile.open(archive) as tape:
            members = {Path(member.name).name: member for member in tape.getmembers() if member.isfile()}
            contents = {}
            for file in DOMAINS.values():
                if file not in members or members[file].size > _MAX_BYTES:
                    raise UserError(f"text_domains: {archive} does not hold {file}; {remedy}")
                opened = tape.extractfile(members[file])
                assert opened is not None  # isfile() was checked
                contents[file] = opened.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"text_domains: {archive} cannot be read ({error}); {remedy}") from error
    from polymodal.files import check_writable, write_bytes

    check_writable(folder)
    for file, content in contents.items():
        write_bytes(folder / file, content)
    return folder
