"""The package as users get it: fast to import, light to ask for help, described in pyproject.toml and CITATION.cff."""

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

import hf_context_prune

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "peft", "matplotlib", "scipy", "numpy")


def seconds(*arguments: str) -> float:
    """The shortest of several runs of Python: other work on the machine only makes a run longer."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)
        found.append(time.perf_counter() - begin)
    return min(found)


def test_import_is_fast():
    """Under 0.3 s by itself: Python's own start, about 0.02 s, is left out."""
    assert seconds("-c", "import hf_context_prune") - seconds("-c", "pass") < 0.3


def test_help_is_fast():
    assert seconds("-m", "hf_context_prune", "--help") < 1.0


@pytest.mark.parametrize("command", [(), ("prune",)])
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\n"
        "from hf_context_prune.cli.app import app\n"
        f"app({[*command, '--help']!r}, standalone_mode=False)\n"
        f"print(*sorted({set(HEAVY)!r} & set(sys.modules)), file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert run.stderr.split() == []
    assert "--help" in run.stdout


def test_every_public_name_can_be_imported():
    assert len(set(hf_context_prune.__all__)) == len(hf_context_prune.__all__)
    for name in hf_context_prune.__all__:
        assert getattr(hf_context_prune, name) is not None
    assert set(hf_context_prune.__all__) <= set(dir(hf_context_prune))


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == hf_context_prune.__version__ == citation["version"]


def test_citation_is_complete():
    """The keys that the Citation File Format 1.2.0 requires, and the paper."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["license"]
    for key in ("message", "title", "authors"):
        assert citation[key]
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    assert [paper["url"] for paper in citation["references"]] == ["https://arxiv.org/abs/2312.12682"]


def test_every_supported_python_is_named():
    named = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line}
    assert named == {"3.11", "3.12", "3.13"}


def test_development_needs_every_export_extra():
    (extras,) = (line for line in PROJECT["optional-dependencies"]["dev"] if line.startswith("hf-context-prune["))
    offered = set(PROJECT["optional-dependencies"]) - {"dev", "docs", "benchmarks"}
    assert set(extras.partition("[")[2].rstrip("]").split(",")) == offered
