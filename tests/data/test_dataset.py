"""Data set files: what they may say, and in which words the rest is refused."""

from __future__ import annotations

import importlib.metadata
import pickle
from pathlib import Path

import pytest

from bench.data.dataset import DATASETS, Dataset, Split, load_dataset
from bench.errors import UserError
from bench.names import Entry

FILES = 'image = "i/{name}.png"\nmask = "m/{name}.png"\n'
RIGHT = f'classes = ["background", "a", "b"]\n[train]\n{FILES}[test]\n{FILES}'


def written(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text)
    return path


def test_shipped_data_sets_can_be_read() -> None:
    found, warnings = DATASETS.everything()
    assert sorted(found) == ["ade", "camvid", "shapes", "voc"]
    assert warnings == []
    assert all(dataset.home == "" for dataset in found.values())
    assert found["voc"].maps["saliency"].padding == 0


def test_a_data_set_survives_json_and_pickle_and_can_be_hashed(tmp_path: Path) -> None:
    for dataset in (load_dataset("shapes"), load_dataset(str(written(tmp_path, RIGHT)))):
        back = Dataset.model_validate_json(dataset.model_dump_json())
        assert back == dataset == pickle.loads(pickle.dumps(dataset))
        assert {back: 1}[dataset] == 1
        assert back.meaning == dataset.meaning


def test_what_is_not_said(tmp_path: Path) -> None:
    dataset = load_dataset("own.toml", beside=written(tmp_path, RIGHT))
    assert (dataset.name, dataset.title, dataset.home) == ("own", "own", str(tmp_path))
    assert (dataset.background, dataset.track, dataset.roots, dataset.maps) == ("class", "small", (".",), {})


def test_what_masks_mean_is_told_by_classes_background_and_values() -> None:
    split = Split(image="{name}.png", mask="{name}.png")
    about = {"name": "x", "train": split, "test": split, "classes": ("background", "a", "b")}
    base = Dataset(**about)
    others = [
        {**about, "classes": ("background", "b", "a")},
        {**about, "background": "unlabelled"},
        {**about, "mask_ids": (0, 2, 1)},
    ]
    assert len({base.meaning, *(Dataset.model_validate(other).meaning for other in others)}) == 4
    assert (
        Dataset.model_validate({**about, "name": "y", "title": "z", "roots": ("r",)}).meaning == base.meaning
    )
    assert len(base.meaning) == 16


def test_values_of_mask_files() -> None:
    assert load_dataset("camvid").raw_to_id()[11] == 255
    assert load_dataset("voc").raw_to_id() == {**{c: c for c in range(21)}, 255: 255}


