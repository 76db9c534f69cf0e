"""A small world of moving glyphs in which a sentence needs both the signing and the question; no download.

Twelve sign forms, each a random 5x5 glyph moving left-right, up-down or in a circle. Six of them are homonyms: the
form is the same in the three topics and its word differs, so only the question tells which word is meant. Six are
unambiguous. Without a question the best possible word accuracy is .4 + .6/3 = .60, with one it is 1.

The world is written once, in the exact layout of PHOENIX-2014T, so that everything after it is the real reader.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from polymodal.errors import UserError
from polymodal.paths import cache_dir

from slt.data.base import Item
from slt.data.phoenix import Phoenix2014T

__all__ = ["FILLERS", "GLYPH", "HOMONYMS", "NEGATION", "TOPICS", "UNAMBIGUOUS", "Synthetic"]

TOPICS: dict[str, tuple[str, str]] = {
    "winter": ("winter", "januar"),
    "sommer": ("sommer", "juli"),
    "herbst": ("herbst", "oktober"),
}
"""Topic and its two synonyms; a question carries one of them."""

HOMONYMS: dict[str, tuple[str, str, str]] = {
    "H1": ("schnee", "gewitter", "nieselregen"),
    "H2": ("eiswind", "föhn", "sturmböen"),
    "H3": ("frost", "hitze", "kühle"),
    "H4": ("glätte", "trockenheit", "laub"),
    "H5": ("hochnebel", "sonnenschein", "wolkenfelder"),
    "H6": ("graupel", "schauer", "dunst"),
}
"""Sign form and its word in each topic, in the order of ``TOPICS``."""

UNAMBIGUOUS: dict[str, str] = {
    "U1": "heute",
    "U2": "morgen",
    "U3": "nachts",
    "U4": "norden",
    "U5": "süden",
    "U6": "alpen",
}
"""Sign form and its only word."""

FILLERS = ("wie", "wird", "das", "wetter", "denn", "jetzt")
NEGATION = "nicht"
_WORLD_VERSION = 1
GLYPH = 5
"""Height and width of a glyph, pixels."""
_log = logging.getLogger(__name__)


@dataclass
class Synthetic(Phoenix2014T):
    """The synthetic world; written on first use into the user's cache (``$POLYMODAL_CACHE``), then read like PHOENIX.

    Further options are those of :class:`~slt.data.base.SLTData`.

    Args:
        root: folder for worlds; default: the user's cache. Each set of options has its own sub-folder.
        questions: folder with other question files for this world; default: its own.
        world_seed: seed of glyphs, sentences and noise; the seed of a run does not change the data.
        sizes: clips in train, dev and test.
        frame_size: height and width in pixels, at least 12.
        noise: standard deviation of the pixel noise, in units of the glyph's contrast.
        distractors: 0 for questions of four tokens (three fillers and a topic word). With n = 1..3, questions have
            eight tokens: n words of other topics, each right after "nicht", the topic word, and fillers. The topic
            stays determinable: it is the one topic word that does not follow "nicht". A model must tell the words
            apart by their neighbour, which is where weighting question tokens could matter.
    """

    world_seed: int = 0
    sizes: tuple[int, int, int] = (1500, 300, 300)
    frame_size: int = 24
    noise: float = 0.1
    distractors: int = 0

    name: ClassVar[str] = "synthetic"

    def options(self) -> dict[str, Any]:
        """What the world depends on.

        Raises:
            UserError: an option out of range.
        """
        if len(self.sizes) != 3 or min(self.sizes) < 1:
            raise UserError(f"sizes={self.sizes}; expected three numbers of at least 1, e.g. [1500, 300, 300]")
        if self.frame_size < 12:
            raise UserError(
                f"frame_size={self.frame_size}; expected at least 12: a glyph of {GLYPH} pixels moves in it"
            )
        if not 0 <= self.noise <= 1:
            raise UserError(f"noise={self.noise}; expected 0..1 in units of the glyph's contrast")
        if not 0 <= self.distractors <= 3:
            raise UserError(f"distractors={self.distractors}; expected 0..3 words of other topics")
        return {
            "version": _WORLD_VERSION,
            "seed": self.world_seed,
            "sizes": list(self.sizes),
            "frame_size": self.frame_size,
            "noise": self.noise,
            "distractors": self.distractors,
        }

    def world(self) -> Path:
        """Folder of this world; it may not exist yet."""
        key = hashlib.sha256(json.dumps(self.options(), sort_keys=True).encode()).hexdigest()[:12]
        base = self.root if self.root is not None else cache_dir("slt", "worlds")
        return base / f"synthetic-{key}"

    def home(self) -> Path:
        """The PHOENIX folder inside the world."""
        return self.world() / "PHOENIX-2014-T"

    def questions_default(self) -> Path:
        """The world's own question files."""
        return self.world() / "questions"

    def prepare(self) -> None:
        """Write the world unless it is there; another process doing the same at the same time does no harm.

        Raises:
            UserError: the folder cannot be written, or holds something else.
        """
        world = self.world()
        if world.is_dir():
            if not (world / "truth.json").is_file():
                raise UserError(
                    f"synthetic world: {world / 'truth.json'} is missing; remove the folder, it is made again"
                )
            return
        start = time.monotonic()
        _log.info("writing the synthetic world into %s (%d clips)", world, sum(self.sizes))
        try:
            world.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=world.parent, prefix=f".{world.name}."))
        except OSError as error:
            raise UserError(
                f"synthetic world: cannot write into {world.parent} ({error.strerror}); choose another folder with"
                " --data.root DIR or the environment variable POLYMODAL_CACHE"
            ) from error
        try:
            from slt.data.world import write_world

            write_world(temporary, self.options())
            temporary.chmod(0o755)
            try:
                temporary.rename(world)
            except OSError:
                if not world.is_dir():  # else another process was faster, and its world is the same
                    raise
        except OSError as error:
            raise UserError(f"synthetic world: cannot write {temporary} ({error.strerror}); free some space") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _log.info("synthetic world written in %.1f s", time.monotonic() - start)

    def read_split(self, split: str) -> list[Item]:
        """Items of the PHOENIX reader with the ground truth of signs and topic."""
        truth = json.loads((self.world() / "truth.json").read_text(encoding="utf-8"))
        return [
            replace(item, topic=truth["topics"][item.id], signs=tuple(truth["signs"][item.id].split()))
            for item in super().read_split(split)
        ]
