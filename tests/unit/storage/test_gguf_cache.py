"""Dequantised GGUF files in the cache: an error speaks of the cache, not of the output of a command."""

import errno

import pytest

from hf_context_prune.errors import LoadError, SaveError
from hf_context_prune.storage import gguf
from hf_context_prune.storage.cache import CACHE_VARIABLE
from hf_context_prune.storage.staging import staged_folder


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    return tmp_path / "model.gguf"


def test_a_full_disk(file, monkeypatch):
    def fails(_, folder):
        with staged_folder(folder, required_bytes=0):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf, "dequantise", fails)
    with pytest.raises(
        LoadError, match=rf"model\.gguf can't be kept .* No space left .* Set {CACHE_VARIABLE}"
    ) as caught:
        gguf.ensure_dequantised(file)
    assert "--output" not in str(caught.value)
    assert not [path for path in (file.parent / "cache" / "gguf").iterdir() if path.suffix != ".lock"]


def test_other_errors_pass(file, monkeypatch):
    for error in (LoadError("not a model"), SaveError("another run")):

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(gguf, "dequantise", fails)
        with pytest.raises(type(error), match=str(error)):
            gguf.ensure_dequantised(file)
