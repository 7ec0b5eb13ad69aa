"""Model cards: structure, figures, hostile facts, and the card of a folder from the folder alone."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest
import typer
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_context_prune import EvalOptions, PrunerConfig, RecoveryConfig, prune
from hf_context_prune.cli.app import app
from hf_context_prune.config import build_config
from hf_context_prune.errors import ConfigError, LoadError, NumericsError, SaveError
from hf_context_prune.evaluation.accuracy import Accuracy
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.reports.codec import decode
from hf_context_prune.evaluation.reports.report import EvalReport, MultipleChoiceFacts
from hf_context_prune.evaluation.reports.rows import text_rows
from hf_context_prune.modeling.plan import GONE_LAYER, PruningPlan
from hf_context_prune.pipelines.recover import recover_folder
from hf_context_prune.publishing.card.card import build_card, make_card
from hf_context_prune.publishing.card.facts import CardFacts, read_facts
from hf_context_prune.publishing.card.metadata import benchmark_results
from hf_context_prune.storage.loading import load_model, load_pruned
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.saving import save_pruned
from hf_context_prune.utils.file_names import PLAN_NAME, REPORT_NAME
from tests.support.runs import OPTIONS
from tests.support.tiny import texts, tiny_model, tiny_tokenizer

CARDS = sorted((Path(__file__).parents[3] / "model_cards").glob("*.md"))
BASE_README = """---
license: other
license_name: example-licence
license_link: LICENSE
language: [en, de]
pipeline_tag: text-generation
---
# A base
"""
HEADINGS = [
    "Intended use",
    "Removed parts",
    "Calibration text",
    "Evaluation",
    "Speed and memory",
    "How to load it",
    "How to reproduce it",
    "Limits",
    "Licence",
    "Citation",
]
HOSTILE = [
    "x\n---\nlicense: mit\n---\n# Heading",
    "!!python/object/apply:os.system ['true']",
    "*alias &anchor {{ 7 * 7 }} {% raw %} {# no #}",
    "<script>alert(1)</script> <img src=x onerror=alert(1)>",
    "[link](http://evil.example) ![image](http://evil.example/i.png) www.evil.example @someone",
    "# Heading\n\n- list | cell | ``` `code` ~~~",
    "$$x^2$$ &lt; \u202eesrever\u202c \x00\x1b[31m",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base with a card of its own; what was pruned from it, and recovered, with general text."""
    place = tmp_path_factory.mktemp("card")
    tiny_model("llama").save_pretrained(place / "base")
    tiny_tokenizer().save_pretrained(place / "base")
    (place / "base" / "README.md").write_text(BASE_README)
    general = [f"{text} general {i}" for i, text in enumerate(texts(seed=5))]
    options = EvalOptions(benchmark=True, memory=False, general_data=general, max_tokens=500)
    config = PrunerConfig(mlp_ratio=0.25, domain="Contract law", **OPTIONS)
    result = prune(place / "base", texts(), config, eval_options=options)
    result.save_pretrained(place / "mini-law")
    recovery = RecoveryConfig(max_steps=2, batch_size=2, max_seq_length=32, num_evals=1)
    recovered = recover_folder(
        place / "mini-law",
        texts(),
        recovery,
        base=place / "base",
        eval_options=dataclasses.replace(options, benchmark=False),
    )
    recovered.save_pretrained(place / "mini-law-recovered")
    save_pruned(tiny_model("llama"), place / "unmeasured", tokenizer=tiny_tokenizer(), plan=result.plan)
    return place


@pytest.fixture
def facts(place):
    return read_facts(place / "mini-law")


def headings(card: ModelCard) -> list[str]:
    return re.findall(r"^## (.+)$", card.text, re.MULTILINE)


