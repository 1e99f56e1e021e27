"""Where files are looked for, and what an image list may say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.data.dataset import load_dataset
from bench.data.locate import locate
from bench.errors import UserError

Toy = Callable[..., Path]


def test_a_data_root_that_is_not_there(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--data-root nowhere: no such folder"):
        locate(load_dataset("voc"), "nowhere")
    with pytest.raises(UserError, match=r"data set 'voc': not found; looked for .*--data-root"):
        locate(load_dataset("voc"))
    with pytest.raises(UserError, match=r"looked for images/training/\*\.jpg in data/ade"):
        locate(load_dataset("ade"))
    monkeypatch.setenv("CISS_BENCH_DATA", "nowhere")
    with pytest.raises(UserError, match="CISS_BENCH_DATA nowhere: no such folder"):
        locate(load_dataset("voc"))


@pytest.mark.parametrize(
    ("layout", "lists"),
    [("VOCdevkit/VOC2012", "ImageSets/Segmentation"), ("PascalVOC12", "splits"), (".", "list")],
)
def test_voc_is_found_in_the_layouts_of_the_authors(tmp_path: Path, layout: str, lists: str) -> None:
    (tmp_path / layout / lists).mkdir(parents=True)
    (tmp_path / layout / lists / "train_aug.txt").write_text(
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n"
    )
    (tmp_path / layout / lists / "val.txt").write_text("2007_000033\n")
    files = locate(load_dataset("voc"), tmp_path)
    assert files["train"].names == ("2007_000032",)
    assert files["test"].mask("2007_000033") == tmp_path / layout / "SegmentationClassAug/2007_000033.png"


def test_a_users_own_data_set_is_found_beside_its_file_from_anywhere(
    toy: Toy, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_dataset("toy-set.toml", beside=toy())
    (in_tmp / "elsewhere").mkdir()
    monkeypatch.chdir(in_tmp / "elsewhere")
    assert locate(dataset)["train"].image("train000").is_file()


def test_without_a_list_every_image_counts_and_names_keep_spaces_and_braces(tmp_path: Path) -> None:
    settings = tmp_path / "own.toml"
    split = 'image = "pictures/{0}_{{name}}_rgb.png"\nmask = "masks/{{name}}.png"\n'
    settings.write_text(
        f'classes = ["background", "a"]\n[train]\n{split.format("t")}[test]\n{split.format("v")}'
    )
    (tmp_path / "pictures").mkdir()
    for name in ("t_b_rgb.png", "t_a b {0}_rgb.png", "v_c_rgb.png", "v_c_depth.png"):
        (tmp_path / "pictures" / name).touch()
    files = locate(load_dataset(str(settings)))
    assert files["train"].names == ("a b {0}", "b")
    assert files["test"].names == ("c",)
    assert files["train"].image("a b {0}") == tmp_path / "pictures/t_a b {0}_rgb.png"


def test_the_words_of_an_image_list(toy: Toy, in_tmp: Path) -> None:
    path = toy()
    (in_tmp / "toy/train.txt").write_text("a.jpg b.png\n\nfolder/b.JPG\nc d e\n  f.g  \n")
    assert locate(load_dataset("toy-set.toml", beside=path))["train"].names == ("a", "b", "c d e", "f.g")


def test_named_maps(toy: Toy) -> None:
    files = locate(load_dataset("toy-set.toml", beside=toy()))
    assert files["train"].map("saliency", "train000").is_file()
    with pytest.raises(UserError, match="data set 'toy-set' has no saliency maps of its test images"):
        files["test"].map("saliency", "test000")
    with pytest.raises(UserError, match="data set 'toy-set' has no proposals maps"):
        files["train"].map("proposals", "train000")


def test_a_drawn_data_set_does_not_need_the_root_of_another(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_tmp / "elsewhere").mkdir()
    monkeypatch.setenv("CISS_BENCH_DATA", str(in_tmp / "elsewhere"))
    drawn = in_tmp / "data/shapes-v9"
    for place, text in (("train.txt", "a\n"), ("test.txt", "b\n")):
        (drawn / place).parent.mkdir(parents=True, exist_ok=True)
        (drawn / place).write_text(text)
    monkeypatch.setattr("bench.data.generators.ensure", lambda dataset: drawn)
    assert locate(load_dataset("shapes"))["train"].root == drawn
