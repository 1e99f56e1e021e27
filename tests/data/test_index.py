"""The class index: what images show, what stands for their content, and when it is made anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.data.dataset import Dataset, load_dataset
from bench.data.index import build, class_index, class_indexes, map_fingerprint, read_class_index
from bench.data.locate import locate
from bench.errors import UserError

Toy = Callable[..., Path]
CHANGED = (10, 10)
"""Access and modification time in nanoseconds of a file that was touched."""


def toy_set(toy: Toy, **more: int) -> Dataset:
    """A throw-away data set."""
    return load_dataset("toy-set.toml", beside=toy(**more))


def kept(folder: Path, split: str = "train") -> Path:
    """The file in which an index is kept."""
    (found,) = folder.glob(f"data/cache/class-index/toy-set-*/{split}.txt")
    return found


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the image files opened from now on."""
    names: list[str] = []
    real, real_open = Image.open, Path.open
    read = Path.read_bytes

    def noted(path: Path) -> Path:
        if Path(path).suffix in (".png", ".jpg"):
            names.append(Path(path).name)
        return path

    monkeypatch.setattr(Image, "open", lambda path, *more: real(noted(path), *more))
    monkeypatch.setattr(Path, "open", lambda self, *more, **m: real_open(noted(self), *more, **m))
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(noted(self)))
    return names


def test_an_index_says_what_the_masks_show(toy: Toy, in_tmp: Path) -> None:
    index = class_index(toy_set(toy, n_classes=4))
    for name, shows in zip(index.names, index.presence, strict=True):
        mask = np.asarray(Image.open(in_tmp / f"toy/masks/{name}.png"))
        assert {c for c in range(1, 5) if shows >> c & 1} == set(np.unique(mask)) - {0, 255}
    assert not (in_tmp / "toy/class-index").exists()


def test_no_image_is_opened_once_the_index_is_made(
    toy: Toy, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = toy_set(toy)
    before = class_indexes(dataset), map_fingerprint(dataset, None, "saliency")
    names = opened(monkeypatch)
    assert (class_indexes(dataset), map_fingerprint(dataset, None, "saliency")) == before
    assert names == []
    kept(in_tmp).unlink()
    class_index(dataset)
    assert "train000.png" in names


def test_a_file_that_changed_after_it_was_indexed_is_noticed(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy, n_classes=4)
    before = class_index(dataset)
    path = in_tmp / "toy/masks/train005.png"
    Image.fromarray(np.full((32, 32), 4, np.uint8)).save(path)
    after = class_index(dataset)
    assert after.presence[5] == 1 << 4
    assert after.fingerprint != before.fingerprint
    Image.fromarray(np.full((32, 32), 77, np.uint8)).save(path)
    with pytest.raises(UserError, match=r"train005\.png: value 77 is no class"):
        class_index(dataset)


@pytest.mark.parametrize(
    ("suffix", "keep"), [("png", 40), ("png", -30), ("jpg", 40), ("jpg", -30), ("jpg", 0)]
)
def test_an_image_that_is_cut_off_is_refused_before_anything_is_trained(
    toy: Toy, in_tmp: Path, suffix: str, keep: int
) -> None:
    path = toy(size=64)
    if suffix == "jpg":
        for image in (in_tmp / "toy/images").iterdir():
            Image.open(image).save(image.with_suffix(".jpg"))
        settings = in_tmp / "toy-set.toml"
        settings.write_text(
            settings.read_text().replace('image = "images/{name}.png"', 'image = "images/{name}.jpg"')
        )
    damaged = in_tmp / f"toy/images/train007.{suffix}"
    damaged.write_bytes(damaged.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"train007\.{suffix}: cannot decode this image"):
        class_index(load_dataset("toy-set.toml", beside=path))


def test_an_image_with_something_after_its_end_is_whole(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy)
    path = in_tmp / "toy/images/train007.png"
    path.write_bytes(path.read_bytes() + b"camera" * 500)
    index = class_index(dataset)
    assert (len(index.names), index.names[7]) == (24, "train007")


def test_a_mask_of_three_channels(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy)
    path = in_tmp / "toy/masks/train005.png"
    Image.open(path).convert("RGB").save(path)
    with pytest.raises(UserError, match=r"train005\.png: mode 'RGB' is not one byte a pixel"):
        class_index(dataset)


def test_a_list_that_is_no_text(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy)
    (in_tmp / "toy/train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"train\.txt: cannot read this image list"):
        class_index(dataset)


def test_photographs_replaced_by_others_of_the_same_size(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy)
    before = class_index(dataset)
    path = in_tmp / "toy/images/train003.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=CHANGED)
    after = class_index(dataset)
    assert after.presence == before.presence
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("place", [0, 50_000, 99_999])
def test_of_a_large_photograph_first_middle_and_last_bytes_count(toy: Toy, in_tmp: Path, place: int) -> None:
    dataset = toy_set(toy)
    path = in_tmp / "toy/saliency/train003.png"
    found = set()
    for value in (b"\1", b"\2"):
        path.write_bytes(b"\0" * place + value + b"\0" * (99_999 - place))
        os.utime(path, ns=(value[0], value[0]))
        found.add(map_fingerprint(dataset, None, "saliency"))
    assert len(found) == 2


def test_files_that_were_only_touched_keep_their_fingerprint(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy)
    before = class_index(dataset)
    os.utime(in_tmp / "toy/images/train003.png", ns=CHANGED)
    after = class_index(dataset)
    assert after.stamp != before.stamp
    assert after.fingerprint == before.fingerprint
    assert class_index(dataset) == after


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("# format 2", "# format 1"),
        lambda text: text.replace("# format 2\n", ""),
        lambda text: text.replace("train000", "train999"),
        lambda text: text.replace("\t1", "\t77", 1),
        lambda text: text.replace("# meaning ", "# meaning 0"),
        lambda text: text.replace("# stamp ", "# stamp 0"),
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\x00\n\n",
    ],
)
def test_a_stale_or_damaged_index_is_made_anew(toy: Toy, in_tmp: Path, change: Callable[[str], str]) -> None:
    dataset = toy_set(toy)
    right = class_index(dataset)
    path = kept(in_tmp)
    text = path.read_text()
    path.write_text(change(text))
    assert class_index(dataset) == right
    assert path.read_text() == text


