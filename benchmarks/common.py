"""What every benchmark shares: its rows on disk (resumable), its section of RESULTS.md, and the real model."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
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
    """Options that all benchmarks take; with `several`, ``--domains`` instead of ``--domain``."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="folder of the domains, such as shared/data")
    if several:
        options.add_argument("--domains", nargs="+", default=list(DOMAINS), help="folders of --data")
    else:
        options.add_argument("--domain", default="medicine", help="a folder of --data")
    options.add_argument("--work", type=Path, default=ROOT / "rows", help="folder of the finished rows (JSONL)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    return options


def given(options: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The options of a run that are not the defaults, as one types them after the command; paths are left out."""
    words = []
    for action in options._actions:
        if action.dest in ("help", "data", "work", "fresh"):
            continue
        value = getattr(args, action.dest)
        if value != action.default and action.option_strings:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [action.option_strings[-1], *map(str, values)]
    return "".join(f" {word}" for word in words)


def corpus(options: argparse.Namespace, split: str, domain: str | None = None) -> TextSource:
    """The train or validation text of a domain, by default of ``--domain``."""
    return load_documents(options.data / (domain or options.domain) / f"corpus.{split}.jsonl.gz")


class Rows:
    """One JSON line for every finished configuration; a later run goes on where this one stopped."""

    def __init__(self, options: argparse.Namespace, name: str, **setting: Any) -> None:
        options.work.mkdir(parents=True, exist_ok=True)
        self.path = options.work / f"{name}.jsonl"
        if options.fresh:
            self.path.unlink(missing_ok=True)
        self.setting = {**setting, "commit": commit(), "machine": machine()}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def get(self, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a configuration, measured now unless it is there."""
        for row in self.rows:
            if row["key"] == key:
                return row
        row = {"key": key, **measure(), "setting": self.setting}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(
            json.dumps({"key": key, **{k: v for k, v in row.items() if k not in ("key", "setting")}})[:300], flush=True
        )
        return row


def commit() -> str:
    """The commit of the working tree, marked if anything but results in this folder was changed."""
    name = subprocess.run(
        ["git", "describe", "--always"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    if not name:
        return "unknown"
    others = (":(top)", ":(exclude)RESULTS.md", ":(exclude)*.png", ":(exclude)rows")
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *others], cwd=ROOT, check=False).returncode
    return f"{name}-dirty" if changed else name


def machine() -> str:
    """Processor, threads and torch, for the caption."""
    return f"{hardware_name(torch.device('cpu'))}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def cell(estimate: Estimate | None, digits: int = 3) -> str:
    """A figure with its interval."""
    if estimate is None:
        return ""
    text = f"{estimate.value:.{digits}f}"
    if estimate.interval is not None:
        text += f" [{estimate.interval[0]:.{digits}f}, {estimate.interval[1]:.{digits}f}]"
    return text


def plot_path(name: str) -> Path:
    """Where a benchmark's plot goes: beside RESULTS.md, which shows it."""
    return RESULTS.with_name(f"{name}.png")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column left, others right."""
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *rows))


def write_section(name: str, text: str) -> None:
    """Replace one benchmark's section of RESULTS.md, or add it at the end."""
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
