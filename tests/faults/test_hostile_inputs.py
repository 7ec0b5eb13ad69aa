"""Damaged and hostile configs, plans, reports, manifests and YAML: an error in words or a right result, and soon.

Real files are mutated: keys dropped, renamed and doubled; values of other types, sizes and signs; bytes cut, flipped
and added. A seeded sample runs every day, and a deep one each night.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hf_context_prune import EvalReport, PrunerConfig, PruningPlan, load_model, load_pruned, read_space_settings
from hf_context_prune.cli.inspect import inspect
from hf_context_prune.cli.options import config_from
from hf_context_prune.cli.report import report as show_report
from hf_context_prune.data.documents import check_readable, load_documents
from hf_context_prune.data.questions import load_questions
from hf_context_prune.errors import ContextPruneError, LoadError, PlanError
from hf_context_prune.evaluation.reports.rendering import read_folder, render_markdown
from hf_context_prune.export.report import ExportReport
from hf_context_prune.export.run import read_export
from hf_context_prune.export.verify import Tolerance, Verification
from hf_context_prune.modeling.architectures import spec_of
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.plan import LayerPlan
from hf_context_prune.pipelines.recover import recover_to_folder
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.publishing.card.card import build_card, make_card
from hf_context_prune.publishing.card.facts import read_facts
from hf_context_prune.publishing.space.folder import make_space_settings
from hf_context_prune.storage.loading import load_meta_model
from hf_context_prune.storage.manifest import verify_folder, write_manifest
from hf_context_prune.utils.file_names import EXPORT_REPORT_NAME, MANIFEST_NAME, PLAN_NAME, REPORT_NAME
from tests.support.limits import within
from tests.support.tiny import COVERING, case, tiny_tokenizer, tokens

GOLDEN = Path(__file__).parents[1] / "support" / "golden" / "variable_3369b6e.zip"
QUICK, DEEP = 12, 2_000


class Raw(str):
    """Text that stands in a file as it is, where a value should be."""


HOSTILE = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 10**9, 10**12, 2**63, -(10**30), 10**400, 0.5, -1e300, 5e-324),
    *("", " ", "a", "a\nb\0c", "../../../etc/passwd", "/dev/zero", "~nobody/x", "x" * 10_000, "\U0001f600é\u2028", "1"),
    *([], {}, [[]], {"": None}, [0], ["a"], [-1, 10**9], {"a": {"b": [1, {"c": None}]}}, [1] * 10_000),
    *map(Raw, ("NaN", "-Infinity", "9" * 5_000, "[" * 5_000 + "]" * 5_000, '{"a":' * 5_000, '"\\ud800"', "1e999", "")),
]
KINDS = (
    *("set", "set", "set", "drop", "rename", "double", "wrap", "swap", "add"),
    *("cut", "flip", "insert", "append", "whole"),
)
VALUES = st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=20)
DAMAGES = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 10**6), VALUES), min_size=1, max_size=3)


def places(value):
    """(container, key) of every value in a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def damage(content, damages, dump):
    """The content of a file after damages; `dump` writes a tree in the file's format."""
    tree, raw, doubled = yaml.safe_load(content), {}, []  # JSON is YAML
    for kind, at, value in damages:
        found = list(places(tree))
        if not found or kind in ("cut", "flip", "insert", "append", "whole"):
            continue
        container, key = found[at % len(found)]
        if isinstance(value, Raw):
            value = raw.setdefault(value, f"raw-{len(raw)}") and f"raw-{list(raw).index(value)}"
        if kind == "set":
            container[key] = value
        elif kind == "drop":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[f"{key}{at}" if at % 2 else str(value)[:50]] = container.pop(key)
        elif kind == "double":
            doubled.append(key)
        elif kind == "wrap":
            container[key] = [container[key]] if at % 2 else {"a": container[key]}
        elif kind == "swap":
            other, name = found[(at * 7 + 1) % len(found)]
            container[key], other[name] = other[name], container[key]
        elif kind == "add" and isinstance(container, dict):
            container[str(value)[:50]] = value
    text = dump(tree)
    for literal, mark in raw.items():
        text = text.replace(f'"{mark}"', literal).replace(mark, literal)
    for key in doubled:
        text = text.replace(f'"{key}":', f'"{key}": 1, "{key}":', 1)
    data = text.encode("utf-8", "surrogatepass")
    for kind, at, value in damages:
        at %= len(data) + 1
        if kind == "cut":
            data = data[:at]
        elif kind == "flip":
            data = data[:at] + bytes(byte ^ 1 << at % 8 for byte in data[at : at + 1]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + (str(value)[:50]).encode("utf-8", "replace") + data[at:]
        elif kind == "append":
            data += str(value)[:50].encode("utf-8", "replace")
        elif kind == "whole":
            data = (value if isinstance(value, Raw) else json.dumps(value)).encode()
    return data


def dump_json(tree):
    return json.dumps(tree, ensure_ascii=False)


def dump_yaml(tree):
    return yaml.safe_dump(tree, allow_unicode=True)


def attack(path, dump, use, *, examples, seal=None):
    """Damage a file again and again, and read it; the file is whole again at the end."""
    original = path.read_bytes()

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # at most three damages: nothing to shrink
        suppress_health_check=list(HealthCheck),
    )
    @given(damages=DAMAGES)
    def check(damages):
        path.write_bytes(damage(original, damages, dump))
        if seal is not None:
            seal()
        shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as strict as a terminal
        with within(seconds=2, megabytes=500), suppress(ContextPruneError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with redirect_stdout(shown):
                use()

    try:
        check()
    finally:
        path.write_bytes(original)
        if seal is not None:
            seal()


depths = pytest.mark.parametrize(
    "examples", [QUICK, pytest.param(DEEP, marks=pytest.mark.nightly)], ids=["quick", "deep"]
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Native and variable-width folders of the covering families, without manifests."""
    root = tmp_path_factory.mktemp("models")
    for name in COVERING:
        model = case(name)
        geometry = read_geometry(model.config, spec_of(model.config))
        layers = tuple(
            LayerPlan(tuple(range(w.neurons - 4 * i - 4)), tuple(range(w.kv_groups)))
            for i, w in enumerate(geometry.layers)
        )
        smaller = apply_plan(model, PruningPlan(model.config.model_type, geometry.layers, layers))
        for kind, each in (("native", model), ("variable", smaller)):
            each.save_pretrained(root / kind / name)
            tiny_tokenizer().save_pretrained(root / kind / name)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pruned folder that an earlier release saved, with plan, report and manifest."""
    root = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(GOLDEN) as archive:
        archive.extractall(root)
    return next(path.parent for path in root.rglob(MANIFEST_NAME))


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    verification = Verification(
        "its own text", 100, 4.0, 4.01, None, None, 0.01, 0.1, 2, 8, 2, 0.0, 50.0, 60.0, 1000, 500, Tolerance(0.1, 0.2)
    )
    report = ExportReport("gguf", "float16", "base", "ab" * 32, {"gguf": "0.10"}, "a CPU", verification)
    report.save(folder / EXPORT_REPORT_NAME)
    (folder / "model.gguf").write_bytes(b"GGUF")
    write_manifest(folder)
    return folder


def sealing(folder):
    """Write a manifest that fits: whoever can change a file can do that too."""

    def seal():
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        write_manifest(folder)

    return seal


@depths
@pytest.mark.parametrize("kind", ["native", "variable"])
def test_configs(models, kind, examples):
    for name in COVERING:
        folder = models / kind / name

        def use(folder=folder):
            with suppress(ContextPruneError):
                load_meta_model(folder)
            load_model(folder)

        attack(folder / "config.json", dump_json, use, examples=examples // 4)


@depths
@pytest.mark.parametrize("file", ["tokenizer_config.json", "generation_config.json", "tokenizer.json"])
def test_other_files_of_a_model(models, file, examples):
    folder = models / "native" / COVERING[0]
    attack(folder / file, dump_json, lambda: load_model(folder), examples=examples // 4)


def test_a_harmless_change_of_a_config_changes_nothing(models):
    ids = tokens(1, 8)
    for kind in ("native", "variable"):
        for name in COVERING:
            path = models / kind / name / "config.json"
            before = load_model(path.parent).model(ids).logits
            content = path.read_text()
            path.write_text(json.dumps({"unknown": [1]} | dict(reversed(json.loads(content).items()))) + " \n")
            with within(seconds=2):
                after = load_model(path.parent).model(ids).logits
            path.write_text(content)
            assert torch.equal(before, after)


@depths
def test_plans(folder, examples):
    path, model = folder / PLAN_NAME, case("llama-mqa-tied")

    def use():
        with suppress(ContextPruneError):
            build_card(read_facts(folder))
        with suppress(ContextPruneError):
            inspect(folder)
        plan = PruningPlan.load(path)
        assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))).sha256 == plan.sha256
        apply_plan(model, plan)

    attack(path, dump_json, use, examples=examples, seal=sealing(folder))


@depths
def test_what_a_plan_says_of_its_making(folder, examples, tmp_path):
    """The rest of the plan stays whole."""
    path = folder / PLAN_NAME

    def dump(provenance):
        return dump_json(json.loads(whole) | {"provenance": provenance})

    whole = path.read_text()
    provenance = tmp_path / "provenance.json"
    provenance.write_text(json.dumps(json.loads(whole)["provenance"]))

    def use():
        path.write_bytes(provenance.read_bytes())
        sealing(folder)()
        for call in (
            lambda: build_card(read_facts(folder)),
            lambda: inspect(folder),
            lambda: make_space_settings([str(folder)]),
            lambda: recover_to_folder(folder, "absent.txt", tmp_path / "out"),
        ):
            with suppress(ContextPruneError):
                call()

    try:
        attack(provenance, dump, use, examples=examples // 4)
    finally:
        path.write_text(whole)
        sealing(folder)()


def test_errors_of_a_card_name_files_that_stay(folder):
    path = folder / PLAN_NAME
    whole = path.read_bytes()
    try:
        path.write_text("{")
        sealing(folder)()
        with pytest.raises(PlanError, match=re.escape(f"{path} can't be read")):
            make_card(folder, overwrite=True)
    finally:
        path.write_bytes(whole)
        sealing(folder)()


@depths
def test_reports(folder, examples):
    path = folder / REPORT_NAME

    def use():
        with suppress(ContextPruneError):
            inspect(folder)
        with suppress(ContextPruneError):
            read_facts(folder)
        found = read_folder(folder)
        render_markdown([found])
        show_report([folder])
        EvalReport.load(path).to_dict()

    attack(path, dump_json, use, examples=examples, seal=sealing(folder))


def test_a_report_that_holds_infinity_is_refused_by_every_command(folder, subtests):
    path = folder / REPORT_NAME
    whole = path.read_text()
    values = json.loads(whole)
    values["loss"]["base"]["bits_per_byte"]["value"] = float("inf")
    try:
        path.write_text(json.dumps(values))
        sealing(folder)()
        for read in (inspect, read_folder, lambda folder: show_report([folder]), read_facts, make_card):
            with subtests.test(read=read), pytest.raises(LoadError, match="it holds Infinity"):
                read(folder)
    finally:
        path.write_text(whole)
        sealing(folder)()


@depths
def test_manifests(folder, examples):
    def use():
        for read in (verify_folder, load_pruned, inspect, read_folder):
            with suppress(ContextPruneError):
                read(folder)
        load_model(folder)

    attack(folder / MANIFEST_NAME, dump_json, use, examples=examples)


@depths
def test_export_reports(export, examples):
    def use():
        with suppress(ContextPruneError):
            inspect(export)
        read_export(export).table_rows()

    attack(export / EXPORT_REPORT_NAME, dump_json, use, examples=examples, seal=sealing(export))


@depths
def test_config_files(tmp_path, examples):
    path = tmp_path / "options.yaml"
    path.write_text(dump_yaml(PrunerConfig(pruning_ratio=0.3, vocab_size=300, general_data_ratio=0.1).to_dict()))

    def use():
        with suppress(ContextPruneError):
            PrunerConfig.from_yaml(path)
        config_from(path, {"criterion": "wanda"})

    attack(path, dump_yaml, use, examples=4 * examples)


@depths
def test_space_files(tmp_path, examples):
    path = tmp_path / "space.yaml"
    commit = {"repo": "owner/name", "revision": "ab" * 20}
    models = [{"name": "Law", "path": "models/law", "prompts": ["Who?"], "reports": {"code": "r.json"}}]
    models.append({"name": "Medicine", **commit, "base": "demo"})
    path.write_text(dump_yaml({"title": "Two", "base": commit, "models": models, "limits": {"seconds": 30}}))
    attack(path, dump_yaml, lambda: read_space_settings(path), examples=4 * examples)


QUESTION = {"question": "Who?", "choices": ["me", "you"], "answer": "B", "source": "law", "split": "test", "id": "7"}


@depths
def test_text_and_questions(tmp_path, examples):
    path = tmp_path / "rows.json"
    arc = QUESTION | {"choices": {"text": ["me", "you"], "label": ["1", "2"]}, "answer": "1", "split": "dev"}
    path.write_text(json.dumps([QUESTION | {"text": "A text.", "doc": "1", "source": "a"}, QUESTION, arc]))

    def use():
        with suppress(ContextPruneError):
            assert load_questions(path).fingerprint
        with suppress(ContextPruneError):
            check_readable(path)
        load_documents(path)

    attack(path, dump_json, use, examples=examples // 2)
