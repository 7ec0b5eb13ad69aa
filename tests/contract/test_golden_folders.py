"""Folders written by commit 3369b6e, whose option names were others, work with the code of today.

``tests/support/golden/`` has them as zips, each with the logits that commit computed: ``variable`` (widths that vary,
pruned vocabulary, refitted head, general text) and ``recovered`` (native architecture, trained after pruning).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_context_prune.evaluation.reports.report import EvalReport
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.publishing.card.card import make_card
from hf_context_prune.publishing.space.facts import describe_removal, read_facts
from hf_context_prune.publishing.space.settings import Entry, Source
from hf_context_prune.storage.loading import load_model, load_pruned
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.provenance import config_from_provenance
from hf_context_prune.utils.file_names import CARD_NAME, PLAN_NAME, REPORT_NAME

SUPPORT = Path(__file__).parents[1] / "support"
NAMES = ("variable", "recovered")
COMMANDS = {
    "variable": """\
hf-context-prune prune base \\
  --data law.jsonl \\
  --general-data general.jsonl \\
  --allocation adaptive \\
  --domain law \\
  --general-data-ratio 0.25 \\
  --max-seq-length 32 \\
  --no-native-architecture \\
  --num-calibration-samples 16 \\
  --pad-to-multiple-of 8 \\
  --pruning-ratio 0.25 \\
  --refit-lm-head \\
  --vocab-size 280 \\
  --output mini-gpt
""",
    "recovered": """\
hf-context-prune prune base \\
  --data law.jsonl \\
  --allocation uniform \\
  --max-seq-length 32 \\
  --mlp-ratio 0.5 \\
  --native-architecture \\
  --num-calibration-samples 16 \\
  --no-refit-lm-head \\
  --round-to 4 \\
  --output mini-gpt
# This run also had --distillation 0.25 --temperature 2.0 --rewind pretrained, which `recover` no longer has:
hf-context-prune recover mini-gpt \\
  --data law.jsonl \\
  --method full \\
  --max-steps 6 \\
  --num-epochs 1.0 \\
  --batch-size 2 \\
  --max-seq-length 32 \\
  --lora-rank 32 \\
  --num-evals 2 \\
  --early-stopping-patience 2 \\
  --seed 0 \\
  --output mini-gpt-recovered
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("golden")
    for name in NAMES:
        with zipfile.ZipFile(SUPPORT / "golden" / f"{name}_3369b6e.zip") as packed:
            packed.extractall(place / "packed")
        (place / "packed" / "folder").rename(place / name)
        (place / "packed" / "expected.json").rename(place / f"{name}.json")
    return place


@pytest.fixture(params=NAMES)
def golden(request, place):
    expected = json.loads((place / f"{request.param}.json").read_text())
    return SimpleNamespace(name=request.param, folder=place / request.param, **expected)


def test_the_files_verify(golden):
    assert {PLAN_NAME, REPORT_NAME, CARD_NAME, "model.safetensors"} <= verify_folder(golden.folder)["files"].keys()


def test_the_logits_are_the_same(golden):
    model = load_pruned(golden.folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([golden.input_ids])).logits[0, -3:]
    torch.testing.assert_close(logits, torch.tensor(golden.logits), atol=1e-4, rtol=1e-4)
    loaded = load_model(golden.folder)
    assert loaded.tokenizer.decode(loaded.tokenizer("the court finds")["input_ids"]) == "the court finds"


def test_the_plan_and_the_report_are_read(golden):
    plan, report = PruningPlan.load(golden.folder / PLAN_NAME), EvalReport.load(golden.folder / REPORT_NAME)
    assert plan.sha256 == golden.plan_sha256
    assert report.size.pruned_parameters == sum(p.numel() for p in load_pruned(golden.folder).parameters())
    assert report.loss.pruned.bits_per_byte.value > 0
    config = config_from_provenance(plan.provenance["config"])
    if golden.name == "variable":
        assert (config.refit_lm_head, config.general_data_ratio, config.pad_to_multiple_of) == (True, 0.25, 8)
        assert report.general is not None
        assert report.speed is not None
    else:
        assert (config.native_architecture, config.round_to) == (True, 4)
        assert report.loss.recovered is not None


def test_inspect_shows_it(golden, capsys, monkeypatch):
    from hf_context_prune.cli import app

    for shown in ("auto", "json"):
        monkeypatch.setattr(sys, "argv", ["hf-context-prune", "inspect", str(golden.folder), "--format", shown])
        with pytest.raises(SystemExit) as end:
            app.main()
        assert (end.value.code or 0, golden.plan_sha256 in capsys.readouterr().out) == (0, True)


def test_its_card_is_written_with_the_options_of_today(golden, tmp_path):
    folder = shutil.copytree(golden.folder, tmp_path / golden.name)
    make_card(folder)
    card = (folder / CARD_NAME).read_text(encoding="utf-8")
    assert f"```sh\n{COMMANDS[golden.name]}```" in card
    assert "license: mit" in card
    verify_folder(folder, allow_edits=False)


def test_a_space_shows_it(golden):
    facts = read_facts(Entry("Law", Source(path=golden.folder), Source(path=golden.folder)))
    assert facts.problems == ()
    words = " ".join(describe_removal(facts))
    assert "million parameters" in words
    assert "optimal brain surgeon" in words


@pytest.mark.slow
def test_transformers_opens_both_in_a_process_without_this_package(place, tmp_path):
    ids = torch.tensor([json.loads((place / "variable.json").read_text())["input_ids"]])
    torch.save(ids, tmp_path / "ids.pt")
    for name in NAMES:
        with torch.no_grad():
            logits = load_pruned(place / name)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.save(logits, tmp_path / f"{name}.pt")
    (tmp_path / "cases.json").write_text(json.dumps({str(place / name): (name == "variable", 0) for name in NAMES}))
    script = SUPPORT / "reload_without_package.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"checked": 2}
