"""Measure the time to build a card from facts, and the memory of a push.

python -m benchmarks.publishing                     # prunes a model quickly, for facts of real size
python -m benchmarks.publishing --folder mini-gpt   # uses the facts of a folder
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from benchmarks.common import ROOT, commit, machine, write_section
from benchmarks.models import smollm2
from hf_context_prune import EvalOptions, PrunerConfig, prune
from hf_context_prune.data.demo import licence_texts
from hf_context_prune.data.documents import TextSource
from hf_context_prune.publishing.card.card import build_card, write_card
from hf_context_prune.publishing.card.facts import read_facts
from hf_context_prune.storage.staging import staged_folder

GOAL_SECONDS, GOAL_MEGABYTES = 1.0, 400
TOKEN = "hf_of_the_benchmark"


@dataclass(frozen=True)
class Push:
    """One run of ``hf-context-prune push``."""

    seconds: float
    peak_megabytes: float


def make_quick_folder(place: Path) -> Path:
    """Prune SmolLM2 in a minute, with a small report, for a card of the real size."""
    texts = licence_texts()
    some = TextSource.from_documents(texts.calibration.documents[:40], name=texts.calibration.name)
    config = PrunerConfig(mlp_ratio=0.25, criterion="magnitude", reconstruction="none", num_calibration_samples=4)
    options = EvalOptions(max_tokens=2_000, benchmark=True, general_data=texts.held_out)
    return prune(smollm2(), some, config, eval_options=options).save_pretrained(place / "mini-gpt")


def time_cards(folder: Path, repeats: int) -> tuple[list[float], list[float]]:
    """Return the seconds to build the text, and to write text and picture, measured in turns, without the first turn."""
    facts = read_facts(folder)
    alone, whole = [], []
    with tempfile.TemporaryDirectory() as place:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            build_card(facts)
            alone.append(time.perf_counter() - start)
            start = time.perf_counter()
            write_card(Path(place), facts)
            whole.append(time.perf_counter() - start)
    return alone[1:], whole[1:]


def time_first_card(folder: Path) -> float:
    """Return the seconds to write the first card of a process, including the import of matplotlib."""
    code = (
        "import sys, time, pathlib, tempfile\n"
        "from hf_context_prune.publishing.card.card import write_card\n"
        "from hf_context_prune.publishing.card.facts import read_facts\n"
        "facts = read_facts(sys.argv[1])\n"
        "start = time.perf_counter()\n"
        "write_card(pathlib.Path(tempfile.mkdtemp()), facts)\n"
        "print(time.perf_counter() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_pushes(megabytes: int, place: Path) -> tuple[Push, Push]:
    """Push a folder of this size to a local server in another process, and push it again."""
    with staged_folder(place / "big", required_bytes=megabytes * 10**6) as staging:
        weights = np.random.default_rng(0).standard_normal(megabytes * 250_000, dtype=np.float32)
        save_file({"weight": weights}, staging / "model.safetensors")
        (staging / "config.json").write_text("{}\n")
        (staging / "README.md").write_text("---\ntags: [pruned]\n---\n\n# A large model\n")
    del weights
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.hub.server", TOKEN, "org"],
        cwd=ROOT.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        environment = os.environ | {
            "HF_ENDPOINT": server.stdout.readline().strip(),
            "HF_HOME": str(place / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
        }
        words = ["push", str(place / "big"), "org/big"]
        return _run_push(words, environment, place), _run_push(words, environment, place)
    finally:
        server.stdin.close()
        server.wait(timeout=30)


_RUN = """
import sys
from pathlib import Path
from hf_context_prune.cli.app import main
try:
    main()
finally:
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    Path(sys.argv[0]).write_text(peak.split()[1])
"""


def _run_push(words: Sequence[str], environment: dict[str, str], place: Path) -> Push:
    """Run the command in a process that reads its own peak: the peak of a child also counts the memory of its parent."""
    peak = place / "peak"
    code = f"import sys; sys.argv[0] = {str(peak)!r}\n{_RUN}"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *words], env=environment, stdout=subprocess.DEVNULL, check=True)
    return Push(time.perf_counter() - start, int(peak.read_text()) * 1024 / 1e6)


def results_text(
    folder: Path,
    alone: list[float],
    whole: list[float],
    first: float,
    sent: tuple[Push, Push],
    args: argparse.Namespace,
) -> str:
    """Return the section of RESULTS.md."""
    push, again = sent
    worst = max(first, *whole)
    card = "met" if worst < GOAL_SECONDS else "missed"
    memory = "met" if max(push.peak_megabytes, again.peak_megabytes) < GOAL_MEGABYTES else "missed"
    return f"""## Publishing

Card of a pruned SmolLM2-135M-Instruct ({len(read_facts(folder).plan.layers)} layers) from its facts in memory: the text in
{1000 * statistics.median(alone):.0f} ms, text and picture in {statistics.median(whole):.2f} s (medians of {len(whole)});
{first:.2f} s for the first card of a process, which imports matplotlib. Goal: under {GOAL_SECONDS:.0f} s: {card}.

`hf-context-prune push` of {args.megabytes} MB to a local server in another process (large-file upload, not Xet): peak RSS
{push.peak_megabytes:.0f} MB, {push.seconds:.1f} s; a second push, with nothing to send: {again.peak_megabytes:.0f} MB,
{again.seconds:.1f} s. Goal: under {GOAL_MEGABYTES} MB: {memory}.

`python -m benchmarks.publishing` at `{commit()}`, {machine()}.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, help="a pruned folder with a report (default: prune one now)")
    options.add_argument("--megabytes", type=int, default=300, help="size of the pushed folder")
    options.add_argument("--repeats", type=int, default=5, help="timed cards")
    args = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder = args.folder or make_quick_folder(place)
        alone, whole = time_cards(folder, args.repeats)
        first = time_first_card(folder)
        sent = measure_pushes(args.megabytes, place)
        write_section("publishing", results_text(folder, alone, whole, first, sent, args))


if __name__ == "__main__":
    main()
