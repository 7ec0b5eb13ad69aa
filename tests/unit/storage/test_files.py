"""Single files: whole or as they were."""

import os
from pathlib import Path

import pytest

from hf_context_prune.errors import SaveError
from hf_context_prune.utils.files import write_file


def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "table.md"
    write_file(path, "one \u00e4")
    assert path.read_text(encoding="utf-8") == "one \u00e4"
    write_file(path, b"two")
    assert path.read_bytes() == b"two"

    def fails(self, _):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(SaveError, match="No space left"):
        write_file(path, "three")
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"two", ["table.md"])


@pytest.mark.parametrize("place", ["folder", "file/table.md", "absent/table.md"])
def test_a_place_that_cannot_be_written(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="could not be written"):
        write_file(tmp_path / place, "text")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
