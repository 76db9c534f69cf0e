"""How many frames a clip is padded to, how many tokens come out of the temporal convolutions, which frames are read.

Every function works on one clip alone, so that no clip's length depends on its batch mates. The module loads without
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polymodal.errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = [
    "SCHEMES",
    "conv_length",
    "frame_indices",
    "padded_indices",
    "padded_length",
    "padding",
    "token_length",
]

SCHEMES: dict[str, int] = {"gfslt": 8, "vac": 6}
"""Padding scheme -> frames repeated on the left. The right side gets at least as many."""

_MAX_FRAMES = 300


def _left(scheme: str) -> int:
    if scheme not in SCHEMES:
        raise UserError(f"unknown padding scheme {scheme!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[scheme]


def _checked(frames: int) -> int:
    if frames < 1:
        raise UserError(f"frames={frames}; a clip needs at least one frame")
    return int(frames)


def padded_length(frames: int, scheme: str = "gfslt") -> int:
    """Frames of a clip after repeating its edge frames.

    Args:
        frames: frames of the clip, T >= 1.
        scheme: ``gfslt`` (4 ceil(T/4) + 16) or ``vac`` (4 ceil(T/4) + 12).

    Returns:
        P(T), divisible by 4.

    Raises:
        UserError: unknown scheme, or no frame.

    Source:
        SSL-SSAW (arXiv 2509.14036), our reading, section 3.2; the schemes are those of the GFSLT-VLP code.
    """
    return 4 * -(-_checked(frames) // 4) + 2 * _left(scheme)


def conv_length(padded: int) -> int:
    """Tokens out of Conv(5), MaxPool(2), Conv(5), MaxPool(2) without padding of their own.

    Args:
        padded: frames going in; at least 16 for one token.

    Returns:
        floor((floor((P - 4) / 2) - 4) / 2), which is P/4 - 3 for P divisible by 4.
    """
    return ((padded - 4) // 2 - 4) // 2


def token_length(frames: int, scheme: str = "gfslt") -> int:
    """Visual tokens of a clip: ceil(T/4) + 1 for ``gfslt``, ceil(T/4) for ``vac``.

    Args:
        frames: frames of the clip before padding, T >= 1.
        scheme: ``gfslt`` or ``vac``.

    Returns:
        Number of tokens after the temporal convolutions.

    Raises:
        UserError: unknown scheme, or no frame.
    """
    return conv_length(padded_length(frames, scheme))


def padding(frames: int, scheme: str = "gfslt") -> tuple[int, int]:
    """How often the first and the last frame are repeated.

    Args:
        frames: frames of the clip, T >= 1.
        scheme: ``gfslt`` (left 8) or ``vac`` (left 6).

    Returns:
        ``(left, right)`` with left + T + right = P(T).
    """
    left = _left(scheme)
    return left, padded_length(frames, scheme) - frames - left


def padded_indices(frames: int, scheme: str = "gfslt") -> list[int]:
    """Frame index at each position of the padded clip.

    Frame features can be computed once a frame and repeated by these indices, which gives the padded clip without
    sending the repeated frames through the CNN.

    Args:
        frames: frames of the clip, T >= 1.
        scheme: ``gfslt`` or ``vac``.

    Returns:
        P(T) indices: 0 on the left, 0..T-1, then T-1.
    """
    left, right = padding(frames, scheme)
    return [0] * left + list(range(frames)) + [frames - 1] * right


def frame_indices(num_frames: int, limit: int = _MAX_FRAMES, generator: torch.Generator | None = None) -> list[int]:
    """Which frames of a clip are read.

    Clips up to ``limit`` frames are read whole. Longer ones are thinned: in training a random sample without
    replacement, in order; in evaluation evenly spaced, floor(i T / limit).

    Args:
        num_frames: frames of the clip, T >= 1.
        limit: most frames to read.
        generator: training draws from it; ``None`` is evaluation.

    Returns:
        min(T, limit) increasing indices in [0, T).

    Raises:
        UserError: no frame, or ``limit`` below 1.

    Source:
        SSL-SSAW (arXiv 2509.14036), our reading, section 3.2: the released code of GFSLT-VLP samples at random in
        evaluation too, ours does not.
    """
    total = _checked(num_frames)
    if limit < 1:
        raise UserError(f"limit={limit}; expected at least 1 frame, 300 is the usual value")
    if total <= limit:
        return list(range(total))
    if generator is None:
        return [i * total // limit for i in range(limit)]
    import torch

    chosen: list[int] = torch.randperm(total, generator=generator)[:limit].sort().values.tolist()
    return chosen
