"""The report as a value, as JSON and as a table."""

import dataclasses
import json
import math

import pytest

from hf_context_prune.errors import ConfigError, LoadError, NumericsError, SaveError
from hf_context_prune.evaluation.accuracy import Accuracy
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.evaluation.general_text import build_loss_facts
from hf_context_prune.evaluation.losses import DocumentLoss, compare_losses, summarize_losses
from hf_context_prune.evaluation.reports.codec import decode
from hf_context_prune.evaluation.reports.report import (
    DatasetFacts,
    Environment,
    EvalReport,
    LossFacts,
    MemoryFacts,
    MultipleChoiceFacts,
    SizeFacts,
    SizeSearch,
    SpeedFacts,
    TextLosses,
)
from hf_context_prune.evaluation.reports.rows import source_tables, table_header, table_rows, text_rows, text_table
from hf_context_prune.evaluation.reports.summary import headline, legend
from hf_context_prune.evaluation.speed import MemoryMeasurement, SpeedMeasurement, Spread

BASE = [DocumentLoss(f"d{i}", "s", 200.0 + 9 * i, 100, 400) for i in range(12)]
PRUNED = [dataclasses.replace(loss, nll=loss.nll + 10 + i) for i, loss in enumerate(BASE)]
DATASET = DatasetFacts("law.jsonl", None, "ab" * 32, "A tenth of the documents, kept out of calibration.")
ENVIRONMENT = Environment.current("float32")


def speed(prefill, decode, threads=2):
    return SpeedMeasurement(
        prefill_rounds=prefill,
        decode_rounds=decode,
        prefill=Spread(prefill[1], prefill[0], prefill[2]),
        decode=Spread(decode[1], decode[0], decode[2]),
        prompt_tokens=512,
        new_tokens=32,
        batch_size=1,
        dtype="float32",
        threads=threads,
        device="cpu",
        hardware="a processor",
    )


def memory(peak):
    return MemoryMeasurement(400_000_000, peak, 0.5, 512, 16, "float32", "VmHWM")


@pytest.fixture
def report():
    return EvalReport(
        base_model="org/base",
        dataset=DATASET,
        size=SizeFacts.measured(
            1_000_000, 798_000, asked_ratio=0.2, base_weight_bytes=4_000_000, pruned_weight_bytes=3_200_000
        ),
        loss=LossFacts(summarize_losses(BASE), summarize_losses(PRUNED), compare_losses(BASE, PRUNED)),
        environment=ENVIRONMENT,
        speed=SpeedFacts(
            speed((90.0, 100.0, 110.0), (9.0, 10.0, 11.0)), speed((135.0, 150.0, 165.0), (9.0, 10.0, 11.0))
        ),
        memory=MemoryFacts(memory(1_000_000_000), memory(900_000_000)),
        notes=("A note.",),
    )


@pytest.fixture
def single():
    return EvalReport(
        base_model="org/base",
        dataset=DATASET,
        size=SizeFacts.measured(1_000_000),
        loss=LossFacts(summarize_losses(BASE)),
        environment=ENVIRONMENT,
    )


def test_json_round_trip(report, single, tmp_path):
    budget = SizeSearch(0.03, 0.028, "On other text.", 4)
    searched = dataclasses.replace(report, budget=budget, loss=dataclasses.replace(report.loss, predicted_excess=0.125))
    for original in (searched, report, single):
        path = tmp_path / "eval_report.json"
        original.save(path)
        assert EvalReport.load(path) == original
        assert EvalReport.from_dict(json.loads(json.dumps(original.to_dict()))) == original
        assert [entry.name for entry in tmp_path.iterdir()] == ["eval_report.json"]
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["schema_version"] == 6
    assert list(data) == sorted(data)


def test_older_reports_still_load(report):
    data = report.to_dict()
    for version in (5, 4, 3):
        data["schema_version"] = version
        assert EvalReport.from_dict(json.loads(json.dumps(data))) == report
    del data["general"], data["dataset"]["max_chars"]
    assert EvalReport.from_dict(json.loads(json.dumps(data))) == report
    data["schema_version"] = 2
    del data["loss"]["recovered"], data["loss"]["recovered_comparison"], data["multiple_choice"]
    assert EvalReport.from_dict(data) == report
    del data["loss"]["base"]
    with pytest.raises(LoadError, match=r"report\.loss.*base"):
        EvalReport.from_dict(data)


