"""ViT and mask transformer beyond their golden vectors, and their networks."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.errors import UserError
from bench.models.build import BODIES, NETWORKS, Assembled, BodyKind, build_network, patch_tokens
from bench.models.classifier import LinearClassifier
from bench.models.network import Network
from bench.models.vit import (
    Block,
    MaskTransformer,
    PatchTokens,
    VisionTransformer,
    mask_norm,
    resize_position_embedding,
)
from bench.models.weights import load_pretrained


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tiny(image_size: int = 32) -> VisionTransformer:
    return VisionTransformer(image_size, patch=8, width=16, n_blocks=2, n_heads=2, hidden=32)


# ---- the networks ------------------------------------------------------------------------------------------


def test_the_network_of_the_paper() -> None:
    with torch.device("meta"):
        network: Any = build_network("segmenter-vit-b16", [1, 15, 1], "mask-transformer")
    unused = 768 * 20 + 20  # the released encoder carries a linear head that nothing reads
    assert n_parameters(network.body) == 86_449_940 - unused
    assert n_parameters(network) == 102_410_550 - unused
    assert network.body.pos_embed.shape == (1, 1 + 32 * 32, 768)
    assert {m.eps for m in network.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    drops = [block.drop_path for block in [*network.body.blocks, *network.classifier.blocks]]
    assert drops == pytest.approx([0.0] * 13 + [0.1])


@pytest.mark.parametrize("classifier", ["mask-transformer", "linear"])
def test_every_parameter_of_the_small_network_learns(classifier: str) -> None:
    network = build_network("small-vit", [1, 3], classifier).train()
    output = network(torch.randn(2, 3, 96, 96))
    assert output.logits.shape == (2, 4, 96, 96)
    assert output.small_logits.shape == (2, 4, 12, 12)
    assert [m.shape for m in output.maps] == [output.body.shape] * 2
    output.logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_the_small_network_is_no_larger_than_the_small_deeplab() -> None:
    with_tokens = build_network("small-vit", [1, 6], "mask-transformer")
    assert n_parameters(with_tokens) < n_parameters(build_network("small", [7]))


def test_a_network_without_tokens_is_refused() -> None:
    words = r"network = 'small': has no tokens .* allowed: segmenter-vit-b16, small-vit"
    with pytest.raises(UserError, match=words):
        build_network("small", [1, 3], "mask-transformer")


def test_an_image_that_no_patch_divides_is_padded_and_its_logits_cut() -> None:
    body = tiny()
    network = Network(body, PatchTokens(16), MaskTransformer(16, [1, 2], n_heads=2)).eval()
    images = torch.randn(2, 3, 29, 20)
    whole = network(F.pad(images, (0, 4, 0, 3)))
    cut = network(images)
    assert whole.logits.shape == (2, 3, 32, 24)
    assert torch.equal(cut.logits, whole.logits[..., :29, :20])
    assert torch.equal(cut.small_logits, whole.small_logits)


def test_tokens_and_map_agree() -> None:
    body = tiny().eval()
    images = torch.randn(2, 3, 32, 24)
    out, maps = body(images)
    tokens = body.tokens(images)[-1]
    assert out.shape == (2, 16, 4, 3)
    assert torch.equal(out[1, :, 2, 1], tokens[1, 1 + 2 * 3 + 1])
    assert torch.allclose(F.layer_norm(maps[-1].movedim(1, -1), (16,)), out.movedim(1, -1), atol=1e-5)


# ---- position embedding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_position_embedding_keeps_its_class_token_and_what_is_constant(mode: str) -> None:
    embedding = torch.cat([torch.randn(1, 1, 5), torch.randn(1, 1, 5).expand(1, 9, 5)], dim=1)
    resized = resize_position_embedding(embedding, (4, 7), mode)
    assert resized.shape == (1, 29, 5)
    assert torch.equal(resized[:, 0], embedding[:, 0])
    assert torch.allclose(resized[:, 1:], embedding[:, 1:2].expand(1, 28, 5), atol=1e-6)
    assert resize_position_embedding(embedding, (3, 3), mode) is embedding


def test_rows_and_columns_of_a_position_embedding_are_not_confused() -> None:
    rows = torch.arange(4.0).repeat_interleave(4)
    embedding = torch.cat([torch.zeros(1), rows])[None, :, None]
    resized = resize_position_embedding(embedding, (8, 2), "bilinear")[0, 1:, 0].view(8, 2)
    assert torch.equal(resized[:, 0], resized[:, 1])
    assert resized[:, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]  # corners are not aligned


# ---- blocks ------------------------------------------------------------------------------------------------


def test_drop_path_skips_whole_images_in_training_only() -> None:
    block = Block(8, 2, 16, drop_path=0.5)
    x = torch.randn(64, 3, 8)
    with torch.no_grad():
        kept = block._kept(torch.ones(64, 3, 8))
        assert set(kept.unique().tolist()) == {0.0, 2.0}
        assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))
        assert not torch.equal(block(x), block(x))
        block.eval()
        assert torch.equal(block(x), block(x))


# ---- the mask transformer ----------------------------------------------------------------------------------


def test_mask_norm_is_a_standard_score_over_the_classes() -> None:
    masks = torch.randn(2, 6, 4)
    normed = mask_norm(masks, torch.ones(4), torch.zeros(4), eps=0.0)
    assert torch.allclose(normed.mean(-1), torch.zeros(2, 6), atol=1e-6)
    assert torch.allclose(normed.var(-1), torch.ones(2, 6), atol=1e-5)
    assert torch.allclose(mask_norm(masks, torch.full((4,), 3.0), torch.ones(4), eps=0.0), 3 * normed + 1)


def test_classes_keep_their_masks_when_the_heads_change_places() -> None:
    decoder = MaskTransformer(8, [1, 3, 2], n_heads=2).eval()
    features = torch.randn(2, 8, 3, 4)
    masks, extra = decoder(features)
    decoder.heads = nn.ModuleList([decoder.heads[k] for k in (2, 0, 1)])
    assert decoder.sizes == [2, 1, 3]
    swapped, swapped_extra = decoder(features)
    order = [4, 5, 0, 1, 2, 3]
    torch.testing.assert_close(swapped, masks[:, order])
    torch.testing.assert_close(swapped_extra["class_features"], extra["class_features"][:, order])
    torch.testing.assert_close(swapped_extra["patches"], extra["patches"])


def test_a_new_head_changes_the_old_masks() -> None:
    decoder = MaskTransformer(8, [1, 3], n_heads=2).eval()
    features = torch.randn(1, 8, 3, 3)
    before, _ = decoder(features)
    decoder.grow(2)
    after, extra = decoder(features)
    assert decoder.sizes == [1, 3, 2]
    assert after.shape == (1, 6, 3, 3)
    assert extra["class_tokens"].shape == (1, 6, 8)
    assert not torch.allclose(after[:, :4], before, atol=1e-2)


def test_masks_stay_single_precision_under_autocast() -> None:
    decoder = MaskTransformer(8, [1, 3], n_heads=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks, extra = decoder(torch.randn(2, 8, 3, 3))
    assert masks.dtype == torch.float32
    assert extra["patches"].dtype == torch.bfloat16


def test_a_new_head_is_made_on_the_device_of_the_old_ones() -> None:
    decoder = MaskTransformer(8, [1, 3], n_heads=2).to("meta")
    decoder.grow(1)
    assert {p.device.type for p in decoder.parameters()} == {"meta"}


# ---- pretrained weights ------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Network:
    """A tiny ViT among the networks that a recipe can name."""
    for registry in (BODIES, NETWORKS):
        for attribute in ("_added", "_loaded"):
            monkeypatch.setattr(registry, attribute, dict(getattr(registry, attribute)))
    BODIES.add("tiny-vit", BodyKind("a tiny ViT", lambda norm: tiny()))
    NETWORKS.add("tiny-vit", Assembled("a tiny ViT", "tiny-vit", patch_tokens))
    return Network(tiny(), PatchTokens(16), LinearClassifier(16, [2]))


def timm_checkpoint(side: int) -> dict[str, Tensor]:
    """What timm's models save: the encoder for another image size, and the classifier of its task."""
    state = {name: torch.randn_like(value) for name, value in tiny(side * 8).state_dict().items()}
    return {**state, "head.weight": torch.zeros(10, 16), "head.bias": torch.zeros(10)}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_checkpoint_of_timm_with_its_position_embedding_resized(
    registered: Any, tmp_path: Path, suffix: str
) -> None:
    state = timm_checkpoint(side=3)
    path = tmp_path / f"vit.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    assert load_pretrained(registered, "tiny-vit", str(path)) == str(path)
    loaded = registered.body.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in loaded if name != "pos_embed")
    patches = state["pos_embed"][:, 1:].view(1, 3, 3, 16).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, size=(4, 4), mode="bicubic", align_corners=False)
    bicubic = resized.permute(0, 2, 3, 1).reshape(1, 16, 16)
    torch.testing.assert_close(loaded["pos_embed"], torch.cat([state["pos_embed"][:, :1], bicubic], dim=1))