def check_structure(card: ModelCard, picture: str | None = None) -> None:
    """What every card has; a picture of the widths only where they vary."""
    assert headings(card) == HEADINGS
    assert len(re.findall("^# ", card.text, re.MULTILINE)) == 1
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"pruned", "structured-pruning", "context-pruning"} <= set(data["tags"])
    assert re.findall(r"!\[MLP neurons.*?\]\((.*?)\)", card.text) == ([picture] if picture else [])
    assert "2312.12682" in card.text
    assert "safety" in card.text
    assert "outside the domain" in card.text or "Nothing was measured" in card.text
    assert re.search(r"Plan `[0-9a-f]{64}`", card.text)
    assert ModelCard(str(card)).data.to_dict() == data


def test_the_card_of_a_folder(place, facts):
    card = ModelCard.load(place / "mini-law" / "README.md")
    check_structure(card)
    data = card.data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "example-licence")
    assert "license_link" not in data  # a relative link, and the base has no repository
    assert data["language"] == ["en", "de"]
    assert "base_model" not in data  # a local folder has no id
    assert "contract-law" in data["tags"]
    report, text = facts.report, card.text
    results = data["model-index"][0]["results"]
    assert {result["dataset"]["name"].rpartition(" (")[2] for result in results} == {
        "test text of the domain)",
        "general text)",
    }
    value = results[0]["metrics"][0]["value"]
    assert value == pytest.approx(report.loss.pruned.bits_per_byte.value, rel=1e-5)
    for row in text_rows(report)[1:]:
        assert row[2] in text.replace("\\", "")  # base, with its interval
        assert row[3] in text.replace("\\", "")
    assert "| domain: in-memory |" in text
    assert "| general: in-memory |" in text
    assert f"{report.size.pruned_parameters:,} of {report.size.base_parameters:,} parameters" in text
    assert report.speed.base.hardware in text.replace("\\", "")
    assert "Brackets behind a loss" not in text  # of fewer than ten documents there is no interval
    assert "read the same documents in windows of" in text
    assert "**Loss outside the domain:** on general text" in text
    assert "--mlp-ratio 0.25" in text
    assert "--general-data" in text
    assert "the README.md in its folder" in text
    assert "example-licence" in text


def test_the_folder_with_its_card_verifies_and_loads(place):
    folder = place / "mini-law"
    manifest = verify_folder(folder)
    assert {"README.md", PLAN_NAME, REPORT_NAME} <= manifest["files"].keys()
    assert "widths.png" not in manifest["files"]  # one width for all layers makes no picture
    load_pruned(folder)


def test_widths_that_vary_make_a_picture(tiny_space):
    folder = tiny_space / "variable"
    assert "widths.png" in verify_folder(folder)["files"]
    assert (folder / "widths.png").read_bytes().startswith(b"\x89PNG")
    check_structure(ModelCard.load(folder / "README.md"), picture="widths.png")


def test_a_recovered_model_has_three_columns(place):
    card = ModelCard.load(place / "mini-law-recovered" / "README.md")
    check_structure(card)
    assert "| text | documents | base | pruned | recovered | change |" in card.text
    assert "then trained on text of the domain" in card.text
    assert "hf-context-prune recover mini-gpt" in card.text
    assert card.text.count("hf-context-prune prune") == 1
    assert "--num-evals 1" in card.text
    assert "no longer has" not in card.text


def test_a_recovery_of_an_older_version_is_shown_by_the_names_of_today(facts):
    old = {"method": "lora", "evaluations": 4, "patience": 2, "temperature": 1.0, "rewind": "none"}
    runs = [{"config": {**old, "distillation": 0.5}}, {"config": {**old, "distillation": 0.0}}]
    text = build_card(with_provenance(facts, recoveries=runs)).text
    assert "The base of the tables was not trained." in text
    assert "was not trained" not in build_card(facts).text
    for part in ("--method lora", "--num-evals 4", "--early-stopping-patience 2"):
        assert text.count(part) == 2
    assert text.count("# This run also had --distillation 0.5, which `recover` no longer has:") == 1
    assert not any(word in text for word in ("--temperature", "--rewind", "--patience", "--evaluations"))