def test_a_recovered_model_has_rows_of_its_own(report):
    loss = dataclasses.replace(
        report.loss, recovered=report.loss.pruned, recovered_comparison=report.loss.comparison, predicted_excess=0.5
    )
    recovered = dataclasses.replace(report, loss=loss)
    assert EvalReport.from_dict(json.loads(json.dumps(recovered.to_dict()))) == recovered
    assert table_header(recovered) == ("measure", "base", "pruned", "recovered", "change")
    rows = {row[0]: row[1:] for row in table_rows(recovered, intervals=True)}
    for measure in ("bits per byte", "perplexity per token"):
        base, pruned, after, change = rows[measure]
        assert base != pruned == after
        assert change.startswith("+" if measure == "bits per byte" else "x")
    assert rows["parameters"] == ("1,000,000", "798,000", "798,000", "-20.2 % (asked -20.0 %)")
    assert rows["decode (tokens/s)"][1] == "-"  # the speed is that of the recovered model
    assert "predicted for pruned" in rows["excess loss (nats per token)"][-1]


def test_a_base_that_was_not_measured_is_named_so_in_every_table(report):
    """A recovered model was once compared with its pruned model in a column named base."""
    loss = LossFacts(None, report.loss.pruned, recovered=summarize_losses(BASE))
    recovered = dataclasses.replace(report, loss=loss)
    assert EvalReport.from_dict(json.loads(json.dumps(recovered.to_dict()))) == recovered
    rows = {row[0]: row[1:] for row in table_rows(recovered)}
    bits = [f"{summary.bits_per_byte.value:.4f}" for summary in (loss.pruned, loss.recovered)]
    assert rows["bits per byte"] == ("not measured", *bits, "not measured")
    header, domain = text_rows(recovered)
    cells = dict(zip(header, domain, strict=True))
    assert (cells["base"], cells["change"]) == ("not measured", "not measured")
    assert cells["recovered"].startswith(bits[1])
    assert any("the base was not measured" in line for line in headline(recovered))
    unknown = dataclasses.replace(recovered, loss=LossFacts(summarize_losses(BASE), None, recovered=loss.pruned))
    assert dict(zip(*text_rows(unknown), strict=True))["pruned"] == "not measured"
    with pytest.raises(ConfigError, match="one model at least"):
        LossFacts(None)


def test_a_headline_names_parameters_where_the_bytes_shrank_by_another_share(report):
    """Those of a text part beside images, or of a model that was saved in another dtype."""
    for after, said in ((796_000, "20.2 % smaller (1.00 to 0.80 MB)"), (498_000, "20.2 % fewer parameters (1.00 to")):
        size = dataclasses.replace(report.size, base_weight_bytes=1_000_000, pruned_weight_bytes=after)
        assert headline(dataclasses.replace(report, size=size))[0].startswith(said)


def test_sources_are_told_by_their_loss(report, single):
    """The headline has the least and the most, a verbose summary all, the largest loss first; no name is told."""
    base = [dataclasses.replace(loss, source=f"s{i % 3}") for i, loss in enumerate(BASE)]
    pruned = [
        dataclasses.replace(loss, source=f"s{i % 3}", nll=loss.nll * (1 + i % 3 / 10)) for i, loss in enumerate(BASE)
    ]
    by_source = dataclasses.replace(report, loss=build_loss_facts(base, {"pruned": pruned}, seed=0))
    assert EvalReport.from_dict(json.loads(json.dumps(by_source.to_dict()))) == by_source
    assert "From +0.0 % to +20.0 % on its 3 sources." in headline(by_source)
    ((title, (header, *rows)),) = source_tables(by_source)
    assert title == "Loss by source of the text"
    assert header == ("source", "documents", "base", "pruned", "change")
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("source 3", "4", "+20.0 %"),
        ("source 2", "4", "+10.0 %"),
        ("source 1", "4", "+0.0 %"),
    ]
    shown = by_source.summary(intervals=True)
    assert "(+0.0 to +20.0)" in shown
    assert shown.index("source 3") < shown.index("source 2") < shown.index("source 1")
    assert "source 2" not in by_source.summary()
    assert "Parentheses behind a loss hold the lowest and the highest source" in shown
    assert "Brackets behind a loss" not in shown
    assert source_tables(report) == []
    alone = dataclasses.replace(single, loss=build_loss_facts(base, {}, seed=0))
    assert source_tables(alone)[0][1][0] == ("source", "documents", "base")
    both = dataclasses.replace(report, general=TextLosses(DATASET, by_source.loss))
    assert [title for title, _ in source_tables(both)] == ["Loss by source of the general text"]
    assert {"Brackets behind a loss", "Parentheses behind a loss"} <= {
        " ".join(line.split()[:4]) for line in legend(both)
    }
    assert not any("sources" in line for line in headline(alone))


