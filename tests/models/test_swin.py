"""The Swin body beyond its golden vectors, and its networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from bench.errors import UserError
from bench.models.build import build_network
from bench.models.swin import Swin, from_windows, shift_mask, to_windows
from bench.models.weights import load_pretrained


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def small() -> Any:
    torch.manual_seed(0)
    return build_network("small-swin", [3])


def test_windows_are_cut_and_put_together_again() -> None:
    x = torch.arange(2 * 6 * 9 * 4.0).view(2, 6, 9, 4)
    windows = to_windows(x, 3)
    assert windows.shape == (2, 6, 9, 4)
    assert torch.equal(windows[1, 4], x[1, 3:6, 3:6].flatten(0, 1))  # row-major: the second of the second row
    assert torch.equal(from_windows(windows, 3, 6, 9), x)


def test_after_the_roll_only_neighbours_in_the_image_attend_to_each_other() -> None:
    window, side = 4, 12
    at = torch.cartesian_prod(torch.arange(side), torch.arange(side)).view(1, side, side, 2)
    rolled = to_windows(at.roll((-2, -2), (1, 2)), window)[0]
    # in the image, of the two tokens of each pair
    distance = (rolled[:, :, None] - rolled[:, None, :]).abs().amax(-1)
    assert torch.equal(shift_mask(side, side, window, torch.device("cpu")) == 0, distance < window)


def test_maps_halve_in_side_and_double_in_width_whatever_the_image() -> None:
    body = Swin(8, (1, 2, 1), (1, 2, 2), window=3).eval()
    for height, width in ((32, 32), (50, 41)):
        out, maps = body(torch.randn(1, 3, height, width))
        shapes = [(8 * 2**i, -(-height // (4 * 2**i)), -(-width // (4 * 2**i))) for i in range(3)]
        assert [tuple(m.shape[1:]) for m in [*maps, out]] == shapes


def test_every_stage_leaves_normed_maps(small: Any) -> None:
    out, maps = small.eval().body(torch.randn(2, 3, 96, 96))
    for m in [*maps, out]:
        assert torch.allclose(m.mean(1), torch.zeros(()), atol=1e-5)
        assert torch.allclose(m.var(1, unbiased=False), torch.ones(()), atol=1e-3)


def test_stochastic_depth_is_active_in_training_only(small: Any) -> None:
    images = torch.randn(2, 3, 96, 96)
    body = small.body.train()
    torch.manual_seed(0)
    first = body(images)[0]
    torch.manual_seed(1)
    assert not torch.equal(first, body(images)[0])
    body.eval()
    assert torch.equal(body(images)[0], body(images)[0])


def test_padding_takes_part_in_the_attention() -> None:
    """Zeros behind the first norm are tokens like others: a lone one would else attend to itself."""
    torch.manual_seed(0)
    body = Swin(8, (1,), (1,), window=4).eval()
    block: Any = body.get_submodule("layers.0.blocks.0")
    token = torch.randn(1, 1, 1, 8)
    normed = block.norm1(token)
    alone = block.attn.proj(block.attn.qkv(normed)[..., 16:])
    assert not torch.allclose(block.attend(normed, None), alone, atol=1e-3)


def test_the_network_of_the_paper() -> None:
    with torch.device("meta"):
        network: Any = build_network("deeplab-abn-swin-b", [16, 5])
        theirs = torchvision.models.swin_b()
    body = network.body
    # tables of window 12 instead of torchvision's 7
    window = (23**2 - 13**2) * (2 * 4 + 2 * 8 + 18 * 16 + 2 * 32)
    stage_norms = 2 * (128 + 256 + 512)  # and the last stage's is torchvision's norm
    assert n_parameters(body) == n_parameters(theirs) - n_parameters(theirs.head) + window + stage_norms
    assert network.head.map_convs[0].in_channels == 1024
    rates = [block.drop_path.p for layer in body.layers for block in layer.blocks]
    assert len(rates) == 24
    assert rates == pytest.approx([0.3 * i / 23 for i in range(24)])


def test_a_small_network_learns_with_every_parameter(small: Any) -> None:
    output = small.train()(torch.randn(2, 3, 96, 96))
    assert output.logits.shape == (2, 3, 96, 96)
    assert output.small_logits.shape[-1] == 12
    (output.logits.square().mean() + sum(m.square().mean() for m in output.maps)).backward()
    assert [name for name, p in small.named_parameters() if p.grad is None] == []


def n_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- pretrained weights ------------------------------------------------------------------------------------


def classifier_checkpoint(body: Swin) -> dict[str, Tensor]:
    """What Swin's authors release: a classifier with buffers, a last norm, a head; no norms behind stages."""
    torch.manual_seed(1)
    own = {name: value for name, value in body.state_dict().items() if not name.startswith("norm")}
    trunk = {name: torch.randn_like(value) for name, value in own.items()}
    buffers = {"blocks.1.attn_mask": (4, 36, 36), "blocks.0.attn.relative_position_index": (36, 36)}
    rest = {"norm.weight": (64,), "norm.bias": (64,), "head.weight": (1000, 64)}
    shapes = {**{f"layers.0.{name}": shape for name, shape in buffers.items()}, **rest}
    return {**trunk, **{name: torch.zeros(shape) for name, shape in shapes.items()}}


def test_a_released_checkpoint_fills_the_trunk_and_leaves_the_new_norms(small: Any, tmp_path: Path) -> None:
    released = classifier_checkpoint(small.body)
    path = tmp_path / "swin.pth"
    torch.save({"model": released}, path)
    assert load_pretrained(small, "small-swin", str(path)) == str(path)
    loaded = small.body.state_dict()
    assert all(torch.equal(loaded[name], released[name]) for name in loaded if not name.startswith("norm"))
    for i in (0, 1):
        assert torch.equal(loaded[f"norm{i}.weight"], torch.ones_like(loaded[f"norm{i}.weight"]))
        assert torch.equal(loaded[f"norm{i}.bias"], torch.zeros_like(loaded[f"norm{i}.bias"]))


def test_a_checkpoint_of_another_window_is_refused(small: Any, tmp_path: Path) -> None:
    other = Swin(32, (2, 2), (2, 4), window=7)
    torch.save({"model": other.state_dict()}, tmp_path / "swin.pth")
    with pytest.raises(UserError, match=r"does not fit network 'small-swin'.*relative_position_bias_table"):
        load_pretrained(small, "small-swin", str(tmp_path / "swin.pth"))


def test_torchvision_has_no_weights_for_it(small: Any) -> None:
    with pytest.raises(UserError, match="give the path of a checkpoint"):
        load_pretrained(small, "small-swin", "imagenet")
