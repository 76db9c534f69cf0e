"""Video decoding: exact frames, truncated files, a missing decoder. Needs PyAV to write the test clips."""

import struct
import sys

import numpy as np
import pytest
from polymodal.errors import UserError
from slt.data import video

FRAMES = 40


def box(kind, payload=b""):
    return struct.pack(">I4s", 8 + len(payload), kind) + payload


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """An H.264 clip with B frames and few key frames; frame i is grey of brightness 6 i."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"g": "12", "crf": "1", "bf": "2"}
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 6 * number, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture(params=["torchcodec", "av"])
def decoder(request, monkeypatch):
    """Each decoder that works here."""
    if request.param == "torchcodec":
        problem = video._torchcodec_problem()
        if problem:
            pytest.skip(problem)
    else:
        pytest.importorskip("av")
    monkeypatch.setattr(video, "backend", lambda: request.param)
    return request.param


def test_frames_are_exact(clip, decoder):
    assert video.count_video_frames(clip) == FRAMES
    indices = [0, 5, 5, 11, 12, 13, FRAMES - 1]
    frames = video.load_video(clip, indices)
    assert frames.shape == (7, 48, 64, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_allclose(frames.reshape(7, -1).mean(1), [6 * i for i in indices], atol=2)


def test_indices_are_checked(clip, decoder):
    with pytest.raises(UserError, match=f"has {FRAMES} frames, number {FRAMES} was asked for"):
        video.load_video(clip, [0, FRAMES])
    with pytest.raises(UserError, match="no frame was asked"):
        video.load_video(clip, [])
    with pytest.raises(UserError, match="frame -1"):
        video.load_video(clip, [-1, 0])


@pytest.mark.parametrize("keep", [0, 4, 100, -200, -1])
def test_truncated_files(clip, decoder, tmp_path, keep):
    short = tmp_path / "short.mp4"
    short.write_bytes(clip.read_bytes()[:keep])
    for call in (lambda: video.count_video_frames(short), lambda: video.load_video(short, [0])):
        with pytest.raises(UserError) as caught:
            call()
        assert "short.mp4" in str(caught.value)
        assert "truncated" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_garbage_inside_a_whole_container(decoder, tmp_path):
    path = tmp_path / "junk.mp4"
    path.write_bytes(box(b"ftyp", b"isom0000") + box(b"moov", b"\0" * 64))
    with pytest.raises(UserError, match=r"junk\.mp4.*(cannot be decoded|no frame)"):
        video.load_video(path, [0])
    other = tmp_path / "junk.mkv"
    other.write_bytes(b"nothing to see")
    with pytest.raises(UserError, match=r"junk\.mkv cannot be decoded"):
        video.count_video_frames(other)


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (box(b"ftyp", b"isom") + box(b"moov", b"x" * 20) + box(b"mdat", b"y" * 9), True),
        (box(b"moov") + struct.pack(">I4sQ", 1, b"mdat", 16 + 5) + b"12345", True),
        (box(b"moov") + struct.pack(">I4s", 0, b"mdat") + b"to the end", True),
        (box(b"ftyp") + box(b"mdat", b"y" * 9), False),
        (box(b"moov") + box(b"mdat", b"y" * 9)[:-1], False),
        (box(b"moov") + struct.pack(">I4s", 3, b"mdat"), False),
        (box(b"moov") + b"12345", False),
    ],
)
def test_boxes_are_walked_without_a_decoder(tmp_path, data, whole):
    path = tmp_path / "x.mp4"
    path.write_bytes(data)
    if whole:
        video._check_boxes(path)
    else:
        with pytest.raises(UserError, match="truncated"):
            video._check_boxes(path)


def test_missing_file_and_missing_decoder(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"none\.mp4 is missing"):
        video.load_video(tmp_path / "none.mp4", [0])
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    video.backend.cache_clear()
    try:
        with pytest.raises(UserError, match=r"polymodal-slt\[video\]"):
            video.backend()
    finally:
        video.backend.cache_clear()


def test_names():
    assert video.is_video("a/B.MP4")
    assert not video.is_video("a/mp4")