def test_test_text_of_its_own_is_named_in_every_command(facts):
    """Without it, a tenth of the other text would be held out, and the model would be another one."""
    recoveries = [{"config": {"method": "full"}, "test_data": "held.jsonl"}]
    text = build_card(with_provenance(facts, test_data="held.jsonl", recoveries=recoveries)).text
    prune_command, recover_command = text.split("hf-context-prune recover mini-gpt")
    assert "--eval-data held.jsonl" in prune_command.split("hf-context-prune prune")[1]
    assert "--eval-data held.jsonl" in recover_command
    assert "--eval-data" not in build_card(with_provenance(facts, recoveries=[{"config": {"method": "full"}}])).text


def test_options_of_another_version_are_shown_as_they_are(facts):
    text = build_card(with_provenance(facts, config={"mlp_ratio": 0.25, "quantum": "x`y"})).text
    assert "does not have all options of the run" in text
    assert "quantum" in text
    assert "hf-context-prune prune" not in text
    assert "does not record the options" in build_card(with_provenance(facts, config={})).text


def test_the_command_asks_for_what_the_plan_records(facts, subtests):
    """Also for what is off where the default would decide."""
    prune_command = typer.main.get_command(app).commands["prune"]
    for values, shown in (
        ({}, ["--allocation adaptive", "--pruning-ratio 0.2"]),
        ({"native_architecture": False, "refit_lm_head": False}, ["--no-native-architecture", "--no-refit-lm-head"]),
        ({"native_architecture": True, "refit_lm_head": True}, [" --native-architecture", " --refit-lm-head"]),
        (
            {"units": "tokens,neurons", "general_data_ratio": 0.25},
            ["--units tokens,neurons", "--general-data-ratio 0.25"],
        ),
        (
            {"general_data_ratio": 0.0, "max_loss_increase": 0.1},
            ["--general-data-ratio 0.0", "--max-loss-increase 0.1"],
        ),
        ({"linear_threshold": 0.1}, ["--linear-threshold 0.1"]),
    ):
        with subtests.test(**values):
            config = build_config({**OPTIONS, "pruning_seed": 3, **values})
            text = build_card(with_provenance(facts, config=config.to_dict())).text
            command = re.search(r"^hf-context-prune prune (.*?)\n```", text, re.MULTILINE | re.DOTALL)[1].replace(
                "\\\n", ""
            )
            assert all(words in command for words in shown)
            given = prune_command.make_context("prune", shlex.split(command)).params
            names = {item.name for item in dataclasses.fields(config)}
            asked = {name: value for name, value in given.items() if name in names and value is not None}
            assert build_config(asked) == config
    exact = build_card(with_provenance(facts, base_dtype="float32", base_revision="abc")).text
    assert "--revision abc \\\n  --dtype float32 \\\n  --data" in exact


def test_without_a_report_it_says_that_nothing_was_measured(place):
    card = build_card(read_facts(place / "unmeasured"))
    check_structure(card)
    assert "Nothing was measured" in card.text
    assert "model-index" not in card.data.to_dict()
    assert "hf-context-prune evaluate" in card.text


def test_without_general_text_it_says_so(facts):
    card = build_card(dataclasses.replace(facts, report=dataclasses.replace(facts.report, general=None)))
    assert "was not measured" in card.text
    assert "--general-data GENERAL" in card.text


@pytest.mark.parametrize(
    ("stated", "words", "licence"),
    [
        ({}, "not known (the plan names none)", None),
        ({"unknown": "its model card could not be read"}, "not known (its model card could not be read)", None),
        ({"stated_by": "its model card"}, "not known (its model card names none)", None),
        (
            {"license": "mit", "stated_by": "its model card"},
            "mit, as stated by its model card",
            "mit",
        ),
    ],
)
def test_a_licence_is_copied_or_said_to_be_unknown(facts, stated, words, licence):
    card = build_card(with_provenance(facts, base_card=stated))
    assert words in card.text
    assert card.data.to_dict().get("license") == licence


