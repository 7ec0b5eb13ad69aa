"""One definition of the id of a repository, for every place that takes one."""

from __future__ import annotations

import pytest

from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import ConfigError, DataError
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.pipelines.recover import _load_base
from hf_context_prune.publishing.hub import push_folder
from hf_context_prune.publishing.space.folder import make_space_settings
from hf_context_prune.utils.hub_ids import is_hub_id
from tests.support.export_folders import VARIABLE
from tests.support.tiny import tiny_model

NO_IDS = (
    *("../x", "x/..", "a/../b", "./x", "a//b", "/x", "a/b/c", "-a/b", "a--b/c", "a/b.git", "a/b\n", "\u00e9/b"),
    *("a/" + "b" * 97, "", None, 7),
)


def test_what_is_an_id():
    assert all(map(is_hub_id, ("a/b", "HuggingFaceTB/SmolLM2-135M", "a.b/c_d.e-f")))
    assert [value for value in NO_IDS if is_hub_id(value)] == []
    assert is_hub_id("gpt2", with_owner=False)
    assert not is_hub_id("gpt2")


def test_a_plan_names_no_base_of_this_machine(tmp_path):
    geometry = read_geometry(tiny_model("llama").config, SPECS["llama"])
    for name in (str(tmp_path), "../x", None, 7):
        plan = PruningPlan("llama", geometry.layers, VARIABLE, provenance={"base_model": name, "base_revision": "main"})
        assert _load_base(plan, None, None) is None


def test_every_place_that_takes_an_id_refuses_what_is_none(tmp_path, subtests):
    for value in ("../x", "a/../b", "a--b/c"):
        with subtests.test(value):
            with pytest.raises(ConfigError, match="not the id of a repository"):
                push_folder(tmp_path, value)
            with pytest.raises(ConfigError, match="neither a folder nor a Hub id"):
                make_space_settings([value], base="demo")
            with pytest.raises(DataError):
                load_documents(value)
