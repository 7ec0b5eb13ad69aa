"""Calibration split over processes: the plan of one process, and no process that waits for one that failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.pruning.calibration.calibrate import calibrate
from hf_context_prune.pruning.calibration.reduce import reduce_moments
from hf_context_prune.pruning.calibration.statistics import CalibrationStats
from hf_context_prune.pruning.planner import plan_and_reconstruct
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.utils import distributed
from hf_context_prune.utils.locks import reserve_output
from tests.support.distributed_cases import CONFIGS, MODELS, batches, moments_of, parts, repaired, samples
from tests.support.tiny import case, model_and_text

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parents[1] / "support" / "distributed_worker.py"
ALL = frozenset({"gram", "taylor"})
RANKS = (0, 1)


def launch(folder, *arguments, worker=True):
    """Two CPU processes by ``accelerate launch``; none outlives the call."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--main_process_ip", "127.0.0.1", "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(WORKER), str(folder)] if worker else ["-m", "hf_context_prune"]
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "HF_HOME": str(folder / "home"),  # no launcher settings of this machine's user
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"the processes hang:\n{out}\n{err}")
    return process.returncode, out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    return model_and_text(folder, "data.0.jsonl")


@pytest.fixture(scope="module")
def launched(tmp_path_factory, place):
    """One launch of two processes, whose last command fails in the second: (folder, code, stdout, stderr)."""
    folder = tmp_path_factory.mktemp("two")
    return folder, *launch(folder, *prune_arguments(place, "data.@RANK.jsonl", "failed"))


@pytest.fixture(scope="module")
def folder(launched):
    """What the two processes wrote before the command."""
    folder, _, out, err = launched
    assert all((folder / f"result.{rank}.pt").exists() for rank in RANKS), out + err
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"result.{rank}.pt") for rank in RANKS]