def test_other_classes_in_the_same_masks_are_another_index(toy: Toy, in_tmp: Path) -> None:
    before = class_index(toy_set(toy, n_classes=4))
    settings = in_tmp / "toy-set.toml"
    text = settings.read_text()
    found = {before.fingerprint}
    for other in (
        text.replace('"c3", "c4"', '"c4", "c3"'),
        'background = "unlabelled"\n' + text,
        "mask_ids = [0, 2, 1, 3, 4]\n" + text,
    ):
        settings.write_text(other)
        found.add(class_index(load_dataset("toy-set.toml", beside=settings)).fingerprint)
    assert len(found) == 4
    settings.write_text('title = "another title"\n' + text)
    assert class_index(load_dataset("toy-set.toml", beside=settings)) == before


def test_a_cache_that_cannot_be_written_blocks_nothing(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy)
    (in_tmp / "data").write_text("in the way")
    assert class_index(dataset) == class_index(dataset)
    assert map_fingerprint(dataset, None, "saliency") == map_fingerprint(dataset, None, "saliency")


def test_an_index_that_comes_with_the_data_saves_opening_the_masks(
    toy: Toy, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = toy_set(toy)
    right = class_index(dataset)
    kept(in_tmp).unlink()
    brought = in_tmp / "toy/class-index/train.txt"
    brought.parent.mkdir()
    # No mask says that every image shows class 2 alone.
    brought.write_text("".join(f"{name} 2\n" for name in right.names))
    monkeypatch.setattr("bench.data.index._shown", lambda mask, dataset: pytest.fail("a mask is opened"))
    index = class_index(dataset)
    assert set(index.presence) == {1 << 2}
    assert index.fingerprint == right.fingerprint


@pytest.mark.parametrize(
    "text", ["train000 1\n", "train000 99\n", "\x00", "# sizes and times 0123456789abcdef\n{all}"]
)
def test_an_index_that_comes_with_the_data_and_cannot_be_right_is_not_used(
    toy: Toy, in_tmp: Path, text: str
) -> None:
    dataset = toy_set(toy)
    right = class_index(dataset)
    kept(in_tmp).unlink()
    brought = in_tmp / "toy/class-index/train.txt"
    brought.parent.mkdir()
    brought.write_text(text.replace("{all}", "".join(f"{name} 2\n" for name in right.names)))
    assert class_index(dataset) == right


def test_names_with_spaces_survive(toy: Toy, in_tmp: Path) -> None:
    path = toy()
    for kind in ("images", "masks"):
        for file in (in_tmp / "toy" / kind).iterdir():
            file.rename(file.with_name(file.name.replace("train0", "train 1 ")))
    names = (in_tmp / "toy/train.txt").read_text().replace("train0", "train 1 ")
    (in_tmp / "toy/train.txt").write_text(names)
    dataset = load_dataset("toy-set.toml", beside=path)
    index = class_index(dataset)
    assert index.names[0] == "train 1 00"
    assert class_index(dataset) == read_class_index(kept(in_tmp), dataset) == index


def test_a_drawn_data_set_is_its_generator_and_not_its_bytes(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.data.shapes.IMAGES", {"train": 3, "test": 2})
    dataset = load_dataset("shapes")
    before, of_maps = class_index(dataset), map_fingerprint(dataset, None, "saliency")
    root = in_tmp / "data/cache/shapes-v1"
    assert locate(dataset)["train"].root == Path("data/cache/shapes-v1")
    image = root / "images/train_0000.png"
    Image.open(image).save(image, compress_level=9)  # another version of the library writes other bytes
    assert class_index(dataset).fingerprint == before.fingerprint
    assert class_index(dataset, split="test").fingerprint != before.fingerprint
    monkeypatch.setattr("bench.data.shapes.PARAMETERS", {"size": 97})
    assert map_fingerprint(dataset, None, "saliency") != of_maps
    (root.parent / "class-index").rename(root.parent / "elsewhere")
    assert class_index(dataset).fingerprint != before.fingerprint


def test_maps_that_are_missing(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy)
    with pytest.raises(UserError, match="data set 'toy-set' has no depth maps"):
        map_fingerprint(dataset, None, "depth")
    (in_tmp / "toy/saliency/train003.png").unlink()
    with pytest.raises(UserError, match=r"1 of 24 saliency maps are missing, the first is .*train003\.png"):
        map_fingerprint(dataset, None, "saliency")


def test_what_pads_a_map_belongs_to_its_fingerprint(toy: Toy, in_tmp: Path) -> None:
    before = map_fingerprint(toy_set(toy), None, "saliency")
    settings = in_tmp / "toy-set.toml"
    settings.write_text(settings.read_text() + "padding = 255\n")
    assert map_fingerprint(load_dataset("toy-set.toml", beside=settings), None, "saliency") != before


def test_many_processes_find_what_one_finds(toy: Toy) -> None:
    files = locate(toy_set(toy, images=300))["train"]
    assert build(files, workers=2) == build(files, workers=1)


def test_an_image_without_its_mask(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy)
    (in_tmp / "toy/masks/train003.png").unlink()
    with pytest.raises(UserError, match=r"image train003\.png has no mask; expected .*masks/train003\.png"):
        class_index(dataset)


def test_a_listed_image_that_is_not_there(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy)
    (in_tmp / "toy/images/train003.png").unlink()
    with pytest.raises(UserError, match=r"train003\.png: listed, but there is no such image"):
        class_index(dataset)


def test_a_mask_with_an_unknown_id(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy, n_classes=4)
    path = in_tmp / "toy/masks/train005.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[0, 0] = 77
    Image.fromarray(mask).save(path)
    with pytest.raises(
        UserError, match=r"train005\.png: value 77 is no class of .*; allowed: 0 to 4, 255 \(void\)"
    ):
        class_index(dataset)


def test_a_mask_that_is_cut_off(toy: Toy, in_tmp: Path) -> None:
    dataset = toy_set(toy)
    path = in_tmp / "toy/masks/train005.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"train005\.png: cannot read this mask"):
        class_index(dataset)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a 1\nb 21\n", r"index\.txt:2: 'b 21': allowed: a name, then class ids from 1 to 20"),
        ("a b\t0\n", r"index\.txt:1: 'a b\\t0': allowed"),
        ("\t1\n", r"index\.txt:1: '\\t1': allowed"),
        ("a one\n", r"index\.txt:1: 'a one' is not `name id id …`"),
        ("a 1\n\nb 2\n", r"index\.txt:2: '': allowed"),
        ("# nothing\n", "no image in this class index"),
        ("", "no image in this class index"),
    ],
)
def test_a_damaged_index_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "index.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_class_index(path, load_dataset("voc"))


def test_an_index_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "index.txt"
    path.write_bytes(b"\xff\xfe")
    for wrong in (path, tmp_path / "none.txt"):
        with pytest.raises(UserError, match=rf"{wrong.name}: cannot read this class index"):
            read_class_index(wrong, load_dataset("voc"))


def test_official_index_files(shared: Path) -> None:
    index = read_class_index(shared / "data/voc/train_classes.txt", load_dataset("voc"))
    assert len(index.names) == 10582
    assert index.count(15) == 3898


def test_camvid_real_photographs(shared: Path) -> None:
    index = class_index(load_dataset("camvid"), shared / "data/camvid")
    assert len(index.names) == 367
    assert 0 < index.count(11) < 367
