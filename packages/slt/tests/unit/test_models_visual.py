"""Frame encoders, temporal padding, batch norm over valid positions, independence of batch mates."""

import importlib.util
from pathlib import Path

import pytest
import torch
from polymodal.errors import UserError
from safetensors.torch import save_file
from slt.config import ModelConfig
from slt.models.backbones import FrameCNN, build_backbone
from slt.models.visual import TemporalConv, VisualEncoder, edge_padding, pad_clips
from slt.ops.lengths import padded_indices, token_length

_spec = importlib.util.spec_from_file_location("_models_toy", Path(__file__).with_name("_models_toy.py"))
toy = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

LENGTHS = torch.tensor([9, 4, 13, 1, 6])


def clips(lengths=LENGTHS, size=8, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (int(lengths.sum()), 3, size, size), generator=random, dtype=torch.uint8)


def encoder(**changes) -> VisualEncoder:
    torch.manual_seed(1)
    return VisualEncoder(toy.small_config(**changes)).double()


def settled(**changes) -> VisualEncoder:
    """An encoder with running statistics of its own, in evaluation mode."""
    model = encoder(**changes)
    model.train()
    with torch.no_grad():
        model(clips(seed=5), LENGTHS)
    return model.eval()


@pytest.mark.parametrize("scheme", ["gfslt", "vac"])
def test_real_stack_gives_the_promised_lengths(scheme):
    stack = TemporalConv(2, 2, scheme).eval()
    lengths = [*range(1, 41), 99, 100, 101, 300]
    rows, counts = stack(torch.randn(sum(lengths), 2), lengths)
    assert counts == [token_length(t, scheme) for t in lengths]
    assert rows.shape == (sum(counts), 2)


@pytest.mark.parametrize("scheme", ["gfslt", "vac"])
def test_edge_padding_is_that_of_single_clips(scheme):
    lengths = [3, 1, 8]
    expected, start = [], 0
    for frames in lengths:
        expected += [start + i for i in padded_indices(frames, scheme)]
        start += frames
    assert edge_padding(lengths, scheme).tolist() == expected


@pytest.mark.parametrize("backbone", ["tiny", "resnet18"])
def test_repeating_features_equals_repeating_frames(backbone):
    size = 8 if backbone == "tiny" else 32
    frames, lengths = clips(torch.tensor([5, 3]), size), [5, 3]
    network = build_backbone(toy.small_config(backbone=backbone)).double().eval()
    rows = edge_padding(lengths, "gfslt")
    torch.testing.assert_close(network(frames[rows]), network(frames)[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["ln", "bn"])
def test_eval_output_does_not_depend_on_batch_mates(norm):
    model, frames = settled(sign_proj_norm=norm), clips()
    tokens, mask = model(frames, LENGTHS)
    assert mask.sum(1).tolist() == [token_length(t, "gfslt") for t in LENGTHS.tolist()]
    assert torch.equal(tokens[~mask], torch.zeros_like(tokens[~mask]))
    for row, (clip, frames_count) in enumerate(zip(frames.split(LENGTHS.tolist()), LENGTHS, strict=True)):
        alone, alone_mask = model(clip, frames_count[None])
        assert alone_mask.all()
        torch.testing.assert_close(tokens[row, mask[row]], alone[0], rtol=0, atol=1e-12)


def test_training_statistics_do_not_see_padding():
    """A clip far longer than its mates changes how much a padded batch would be padded, not the statistics."""
    frames, lengths = clips(), LENGTHS.tolist()
    order = [2, 0, 4, 1, 3]
    parts = frames.split(lengths)
    one, two = encoder().train(), encoder().train()
    tokens, mask = one(frames, LENGTHS)
    shuffled, shuffled_mask = two(torch.cat([parts[i] for i in order]), LENGTHS[order])
    assert torch.equal(mask[order], shuffled_mask)
    torch.testing.assert_close(tokens[order], shuffled, rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(one.named_buffers()), dict(two.named_buffers()), rtol=0, atol=1e-12)


def test_chunks_of_evaluation_change_nothing():
    whole, chunked = settled(), settled(frames_per_pass=4)
    torch.testing.assert_close(whole(clips(), LENGTHS)[0], chunked(clips(), LENGTHS)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backbone", ["tiny", "resnet18"])
def test_recomputing_gives_the_same_gradients_and_counts_a_batch_once(backbone):
    lengths = torch.tensor([3, 2])
    models = [encoder(backbone=backbone, checkpoint_frames=again).train() for again in (False, True)]
    for model in models:
        model(clips(lengths, 32), lengths)[0].square().sum().backward()
    plain, recomputed = models
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name, rtol=0, atol=1e-9)
    torch.testing.assert_close(dict(plain.named_buffers()), dict(recomputed.named_buffers()), rtol=0, atol=0)


def test_resnet_runs_as_torchvision_runs_it():
    network = build_backbone(toy.small_config(backbone="resnet18")).eval()
    frames = clips(torch.tensor([3]), 32)
    pixels = frames / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    pixels = pixels / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(network(frames), network.network(pixels), rtol=0, atol=1e-4)


def test_pad_clips_pads_with_zeros():
    tokens, mask = pad_clips(torch.ones(5, 2), [2, 3])
    assert tokens[0].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]


