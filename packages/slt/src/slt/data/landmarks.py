"""Which landmarks of a signer are used, and how they are normalised. NumPy only.

A canonical frame is ``(77, 4)``: x, y, 0, valid for 7 points of the body, 21 of each hand and 28 of the face.

- Selection: nose, shoulders, elbows and wrists carry the arms; legs and hips are rarely in the picture. All hand points
  carry the handshape. Of 478 face points, 28 keep lips (mouthing), brows, eyes (grammar) and the outline.
- Normalisation: the middle of the shoulders is the origin and the shoulder width the unit, both the median over the
  clip, so that moving shoulders stay visible. z is 0 throughout: one camera hardly knows it, and its unit differs from
  file to file.
- A landmark is valid where the detector's confidence is positive. Everything else is zero and masked, so a hand that
  is not seen in a frame says nothing.
"""

from __future__ import annotations

import numpy as np

__all__ = ["BODY", "COUNT", "FACE", "HAND", "SECTIONS", "local_hands", "mirror", "missing_hand", "normalise_pose"]

BODY = ("NOSE", "LEFT_SHOULDER", "RIGHT_SHOULDER", "LEFT_ELBOW", "RIGHT_ELBOW", "LEFT_WRIST", "RIGHT_WRIST")
_FINGERS = ("INDEX_FINGER", "MIDDLE_FINGER", "RING_FINGER", "PINKY")
HAND = (
    "WRIST",
    *(f"THUMB_{joint}" for joint in ("CMC", "MCP", "IP", "TIP")),
    *(f"{finger}_{joint}" for finger in _FINGERS for joint in ("MCP", "PIP", "DIP", "TIP")),
)
_LIPS = (61, 291, 0, 17, 13, 14, 37, 267, 84, 314)
_BROWS = (70, 105, 107, 300, 334, 336)
_EYES = (33, 133, 159, 145, 263, 362, 386, 374)
_OUTLINE = (10, 152, 234, 454)
FACE = tuple(str(i) for i in (*_LIPS, *_BROWS, *_EYES, *_OUTLINE))
_FACE_SWAP = {61: 291, 37: 267, 84: 314, 70: 300, 105: 334, 107: 336, 33: 263, 133: 362, 159: 386, 145: 374, 234: 454}

SECTIONS = {
    "body": slice(0, 7),
    "left": slice(7, 28),
    "right": slice(28, 49),
    "face": slice(49, 77),
}
"""Where the parts lie in a canonical frame."""
COUNT = 77
_LEFT_SHOULDER, _RIGHT_SHOULDER = 1, 2
_MIDDLE_MCP = HAND.index("MIDDLE_FINGER_MCP")


def normalise_pose(points: np.ndarray) -> np.ndarray:
    """Signer-normalised landmarks of one clip.

    Args:
        points: ``(T, 77, 4)`` x, y, anything, confidence in the order of ``SECTIONS``; x and y in one unit.

    Returns:
        ``(T, 77, 4)`` float32 in shoulder widths, last channel 1 or 0; zeros where invalid.

    Raises:
        ValueError: no frame shows both shoulders, or they coincide.
    """
    out = np.array(points, dtype=np.float64)
    out[..., :3] = np.nan_to_num(out[..., :3])
    valid = (points[..., 3] > 0) & np.isfinite(points[..., :2]).all(-1)
    both = valid[:, _LEFT_SHOULDER] & valid[:, _RIGHT_SHOULDER]
    if not both.any():
        raise ValueError("no frame shows both shoulders")
    left, right = out[both, _LEFT_SHOULDER, :2], out[both, _RIGHT_SHOULDER, :2]
    centre, width = np.median((left + right) / 2, axis=0), np.median(np.linalg.norm(left - right, axis=-1))
    if not width > 0:
        raise ValueError("the shoulders coincide")
    out[..., :2] = (out[..., :2] - centre) / width
    out[..., 2] = 0.0
    out[..., 3] = valid
    masked: np.ndarray = (out * valid[..., None]).astype(np.float32)
    return masked


def local_hands(points: np.ndarray) -> np.ndarray:
    """Hands relative to their wrist in units of the hand's length, so that the handshape is not a small detail.

    The hand's place stays in the body's wrists. Length = wrist to the middle finger's first joint, the median over
    the clip, so that foreshortening stays visible.

    Args:
        points: ``(T, 77, 4)`` from :func:`normalise_pose`.

    Returns:
        A copy with the hands replaced; a hand whose wrist is not seen in a frame is invalid there.
    """
    out = points.copy()
    for name in ("left", "right"):
        part = out[:, SECTIONS[name]]
        seen = (part[:, 0, 3] > 0) & (part[:, _MIDDLE_MCP, 3] > 0)
        lengths = np.linalg.norm(part[seen, _MIDDLE_MCP, :2] - part[seen, 0, :2], axis=-1)
        length = float(np.median(lengths)) if seen.any() else 0.0
        valid = (part[..., 3] > 0) & (part[:, :1, 3] > 0) & (length > 0)
        part[..., :2] = (part[..., :2] - part[:, :1, :2]) / (length or 1.0)
        part[..., 3] = valid
        part[:] = part * valid[..., None]
    return out


def mirror(points: np.ndarray) -> np.ndarray:
    """The clip as a signer of the other handedness would sign it: x negated, left and right exchanged.

    Args:
        points: ``(T, 77, 4)`` from :func:`normalise_pose`.
    """
    order = np.arange(COUNT)
    body = [BODY.index(n.replace("LEFT", "*").replace("RIGHT", "LEFT").replace("*", "RIGHT")) for n in BODY]
    order[SECTIONS["body"]] = body
    left, right, face = SECTIONS["left"], SECTIONS["right"], SECTIONS["face"]
    order[left], order[right] = order[right].copy(), order[left].copy()
    swap = {**_FACE_SWAP, **{b: a for a, b in _FACE_SWAP.items()}}
    order[face] = [face.start + FACE.index(str(swap.get(int(n), int(n)))) for n in FACE]
    out = points[:, order].copy()
    out[..., 0] *= -1
    return out


def missing_hand(points: np.ndarray, hand: str) -> float:
    """Share of frames in which a hand (``left`` or ``right``) has no valid point, 0..1."""
    return float((points[:, SECTIONS[hand], 3].max(-1) <= 0).mean())
