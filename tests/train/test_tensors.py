"""Files of tensors appear whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.train import tensors
from bench.train.tensors import read_tensors, write_tensors


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(6).view(2, 3).t(), "b": torch.tensor(1.5)}, {"place": [0, 1, 2]})
    found, values = read_tensors(path)
    assert found["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["b"] == 1.5
    assert values == {"place": [0, 1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("part", [0, 10])
def test_a_process_that_dies_while_it_writes_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {"epochs": 1})
    before = path.read_bytes()

    def dies(flat: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
        assert path.read_bytes() == before
        Path(file).write_bytes(b"0" * part)
        raise KeyboardInterrupt

    monkeypatch.setattr(tensors, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(path, {"a": torch.zeros(3)}, {"epochs": 2})
    assert path.read_bytes() == before
