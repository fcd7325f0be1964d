"""Files in the cache folder: whole or not there, and ignored with one warning when they cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tri_mpk.store import read_json, slug, write_json


def test_round_trip(tmp_path: Path):
    path = tmp_path / "folder" / "file.json"
    assert read_json(path, dict, "") is None  # not there: no warning either
    write_json(path, {"a": 1.5, "b": ["c"]})
    assert read_json(path, dict, "") == {"a": 1.5, "b": ["c"]}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]  # nothing partial is left


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"b": 1}', "\x00\xff"])
def test_what_cannot_be_used_is_ignored_with_one_warning(tmp_path: Path, text: str):
    path = tmp_path / "file.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match=r"ignores .*file\.json: .+\. Do this$") as warned:
        assert read_json(path, lambda values: values["a"], "Do this") is None
    assert len(warned) == 1


def test_a_folder_in_the_place_of_a_file(tmp_path: Path):
    with pytest.warns(UserWarning, match="ignores"):
        assert read_json(tmp_path, dict, "") is None


def test_slug():
    assert slug("NVIDIA H200") == "NVIDIA-H200"
    assert slug("../a b/c") == "..-a-b-c"
