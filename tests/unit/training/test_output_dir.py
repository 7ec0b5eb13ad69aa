"""A training replaces files in its output_dir only if this package wrote them."""

from __future__ import annotations

import shutil

import pytest

from hf_context_prune.errors import ConfigError, SaveError
from hf_context_prune.modeling import specs
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.storage.staging import staged_folder
from hf_context_prune.training.callback.checks import check_output_dir
from hf_context_prune.utils.file_names import PLAN_NAME
from tests.support.tiny import tiny_model


def test_files_of_others_are_told_before_the_first_step(tmp_path, subtests):
    geometry = read_geometry(tiny_model("llama").config, specs.SPECS["llama"])
    PruningPlan.identity("llama", geometry).save(tmp_path / PLAN_NAME)
    shutil.copyfile(specs.__file__, tmp_path / "specs.py")
    (tmp_path / "train.py").write_text("mine")
    check_output_dir(str(tmp_path))
    check_output_dir(str(tmp_path / "absent"))
    others = {
        PLAN_NAME: lambda path: path.write_text("{}"),
        "specs.py": lambda path: path.write_text("RATE = 2"),
        "modeling_context_pruned.py": lambda path: path.symlink_to(tmp_path / "specs.py"),
        "configuration_context_pruned.py": lambda path: path.symlink_to(tmp_path / "absent.py"),
    }
    for name, make in others.items():
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        make(folder / name)
        with subtests.test(name), pytest.raises(ConfigError, match=f"{name} was not written by this package"):
            check_output_dir(str(folder))


def test_a_folder_in_a_saved_one_is_refused(tmp_path):
    with staged_folder(tmp_path / "model", required_bytes=0) as staging:
        (staging / "config.json").write_text("{}")
    with pytest.raises(SaveError, match=r"lies in .*model, a folder that this package saved"):
        check_output_dir(str(tmp_path / "model" / "runs" / "1"))