def test_the_weights_of_torchvision_give_its_features(registered: Any, tmp_path: Path) -> None:
    norm = functools.partial(nn.LayerNorm, eps=1e-5)
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3, norm_layer=norm).eval()
    nn.init.normal_(theirs.heads.head.weight)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    load_pretrained(registered, "tiny-vit", str(tmp_path / "vit.pth"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        mine = registered.body.eval().tokens(images)[-1]
        x = theirs._process_input(images)
        want = theirs.encoder(torch.cat([theirs.class_token.expand(2, -1, -1), x], dim=1))
    torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)


def test_names_of_the_published_torchvision_file() -> None:
    """Its MLPs carry older names than the module does."""
    old = {"linear_1": "fc1", "linear_2": "fc2"}
    state = {f"encoder.layers.encoder_layer_0.mlp.{name}.weight": torch.zeros(1) for name in old}
    assert list(tiny().adapt(state)) == [f"blocks.0.mlp.{name}.weight" for name in old.values()]


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.weight"), "blocks.1.attn.qkv.weight"),
        # two extra tokens, as a distilled ViT has
        (lambda s: s.update({"pos_embed": torch.zeros(1, 12, 16)}), "pos_embed"),
        (lambda s: s.update({"cls_token": torch.zeros(1, 1, 32)}), "cls_token"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    registered: Any, tmp_path: Path, change: object, first: str
) -> None:
    state = timm_checkpoint(side=4)
    change(state)  # type: ignore[operator]
    torch.save(state, tmp_path / "vit.pth")
    words = rf"does not fit network 'tiny-vit': 1 of \d+ tensors are missing, first '{first}'"
    with pytest.raises(UserError, match=words):
        load_pretrained(registered, "tiny-vit", str(tmp_path / "vit.pth"))
