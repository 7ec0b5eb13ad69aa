"""The benchmarks of pruned loss on a tiny model: rows, resuming, section, plot, and sizes that peers reach."""

from __future__ import annotations

import argparse
import copy
import gzip
import json

import pytest
import torch

from benchmarks import common, cost, methods, one_shot, residual
from benchmarks.methods import METHODS, SIZES, Size, budgets
from benchmarks.peers import PeerResult
from hf_context_prune.errors import ConfigError
from hf_context_prune.storage.loading import LoadedModel
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.slow

TEXT = "court party duty care patient dose trial market rate bank loan risk appeal judge nurse bond share fund"
WORDS = TEXT.split()


@pytest.fixture
def bench(tmp_path, monkeypatch, tokenizer):
    """Return `tmp_path`, which holds two tiny domains and gets RESULTS.md and plot, and the options of a run."""
    pytest.importorskip("matplotlib")
    generator = torch.Generator().manual_seed(0)
    for domain in ("law", "medicine"):
        (tmp_path / domain).mkdir()
        for split, count in (("train", 30), ("validation", 6)):
            picks = torch.randint(len(WORDS), (count, 60), generator=generator).tolist()
            lines = [
                json.dumps({"text": " ".join(WORDS[i] for i in row), "doc": f"{split}-{n}", "source": "made up"})
                for n, row in enumerate(picks)
            ]
            with gzip.open(tmp_path / domain / f"corpus.{split}.jsonl.gz", "wt") as file:
                file.write("\n".join(lines))
    loaded = LoadedModel(tiny_model("llama"), tokenizer, "tiny", None, None)
    monkeypatch.setattr(cost, "smollm2", lambda: loaded)
    monkeypatch.setattr(cost, "in_fresh_process", cost.run_once)
    for name, (label, _) in one_shot.MODELS.items():
        monkeypatch.setitem(one_shot.MODELS, name, (label, lambda: loaded))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    options = f"--data {tmp_path} --work {tmp_path / 'rows'} --length 32 --eval-tokens 900"
    return tmp_path, options.split()


def with_options(options, more):
    return [*options, *more.split()]


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / "rows" / f"{name}.jsonl").read_text().splitlines()]