def test_general_text_has_rows_of_its_own(report):
    general = TextLosses(dataclasses.replace(DATASET, name="general text"), report.loss)
    both = dataclasses.replace(report, general=general)
    assert EvalReport.from_dict(json.loads(json.dumps(both.to_dict()))) == both
    rows = {row[0]: row[1:] for row in table_rows(both, intervals=True)}
    for measure in ("bits per byte", "perplexity per token"):
        assert rows[f"{measure}, general text"] == rows[measure]
    assert table_rows(both, "general")[0][0] == "bits per byte, general text"
    header, domain, other = text_rows(both)
    assert header == ("text", "documents", "base", "pruned", "change")
    assert (domain[0], other[0]) == (f"domain: {DATASET.name}", "general: general text")
    assert domain[1:] == other[1:]
    loss = dataclasses.replace(report.loss, recovered=report.loss.base, recovered_comparison=report.loss.comparison)
    assert text_rows(dataclasses.replace(report, loss=loss))[0][-2] == "recovered"


def test_the_creation_time_is_utc(report):
    assert report.created.endswith("+00:00")


def test_the_environment_names_versions():
    assert {"torch", "transformers"} <= ENVIRONMENT.packages.keys()
    assert ENVIRONMENT.threads >= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_figures_are_not_saved(single, tmp_path, bad):
    broken = dataclasses.replace(single, size=dataclasses.replace(single.size, asked_ratio=bad))
    with pytest.raises(NumericsError, match=r"report\.size\.asked_ratio"):
        broken.save(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_figure_has_one_remedy():
    with pytest.raises(LoadError) as raised:
        decode(SizeFacts, {"parameters": math.inf}, "report.size")
    assert str(raised.value) == (
        "report.size.parameters is inf; a report holds finite numbers only. The file is damaged."
    )


def test_a_failed_save_leaves_nothing(single, tmp_path):
    with pytest.raises(SaveError, match="missing"):
        single.save(tmp_path / "missing" / "report.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SaveError, match="folder"):
        single.save(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_failed_save_keeps_the_old_file(single, tmp_path):
    path = tmp_path / "report.json"
    single.save(path)
    before = path.read_bytes()
    with pytest.raises(NumericsError):
        dataclasses.replace(single, size=SizeFacts(1, asked_ratio=math.nan)).save(path)
    assert path.read_bytes() == before


DAMAGE = [
    (lambda data: data.update(schema_version=1), "schema_version 1"),
    (lambda data: data.pop("schema_version"), "schema_version None"),
    (lambda data: data.pop("loss"), "loss"),
    (lambda data: data.update(extra=1), "extra"),
    (lambda data: data["dataset"].pop("fingerprint"), r"report\.dataset.*fingerprint"),
    (lambda data: data["size"].update(base_parameters="many"), r"report\.size\.base_parameters"),
    (lambda data: data["size"].update(base_parameters=True), r"report\.size\.base_parameters"),
    (lambda data: data["loss"]["base"]["bits_per_byte"].update(interval=[1.0]), r"interval\[1\] is missing"),
    (lambda data: data["speed"]["base"].update(threads=7), "contradicts itself.*threads"),
    (lambda data: data.update(notes="text"), r"report\.notes"),
]


def test_damaged_reports_are_refused(report, subtests):
    for change, message in DAMAGE:
        with subtests.test(change=change, message=message):
            data = report.to_dict()
            change(data)
            with pytest.raises(LoadError, match=message):
                EvalReport.from_dict(data)


def test_files_that_are_no_report_are_refused(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(LoadError, match="not a readable"):
        EvalReport.load(path)
    for content in (b"{", b"\xff\xfe", b"[1]", b"null"):
        path.write_bytes(content)
        with pytest.raises(LoadError):
            EvalReport.load(path)


def test_unlike_speeds_can_not_be_reported():
    with pytest.raises(ConfigError, match="threads"):
        SpeedFacts(speed((1.0, 1.0, 1.0), (1.0, 1.0, 1.0)), speed((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), threads=4))


def test_a_comparison_has_four_columns(report):
    rows = {row[0]: row[1:] for row in table_rows(report, intervals=True)}
    assert list(rows) == [
        "parameters",
        "weights on disk",
        "bits per byte",
        "perplexity per token",
        "excess loss (nats per token)",
        "prefill (tokens/s)",
        "decode (tokens/s)",
        "peak memory (RSS)",
    ]
    assert rows["parameters"] == ("1,000,000", "798,000", "-20.2 % (asked -20.0 %)")
    assert rows["weights on disk"] == ("4.0 MB", "3.2 MB", "-20.0 %")
    assert rows["bits per byte"][0].startswith(f"{2.495 / math.log(2) / 4:.4f} [")
    assert rows["bits per byte"][2].startswith("+6.2 % [+")
    assert rows["perplexity per token"][0].startswith(f"{math.exp(2.495):.2f} [")
    assert rows["perplexity per token"][2].startswith(f"x{math.exp(0.155):.3f} [")
    assert rows["excess loss (nats per token)"][:2] == ("-", "-")
    assert rows["excess loss (nats per token)"][2].startswith("+0.1550 [+0.1")
    assert rows["prefill (tokens/s)"] == ("100.0 (90.0 to 110.0)", "150.0 (135.0 to 165.0)", "x1.50 (1.50 to 1.50)")
    plain = {row[0]: row[1:] for row in table_rows(report)}
    assert plain["bits per byte"] == tuple(cell.partition(" [")[0] for cell in rows["bits per byte"])
    assert plain["prefill (tokens/s)"] == ("100.0", "150.0", "x1.50")
    assert "excess loss (nats per token)" not in plain
    table = text_table(table_header(report), table_rows(report))
    assert max(map(len, table.splitlines())) <= 80
    assert rows["peak memory (RSS)"] == ("1,000.0 MB", "900.0 MB", "-10.0 %")


def test_a_single_model_has_two_columns_and_only_what_was_measured(single):
    rows = table_rows(single)
    assert [row[0] for row in rows] == ["parameters", "bits per byte", "perplexity per token"]
    assert all(len(row) == 2 and row[1] for row in rows)
    timed = dataclasses.replace(single, speed=SpeedFacts(speed((90.0, 100.0, 110.0), (9.0, 10.0, 11.0))))
    assert table_rows(timed)[-1] == ("decode (tokens/s)", "10.0")
    assert table_header(timed) == ("measure", "value")


def test_another_vocabulary_is_said_to_be_incomparable_per_token(report):
    recut = [dataclasses.replace(loss, num_tokens=loss.num_tokens + 1) for loss in PRUNED]
    loss = LossFacts(summarize_losses(BASE), summarize_losses(recut), compare_losses(BASE, recut))
    other = dataclasses.replace(report, loss=loss)
    assert "perplexity per token" not in [row[0] for row in table_rows(other)]
    rows = {row[0]: row[1:] for row in table_rows(other, intervals=True)}
    assert "excess loss (nats per token)" not in rows
    assert rows["perplexity per token"][2] == "not comparable: other tokens"
    assert rows["bits per byte"][2].startswith("+")


def test_no_change_has_no_minus_sign(report):
    same = dataclasses.replace(report, size=SizeFacts.measured(1_000_000, 1_000_000))
    assert table_rows(same)[0] == ("parameters", "1,000,000", "1,000,000", "+0.0 %")


def test_a_side_that_was_not_measured_is_a_dash(report):
    size = dataclasses.replace(report.size, base_weight_bytes=None)
    rows = {
        row[0]: row[1:]
        for row in table_rows(dataclasses.replace(report, size=size, memory=MemoryFacts(None, memory(900_000_000))))
    }
    assert rows["weights on disk"] == ("-", "3.2 MB", "-")
    assert rows["peak memory (RSS)"] == ("-", "900.0 MB", "-")


def test_the_table_has_predicted_beside_realised_and_the_budget(report):
    searched = dataclasses.replace(
        report,
        budget=SizeSearch(0.03, 0.0281, "On other text.", 4),
        loss=dataclasses.replace(report.loss, predicted_excess=0.125),
    )
    rows = {row[0]: row for row in table_rows(searched, intervals=True)}
    excess = next(row for row in table_rows(report, intervals=True) if row[0].startswith("excess loss"))
    assert rows[excess[0]][-1] == f"{excess[-1]} (predicted for pruned: +0.1250)"
    assert rows["bits per byte, text of the search"][1:] == ("-", "-", "+2.8 % (allowed +3.0 %)")


IMPOSSIBLE_FIGURES = [
    (("loss", "base", "bits_per_byte", "value"), 10**400, "digits"),
    (("size", "pruned_parameters"), 10**400, "digits"),
    (("loss", "comparison", "excess_nats_per_token", "value"), 1e308, "contradicts itself"),
    (("speed", "base", "prefill_rounds"), [0.0, 1.0, 2.0], "contradicts itself"),
    (("speed", "base", "prefill_rounds"), [1.0], "contradicts itself"),
]


def test_the_pruned_model_answers_the_questions_of_the_base():
    group = Accuracy("all", 2, 1, Estimate(0.5, (0.1, 0.9)), 0.25, (0, 0))
    with pytest.raises(ConfigError, match="The base has 1 groups of questions"):
        MultipleChoiceFacts("mcq.jsonl", None, "letter", 0, (group,), pruned=(group, group))


def test_figures_that_can_not_be_are_refused(report, subtests):
    for place, value, said in IMPOSSIBLE_FIGURES:
        with subtests.test(place=place, value=value, said=said):
            data = report.to_dict()
            inner = data
            for name in place[:-1]:
                inner = inner[name]
            assert place[-1] in inner
            inner[place[-1]] = value
            with pytest.raises(LoadError, match=said):
                EvalReport.from_dict(data)