def close(got, expected, *, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# The group


@pytest.mark.slow
def test_the_group_ends_before_python_does(folder):
    # else a thread of gloo that still holds a tensor aborts the process, now and then
    assert [json.loads((folder / f"group.{rank}.json").read_text()) for rank in RANKS] == [False, False]


def test_a_group_of_the_caller_is_left_alone():
    source = (
        "import atexit, torch; torch.distributed.init_process_group('gloo', init_method='tcp://127.0.0.1:0', rank=0,"
        "world_size=1); atexit.register(torch.distributed.destroy_process_group);"
        "atexit.register(lambda: print(torch.distributed.is_initialized()));"
        "from hf_context_prune.utils import distributed as d; assert d.is_main_process()"
    )
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


# Sums


@pytest.mark.slow
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("share", ["shares", "empty"])
def test_moments_are_those_of_one_process(results, share, centre):
    rows = parts(1)[0]
    expected = moments_of(rows, centre=centre)
    got = [result["moments"][f"{share}.{centre}"] for result in results]
    assert got[0][0] == got[1][0] == expected.statistics.num_tokens == 150
    x, target = (torch.cat(tensors).double() for tensors in zip(*rows, strict=True))
    if centre:
        x, target = x - x.mean(dim=0), target - target.mean(dim=0)
    for index, exact in enumerate((x.T @ x / 150, x.T @ target / 150)):
        assert torch.equal(got[0][1 + index], got[1][1 + index])
        close(got[0][1 + index], exact, tolerance=1e-6)


@pytest.mark.slow
def test_experts_are_repaired_as_by_one_process(results):
    first, second = (result["experts"] for result in results)
    for name, expected in repaired().items():
        assert torch.equal(first[name], second[name])
        close(first[name], expected, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_one_process(folder, name):
    first, second = (CalibrationStats.load(folder / f"{name}.{rank}.safetensors") for rank in RANKS)
    expected = calibrate(case(name), batches(), statistics=ALL)
    check_statistics(first, second, expected)
    assert (first.num_samples, first.num_tokens) == (expected.num_samples, expected.num_tokens) == (12, 210)


@pytest.mark.slow
def test_a_process_without_a_batch_takes_part(folder):
    first, second = (CalibrationStats.load(folder / f"one.{rank}.safetensors") for rank in RANKS)
    check_statistics(first, second, calibrate(case("llama"), batches()[:1], statistics=ALL), tolerance=0)


def check_statistics(first, second, expected, *, tolerance=1e-5):
    assert set(first.targets) == set(expected.targets)
    for key, one in expected.targets.items():
        got, other = first.targets[key], second.targets[key]
        assert got.num_tokens == one.num_tokens
        for name in ("sum", "sum_abs", "sum_squares", "gram", "taylor"):
            assert torch.equal(getattr(got, name), getattr(other, name))
            close(getattr(got, name), getattr(one, name), tolerance=tolerance)
        assert (got.pivot is None) == (one.pivot is None)
        close(got.second_moment(centred=True), one.second_moment(centred=True), tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_and_its_repair_are_those_of_one_process(folder, results, name):
    model = case("llama")
    plan, reconstruct = plan_and_reconstruct(model, samples(), PrunerConfig(**CONFIGS[name]))
    expected = dict(apply_plan(model, plan, reconstruct=reconstruct).named_parameters())
    for rank in RANKS:
        assert PruningPlan.load(folder / f"{name}.{rank}.json").layers == plan.layers
        got = results[rank][name]
        assert set(got) == set(expected)
        for key, parameter in expected.items():
            close(got[key].detach(), parameter.detach())


# Errors


@pytest.mark.slow
def test_an_error_in_one_process_is_raised_in_all(results):
    errors = [result["errors"] for result in results]
    assert [e["nan"][0] for e in errors] == ["NumericsError"] * 2
    assert "layer 2 (attention), batch 1" in errors[1]["nan"][1]
    assert errors[0]["nan"][1] == f"{errors[1]['nan'][1]} (in process 1 of 2)"
    assert [e["different"][0] for e in errors] == ["DataError"] * 2
    assert "different batches" in errors[0]["different"][1]
    assert [e["nothing"][0] for e in errors] == ["DataError"] * 2
    assert [e["main"][0] for e in errors] == ["KeyError", "RuntimeError"]
    assert errors[1]["main"][1] == "KeyError: 'lost' (in process 0 of 2)"
    assert [e["before"] for e in errors] == [["ConfigError", "wrong"], ["ConfigError", "wrong (in process 0 of 2)"]]


@pytest.mark.slow
def test_objects_come_from_the_main_process(results):
    assert [result["main"] for result in results] == [True, False]
    assert [result["objects"] for result in results] == [("from 0", 0)] * 2


# The command line


def prune_arguments(place, data, output):
    return [
        *("prune", place / "base", "--data", place / data, "--output", place / output, "--mlp-ratio", 0.25),
        *("--max-seq-length", 32, "--num-calibration-samples", 16, "--no-benchmark", "--max-eval-tokens", 400),
    ]


@pytest.mark.slow
def test_the_command_writes_and_prints_once(place, run):
    code, out, err = launch(place, *prune_arguments(place, "data.0.jsonl", "two"), "--format", "json", worker=False)
    assert code == 0, err
    report = json.loads(out)  # one document: the other process printed nothing
    code, _, err = run(*prune_arguments(place, "data.0.jsonl", "one"))
    assert code == 0, err
    plans = [PruningPlan.load(place / name / "pruning_plan.json") for name in ("one", "two")]
    assert plans[0].layers == plans[1].layers
    assert plans[1].sha256 == report["plan_sha256"]


@pytest.mark.slow
def test_a_failure_in_one_process_ends_all_with_its_exit_code(place, launched):
    folder, code, out, err = launched
    assert code != 0
    assert out == ""
    assert [json.loads((folder / f"exit.{rank}.json").read_text()) for rank in RANKS] == [1, 1]
    shown = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(shown) == 1
    assert "data.1.jsonl" in shown[0]
    assert "(in process 1 of 2)" in shown[0]
    assert not (place / "failed").exists()


@pytest.mark.nightly
def test_an_output_at_which_another_run_is_at_work_is_refused_in_all(place):
    with reserve_output(place / "reserved"):
        code, out, err = launch(place, *prune_arguments(place, "data.0.jsonl", "reserved"), worker=False)
    assert code != 0
    assert out == ""
    shown = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(shown) == 1
    assert "wait for it to end, or choose another --output" in shown[0]
    assert not (place / "reserved").exists()


# One process


def test_one_process_makes_no_group(model):
    expected = batches()
    assert [batch for _, batch in distributed.shard(expected)] == expected
    assert distributed.num_processes() == 1
    assert distributed.is_main_process()
    assert distributed.on_main_process(lambda: 3) == distributed.broadcast_object(3) == 3
    assert distributed.sum_counts(2, 5) == [2, 5]
    moments = moments_of(parts(1)[0], centre=True)
    before = [tensor.clone() for tensor in moments.second_moments()]
    reduce_moments(moments)
    assert all(torch.equal(a, b) for a, b in zip(before, moments.second_moments(), strict=True))
    calibrate(model, batches())
    assert not torch.distributed.is_initialized()


def test_one_process_imports_nothing_for_it():
    source = (
        "import sys; from hf_context_prune.utils import distributed as d; d.is_main_process(); d.shard([]);"
        "print({'torch', 'accelerate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")  # as under mpirun, with a state that was made before
    monkeypatch.setattr(distributed, "_accelerate", lambda: type("State", (), {"num_processes": 1}))
    with pytest.raises(ConfigError, match="2 processes were launched"):
        distributed.num_processes()


def test_a_launch_that_started_one_process_is_warned_of(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distributed.warn_if_alone()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(distributed.LaunchWarning, match="--multi_gpu"):
        distributed.warn_if_alone()
