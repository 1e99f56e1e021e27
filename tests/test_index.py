from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.data.dataset import load_dataset, locate
from bench.data.index import build, class_index, read_class_index
from bench.errors import UserError
from bench.protocol import load

Toy = Callable[..., Path]


def test_an_index_says_what_the_masks_show_and_is_written_once(toy: Toy, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load(toy(n_classes=4)).dataset
    index = class_index(dataset)
    for name, shows in zip(index.names, index.presence, strict=True):
        mask = np.asarray(Image.open(in_tmp / f"toy/masks/{name}.png"))
        assert {c for c in range(1, 5) if shows >> c & 1} == set(np.unique(mask)) - {0, 255}
    written = in_tmp / "toy/class-index/train.txt"
    assert written.read_text().splitlines()[3].split()[0] == index.names[0]
    monkeypatch.setattr("bench.data.index.build", lambda files: pytest.fail("a mask is opened again"))
    assert class_index(dataset) == index


def test_a_file_that_changed_after_it_was_indexed_is_noticed(toy: Toy, in_tmp: Path) -> None:
    dataset = load(toy(n_classes=4)).dataset
    before = class_index(dataset)
    path = in_tmp / "toy/masks/train005.png"
    Image.fromarray(np.full((32, 32), 4, np.uint8)).save(path)
    after = class_index(dataset)
    assert after.presence[5] == 1 << 4
    assert after.fingerprint != before.fingerprint
    Image.fromarray(np.full((32, 32), 77, np.uint8)).save(path)
    with pytest.raises(UserError, match=r"train005\.png: value 77 is no class"):
        class_index(dataset)


@pytest.mark.parametrize(("suffix", "keep"), [("png", 40), ("png", -30), ("jpg", 40), ("jpg", -30), ("jpg", 0)])
def test_an_image_that_is_cut_off_is_refused_before_anything_is_trained(toy: Toy, in_tmp: Path, suffix: str, keep: int) -> None:
    path = toy(size=64)
    if suffix == "jpg":
        for image in (in_tmp / "toy/images").iterdir():
            Image.open(image).save(image.with_suffix(".jpg"))
        settings = in_tmp / "toy-set.toml"
        settings.write_text(settings.read_text().replace('image = "images/{name}.png"', 'image = "images/{name}.jpg"'))
    damaged = in_tmp / f"toy/images/train007.{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"train007\.{suffix}: cannot decode this image"):
        class_index(load(path).dataset)


def test_an_image_with_something_after_its_end_is_whole(toy: Toy, in_tmp: Path) -> None:
    dataset = load(toy()).dataset
    path = in_tmp / "toy/images/train007.png"
    path.write_bytes(path.read_bytes() + b"camera" * 500)
    class_index(dataset)


def test_a_mask_of_three_channels(toy: Toy, in_tmp: Path) -> None:
    dataset = load(toy()).dataset
    path = in_tmp / "toy/masks/train005.png"
    Image.open(path).convert("RGB").save(path)
    with pytest.raises(UserError, match=r"train005\.png: mode 'RGB' is not one byte a pixel"):
        class_index(dataset)


def test_a_list_that_is_no_text(toy: Toy, in_tmp: Path) -> None:
    path = toy()
    (in_tmp / "toy/train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"train\.txt: cannot read this image list"):
        class_index(load(path).dataset)


def test_a_drawn_data_set_does_not_need_the_root_of_another(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (in_tmp / "elsewhere").mkdir()
    monkeypatch.setenv("CISS_BENCH_DATA", str(in_tmp / "elsewhere"))
    drawn = in_tmp / "data/shapes-v9"
    for place, text in (("train.txt", "a\n"), ("test.txt", "b\n")):
        (drawn / place).parent.mkdir(parents=True, exist_ok=True)
        (drawn / place).write_text(text)
    monkeypatch.setattr("bench.data.generators.ensure", lambda dataset: drawn)
    assert locate(load("shapes-6-2").dataset)["train"].root == drawn


def test_a_data_root_that_cannot_be_written_is_indexed_in_the_cache(toy: Toy, in_tmp: Path) -> None:
    dataset = load(toy()).dataset
    (in_tmp / "toy/class-index").write_text("in the way")
    first = class_index(dataset)
    assert list(in_tmp.glob("data/class-index/*/train.txt"))
    assert class_index(dataset) == first


def test_many_processes_find_what_one_finds(toy: Toy) -> None:
    files = locate(load(toy(images=300)).dataset)["train"]
    assert build(files, workers=2) == build(files, workers=1)


def test_an_image_without_its_mask(toy: Toy, in_tmp: Path) -> None:
    dataset = load(toy()).dataset
    (in_tmp / "toy/masks/train003.png").unlink()
    with pytest.raises(UserError, match=r"image train003\.png has no mask; expected .*masks/train003\.png"):
        class_index(dataset)


def test_a_listed_image_that_is_not_there(toy: Toy, in_tmp: Path) -> None:
    dataset = load(toy()).dataset
    (in_tmp / "toy/images/train003.png").unlink()
    with pytest.raises(UserError, match=r"train003\.png: listed, but there is no such image"):
        class_index(dataset)


def test_a_mask_with_an_unknown_id(toy: Toy, in_tmp: Path) -> None:
    dataset = load(toy(n_classes=4)).dataset
    path = in_tmp / "toy/masks/train005.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[0, 0] = 77
    Image.fromarray(mask).save(path)
    with pytest.raises(UserError, match=r"train005\.png: value 77 is no class of .*; allowed: 0 to 4, 255 \(void\)"):
        class_index(dataset)


def test_a_mask_that_is_cut_off(toy: Toy, in_tmp: Path) -> None:
    dataset = load(toy()).dataset
    path = in_tmp / "toy/masks/train005.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"train005\.png: cannot read this mask"):
        class_index(dataset)


@pytest.mark.parametrize(
    ("text", "words"), [("a 1\nb 21\n", r":2: 'b 21': allowed"), ("a one\n", "is not `name id id …`"), ("# nothing\n", "no image")]
)
def test_a_damaged_index_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "index.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_class_index(path, load_dataset("voc"))


def test_official_index_files(shared: Path) -> None:
    index = read_class_index(shared / "data/voc/train_classes.txt", load_dataset("voc"))
    assert len(index.names) == 10582
    assert index.count(15) == 3898


def test_a_data_root_that_is_not_there(in_tmp: Path) -> None:
    with pytest.raises(UserError, match="--data-root nowhere: no such folder"):
        locate(load_dataset("voc"), "nowhere")
    with pytest.raises(UserError, match=r"data set 'voc': not found; looked for .*--data-root"):
        locate(load_dataset("voc"))


@pytest.mark.parametrize(
    ("layout", "lists"),
    [("VOCdevkit/VOC2012", "ImageSets/Segmentation"), ("PascalVOC12", "splits"), (".", "list")],
)
def test_voc_is_found_in_the_layouts_of_the_authors(tmp_path: Path, layout: str, lists: str) -> None:
    (tmp_path / layout / lists).mkdir(parents=True)
    (tmp_path / layout / lists / "train_aug.txt").write_text("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n")
    (tmp_path / layout / lists / "val.txt").write_text("2007_000033\n")
    files = locate(load_dataset("voc"), tmp_path)
    assert files["train"].names == ("2007_000032",)
    assert files["test"].mask("2007_000033") == tmp_path / layout / "SegmentationClassAug/2007_000033.png"


def test_camvid_real_photographs(shared: Path) -> None:
    index = class_index(load_dataset("camvid"), shared / "data/camvid")
    assert len(index.names) == 367
    assert 0 < index.count(11) < 367