def with_provenance(facts: CardFacts, **values) -> CardFacts:
    plan = dataclasses.replace(facts.plan, provenance={**facts.plan.provenance, **values})
    return dataclasses.replace(facts, plan=plan)


def test_a_base_of_the_hub_is_named_in_the_metadata(facts):
    stated = {"id": "org/base", "license": "other", "license_name": "theirs", "license_link": "LICENSE.md"}
    data = {"name": "org/corpus:law@train", "revision": "a" * 40, "fingerprint": "b" * 64}
    card = build_card(with_provenance(facts, base_card=stated, data=data)).data.to_dict()
    assert (card["base_model"], card["base_model_relation"]) == ("org/base", "finetune")
    assert card["license_link"] == "https://huggingface.co/org/base/blob/main/LICENSE.md"
    assert card["datasets"] == ["org/corpus"]
    from_file = build_card(with_provenance(facts, base_card=stated, base_model="base.Q4.gguf")).text
    assert "`org/base` (from `base.Q4.gguf`), pruned" in from_file
    assert "hf-context-prune prune base.Q4.gguf" in from_file  # the file is what was pruned


def test_a_card_names_the_layers_that_went_and_warns(facts):
    kept = facts.plan.layers
    shorter = dataclasses.replace(facts.plan, layers=(kept[0], GONE_LAYER, kept[2]))
    text = build_card(dataclasses.replace(facts, plan=shorter)).text
    assert "1 of 3 layers was removed as a whole: 1 (numbered from 0)." in text
    before = sum(facts.plan.dense[index].neurons for index in (0, 2))
    assert f"MLP neurons of the layers that stay: {len(kept[0].neurons) + len(kept[2].neurons)} of {before} rem" in text
    assert "GSM8K fell from .87 to .29" in text
    assert "GSM8K" not in build_card(facts).text


@pytest.mark.parametrize(("revision", "expected"), [(None, "text"), ("a" * 40, "org/corpus")])
def test_figures_name_a_data_set_of_the_hub_only_where_there_is_one(facts, revision, expected):
    dataset = dataclasses.replace(facts.report.dataset, name="org/corpus", revision=revision)
    card = build_card(dataclasses.replace(facts, report=dataclasses.replace(facts.report, dataset=dataset)))
    shown = card.data.to_dict()["model-index"][0]["results"]
    assert [result["dataset"]["type"] for result in shown if "domain" in result["dataset"]["name"]] == [expected]


def markup(card: ModelCard) -> tuple[Counter, list[str]]:
    """How often each kind of Markdown is in a card's body, as a real parser sees it; and its texts outside of code."""
    kinds, found = Counter(), []
    for block in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.text):
        for token in (block, *(block.children or [])):
            kinds[token.type] += 1
            if token.type == "text":
                found.append(token.content)
    return kinds, found


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_facts_stay_text(facts, hostile):
    clean = build_card(facts)
    stated = {"id": hostile, "license": hostile, "license_name": hostile, "license_link": hostile, "language": hostile}
    stated |= {"pipeline_tag": hostile, "stated_by": hostile}
    config = {**facts.plan.provenance["config"], "domain": hostile, "text_column": hostile}
    evil = with_provenance(
        facts,
        base_card=stated,
        base_model=hostile,
        base_revision=hostile,
        base_dtype=hostile,
        config=config,
        data={"name": hostile, "revision": hostile, "fingerprint": hostile},
        search_data={"name": hostile},
        versions={hostile: hostile},
        recoveries=[{"config": {"method": hostile, "rewind": hostile}}],
    )
    report = dataclasses.replace(
        facts.report,
        base_model=hostile,
        notes=(hostile,),
        dataset=dataclasses.replace(facts.report.dataset, name=hostile, held_out=hostile),
        environment=dataclasses.replace(facts.report.environment, platform=hostile, packages={hostile: hostile}),
    )
    card = build_card(dataclasses.replace(evil, name=hostile, report=report, architecture=hostile))
    data = card.data.to_dict()
    assert set(data) <= set(clean.data.to_dict()) | {"base_model", "base_model_relation"}
    assert "license" not in data
    assert data["pipeline_tag"] == "text-generation"
    yaml.safe_load(str(card).split("\n---\n")[0].removeprefix("---\n"))
    assert headings(card) == HEADINGS
    (before, _), (kinds, found) = markup(clean), markup(card)
    for kind in (
        "heading_open",
        "link_open",
        "image",
        "html_inline",
        "html_block",
        "hr",
        "fence",
        "table_open",
        "td_open",
    ):
        assert kinds[kind] == before[kind], kind
    assert kinds["list_item_open"] <= before["list_item_open"] + 1  # there is a warning less about the general text
    text = " ".join(found)
    for invisible in "\u202e\x00\x1b":
        assert invisible not in str(card)
    if "7 * 7" in hostile:
        assert "{{ 7 * 7 }}" in text
    source = re.sub(r"(?ms)^(`{3,}).*?^\1$|(`+)[^`].*?\2", "", card.text)  # what a linkifier reads, without code
    for sign in ("://", " www.", " @someone", "$$"):
        assert not re.search(rf"(?<!\\){re.escape(sign)}", source), sign


