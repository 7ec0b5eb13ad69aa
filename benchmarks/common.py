"""Shared by all benchmarks: their options, finished rows on disk, tables, and sections of RESULTS.md."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_context_prune.data.documents import TextSource, load_documents
from hf_context_prune.evaluation.bootstrap import Estimate
from hf_context_prune.modeling.generation import hardware_name

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "RESULTS.md"


DOMAINS = ("law", "medicine", "finance")


def parser(description: str, *, several: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks; with `several`, ``--domains`` replaces ``--domain``."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument(
        "--data", type=Path, required=True, help="folder with one folder per domain, such as shared/data"
    )
    if several:
        options.add_argument("--domains", nargs="+", default=list(DOMAINS), help="names of folders in --data")
    else:
        options.add_argument("--domain", default="medicine", help="name of a folder in --data")
    options.add_argument("--work", type=Path, default=ROOT / "rows", help="folder of the finished rows (JSONL)")
    options.add_argument("--seed", type=int, default=0, help="seed of calibration, pruning and intervals")
    options.add_argument("--fresh", action="store_true", help="remove the rows of earlier runs and measure again")
    return options


def given(options: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Return the options of a run that differ from the defaults, as typed on the command line, without paths."""
    words = []
    for action in options._actions:
        if action.dest in ("help", "data", "work", "fresh"):
            continue
        value = getattr(args, action.dest)
        if isinstance(value, Path):
            continue
        if value != action.default and action.option_strings:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [action.option_strings[-1], *map(str, values)]
    return "".join(f" {word}" for word in words)


def parse_compared(options: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of a run whose domain ``--compared`` has more rows than the others; see also [`given`][]."""
    args = options.parse_args(arguments)
    if args.compared not in args.domains:
        options.error(f"--compared is {args.compared!r}, which is none of --domains ({', '.join(args.domains)}).")
    args.given = given(options, args)
    return args


def corpus(options: argparse.Namespace, split: str, domain: str | None = None) -> TextSource:
    """Read the train or validation text of a domain, by default of ``--domain``."""
    return load_documents(options.data / (domain or options.domain) / f"corpus.{split}.jsonl.gz")


class Rows:
    """Finished rows of a benchmark, one JSON line per configuration, from which a later run resumes.

    [`ResultsLog`][hf_context_prune.storage.results_log.ResultsLog] can't read these files: it holds one setting for
    all rows, in the first line, and refuses rows of another setting. Rows of a benchmark are added over months, so each
    row records its own commit, machine and load average, and its key is an object. Keys keep the words of the rows on disk, such as
    ``blocks`` for calibration samples and ``dense`` for the base model.

    Args:
        options: Parsed options; ``--work`` is the folder, and ``--fresh`` removes the file first.
        name: Name of the file, without its ending.
        setting: Values to record with every new row.
    """

    def __init__(self, options: argparse.Namespace, name: str, **setting: Any) -> None:
        options.work.mkdir(parents=True, exist_ok=True)
        self.path = options.work / f"{name}.jsonl"
        if options.fresh:
            self.path.unlink(missing_ok=True)
        self.setting = {**setting, "commit": commit(), "machine": machine()}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Return the finished row of a configuration, or None."""
        return next((row for row in self.rows if row["key"] == key), None)

    def get_or_measure(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of a configuration: the finished row, or one that is measured now and written."""
        if (found := self.find(key)) is not None:
            return found
        row = {"key": key, **measure(), "setting": {**self.setting, "load": round(os.getloadavg()[0], 1)}}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(
            json.dumps({"key": key, **{k: v for k, v in row.items() if k not in ("key", "setting")}})[:300], flush=True
        )
        return row


def highest_load(rows: Iterable[dict[str, Any]]) -> str:
    """Return the highest load average behind rows and the number of cores; rows before 2026-11-29 have none."""
    known = [row["setting"]["load"] for row in rows if "load" in row["setting"]]
    return f"{max(known):.1f} on {os.cpu_count()} cores" if known else "not known"


def describe_runs(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the commits and machines that rows were measured with, for the last line of a section."""
    settings = [row["setting"] for row in rows]
    commits, machines = (sorted({setting[name] for setting in settings}) for name in ("commit", "machine"))
    return f"{', '.join(f'`{commit}`' for commit in commits)}, {'; '.join(machines)}"


def commit() -> str:
    """Return the commit of the working tree, marked ``-dirty`` if anything but results of benchmarks was changed."""
    name = subprocess.run(
        ["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    if not name:
        return "unknown"
    others = (":(top)", ":(exclude)RESULTS.md", ":(exclude)*.png", ":(exclude)rows")
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *others], cwd=ROOT, check=False).returncode
    return f"{name}-dirty" if changed else name


def machine() -> str:
    """Return processor, number of threads and version of torch, for the last line of a section."""
    return f"{hardware_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def cell(estimate: Estimate | None, digits: int = 3) -> str:
    """Return a number with its interval as text; empty for None."""
    if estimate is None:
        return ""
    text = f"{estimate.value:.{digits}f}"
    if estimate.interval is not None:
        text += f" [{estimate.interval[0]:.{digits}f}, {estimate.interval[1]:.{digits}f}]"
    elif estimate.span is not None:
        text += f" ({estimate.span[0]:.{digits}f} to {estimate.span[1]:.{digits}f})"
    return text


def plot_path(name: str) -> Path:
    """Return the path of a benchmark's plot, beside RESULTS.md, which shows the plot."""
    return RESULTS.with_name(f"{name}.png")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table: first column aligned left, all other columns right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *rows))


def write_section(name: str, text: str) -> None:
    """Replace one section of RESULTS.md, or add a section at the end, and print the section."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    section = f"{begin}\n{text.strip()}\n{end}"
    whole = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else "# Results\n"
    if begin in whole:
        head, _, rest = whole.partition(begin)
        whole = head + section + rest.partition(end)[2]
    else:
        whole = f"{whole.rstrip()}\n\n{section}\n"
    RESULTS.write_text(whole, encoding="utf-8")
    print(section)