def test_wrong_frames_say_what_is_expected():
    model = encoder().eval()
    with pytest.raises(UserError, match=r"uint8"):
        model(clips().double(), LENGTHS)
    with pytest.raises(UserError, match=r"at least one"):
        model(clips(), torch.tensor([33, 0]))
    with pytest.raises(UserError, match=r"packed frames"):
        model(clips(), LENGTHS + 1)


def pose_config() -> ModelConfig:
    return toy.small_config(backbone="pose", pose_landmarks=4, pose_width=8)


def test_missing_landmarks_cannot_change_the_output():
    torch.manual_seed(0)
    model = VisualEncoder(pose_config()).eval()
    points = torch.randn(10, 4, 4)
    points[..., 3] = (torch.rand(10, 4) > 0.4).float()
    lengths = torch.tensor([7, 3])
    other = points.clone()
    other[..., :3][points[..., 3] == 0] = float("nan")
    assert torch.equal(model(points, lengths)[0], model(other, lengths)[0])
    present = points.clone()
    present[..., 3] = 1
    assert not torch.equal(model(points, lengths)[0], model(present, lengths)[0])


def test_pose_shape_is_checked():
    model = VisualEncoder(pose_config())
    with pytest.raises(UserError, match=r"\(N, 4, 4\)"):
        model(torch.zeros(3, 5, 4), torch.tensor([3]))
    with pytest.raises(UserError, match="pose_landmarks"):
        VisualEncoder(toy.small_config(backbone="pose"))


def test_cached_features_pass_and_other_shapes_are_named():
    model = VisualEncoder(toy.small_config(backbone="features"))
    tokens, mask = model(torch.randn(9, 512), torch.tensor([4, 5]))
    assert tokens.shape[:2] == mask.shape
    assert mask.sum(1).tolist() == [token_length(4, "gfslt"), token_length(5, "gfslt")]
    with pytest.raises(UserError, match="feature_cache"):
        model(torch.zeros(3, 3, 24, 24, dtype=torch.uint8), torch.tensor([3]))


def test_resnet_weights_come_from_a_file_and_are_checked(tmp_path):
    from torchvision.models import resnet18

    weights = resnet18(weights=None).state_dict()
    torch.save(weights, tmp_path / "net.pth")
    network = build_backbone(toy.small_config(backbone="resnet18", backbone_weights=str(tmp_path / "net.pth")))
    assert isinstance(network, FrameCNN)
    assert torch.equal(network.network.conv1.weight, weights["conv1.weight"])
    assert not any(name.startswith("network.fc") for name in network.state_dict())
    weights.pop("layer1.0.conv1.weight")
    save_file(weights, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight"):
        build_backbone(toy.small_config(backbone="resnet18", backbone_weights=str(tmp_path / "net.safetensors")))
    with pytest.raises(UserError, match="does not exist"):
        build_backbone(toy.small_config(backbone="resnet18", backbone_weights=str(tmp_path / "none.pth")))
    with pytest.raises(UserError, match="is for resnet18"):
        build_backbone(toy.small_config(backbone_weights=str(tmp_path / "net.pth")))


def test_broken_weight_files_are_refused(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"nothing")
    (tmp_path / "a.safetensors").write_bytes(b"nothing at all")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("a.pth", "a.safetensors", "list.pth"):
        with pytest.raises(UserError, match=name):
            build_backbone(toy.small_config(backbone="resnet18", backbone_weights=str(tmp_path / name)))