def test_hostile_values_in_code_stay_in_their_block(facts):
    evil = with_provenance(facts, data={"name": "x\n```\n# Out\n```"}, base_model="$(touch x); `id` 'a'")
    card = build_card(dataclasses.replace(evil, name='a"\nimport os\n"""'))
    assert headings(card) == HEADINGS
    assert "\n# Out" not in card.text
    blocks = re.findall(r"(?ms)^(`{3,})(\w*)\n(.*?)^\1$", card.text)
    python = next(code for _, language, code in blocks if language == "python")
    compile(python, "card", "exec")
    assert "\nimport os\n" not in python
    shell = next(code for _, language, code in blocks if language == "sh")
    assert "'$(touch x); `id` '\"'\"'a'\"'\"''" in shell


def test_a_schedule_is_values_and_no_code(facts):
    schedule = {"start": 0.1, "x)\nimport os\nos.system('id')  #": 1, "shape": "'); import os  #"}
    text = build_card(with_provenance(facts, schedule=schedule)).text
    call = next(code for code in re.findall(r"(?ms)^```python\n(.*?)^```", text) if "PruningSchedule(" in code)
    [statement] = ast.parse(call).body
    assert isinstance(statement.value, ast.Call)
    assert "os.system" not in call


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_figures_that_are_no_numbers_are_refused(facts, bad):
    loss = dataclasses.replace(facts.report.loss.pruned, bits_per_byte=Estimate(bad, None))
    report = dataclasses.replace(facts.report, loss=dataclasses.replace(facts.report.loss, pruned=loss))
    with pytest.raises(NumericsError, match="bits_per_byte"):
        dataclasses.replace(facts, report=report)
    with pytest.raises(NumericsError, match="provenance"):
        with_provenance(facts, predicted_loss_increase=bad)


@pytest.mark.parametrize("excess", [None, Estimate(0.1, None)])
def test_perplexities_of_other_tokens_are_no_figures(facts, excess):
    """They can't be compared with the base's; bits a byte can."""
    comparison = dataclasses.replace(facts.report.loss.comparison, excess_nats_per_token=excess)
    loss = dataclasses.replace(facts.report.loss, comparison=comparison)
    card = build_card(dataclasses.replace(facts, report=dataclasses.replace(facts.report, loss=loss, general=None)))
    results = card.data.to_dict()["model-index"][0]["results"]
    shown = [metric["type"] for result in results for metric in result["metrics"]]
    assert shown == (["bits_per_byte"] if excess is None else ["bits_per_byte", "perplexity"])


