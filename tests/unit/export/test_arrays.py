"""Arrays in files: every byte, or an error."""

import os

import numpy as np
import pytest

from hf_context_prune.export.arrays import as_file_array


def test_the_bytes_are_those_of_numpy(tmp_path, subtests):
    for values in (np.arange(12.0), np.arange(12).reshape(3, 4).T, np.float16(1.5).reshape(()), np.zeros((0, 2))):
        with subtests.test(shape=values.shape):
            with (tmp_path / "file").open("wb") as file:
                as_file_array(values).tofile(file)
            assert (tmp_path / "file").read_bytes() == np.ascontiguousarray(values).tobytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_not_passed_over():
    with open("/dev/full", "wb", buffering=0) as file:
        np.zeros(4).tofile(file)  # without a word
        with pytest.raises(OSError, match="No space left"):
            as_file_array(np.zeros(4)).tofile(file)
