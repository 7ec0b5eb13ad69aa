"""Models and data sets by Hub id: the real client, in fresh processes, against a local server.

The client reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported, hence the processes; as each costs some
seconds, they are few, with several steps each.
"""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path

import pandas as pd
import pytest

from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.modeling_context_pruned import MODELING_FILES
from hf_context_prune.modeling.plan import LayerPlan, PruningPlan, fingerprint
from hf_context_prune.modeling.specs import SPECS
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.utils.file_names import PLAN_NAME, REPORT_NAME
from tests.support.hub.client import client, digest
from tests.support.hub.process import HubProcess
from tests.support.hub.server import files_of
from tests.support.tiny import TEXT, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

PARQUET_EXPORT = "refs/convert/parquet"
CARD = """---
configs:
- config_name: law
  data_files:
  - split: train
    path: law/train.jsonl.gz
  - split: test
    path: law/test.jsonl
- config_name: medicine
  data_files: medicine/*.jsonl
---
"""


def pruned_model(model):
    """Other widths in every layer."""
    geometry = read_geometry(model.config, SPECS["llama"])
    layers = [LayerPlan(tuple(range(20 + index)), (0, 2) if index else (1,)) for index in range(3)]
    plan = PruningPlan("llama", geometry.layers, tuple(layers), fingerprint(model))
    return apply_plan(model, plan), plan


def lines(*texts: str) -> bytes:
    records = [{"text": text, "doc": f"doc {i // 2}", "source": "court"} for i, text in enumerate(texts)]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parquet(*texts: str) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame({"text": texts, "doc": texts}).to_parquet(buffer)
    return buffer.getvalue()


