"""Pictures and frames from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from polymodal.errors import UserError
from vlm_accel.media import frame_numbers, read_image, read_video


def test_frames_are_spread_as_in_the_protocol() -> None:
    assert frame_numbers(100, 32) == [int(x) for x in np.linspace(0, 99, 32)]
    assert frame_numbers(5, 32) == [0, 1, 2, 3, 4]
    assert frame_numbers(7, 1) == [0]


def test_a_folder_is_a_video_at_one_frame_a_second(tmp_path: Path) -> None:
    for number in range(6):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    video = read_video(tmp_path, 3)
    assert [frame.getpixel((0, 0))[0] for frame in video.frames] == [0, 2, 5]
    assert (video.numbers, video.total, video.fps) == ([0, 2, 5], 6, 1.0)


def test_a_video_file_gives_its_frames(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for number in range(12):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (20 * number, 0, 0)))
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    video = read_video(path, 4)
    assert (len(video.frames), video.numbers, video.total, video.fps) == (4, [0, 3, 7, 11], 12, 10.0)
    reds = [frame.getpixel((16, 16))[0] for frame in video.frames]
    assert reds == sorted(reds)
    assert reds[-1] > 150


@pytest.mark.parametrize("kind", ["missing", "empty folder", "no video"])
def test_bad_videos(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "clip"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "no video":
        path.write_bytes(b"not a video")
    with pytest.raises(UserError, match="clip"):
        read_video(path)


def test_a_huge_picture_is_refused_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "big.png")
    monkeypatch.setattr("vlm_accel.media._MOST_PIXELS", 100)
    with pytest.raises(UserError, match="20 x 20"):
        read_image(tmp_path / "big.png")