def test_questions_of_the_hub_give_a_results_file(facts):
    row = {"source": "all", "accuracy": {"value": 0.5, "interval": None}, "num_questions": 4, "num_correct": 2}
    accuracy = (decode(Accuracy, row | {"chance": 0.25, "shots": [0, 0]}, "row"),)
    known = MultipleChoiceFacts("org/quiz:hard@test", "c" * 40, "likelihood_normalised", 0, accuracy, accuracy, None)
    entry = yaml.safe_load(benchmark_results(dataclasses.replace(facts.report, multiple_choice=known)))[0]
    assert entry["dataset"] == {"id": "org/quiz", "task_id": "hard", "revision": "c" * 40}
    assert entry["value"] == 50
    local = dataclasses.replace(known, name="mcq.jsonl", revision=None)
    assert benchmark_results(dataclasses.replace(facts.report, multiple_choice=local)) is None


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(place, tmp_path):
    return shutil.copytree(place / "mini-law", tmp_path / "mini-law")


def test_a_card_is_made_anew_from_the_folder_alone(copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    make_card(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    make_card(copy, name="org/mini-law")
    assert '"org/mini-law"' in (copy / "README.md").read_text()
    assert (copy / "model.safetensors").read_bytes() == before["model.safetensors"]
    verify_folder(copy, allow_edits=False)


def test_a_folder_of_an_earlier_version_gets_a_card(place, tmp_path):
    plan = PruningPlan.load(place / "mini-law" / PLAN_NAME)
    report = EvalReport.load(place / "mini-law" / REPORT_NAME)
    folder = save_pruned(tiny_model("llama"), tmp_path / "old", tokenizer=tiny_tokenizer(), plan=plan, report=report)
    make_card(folder)
    check_structure(ModelCard.load(folder / "README.md"))
    verify_folder(folder, allow_edits=False)


def test_an_edited_card_is_kept_and_does_not_stop_loading(copy):
    card = copy / "README.md"
    card.write_text(card.read_text() + "\nMore of it.\n")
    load_model(copy)
    with pytest.raises(ConfigError, match="edited by hand"):
        make_card(copy)
    assert card.read_text().endswith("More of it.\n")
    with pytest.raises(SaveError, match="changed since"):  # nor is the folder replaced
        save_pruned(tiny_model("llama"), copy)
    make_card(copy, overwrite=True)
    assert "More of it" not in card.read_text()


def test_what_has_no_card(place, copy, tmp_path):
    with pytest.raises(LoadError):
        make_card(place / "base")
    bare = save_pruned(tiny_model("llama"), tmp_path / "bare", tokenizer=tiny_tokenizer())
    with pytest.raises(LoadError, match=r"no pruning_plan\.json"):
        make_card(bare)
    (copy / "notes.txt").touch()
    with pytest.raises(SaveError, match=r"notes\.txt"):
        make_card(copy)
    (copy / "notes.txt").unlink()
    (copy / PLAN_NAME).write_text("{}")
    with pytest.raises(LoadError):
        make_card(copy)


def test_there_are_cards_of_three_domains():
    assert {path.stem.rpartition("-")[2] for path in CARDS} == {"law", "medicine", "finance"}


@pytest.mark.parametrize("path", CARDS, ids=[path.stem for path in CARDS])
def test_committed_cards(path):
    """`model_cards/`: real ones, with all that a card can tell."""
    card = ModelCard.load(path)
    check_structure(card, picture=f"{path.stem}.png")
    data = card.data.to_dict()
    assert (data["base_model"], data["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert path.stem.rpartition("-")[2] in data["tags"]
    assert "**Loss outside the domain:**" in card.text
    assert "(from `SmolLM2-135M-Instruct.Q4_1.gguf`)" in card.text
    assert "Brackets behind an accuracy hold 95 % intervals over questions" in card.text
    assert (path.parent / f"{path.stem}.png").read_bytes().startswith(b"\x89PNG")
