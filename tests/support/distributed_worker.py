"""Run in each of several processes that accelerate launched: does what test_distributed.py then looks at.

Usage: distributed_worker.py FOLDER ARGUMENT...

The arguments are those of the command line, which runs last and ends the process.
"""

import atexit
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from hf_context_prune.cli import app as cli
from hf_context_prune.config import PrunerConfig
from hf_context_prune.errors import ConfigError
from hf_context_prune.pruning.calibration.calibrate import calibrate
from hf_context_prune.pruning.calibration.reduce import reduce_moments
from hf_context_prune.pruning.planner import plan_and_reconstruct
from hf_context_prune.pruning.surgery import apply_plan
from hf_context_prune.utils import distributed
from tests.support.distributed_cases import CONFIGS, MODELS, batches, moments_of, parts, repaired, samples
from tests.support.tiny import case

torch.set_num_threads(1)
FOLDER = Path(sys.argv[1])


@atexit.register  # before the package makes its group, so it runs after what the package does at the end
def note_group():
    (FOLDER / f"group.{os.environ['RANK']}.json").write_text(json.dumps(torch.distributed.is_initialized()))


def raised(function):
    """What a call raises in this process."""
    try:
        function()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def moments(rank, count):
    """Regression moments of an unequal share each, and with nothing in the last process."""
    result = {}
    for centre in (False, True):
        for name, mine in (("shares", parts(count)[rank]), ("empty", parts(1)[0] if rank == 0 else [])):
            summed = moments_of(mine, centre=centre)
            reduce_moments(summed)
            result[f"{name}.{centre}"] = (summed.statistics.num_tokens, *summed.second_moments())
    return result


def poison(model, rank):
    """NaN in the activations of process 1 alone."""
    if rank == 1:
        model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    return model


def only_main(rank, error):
    if rank == 0:
        raise error
    return distributed.broadcast_object(None)


def work(folder):
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    result = {"moments": moments(rank, count), "main": distributed.is_main_process()}
    for name in MODELS:
        stats = calibrate(case(name), batches(), statistics=frozenset({"gram", "taylor"}))
        stats.save(folder / f"{name}.{rank}.safetensors")
    one = calibrate(case("llama"), batches()[:1], statistics=frozenset({"gram", "taylor"}))
    one.save(folder / f"one.{rank}.safetensors")
    for name, options in CONFIGS.items():
        model = case("llama")
        plan, reconstruct = plan_and_reconstruct(model, samples(), PrunerConfig(**options))
        plan.save(folder / f"{name}.{rank}.json")
        result[name] = dict(apply_plan(model, plan, reconstruct=reconstruct).named_parameters())
    result["experts"] = repaired()
    result["errors"] = {
        "nan": raised(lambda: calibrate(poison(case("llama"), rank), batches())),
        "different": raised(lambda: calibrate(case("llama"), batches()[: 3 + rank])),
        "nothing": raised(lambda: calibrate(case("llama"), [])),
        "main": raised(lambda: distributed.on_main_process(lambda: only_main(rank, KeyError("lost")))),
        "before": raised(distributed.fail_together()(lambda: only_main(rank, ConfigError("wrong")))),
    }
    result["objects"] = (distributed.broadcast_object(f"from {rank}"), distributed.on_main_process(lambda: rank))
    torch.save(result, folder / f"result.{rank}.pt")


def command(folder, arguments):
    """The command line; ``@RANK`` in an argument stands for the number of the process."""
    rank = os.environ["RANK"]
    sys.argv = ["hf-context-prune", *(argument.replace("@RANK", rank) for argument in arguments)]
    try:
        cli.main()
    except SystemExit as exit_:
        (folder / f"exit.{rank}.json").write_text(json.dumps(exit_.code))
        raise


work(FOLDER)
command(FOLDER, sys.argv[2:])
