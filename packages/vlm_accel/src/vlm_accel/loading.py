"""A vision-language model with its processor from a folder, and prompts for it. Nothing is ever downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.devices import pick_device
from polymodal.errors import UserError

from vlm_accel.families import FAMILIES

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from vlm_accel.media import Video

__all__ = ["VisionLanguageModel", "load_model"]

AUTO = ("cuda", "cpu")
"""devices that ``--device auto`` takes, the first that is there"""
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class VisionLanguageModel:
    """A model and its processor.

    Args:
        model: in eval mode.
        processor: makes its inputs and turns its tokens into text.
        path: where it came from.
    """

    model: nn.Module
    processor: Any
    path: Path

    def prompt(self, question: str, images: list[Image], video: Video | None = None) -> dict[str, Tensor]:
        """Inputs for one question about pictures and, or, a video, through the processor's chat template.

        Without a template the processor's own image token stands in front of the question.

        Raises:
            UserError: the processor cannot take videos, or refuses the input.
        """
        content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
        content += [{"type": "video"}] if video else []
        chat = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        return self.from_chat(chat, images, video)

    def from_chat(
        self, chat: list[dict[str, Any]], images: list[Image], video: Video | None = None
    ) -> dict[str, Tensor]:
        """Inputs for a whole conversation (``role``, ``content`` parts of type image, video, text)."""
        given: dict[str, Any] = {"text": [self._text(chat)], "return_tensors": "pt"}
        if images:
            given["images"] = images
        if video:
            if getattr(self.processor, "video_processor", None) is None:
                raise UserError(f"{self.path}: {type(self.processor).__name__} takes no videos; give frames as images")
            from transformers.video_utils import VideoMetadata

            given["videos"] = [video.frames]
            given["video_metadata"] = [VideoMetadata(video.total, fps=video.fps, frames_indices=video.numbers)]
            given["do_sample_frames"] = False  # chosen already
        try:
            made = self.processor(**given)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise UserError(f"{type(self.processor).__name__} refuses the input: {error}") from error
        device = next(self.model.parameters()).device
        dtype = next(self.model.parameters()).dtype
        return {
            key: value.to(device=device, dtype=dtype) if value.is_floating_point() else value.to(device)
            for key, value in made.items()
            if hasattr(value, "is_floating_point")
        }

    def text(self, ids: Tensor, prompt: Tensor) -> list[str]:
        """Answers behind the prompt: ids (B, T + n) as ``generate`` returns them -> B texts."""
        answers: list[str] = self.processor.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def _text(self, chat: list[dict[str, Any]]) -> str:
        template = getattr(self.processor, "chat_template", None)
        template = template or getattr(getattr(self.processor, "tokenizer", None), "chat_template", None)
        if template:
            text: str = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            return text
        kinds = {
            "image": getattr(self.processor, "image_token", "<image>"),
            "video": getattr(self.processor, "video_token", "<video>"),
        }
        parts = [kinds.get(part["type"]) or part["text"] for turn in chat for part in turn["content"]]
        return "\n".join(parts)


def load_model(
    folder: Path | str, dtype: str = "auto", device: str = "auto", attn: str = "sdpa"
) -> VisionLanguageModel:
    """A supported checkpoint in the layout of ``save_pretrained``.

    Args:
        folder: with config.json, weights and processor files.
        dtype: auto (as stored), float32, bfloat16, float16.
        device: auto, cpu, cuda, mps.
        attn: sdpa, eager or flash_attention_2.

    Raises:
        UserError: nothing there, an unknown family (said before any weight is read), or files that do not fit.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {folder}: no config.json there; give the folder of a checkpoint (save_pretrained)")
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype}; use one of {', '.join(_DTYPES)}")
    _check_family(folder)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, dtype=dtype, attn_implementation=attn
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"--model {folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
    return VisionLanguageModel(model.eval().to(pick_device(device, auto=AUTO)), processor, folder)


def _check_family(folder: Path) -> None:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"--model {folder}: config.json is not a model's configuration ({error})") from error
    known = [name for family in FAMILIES if family.decoder and family.encoder for name in family.model_types]
    if kind not in known:
        raise UserError(f"--model {folder}: models of type {kind!r} are not supported; known: {', '.join(known)}")
