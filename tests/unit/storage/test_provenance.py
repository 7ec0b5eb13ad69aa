"""The facts that a base states about itself: copied from their source, never invented."""

from __future__ import annotations

import random
from types import SimpleNamespace

import gguf
import pytest

from hf_context_prune import EvalOptions, PrunerConfig, prune
from hf_context_prune.storage import gguf as gguf_files
from hf_context_prune.storage import loading
from hf_context_prune.storage import provenance as module
from hf_context_prune.storage.known_models import SMOLLM2
from hf_context_prune.storage.loading import LoadedModel
from hf_context_prune.storage.provenance import read_base_card
from tests.support.limits import within
from tests.support.tiny import TEXT, tiny_model, tiny_tokenizer


def base(source=None, *, name="base", revision=None):
    return LoadedModel(None, None, name, revision, None, source)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\nlanguage: en\n---\n# X", {"license": "mit", "language": "en"}),
        ("---\nlicense: [a, b]\ntags: [x]\n---", {"license": ["a", "b"]}),
        ("---\nlicense: 7\nlanguage: {a: b}\npipeline_tag: ''\n---", {}),
        (f"---\nlicense: {'x' * 400}\n---", {}),
        ("# No metadata", {}),
    ],
)
def test_a_folder_states_it_in_its_readme(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text)
    assert read_base_card(base(tmp_path)) == expected | {"stated_by": "the README.md in its folder"}


@pytest.mark.parametrize(
    "content",
    [
        *(b"---\nlicense: [\n---\n", b"---\n- a\n---\n", b"---\nlicense: \xff\n---\n"),
        b"---\nlicense: " + 3000 * b"[" + 3000 * b"]" + b"\n---\n",
        b"---\nlicense: &a [mit, *a]\n---\n",
        b"---\nlicense: mit\nlicense: mit\n---\n",
        b"---\na: [" + 100_000 * b"[]," + b"]\n---\n",
        b"---\na: b\n---\n" + b" " * 5_000_000,
    ],
    ids=range(8),
)
def test_a_readme_that_cant_be_read(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    with within(seconds=2):
        found = read_base_card(base(tmp_path))
    assert found == {"unknown": "the README.md in its folder can't be read"}


def test_nothing_is_stated():
    assert "no README.md" in read_base_card(base(source=module.Path("/nonexistent")))["unknown"]
    assert read_base_card(LoadedModel.from_memory(tiny_model("llama"), None)) == {"unknown": "it was given in memory"}
    # HF_HUB_OFFLINE is set for the tests
    assert read_base_card(base(name="org/model")) == {"id": "org/model", "unknown": "its model card could not be read"}


def test_the_hub_states_it_in_the_card_at_that_commit(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    asked = []
    monkeypatch.setattr(module, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path / "README.md"))
    stated = read_base_card(base(name="org/model", revision="abc"))
    assert stated == {"id": "org/model", "license": "apache-2.0", "stated_by": "its model card"}
    assert asked == [(("org/model", "README.md"), {"revision": "abc"})]


def test_a_gguf_file_states_it_in_its_header(tmp_path):
    file = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_base_card(base(file)) == {
        "license": "mit",
        "language": ["en"],
        "stated_by": "the header of its GGUF file",
    }
    file.write_bytes(b"GGUF nonsense")
    assert "can't be read" in read_base_card(base(file))["unknown"]


def test_the_demo_model_is_known_by_its_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "hash_file", lambda _: SMOLLM2["sha256"])
    (tmp_path / "x.gguf").touch()
    stated = read_base_card(base(tmp_path / "x.gguf"))
    assert (stated["id"], stated["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


def test_a_model_in_memory_names_the_folder_that_it_is_from(tmp_path):
    model = SimpleNamespace(config=SimpleNamespace(name_or_path=str(tmp_path), model_type="llama"))
    loaded = LoadedModel.from_memory(model, None)
    assert (loaded.source, loaded.name) == (tmp_path, tmp_path.name)
    model.config.name_or_path = "org/model"
    loaded = LoadedModel.from_memory(model, None)
    assert (loaded.source, loaded.name) == (None, "org/model")


def test_a_model_in_memory_names_the_gguf_file_that_it_is_from(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").touch()
    for reader in (loading, gguf_files):
        monkeypatch.setattr(reader, "ensure_dequantised", lambda *_: tmp_path / "copy")
    tiny_model("llama").save_pretrained(tmp_path / "copy")
    tiny_tokenizer().save_pretrained(tmp_path / "copy")
    model = loading.load_model(tmp_path / "x.gguf").model
    loaded = LoadedModel.from_memory(model, None)
    assert (loaded.source, loaded.name) == (tmp_path / "x.gguf", "x.gguf")
    options = PrunerConfig(mlp_ratio=0.5, num_calibration_samples=4, max_seq_length=16)
    draw = random.Random(0)
    text = [" ".join(draw.choices(TEXT.split(), k=60)) for _ in range(20)]
    result = prune(model, text, options, eval_options=EvalOptions(max_tokens=200, benchmark=False, memory=False))
    assert result.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()  # that of its copy
    assert result.report.base_model == "x.gguf"
    model.save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved/config.json").read_text()
