"""``slt-translate``: from a video file, a folder of frames or a pose file to text, with a picture on request."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from polymodal.cli import command
from polymodal.errors import UserError

from slt.data.base import SPLITS, Item, SLTData, collapse
from slt.eval_settings import TranslateConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from slt.checkpoint import Trained
    from slt.data.collate import Batch, Collate, Sample
    from slt.data.dataset import SLTDataset

__all__ = ["Clips", "Translator", "gather_options", "main", "translate"]

EXAMPLE = """
slt-translate --checkpoint runs/slt/RUN --video clip.mp4 --question "wie wird das wetter"
slt-translate --checkpoint runs/slt/RUN --video frames/a frames/b               # without a question
slt-translate --checkpoint runs/slt/RUN --video CLIP_ID --question "..." --picture
"""
PICTURE = "translation.png"
_POSE_SUFFIXES = (".pose", ".npy")
_log = logging.getLogger(__name__)


def main() -> int:
    """Entry point of ``slt-translate``; returns the exit code."""
    return command(translate, TranslateConfig, prog="slt-translate", example=EXAMPLE, argv=gather_options(sys.argv[1:]))


def gather_options(arguments: Sequence[str]) -> list[str]:
    """``--video A B``, repeated ``--video`` and ``--question`` as one JSON list each; a bare ``--picture`` gets a name.

    JSON, because the parser reads values as YAML, in which ``nein`` is fine but ``no`` or ``Wann: heute?`` is not.
    """
    found: dict[str, list[str]] = {"--video": [], "--question": []}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        option, eq, value = waiting.pop(0).partition("=")
        values = [value] if eq else []
        while not eq and option in (*found, "--picture") and waiting and not waiting[0].startswith("--"):
            values.append(waiting.pop(0))
        if option in found and values:
            found[option] += values
        elif option == "--picture":
            rest.append(f"--picture={(values or [PICTURE])[0]}")
        else:
            rest.append(option + eq + value)
    return rest + [f"{option}={json.dumps(values, ensure_ascii=False)}" for option, values in found.items() if values]


def translate(config: TranslateConfig) -> None:
    """Translate the clips and print one text a line; with several clips the clip stands in front, then a tab.

    Raises:
        UserError: bad options, checkpoint or clip.
    """
    from slt.pictures import check_picture

    if config.checkpoint is None or not config.video:
        missing = "--checkpoint" if config.checkpoint is None else "--video"
        raise UserError(f"{missing} is missing; slt-translate --checkpoint RUN --video CLIP [--question TEXT]")
    if len(config.question) not in (0, 1, len(config.video)):
        raise UserError(f"{len(config.question)} questions for {len(config.video)} clips; give one for all or one each")
    if config.picture is not None:
        check_picture(config.picture)
    for name in config.video:  # before torch is imported: a wrong path is told at once
        if ("/" in name or Path(name).suffix) and not Path(name).expanduser().exists():
            raise UserError(f"--video {name}: no such file or folder; check the path")

    from slt.checkpoint import load_trained

    trained = load_trained(config.checkpoint, device=config.device)

    from polymodal.seeding import set_threads

    set_threads(config.threads)
    translator = Translator(trained, config.video)
    questions = config.question * len(config.video) if len(config.question) == 1 else config.question
    for number, name in enumerate(config.video):
        picture = _numbered(config.picture, number, len(config.video))
        text = translator.translate(number, questions[number] if questions else "", picture)
        sys.stdout.write(f"{name}\t{text}\n" if len(config.video) > 1 else text + "\n")
        sys.stdout.flush()


def _numbered(path: Path | None, number: int, count: int) -> Path | None:
    return path if path is None or count == 1 else path.with_name(f"{path.stem}-{number + 1}{path.suffix}")


# ------------------------------------------------------------------ clips


class Clips:
    """A reader of the clips that were named on the command line, in place of a split of a data set.

    Args:
        data: reader of the training run: how landmarks are shaped, where clips given by their id are.
        names: paths, or ids of the run's data.

    Raises:
        UserError: nothing there, no frames, or something that the model does not read.
    """

    name = "clips"

    def __init__(self, data: SLTData, names: Sequence[str]) -> None:
        self.data, self.level = data, data.level
        self.modality = "pose" if data.modality == "pose" else "frames"
        self._own: set[str] = set()
        self._all = [self._item(name) for name in names]

    def items(self, split: str) -> list[Item]:
        """The clips, whatever the split."""
        return self._all

    def load(self, item: Item, indices: Sequence[int]) -> np.ndarray:
        """Frames or landmarks of one clip."""
        if item.id in self._own or self.modality == "pose":
            return self.data.load(item, indices)
        from slt.data.clips import load_clip

        return load_clip(item.source[0], indices)

    def _item(self, name: str) -> Item:
        path = Path(name).expanduser()
        if not path.exists():
            return self._by_id(name)
        source, count = self._pose(path) if self.modality == "pose" else self._frames(path)
        return Item(name, "", num_frames=count, source=(str(source),))

    def _frames(self, path: Path) -> tuple[Path, int]:
        from slt.data.clips import clip_length
        from slt.data.frames import count_frames
        from slt.data.video import VIDEO_SUFFIXES, is_video

        if path.is_file() and not is_video(path):
            hint = " (this model reads frames, not poses)" if path.suffix in _POSE_SUFFIXES else ""
            raise UserError(f"--video {path}: neither a folder of frames nor one of {', '.join(VIDEO_SUFFIXES)}{hint}")
        if path.is_dir() and not count_frames(path):
            if not count_frames(path / "1"):  # PHOENIX has a level "1" below the clip in some releases
                raise UserError(f"--video {path}: the folder has no PNG or JPEG frames; for clips in it: {path}/*")
            path = path / "1"
        return path, clip_length(path)

    def _pose(self, path: Path) -> tuple[Path, int]:
        from slt.data.poses import Poses

        if path.suffix not in _POSE_SUFFIXES:
            raise UserError(f"--video {path}: this model reads landmarks; give one of {', '.join(_POSE_SUFFIXES)}")
        return path, Poses.clip_length(path)

    def _by_id(self, name: str) -> Item:
        try:
            found = next((i for split in reversed(SPLITS) for i in self.data.items(split) if i.id == name), None)
        except UserError as error:
            raise UserError(
                f"--video {name}: no such file or folder, and the run's data cannot be searched for a clip of that "
                f"name: {error}"
            ) from error
        if found is None:
            raise UserError(f"--video {name}: no such file or folder, and no clip of that name in {self.data.name}")
        self._own.add(name)
        return dataclasses.replace(found, question="")


# ------------------------------------------------------------------ translation


class Translator:
    """A trained model with clips to translate: frames, batch and search exactly as ``slt-eval`` has them.

    Args:
        trained: the model.
        names: paths or ids of clips, see :class:`Clips`.

    Raises:
        UserError: bad clips, or a model on cached features whose backbone is not known.
    """

    def __init__(self, trained: Trained, names: Sequence[str]) -> None:
        from slt.data.collate import Collate
        from slt.data.dataset import SLTDataset

        config = trained.config
        self.trained, self.module = trained, trained.module
        reader = cast(SLTData, Clips(config.data, names))
        _use_frames(trained)
        self.dataset: SLTDataset = SLTDataset(reader, "test", config.loader, load_frames=True)
        self.collate: Collate = Collate(self.module.tokenizer, config.data.level, config.loader.max_question_tokens)

    def translate(self, number: int, question: str = "", picture: Path | None = None) -> str:
        """Translate one clip.

        Args:
            number: which of the clips, from 0.
            question: empty for none.
            picture: file to draw into; see :mod:`slt.explain` for what it shows.

        Returns:
            The translation.

        Raises:
            UserError: a broken frame, by name; too many tokens; a fusion without weights to draw.
        """
        import torch

        question = collapse(question)
        question = question.lower() if self.trained.config.data.lowercase else question
        with torch.inference_mode():
            sample = self.dataset[number]
            batch = self.collate([sample]).to(self.module.device)
            video = self.module.model.encode_batch(batch)
            batch = self._ask(batch, question, video)
            if picture is not None:
                self._check_weights(batch, video)
            ids = self._search(batch, video)
            text = self.module.tokenizer.decode(ids)
            if picture is not None:
                self._draw(picture, number, sample, batch, video, ids)
        return text

    def _search(self, batch: Batch, video: tuple[Tensor, Tensor]) -> list[int]:
        decode = self.module.decode
        limits = (decode.beams, self.module.max_new_tokens, decode.length_penalty)
        return self.module.model.generate(batch, *limits, video=video)[0]

    def _ask(self, batch: Batch, question: str, video: tuple[Tensor, Tensor]) -> Batch:
        """The batch with its question, which is cut, with a message, where the model has too few positions."""
        from slt.data.collate import Collate

        tokenizer, config = self.module.tokenizer, self.trained.config
        asked, given = self.collate.ask(batch, [question]).to(self.module.device), len(tokenizer.encode(question))
        kept = asked.question_ids.shape[1]
        excess = int(self.module.model.fuse_batch(asked, video)[1].sum()) - config.model.max_positions
        if 0 < excess <= kept - 3:  # else the clip alone is too long, which the model says itself
            kept -= excess
            asked = Collate(tokenizer, config.data.level, kept).ask(batch, [question]).to(self.module.device)
        if question and kept < given:
            _log.warning("the question has %d tokens, the model takes %d; its end is cut off", given, kept)
        return asked

    def _check_weights(self, batch: Batch, video: tuple[Tensor, Tensor]) -> None:
        if self.module.model.fuse_batch(batch, video)[2] is None:
            fusion = self.trained.config.model.fusion
            raise UserError(f"--picture: fusion {fusion} has no weights to draw; leave --picture out, or use ssaw")

    def _draw(
        self,
        path: Path,
        number: int,
        sample: Sample,
        batch: Batch,
        video: tuple[Tensor, Tensor],
        ids: Sequence[int],
    ) -> None:
        from slt.explain import explain
        from slt.ops.lengths import frame_indices
        from slt.pictures import draw_translation, save_picture

        asked = batch.questions[0]
        without = self._search(self.collate.ask(batch, [""]).to(self.module.device), video) if asked else None
        frames: Any = sample.frames.numpy()
        figure = draw_translation(
            explain(self.module, batch, video, ids),
            frames.transpose(0, 2, 3, 1) if frames.shape[1] == 3 and frames.ndim == 4 else frames,
            frame_indices(self.dataset.items[number].num_frames, self.dataset.config.max_frames),
            question=asked,
            without_question=None if without is None else self.module.tokenizer.decode(without),
            local_hands=getattr(self.trained.config.data, "hands", "") == "local",
        )
        save_picture(figure, path)
        _log.info("picture  %s", path)


def _use_frames(trained: Trained) -> None:
    """Give a model that was trained on cached features the frame encoder that made them.

    Raises:
        UserError: its weights are not known or not there.
    """
    model = trained.config.model
    if model.backbone != "features":
        return
    if model.backbone_weights is None or not Path(model.backbone_weights).is_file():
        raise UserError(
            f"{trained.folder} was trained on cached features; translating a clip needs the resnet18 that made them, "
            f"but model.backbone_weights in its config.yaml is {model.backbone_weights}: correct the path there"
        )
    from slt.models.backbones import build_backbone

    backbone = build_backbone(dataclasses.replace(model, backbone="resnet18")).eval()
    trained.module.model.visual.backbone = backbone.to(trained.module.device)