CLASSES = 'classes = ["background", "a", "b"]'
TOO_MANY = "classes = [" + ", ".join(f'"c{i}"' for i in range(256)) + "]"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (CLASSES, "", "classes: missing; this key must be given"),
        (CLASSES, "classes = 7", "classes: 7 is not a list of names"),
        (CLASSES, 'classes = "ab"', "classes: 'ab' is not a list of names"),
        (CLASSES, 'classes = ["background", 3]', "classes: 3 is not a name in quotes"),
        (CLASSES, 'classes = ["background", ""]', "classes: '' is not a name in quotes"),
        (CLASSES, 'classes = ["background"]', "classes: 1 names; allowed: background and 1 to 254 others"),
        (CLASSES, TOO_MANY, "classes: 256 names; allowed: background and 1 to 254 others"),
        (CLASSES, 'classes = ["x", "a", "a"]', "classes: 'a' stands for ids 1 and 2"),
        (
            CLASSES,
            'classes = ["a", "background"]',
            "classes: 'background' stands for id 1; background is id 0",
        ),
        (
            CLASSES,
            f'{CLASSES}\nbackground = "klass"',
            "background: unknown value 'klass'; did you mean 'class'?",
        ),
        (
            CLASSES,
            f"{CLASSES}\nmask_ids = [0, 1, 3]",
            "mask_ids: 3 is no class id; allowed: 0 to 2, and 255 for void",
        ),
        (CLASSES, f"{CLASSES}\nmask_ids = {[0] * 257}", "mask_ids: 257 ids"),
        (CLASSES, f"{CLASSES}\nmask_ids = [true]", "mask_ids = [True]: True in a list of class ids"),
        (CLASSES, f"{CLASSES}\nmask_ids = 3", "mask_ids = 3: not a list of class ids"),
        (CLASSES, f'{CLASSES}\nroots = "."', "roots = '.': not a list of folder names in quotes"),
        (CLASSES, f"{CLASSES}\nroots = []", 'roots = []: empty; ["."] is the data root itself'),
        (CLASSES, f'{CLASSES}\nclases = ["a"]', "unknown key 'clases'; did you mean 'classes'?"),
        (CLASSES, f'{CLASSES}\nhome = "."', "unknown key 'home'"),
        (CLASSES, f'{CLASSES}\nname = "x"', "unknown key 'name'"),
        (f"[train]\n{FILES}", "", "train: missing"),
        (
            f"{CLASSES}\n[train]\n{FILES}",
            f"{CLASSES}\ntrain = 3\n",
            "train = 3: not a table; write [train] with",
        ),
        (
            "i/{name}.png",
            "i/{nam}.png",
            "train.image = 'i/{nam}.png': {nam} is not allowed in a path pattern",
        ),
        ("m/{name}.png", "m/{name.png", "train.mask = 'm/{name.png': {name.png is not allowed"),
        ("m/{name}.png", "m/.png", "train.mask = 'm/.png': {name} is missing"),
        ('mask = "m/{name}.png"\n[test]', "[test]", "train.mask: missing"),
        (
            "i/{name}.png",
            "{name}/{name}.png",
            "train: image = '{name}/{name}.png': {name} more than once needs lists",
        ),
        ("[test]", 'list = ["a"]\n[test]', "train: unknown key 'list'; did you mean 'lists'?"),
        ("[test]", 'lists = "a"\n[test]', "train.lists = 'a': not a list of file names in quotes"),
        ("[test]", 'saliency = "{name}"\n[test]', "train: unknown key 'saliency'"),
        (
            "[test]",
            '[maps.saliency]\ntrain = "s/{nam}.png"\n[test]',
            "maps.saliency.train = 's/{nam}.png': {nam} is",
        ),
        (
            "[test]",
            "[maps.saliency]\npadding = 256\n[test]",
            "maps.saliency.padding = 256: Input should be less than",
        ),
        ("[test]", "[maps.saliency]\npading = 2\n[test]", "unknown key 'pading'; did you mean 'padding'?"),
        ("[test]", "[maps.labels]\n[test]", "'labels' cannot be a map's name"),
        ("[test]", '[maps."../x"]\n[test]', "'../x' cannot be a map's name"),
        (CLASSES, f"{CLASSES}\nmaps = 3", "maps = 3: not a table; write [maps.saliency]"),
        (CLASSES, 'classes = ["', "not a TOML file"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in RIGHT
    path = written(tmp_path, RIGHT.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load_dataset(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes('classes = ["Straße"]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"own\.toml: not a TOML file in UTF-8"):
        load_dataset(str(path))


def test_a_data_set_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^p\.toml: dataset: none\.toml: no such file$"):
        load_dataset("none.toml", beside=Path("p.toml"))
    with pytest.raises(UserError, match=r"^none\.toml: no such file$"):
        load_dataset("none.toml")
    with pytest.raises(UserError, match=r"^p\.toml: dataset: unknown data set 'vox'; did you mean 'voc'"):
        load_dataset("vox", beside=Path("p.toml"))


def test_a_data_set_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, RIGHT)
    (tmp_path / "packaged.py").write_text(f"FILE = {str(path)!r}\nNUMBER = 3\n")
    monkeypatch.syspath_prepend(tmp_path)

    def point(name: str) -> importlib.metadata.EntryPoint:
        return importlib.metadata.EntryPoint("theirs", f"packaged:{name}", "bench.datasets")

    assert DATASETS.of_entry_point(point("FILE")).name == "theirs"
    with pytest.raises(UserError, match=r"data set 'theirs' .*: int is neither a path nor a Dataset"):
        DATASETS.of_entry_point(point("NUMBER"))
    monkeypatch.setattr(
        DATASETS, "finders", [*DATASETS.finders, lambda: {"voc": Entry(lambda: None, "theirs")}]
    )
    DATASETS.forget()
    with pytest.raises(UserError, match="data set 'voc': two have this name"):
        load_dataset("voc")
    monkeypatch.undo()
    DATASETS.forget()
