"""``load_towers("KIND:NAME", weights=FILE)``: towers by name."""

from __future__ import annotations

from pathlib import Path

from polymodal.errors import UserError, did_you_mean

from missing_modal.backbones.base import Tower

__all__ = ["BACKBONES", "load_towers"]

BACKBONES = {
    "open_clip": "a built-in model of open_clip, such as open_clip:ViT-B-16-quickgelu; weights: a file or a tag",
    "hf_clip": "a CLIPModel of Hugging Face, such as hf_clip:FOLDER; weights: its folder",
    "vilt": "a ViltModel of Hugging Face, such as vilt:FOLDER, for mmp_vilt; weights: its folder",
    "towers": "a file that this package has written, such as towers:FILE",
}


def load_towers(
    name: str, weights: Path | str | None = None, seed: int = 0, length: int | None = None
) -> tuple[Tower, ...]:
    """Frozen towers in the order of the modalities, on the CPU in float32.

    Args:
        name: ``KIND:NAME``; see ``BACKBONES``.
        weights: file or folder; ``random`` gives seeded random weights (to try things out).
        seed: of random weights.
        length: text positions (ViLT only; see ``load_vilt``).

    Raises:
        UserError: unknown kind or model, no weights, weights of another model.
    """
    kind, _, rest = name.partition(":")
    if kind not in BACKBONES or not rest:
        hint = did_you_mean(kind, list(BACKBONES))
        raise UserError(f"backbone {name!r}; {hint}expected KIND:NAME with KIND one of {', '.join(BACKBONES)}")
    if kind == "towers":
        from missing_modal.backbones.weights import read_towers

        return read_towers(Path(rest).expanduser())[0]
    if kind == "hf_clip":
        from missing_modal.backbones.hf_clip import load_hf_clip

        return load_hf_clip(rest, rest if weights is None else weights, seed)
    if kind == "vilt":
        from missing_modal.backbones.vilt import load_vilt

        return load_vilt(rest if weights is None else weights, length)
    if weights is None:
        raise UserError(f"backbone {name} needs weights; give --backbone.weights FILE (or random, to try things out)")
    from missing_modal.backbones.open_clip import load_open_clip

    return load_open_clip(rest, weights, seed)