def test_rows_section_plot_and_resume(bench, monkeypatch):
    folder, options = bench
    arguments = with_options(
        options, "--domains law medicine --sizes mlp25 mlp50 --methods flap+bias ours --num-samples 4"
    )
    one_shot.main(arguments)
    rows = rows_of(folder, "one_shot")
    assert [(row["key"]["domain"], row["key"].get("size"), row["key"]["method"]) for row in rows] == [
        *((domain, None, "dense") for domain in ("law", "medicine")),
        *(
            (domain, size, method)
            for size in ("mlp25", "mlp50")
            for domain in ("law", "medicine")
            for method in ("flap+bias", "ours")
        ),
    ]
    dense = rows[0]
    assert dense["calibration_tokens"] == 4 * 32
    assert len(dense["documents"]) == len(dense["nll"]) == len(rows[3]["nll"]) > 1
    assert rows[3]["parameters"] == dense["parameters"] - 3 * 10 * 3 * 48  # 10 of 40 neurons of each of three layers
    assert all({"commit", "machine", "seed"} <= row["setting"].keys() for row in rows)
    text = (folder / "RESULTS.md").read_text()
    assert text.count("<!-- begin one_shot -->") == 1
    for part in ("### 25 % of the MLP neurons", "### 50 %", "| `flap` + `bias` |", "| 1.00 |", "Goal of"):
        assert part in text
    # The command names options that differ from the defaults; the sizes do not differ, and paths are left out.
    named = "--domains law medicine --num-samples 4 --length 32 --eval-tokens 900 --methods flap+bias ours"
    command = text.split("benchmarks.one_shot --data DATA", 1)[1].split("`")[0]
    assert sorted(command.split()) == sorted(named.split())
    assert (folder / "one_shot.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(methods.Domain, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(methods.Domain, "measure_dense", lambda *_: pytest.fail("measured again"))
    one_shot.main(arguments)
    assert rows_of(folder, "one_shot") == rows
    assert (folder / "RESULTS.md").read_text() == text


def test_other_documents_than_the_dense_row_has_are_refused(bench):
    folder, options = bench
    arguments = with_options(options, "--domains law --sizes mlp25 --num-samples 4 --methods")
    one_shot.main([*arguments, "random"])
    test_text = folder / "law" / "corpus.validation.jsonl.gz"
    with gzip.open(test_text, "rt") as file:
        fewer = file.read().splitlines()[:3]
    with gzip.open(test_text, "wt") as file:
        file.write("\n".join(fewer))
    with pytest.raises(SystemExit, match="which --data does not have"):
        one_shot.main([*arguments, "random", "magnitude"])


def test_adaptive_rows_compare_with_uniform_ones(bench):
    folder, options = bench
    one_shot.main(
        with_options(options, "--domains law --sizes all20 --num-samples 12 --methods ours ours-adaptive ours-high")
    )
    _, refit, *rows = rows_of(folder, "one_shot")
    uniform, adaptive, high = (row["parameters"] for row in rows)
    step = 3 * 48 * 16 + 48 * 8 * 4  # no more than one KV group beyond the same total
    assert uniform - step <= adaptive <= uniform
    assert high == adaptive
    assert rows[2]["refit"]["before"] != refit["refit"]["before"]  # rows of the pruned model, and of the base model
    assert rows[2]["predicted"] == rows[1]["predicted"]
    assert (rows[2]["nll"] == rows[1]["nll"]) == (rows[2]["refit"]["share"] == 0)
    text = (folder / "RESULTS.md").read_text()
    assert "adaptive minus uniform" in text
    assert all(row["forwards"] > 0 for row in rows)
    assert rows[2]["forwards"] > rows[1]["forwards"]  # what both share counts for each
    assert "on the base model, with nothing removed" in text
    assert "<!-- begin one_shot_all -->" in text
    assert "--sizes all20" in text


def test_sizes_of_one_kind_a_run(bench, capsys):
    with pytest.raises(SystemExit):
        one_shot.main(with_options(bench[1], "--sizes mlp25 all20"))
    assert "give one kind" in capsys.readouterr().err


def test_cost(bench):
    folder, options = bench
    sizes = "--num-samples 2 4 --timed 4 --search-samples 4 --default-samples 12"
    arguments = with_options(options, f"--domain law {sizes} --methods obs+least_squares ours flap+bias")
    cost.main(arguments)
    rows = rows_of(folder, "cost")
    assert [(row["key"]["method"], row["key"].get("blocks")) for row in rows] == [
        ("dense", None),
        *((method, blocks) for blocks in (2, 4) for method in ("obs+least_squares", "ours", "flap+bias")),
        ("ours-adaptive", 4),
        ("default", 12),
    ]
    pruned, default = rows[1:-1], rows[-1]
    assert all(row["peak"] > row["model"] > row["pruned"] > 0 for row in pruned)
    assert all(("forward_seconds" in row) == (row["key"]["blocks"] == 4) for row in pruned)
    assert [row["held"] for row in pruned[:3]] == [3 * 4 * 40**2, 4 * 40**2 + 2 * 2 * 32 * 48 * 4, 0]
    assert pruned[-1]["search_seconds"] > 0
    assert default["peak"] > default["model"] > default["pruned"] > 0
    assert min(default[name] for name in ("search_seconds", "seconds", "forward_seconds")) > 0
    assert default["tokens"] == 12 * 32
    text = (folder / "RESULTS.md").read_text()
    assert "| 64 |" in text
    assert "forward passes of the base model (goal: 3)" in text
    assert "The default with its search: " in text
    assert (folder / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_cost_in_a_process_of_its_own_says_what_failed(tmp_path):
    args = argparse.Namespace(data=tmp_path / "absent", domain="law", length=32, eval_tokens=900, seed=0, timed=[4])
    with pytest.raises(SystemExit, match="absent"):
        cost.in_fresh_process(args, "ours", 4)


def test_shares_are_exact_and_their_mean_has_the_range_of_the_domains():
    losses = [1.0 + index for index in range(10)]
    dense = {"nll": losses, "sources": ["one"] * 10}
    reference = {"nll": [2 * loss for loss in losses]}
    half, quarter = {"nll": [1.5 * loss for loss in losses]}, {"nll": [1.25 * loss for loss in losses]}
    first, second, mean = one_shot.shares([(dense, reference, half), (dense, reference, quarter)], 0)
    assert (first.value, second.value, mean.value) == (0.5, 0.25, 0.375)
    assert first.interval == pytest.approx((0.5, 0.5))
    assert mean.interval is None
    assert mean.span == (0.25, 0.5)
    single = one_shot.shares([({"nll": [1.0], "sources": ["one"]}, {"nll": [2.0]}, {"nll": [1.5]})], 0)
    assert single[0].interval is None


def test_the_default_and_a_peer_of_a_checkout_stand_beside_ours(bench, monkeypatch):
    folder, options = bench

    def peer(model, samples, remove, attention):
        smaller = copy.deepcopy(model)
        smaller.config.use_cache = False
        return PeerResult(smaller, "p 1", "p(model)", "half of a note", step=10**9, earlier_seconds=1e4)

    seen = []
    monkeypatch.setitem(METHODS, "p", methods.Method("P", peer=peer))
    monkeypatch.setitem(
        METHODS,
        "own",
        methods.Method("Own", peer=lambda *given: (seen.append(given[1].shape), peer(*given))[1], num_samples=16),
    )
    monkeypatch.setattr(one_shot, "METHODS", METHODS)
    one_shot.main(
        with_options(options, "--domains law --sizes all20 --num-samples 12 --methods flap+bias p own layers default")
    )
    dense, *rows = rows_of(folder, "one_shot")
    reference, theirs, own, layers, default = rows
    assert seen == [(16, 32)]  # samples of its own
    assert own["nll"] == theirs["nll"]
    assert "own" not in one_shot.common_methods()
    assert theirs["nll"] == dense["nll"]  # it removed nothing
    assert theirs["forwards"] > 1e4  # the seconds of its earlier call count
    budget = dense["parameters"] - reference["parameters"]
    for row in (layers, default):
        assert 0.9 * budget < dense["parameters"] - row["parameters"] < 1.3 * budget
        assert len(row["nll"]) == len(dense["nll"])
    text = (folder / "RESULTS.md").read_text()
    assert "P minus the default, neurons and KV groups alone, nats per token, paired: law " in text
    assert "- P: half of a note." in text


def test_a_peer_is_compared_with_the_default_units_and_with_adaptive_widths():
    dense = {"documents": [[f"d{i}", 10, 40] for i in range(4)], "sources": ["a", "a", "b", "b"], "nll": [20.0] * 4}
    rows = {("law", "", "dense"): dense}
    for method, excess in {"layers": 1.0, "ours-adaptive": 2.0, "optipfair-maw": 4.0}.items():
        rows["law", "all20", method] = {"nll": [20.0 + excess] * 4}
    args = argparse.Namespace(domains=["law"], methods=["layers", "ours-adaptive", "optipfair-maw"], seed=0)
    label = METHODS["optipfair-maw"].label
    default, adaptive = one_shot.peer_lines(rows, args, "all20", "optipfair-maw")
    assert default.startswith(
        f"{label} minus the default, neurons and KV groups alone, nats per token, paired: law 0.300"
    )
    assert adaptive.startswith(f"{label} minus ours, adaptive widths, nats per token, paired: law 0.200")
    args.methods = ["ours-adaptive", "optipfair-maw"]
    assert one_shot.peer_lines(rows, args, "all20", "optipfair-maw") == [adaptive]


def test_every_method_is_a_valid_config_or_a_peer():
    for method in METHODS.values():
        assert (method.peer is not None) + bool(method.options) + method.whole == 1
    uniform, adaptive, removed = budgets(tiny_model("llama"), SIZES["mlp25"])
    assert uniform == adaptive == {"mlp_ratio": 0.25}
    assert removed == 3 * 10 * 3 * 48
    with pytest.raises(ConfigError):
        budgets(tiny_model("llama"), Size("none", -0.5))


@pytest.mark.parametrize(
    ("package", "name", "size"),
    [
        ("optipfair", "optipfair-maw", "mlp25"),
        ("optipfair", "optipfair-maw", "all20"),
        ("optipfair", "optipfair-ppm", "mlp50"),
        ("torch_pruning", "torch-pruning", "mlp50"),
        ("torch_pruning", "torch-pruning", "all20"),
        ("torch_pruning", "torch-pruning-units", "mlp25"),
        ("torch_pruning", "torch-pruning-units", "all20"),
    ],
)
def test_peers_hit_the_size_and_still_run(package, name, size):
    pytest.importorskip(package)
    from benchmarks.peers import TOLERANCE, check_peer

    # A neuron is under 1 % of the parameters to remove, and a KV group has several query heads.
    model = tiny_model("llama", hidden_size=96, intermediate_size=512, num_attention_heads=12, num_hidden_layers=2)
    model.requires_grad_(True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    samples = torch.randint(3, 320, (4, 24), generator=torch.Generator().manual_seed(0))
    remove = budgets(model, SIZES[size])[2]
    result = METHODS[name].peer(model, samples, remove, SIZES[size].attention)
    assert abs(model.num_parameters() - result.model.num_parameters() - remove) <= TOLERANCE * remove
    check_peer(model, result, samples, remove)
    assert result.version.split()[1][0].isdigit()
    assert bool(result.note) or not SIZES[size].attention
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"instead of .* over 0.5%"):
        check_peer(model, result, samples, 2 * remove)


def test_another_model_has_rows_and_a_section_of_its_own(bench):
    folder, options = bench
    small = "--domains law --sizes mlp25 --methods flap+bias obs+least_squares --num-samples 8"
    one_shot.main(with_options(options, small))
    one_shot.main(with_options(options, f"{small} --model gemma3-270m"))
    rows = rows_of(folder, "one_shot")
    assert [row["key"].get("model") for row in rows] == [None] * 3 + ["gemma3-270m"] * 3
    text = (folder / "RESULTS.md").read_text()
    assert "## One-shot pruning side by side, Gemma 3 270M" in text
    assert "--model gemma3-270m " in text
    assert (folder / "one_shot_gemma3-270m.png").is_file()


def test_sources_of_the_residual_loss(bench, monkeypatch):
    folder, options = bench
    monkeypatch.setattr(residual, "smollm2", cost.smollm2)
    arguments = with_options(options, "--domain law --num-samples 20 --groups 2")
    residual.main(arguments)
    rows = {(row["key"]["kind"], row["key"]["place"]): sum(row["nll"]) for row in rows_of(folder, "residual")}
    assert set(rows) == {
        *(("dense", ""), ("alone", "0 to 1"), ("but", "0 to 1"), ("alone", "2 to 2"), ("but", "2 to 2")),
        *(("repair", name) for name in ("none", "least_squares", "sequential")),
        *(("choice", name) for name in ("random", "l1", "wanda", "obs")),
    }
    assert rows["alone", "0 to 1"] == rows["but", "2 to 2"]  # of two groups, only the first is pruned either way
    assert rows["alone", "2 to 2"] == rows["but", "0 to 1"]
    assert len(set(rows.values())) == 10
    section = (folder / "RESULTS.md").read_text()
    assert "| 0 to 1 |" in section
    assert "| `least_squares` |" in section
    residual.main(arguments)
    assert len(rows_of(folder, "residual")) == 12  # nothing was measured again