class Place:
    """The hub with its repositories, what their models compute, and a folder for the clients with one cache."""

    def __init__(self, hub: HubProcess, folder: Path) -> None:
        self.hub, self.folder, self.home = hub, folder, folder / "home"
        tokenizer = tiny_tokenizer()
        models = {"llama": tiny_model("llama"), "old": tiny_model("llama", seed=1), "new": tiny_model("llama", seed=2)}
        models["pruned"], plan = pruned_model(models["llama"])
        files = {}
        for name, model in models.items():
            if name == "pruned":
                save_pruned(model, folder / name, tokenizer=tokenizer, plan=plan)
            else:
                model.save_pretrained(folder / name)
                tokenizer.save_pretrained(folder / name)
            files[name] = files_of(folder / name)
        self.digests = {name: digest(model) for name, model in models.items()}
        self.files = files
        self.llama = hub.repo("models", "org/llama", files["llama"])
        self.llama.commit(files["old"], ref="old")
        self.pruned = hub.repo("models", "org/pruned", files["pruned"])
        self.outlined = hub.repo("models", "org/outlined", files["old"])
        no_weights = {name: content for name, content in files["llama"].items() if name != "model.safetensors"}
        hub.repo("models", "org/pickle", no_weights | {"pytorch_model.bin": b"a pickle"})
        hub.repo("models", "org/gated", files["llama"], gated=True)
        hub.repo("models", "org/gguf", {"model.gguf": b"GGUF"})
        models["llama"].save_pretrained(folder / "sharded", max_shard_size="100KB")
        tokenizer.save_pretrained(folder / "sharded")
        shards = files_of(folder / "sharded")
        hub.repo("models", "org/sharded", shards)
        wide = json.dumps(json.loads(shards["config.json"]) | {"vocab_size": 10**7}).encode()
        hub.repo("models", "org/wide", shards | {"config.json": wide})
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/old"}
        hub.repo("models", "org/adapter", files["llama"] | {"adapter_config.json": json.dumps(adapter).encode()})
        custom = {
            "model_type": "custom",
            "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        }
        hub.repo("models", "org/custom", {"config.json": json.dumps(custom).encode(), "code.py": b"raise SystemExit"})
        draw = random.Random(0)  # texts that share no 13 words in a row: held-out ones are not dropped
        self.texts = [f"{' '.join(draw.choices(TEXT.split(), k=80))} {i}" for i in range(40)]
        self.corpus_files = {
            "README.md": CARD.encode(),
            "law/train.jsonl.gz": gzip.compress(lines(*self.texts)),
            "law/test.jsonl": lines("held out"),
            "medicine/train.jsonl": lines("a dose"),
        }
        self.corpus = hub.repo("datasets", "org/corpus", self.corpus_files)
        self.legal = hub.repo("datasets", "org/legal", {"legal.py": b"", "README.md": b"A data set with a script."})
        self.legal.commit({"us/test/0000.parquet": parquet("a term", "a crime")}, ref=PARQUET_EXPORT)
        hub.repo("datasets", "org/gated", self.corpus_files, gated=True)
        hub.repo("datasets", "org/busy", self.corpus_files, busy=True)

    def run(self, code: str, *, arguments: dict | None = None, package: bool = True, **variables: str) -> dict:
        """Run a client in a fresh process; returns the JSON of its last line."""
        return client(self.hub, self.folder, self.home, code, arguments=arguments, package=package, **variables)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with HubProcess() as hub:
        yield Place(hub, tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def reads(place):
    """Models by id, while the branch main of one moves as soon as it was resolved; and models that are refused."""
    first, since = place.llama.refs["main"], len(place.hub.log)
    path = "/org/llama/resolve/main/config.json"
    place.hub.once_after(path, "commit", "models", "org/llama", place.files["new"])
    facts = place.run(
        """
from pathlib import Path
from hf_context_prune.storage.loading import load_model, load_meta_model
from hf_context_prune.storage.saving import save_pruned

def facts(loaded):
    config = json.loads((loaded.folder / "config.json").read_text())
    return {
        "revision": loaded.revision, "name": loaded.name, "digest": digest(loaded.model),
        "class": type(loaded.model).__name__, "model_type": config["model_type"], "folder": loaded.folder.name,
        "weights": [path.name for path in loaded.folder.glob("*.safetensors")],
        "name_or_path": [loaded.model.name_or_path, loaded.tokenizer.name_or_path],
        "ids": loaded.tokenizer("the court").input_ids,
    }

asked = {"main": ("org/llama", None), "branch": ("org/llama", "old"), "commit": ("org/llama", arguments["first"])}
results = {key: facts(load_model(id, revision=revision)) for key, (id, revision) in asked.items()}
pruned = load_model("org/pruned")
results["pruned"] = facts(pruned)
results["sharded"] = facts(load_model("org/sharded"))
save_pruned(pruned.model, "saved again", tokenizer=pruned.tokenizer)
outline = load_meta_model("org/outlined")
results["outline"] = [outline.num_parameters(), outline.device.type]
refused = ("org/none", "org/gated", "org/pickle", "org/gguf", "org/custom", "not/an/id", "org/wide", "org/adapter")
results["refused"] = {id: [attempt(load_model, id), attempt(load_meta_model, id)] for id in refused}
results["refused"]["revision"] = [attempt(f, "org/llama", revision="v9") for f in (load_model, load_meta_model)]
print(json.dumps(results))
""",
        arguments={"first": first},
    )
    return facts, first, place.hub.log[since:]


def test_a_model_by_id_is_pinned_to_the_commit_that_its_branch_named(place, reads):
    facts, first, log = reads
    assert place.llama.refs["main"] != first  # it did move
    for key, revision, weights in (
        ("main", first, "llama"),
        ("branch", place.llama.refs["old"], "old"),
        ("commit", first, "llama"),
        ("pruned", place.pruned.refs["main"], "pruned"),
    ):
        got = facts[key]
        assert (got["revision"], got["folder"], got["digest"]) == (revision, revision, place.digests[weights]), key
        assert got["weights"] == ["model.safetensors"]
        assert got["ids"] == tiny_tokenizer()("the court").input_ids
        assert got["name"] == ("org/pruned" if key == "pruned" else "org/llama")
        assert got["name_or_path"] == [got["name"]] * 2
    assert facts["sharded"]["digest"] == place.digests["llama"]
    assert len(facts["sharded"]["weights"]) > 1
    assert facts["outline"] == [tiny_model("llama").num_parameters(), "meta"]
    # main is asked for once, by load_model("org/llama"); all else names a commit, or the other branch.
    of_llama = [r.path for r in log if "/org/llama" in r.path]
    assert [path for path in of_llama if "/main/" in path] == ["/org/llama/resolve/main/config.json"]
    assert not [path for path in of_llama if place.llama.refs["main"] in path]


def test_a_variable_width_repository_needs_no_code_of_its_own_and_can_be_saved_again(place, reads):
    facts, _, log = reads
    assert facts["pruned"]["class"] == "ContextPrunedLlamaForCausalLM"
    assert facts["pruned"]["model_type"] == "context_pruned_llama"
    assert not [request for request in log if request.path.endswith(".py")]
    again, before = place.folder / "saved again", place.folder / "pruned"
    for name in ("config.json", "model.safetensors", "modeling_context_pruned.py"):
        assert (again / name).read_bytes() == (before / name).read_bytes()
    assert_no_machine_path(again, place)


def assert_no_machine_path(folder, place):
    for path in folder.iterdir():
        content = path.read_bytes()
        assert str(place.folder).encode() not in content, path.name
        assert place.hub.endpoint.encode() not in content, path.name


@pytest.mark.parametrize(
    ("id", "error", "words", "outline"),
    [
        ("org/none", "LoadError", ("spelling", "hf auth login"), True),
        ("org/gated", "LoadError", ("gated", "ask for access", "hf auth login"), True),
        ("org/wide", "LoadError", ("embed_tokens.weight", "[10000000, 48]"), False),
        ("org/adapter", "LoadError", ("PEFT adapter", "merge_and_unload"), True),
        ("org/pickle", "LoadError", ("pytorch_model.bin", "any code", "safetensors"), False),
        ("org/gguf", "LoadError", ("no config.json", ".gguf file"), True),
        ("org/custom", "UnsupportedArchitectureError", ("'custom'", "Supported are"), True),
        ("not/an/id", "LoadError", ("owner/name",), True),
        ("revision", "LoadError", ("'v9'", "branch, tag or commit"), True),
    ],
)
def test_a_model_that_is_refused_says_why(reads, id, error, words, outline):
    by_model, by_outline = reads[0]["refused"][id]
    for got in (by_model, by_outline) if outline else (by_model,):
        assert got is not None
        assert got[0] == error
        assert all(word in got[1] for word in words), got[1]
        assert "use_safetensors" not in got[1]
    if not outline:
        assert by_outline is None  # shapes need no weights


def test_what_is_in_the_cache_loads_without_the_server(place, reads):
    """No Hub to be reached; what is only half in the cache is said to be that, not a repository without weights."""
    facts = place.run(
        """
from hf_context_prune.storage.loading import load_model
results = {}
for key, revision in (("branch", "old"), ("commit", arguments["first"])):
    loaded = load_model("org/llama", revision=revision)
    results[key] = [loaded.revision, digest(loaded.model)]
loaded = load_model("org/pruned")
results["pruned"] = [loaded.revision, digest(loaded.model)]
results["refused"] = [attempt(load_model, id) for id in ("org/outlined", "org/never")]
print(json.dumps(results))
""",
        arguments={"first": reads[1]},
        HF_HUB_OFFLINE="1",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert facts["branch"] == [place.llama.refs["old"], place.digests["old"]]
    assert facts["commit"] == [reads[1], place.digests["llama"]]
    assert facts["pruned"] == [place.pruned.refs["main"], place.digests["pruned"]]
    for kind, message in facts["refused"]:
        assert kind == "LoadError"
        assert "HF_HUB_OFFLINE" in message
        assert "use_safetensors" not in message


def test_a_variable_width_repository_opens_without_the_package(place):
    since = len(place.hub.log)
    facts = place.run(
        """
class Barred:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_context_prune":
            raise ImportError("hf_context_prune is barred here")

sys.meta_path.insert(0, Barred())
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("org/pruned", trust_remote_code=True, dtype="auto")
# Without trust_remote_code it would ask on the terminal, as it reads the model's config too.
tokenizer = AutoTokenizer.from_pretrained("org/pruned", trust_remote_code=True)
results = {"digest": digest(model), "class": type(model).__name__, "module": type(model).__module__}
print(json.dumps(results | {"ids": tokenizer("the court").input_ids}))
""",
        package=False,
        HF_HOME=str(place.folder / "other home"),
    )
    assert facts["digest"] == place.digests["pruned"]
    assert facts["class"] == "ContextPrunedLlamaForCausalLM"
    assert facts["module"].startswith("transformers_modules.")
    assert facts["ids"] == tiny_tokenizer()("the court").input_ids
    asked = [request.path for request in place.hub.log[since:] if request.status != 404]
    code = {path.rpartition("/")[2] for path in asked if path.endswith(".py")}
    assert code == set(MODELING_FILES)


def test_a_dataset_by_id_is_read_at_one_commit(place):
    """Of the config and split that were asked for, while the branch moves as soon as it was resolved."""
    first, export = place.corpus.refs["main"], place.legal.refs[PARQUET_EXPORT]
    since = len(place.hub.log)
    moved = place.corpus_files | {"law/train.jsonl.gz": gzip.compress(lines("moved"))}
    place.hub.once_after("/api/datasets/org/corpus", "commit", "datasets", "org/corpus", moved)
    place.hub.once_after(
        f"/api/datasets/org/legal/revision/{PARQUET_EXPORT}",
        *("commit", "datasets", "org/legal", {"us/test/0000.parquet": parquet("moved")}),
        ref=PARQUET_EXPORT,
    )
    facts = place.run(
        """
from hf_context_prune.data.documents import load_documents

results = {}
for reference in ("org/corpus:law@train", "org/corpus:law@test", "org/corpus:medicine", "org/legal:us@test"):
    source = load_documents(reference)
    documents = [[document.text, document.doc, document.source] for document in source.documents]
    results[reference] = [source.name, source.revision, documents]
refused = ("org/none", "org/gated", "org/busy", "org/corpus:game", "org/corpus:law@validation")
results["refused"] = {reference: attempt(load_documents, reference) for reference in refused}
print(json.dumps(results))
"""
    )
    name, revision, documents = facts["org/corpus:law@train"]
    assert (name, revision) == ("org/corpus:law@train", first)
    pairs = zip(place.texts[::2], place.texts[1::2], strict=True)
    assert documents == [[f"{a}\n\n{b}", f"doc {i}", "court"] for i, (a, b) in enumerate(pairs)]
    second = place.corpus.refs["main"]
    assert facts["org/corpus:law@test"] == ["org/corpus:law@test", second, [["held out", "doc 0", "court"]]]
    assert facts["org/corpus:medicine"] == ["org/corpus:medicine@train", second, [["a dose", "doc 0", "court"]]]
    assert facts["org/legal:us@test"] == [
        "org/legal:us@test",
        export,
        [["a term", "a term", "org/legal:us"], ["a crime", "a crime", "org/legal:us"]],
    ]
    for reference, words in {
        "org/none": ("spelling", "hf auth login"),
        "org/gated": ("gated", "ask for access"),
        "org/busy": ("try again",),
        "org/corpus:game": ("check config and split", "'law', 'medicine'"),
        "org/corpus:law@validation": ("check config and split", "'train', 'test'"),
    }.items():
        kind, message = facts["refused"][reference]
        assert kind == "DataError"
        assert all(word in message for word in words), message
    assert "is gated" not in facts["refused"]["org/none"][1]
    # Nothing names the branch: each reference resolves it once, through the API, and then names the commit.
    log = [request.path for request in place.hub.log[since:] if "/org/corpus" in request.path]
    assert log[0] == "/api/datasets/org/corpus"
    resolved = [path for path in log if path == log[0]]
    assert len(resolved) == 5  # three references that are read, two that are refused
    assert all(first in path or second in path for path in log if path not in resolved)
    assert all(first in path for path in log[1 : log.index(log[0], 1)])


def test_the_command_line_by_id(place):
    """A dry run; a run whose folder names ids and commits, and no path; errors that exit with 1 and write nothing."""
    corpus = place.corpus.commit(place.corpus_files)
    facts = place.run(
        """
import contextlib, io
from hf_context_prune.cli import app as cli

def run(*words):
    sys.argv = ["hf-context-prune", *words]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        return [end.code or 0, out.getvalue(), err.getvalue()]

quick = ("--max-seq-length", "32", "--num-calibration-samples", "8", "--no-benchmark", "--max-eval-tokens", "300")
data = ("--data", "org/corpus:law@train")
options = ("--mlp-ratio", "0.25", "--format", "json")
results = {"dry": run("prune", "org/llama", "--revision", "old", *options, "--dry-run")}
for id, revision, target in (("org/llama", ("--revision", "old"), "out"), ("org/pruned", (), "out of pruned")):
    results[target] = run("prune", id, *revision, *data, "--output", target, *options, *quick)
for id in ("org/none", "org/gated", "org/pickle"):
    results[id] = run("prune", id, *data, "--output", "never")
results["data"] = run("prune", "org/llama", "--data", "org/none", "--output", "never")
results["dry none"] = run("prune", "org/none", "--dry-run")
print(json.dumps(results))
"""
    )
    code, out, err = facts["dry"]
    assert code == 0, err
    assert [layer["neurons"] for layer in json.loads(out)["widths"]] == [30, 30, 30]
    for target, id, revision in (
        ("out", "org/llama", place.llama.refs["old"]),
        ("out of pruned", "org/pruned", place.pruned.refs["main"]),
    ):
        code, out, err = facts[target]
        assert code == 0, err
        provenance = json.loads((place.folder / target / PLAN_NAME).read_text())["provenance"]
        assert (provenance["base_model"], provenance["base_revision"]) == (id, revision)
        assert (provenance["data"]["name"], provenance["data"]["revision"]) == ("org/corpus:law@train", corpus)
        report = json.loads((place.folder / target / REPORT_NAME).read_text())
        assert report["base_model"] == id
        assert (report["dataset"]["name"], report["dataset"]["revision"]) == ("org/corpus:law@train", corpus)
        assert report["size"]["base_weight_bytes"] > report["size"]["pruned_weight_bytes"]
        assert_no_machine_path(place.folder / target, place)
    for key in ("org/none", "org/gated", "org/pickle", "data", "dry none"):
        code, out, err = facts[key]
        assert (code, out) == (1, ""), err
        assert "\nError: " in f"\n{err}", err
    assert not (place.folder / "never").exists()
    assert not [path for path in place.folder.iterdir() if path.name.startswith(".")]
