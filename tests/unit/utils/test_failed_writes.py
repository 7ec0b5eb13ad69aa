"""Failed writes are told from other errors, whichever library raises them."""

import errno
import shutil

import pytest
from safetensors import SafetensorError

from hf_context_prune.errors import ConfigError, SaveError
from hf_context_prune.utils.failed_writes import find_failed_write
from hf_context_prune.utils.files import write_file

FULL = "No space left on device"


def test_what_a_failed_write_is(tmp_path, subtests):
    inside, outside = tmp_path / "model" / "file", tmp_path / "base"
    copied = OSError(errno.EIO, "Input/output error", str(outside), None, str(inside))  # as `shutil.copyfile` raises it
    for error, number, path in (
        (copied, errno.EIO, inside),
        (OSError(errno.EACCES, "Permission denied", str(inside)), errno.EACCES, inside),
        (OSError(errno.ENOSPC, FULL, str(outside)), errno.ENOSPC, outside),  # no read fails so
        (OSError(errno.EIO, "Input/output error"), errno.EIO, None),
        (OSError("16 requested and 0 written"), None, None),  # numpy
        (OSError("problem writing element 1024 to file"), None, None),
        (Exception(f"{FULL} (os error 28)"), errno.ENOSPC, None),  # tokenizers
        (SafetensorError(f"I/O error: {FULL} (os error 28)"), errno.ENOSPC, None),
    ):
        with subtests.test(error=error):
            found = find_failed_write(error, tmp_path / "model")
            assert (found.number, found.path) == (number, path)
            assert found.reason
    for error in (
        OSError(errno.EIO, "Input/output error", str(outside)),
        FileNotFoundError(errno.ENOENT, "No such file or directory", str(outside)),
        OSError("Can't load tokenizer for 'model'."),  # transformers
        Exception("a template can't be rendered"),
        ValueError(f"{FULL} (os error 28)"),
        ConfigError("no"),
        SaveError("no"),
    ):
        with subtests.test(error=error):
            assert find_failed_write(error, tmp_path / "model") is None
            assert (find_failed_write(error, tmp_path / "model", any_os_error=True) is not None) == (
                isinstance(error, OSError) and not isinstance(error, SaveError)
            )


def test_a_single_file_that_could_not_be_written(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOSPC, FULL)

    monkeypatch.setattr("pathlib.Path.replace", fails)
    with pytest.raises(SaveError) as caught:
        write_file(tmp_path / "report.json", "{}")
    assert find_failed_write(caught.value, tmp_path).path == tmp_path / "report.json"
    assert find_failed_write(caught.value, tmp_path / "elsewhere") is None


def test_the_target_of_a_real_copy(tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(OSError, match="No space left") as caught:
        shutil.copyfile(tmp_path / "file", "/dev/full")
    assert find_failed_write(caught.value, tmp_path / "other").number == errno.ENOSPC
