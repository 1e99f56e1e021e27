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


def test_an_index_says_what_the_masks_show_and_is_written_once(toy: Toy, in_tmp: Path) -> None:
    dataset = load(toy(n_classes=4)).dataset
    index = class_index(dataset)
    for name, shows in zip(index.names, index.presence, strict=True):
        mask = np.asarray(Image.open(in_tmp / f"toy/masks/{name}.png"))
        assert {c for c in range(1, 5) if shows >> c & 1} == set(np.unique(mask)) - {0, 255}
    written = in_tmp / "toy/class-index/train.txt"
    assert written.read_text().splitlines()[2].split()[0] == index.names[0]
    for mask in (in_tmp / "toy/masks").iterdir():
        mask.unlink()
    assert class_index(dataset) == index  # no mask is opened again


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
