"""README and docs/ are true: their Python runs, their commands exist, their figures stand in RESULTS.md.

Every fenced block is checked. A block that needs the Hub, a GPU or a program that is not installed says so in the line
before it: ``<!-- needs: hub -->``.
"""

import ast
import importlib.util
import io
import json
import random
import re
import shlex
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import typer
from transformers import TrainingArguments

import hf_context_prune
from hf_context_prune import EvalOptions, PrunerConfig, RecoveryConfig, prune_to_folder
from hf_context_prune.cli.app import app, main
from hf_context_prune.modeling.architectures import SPECS
from hf_context_prune.modeling.runtimes import GGUF_FAMILIES
from hf_context_prune.modeling.specs import BUILT_IN
from hf_context_prune.pruning.criteria import CRITERIA
from hf_context_prune.publishing.space.settings import read_space_settings
from hf_context_prune.utils.options import read_options
from tests.support.families_page import families_page
from tests.support.tiny import TEXT, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/**/*.md")))
}
TEXTS = (
    *("*.md", "docs/**/*.md", "model_cards/*.md", "spaces/*", "examples/*", "mkdocs.yml"),
    *("hf_context_prune/**/*.py", "hf_context_prune/**/*.jinja"),
)
"""Whatever a user may read."""
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TINY = "num_calibration_samples=8, max_seq_length=64"
SUBSTITUTES = {
    HUB_ID: "base",
    "vocab_size=16384": "vocab_size=288, pad_to_multiple_of=8",
    "num_samples=128, max_seq_length=512": "num_samples=8, max_seq_length=64",
    "PrunerConfig(": f"PrunerConfig({TINY}, ",
    "ThresholdConfig(": f"ThresholdConfig({TINY}, ",
}
"""In Python blocks: tiny sizes for those of a real model."""
QUICK = EvalOptions(benchmark=False, memory=False)
RUN_COMMANDS = {
    "prune": ["--num-calibration-samples", "8", "--max-seq-length", "64", "--no-benchmark"],
    "evaluate": [],
    "inspect": [],
    "chat": ["--max-new-tokens", "4"],
}
"""Commands of README that are run, with options that make them quick."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        place: Page and line of its fence.
        language: Behind the fence.
        text: Inside.
        needs: What the comment before it names; empty: the block is checked.
    """

    place: str
    language: str
    text: str
    needs: str


@cache
def blocks_of(page: str) -> tuple[Block, ...]:
    found, lines, before = [], iter(enumerate(PAGES[page].splitlines(), start=1)), ""
    for number, line in lines:
        if line.lstrip().startswith("```"):
            indent, language = len(line) - len(line.lstrip()), line.strip().removeprefix("```")
            inside = []
            for _, inner in lines:
                if inner.strip() == "```":
                    break
                inside.append(inner[indent:])
            needs = re.fullmatch(r"\s*<!-- needs: (.*\S) -->", before)
            found.append(Block(f"{page}:{number}", language, "\n".join(inside) + "\n", needs[1] if needs else ""))
        if line.strip():
            before = line
    return tuple(found)


def blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language == language and not block.needs]


def prose(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)


def test_every_block_is_checked():
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language in ("python", "sh", "yaml", "text"), block.place
        unfenced = re.findall(r"\n\n {4}[^\s].*", re.sub(r"\n\d\..*?(?=\n\S)", "", prose(page), flags=re.DOTALL))
        assert unfenced == [], f"{page}: code without a fence is checked by nobody"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the models and texts that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    draw = random.Random(0)
    for name in ("contracts.jsonl", "more-contracts.jsonl"):
        texts = [" ".join(draw.choices(TEXT.split(), k=80)) for _ in range(40)]
        (folder / name).write_text("\n".join(json.dumps({"text": text, "doc": f"{name}-{text}"}) for text in texts))
    config = PrunerConfig(num_calibration_samples=8, max_seq_length=64, native_architecture=True)
    data = str(folder / "contracts.jsonl")
    prune_to_folder(str(folder / "base"), data, folder / "mini-gpt", config, eval_options=QUICK)
    (folder / "spaces").mkdir()
    return folder


def training_names(place) -> dict[str, object]:
    """What the blocks of a training expect the reader to have."""
    ids = torch.randint(3, 300, (24, 32), generator=torch.Generator().manual_seed(0))
    return {
        "model": tiny_model("llama"),
        "tokenizer": tiny_tokenizer(),
        "args": TrainingArguments(
            str(place / "training"),
            max_steps=8,
            save_steps=6,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
        ),
        "train_dataset": [{"input_ids": row, "labels": row} for row in ids],
        "checkpoint": str(place / "training/checkpoint-6"),
    }


@pytest.mark.filterwarnings("ignore:.*calibrating on those")
@pytest.mark.filterwarnings("ignore:The pruning after step .* calibrates on", "ignore:Nothing was removed")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page == "docs/export.md" else ())  # ONNX takes long to import
        for page in PAGES
        if any(block.language == "python" for block in blocks_of(page))
    ],
)
def test_python_runs(page, place, monkeypatch):
    """In the order of the page, each block with the names of the blocks before it."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("hf_context_prune.pipelines.prune.EvalOptions", lambda: QUICK)
    names = training_names(place) if page == "docs/training.md" else {}
    criteria, specs = dict(CRITERIA), dict(SPECS)
    for block in blocks_of(page):
        if block.language == "python" and not block.needs:
            text = block.text
            for real, tiny in SUBSTITUTES.items():
                text = text.replace(real, tiny)
            exec(compile(text, block.place, "exec"), names)
    CRITERIA.clear()
    CRITERIA.update(criteria)
    SPECS.clear()
    SPECS.update(specs)


@cache
def extras() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@cache
def command_line():
    return typer.main.get_command(app)


def check_own(words: list[str]) -> None:
    """Let the real command line parse the words: unknown commands, options and values are errors."""
    name, *rest = words
    command_line().commands[name].make_context(name, rest)


def check_command(words: list[str]) -> None:
    """Fail on a command that can't be what the reader needs, and on one that nobody can tell."""
    while re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    program, *rest = [words[0].removeprefix(".venv/bin/"), *words[1:]]
    if program == "hf-context-prune":
        check_own(rest)
    elif program == "accelerate" and "hf_context_prune" in rest:
        check_own(rest[rest.index("hf_context_prune") + 1 :])
    elif program == "source":
        assert rest == [".venv/bin/activate"]
    elif program in ("python", "python3") and rest[0] == "-c":
        compile(rest[1], "-c", "exec")
    elif program in ("python", "python3") and rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest[2:] if "/" in word)
    elif program in ("python", "python3") and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), rest
    elif program in ("python", "python3", "bash"):
        assert (ROOT / rest[0]).is_file(), rest
    elif program == "pip" and rest[0] == "install":
        assert rest[-1] == "." or set(re.fullmatch(r"\.\[(.*)\]", rest[-1])[1].split(",")) <= extras()
    else:
        pytest.fail(f"nobody checks {words}; mark the block with <!-- needs: ... -->")


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ") if part.strip()]


def test_commands_exist(subtests):
    for block in blocks("sh"):
        for words in commands(block.text):
            with subtests.test(block.place, words=words):
                check_command(words)


def test_every_extra_is_explained():
    table = re.search(r"^\| extra \|.*?\n\n", PAGES["docs/get-started.md"], re.MULTILINE | re.DOTALL)[0]
    assert {
        name for line in table.strip().splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])
    } == extras()


def test_options_in_prose_exist(subtests):
    """Of this command line; others' are named here."""
    known = {"--install-completion", "--mpirun_hostfile", "--cpu", "--num_processes", "--multi_gpu", "--flash-attn"}
    for command in command_line().commands.values():
        for parameter in command.params:
            known.update([*parameter.opts, *parameter.secondary_opts])
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose(page)):
            if "pytest" in code or "python -m benchmarks" in code:
                continue
            with subtests.test(page, code=code):
                assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) <= known


def test_benchmarks_in_prose_exist():
    for page in PAGES:
        for name in re.findall(r"`python -m (benchmarks\.\w+)", PAGES[page]):
            assert importlib.util.find_spec(name), f"{page}: {name}"


def test_readme_commands_run(place, monkeypatch, capsys):
    """The commands for one's own text, on a tiny model."""
    monkeypatch.chdir(place)
    (block,) = (block for block in blocks_of("README.md") if "inspect" in block.text)
    for words in [words for words in commands(block.text) if words[0] == "hf-context-prune"]:
        arguments = [word.replace(HUB_ID, "base") for word in words[1:]]
        monkeypatch.setattr(sys, "stdin", io.StringIO("The court finds\n"))
        monkeypatch.setattr(sys, "argv", ["hf-context-prune", *arguments, *RUN_COMMANDS[arguments[0]]])
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert not exit_info.value.code, capsys.readouterr().err


def test_yaml_is_read(tmp_path):
    for block in blocks("yaml"):
        (tmp_path / "values.yaml").write_text(block.text)
        if "models:" in block.text:
            read_space_settings(tmp_path / "values.yaml")
        else:
            values = read_options(tmp_path / "values.yaml")
            RecoveryConfig.from_dict(values.pop("recovery", {}))
            PrunerConfig.from_dict(values)


def test_readme_is_short_and_begins_with_the_two_commands():
    text = PAGES["README.md"]
    first, second = (block.text for block in blocks_of("README.md")[:2])
    assert len(text.splitlines()) <= 150
    assert text.index(second) < text.index("![")
    assert re.fullmatch(r"python3 -m venv \.venv && .* && \.venv/bin/hf-context-prune demo\n", first)
    assert second.rpartition(" && ")[2].strip() in (ROOT / ".ci/run").read_text()


def test_the_reference_has_every_public_name():
    listed = re.findall(r"^::: hf_context_prune\.(\w+)$", PAGES["docs/reference/index.md"], re.MULTILINE)
    assert sorted(listed) == sorted(set(hf_context_prune.__all__) - {"__version__"})


def test_the_supported_architectures_are_named():
    assert f"[{len(BUILT_IN)} families](docs/families.md)" in PAGES["README.md"]
    listed = re.findall(r"^\| `(\w+)` \|", PAGES["docs/families.md"], re.MULTILINE)
    assert sorted(listed) == sorted(BUILT_IN)


def test_quoted_messages_are_real():
    """Troubleshooting quotes pieces of the sources' own messages."""
    texts = [
        node.value
        for path in (ROOT / "hf_context_prune").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    quoted = re.findall(r'"`([^`]+)`"', PAGES["docs/troubleshooting.md"])
    assert len(quoted) > 15
    assert [words for words in quoted if not any(words in text for text in texts)] == []


FIGURE = re.compile(r"([-+]?\d+\.\d+) ?%?\*{0,2} \[([-+]?\d+\.\d+) ?%?, ([-+]?\d+\.\d+) ?%?\]")


def figures(text: str) -> list[tuple[tuple[float, ...], int]]:
    """Every value with its interval, and how many decimals it has."""
    return [
        (tuple(map(float, match.groups())), len(match[1].partition(".")[2]))
        for match in FIGURE.finditer(text.replace("\n", " ").replace("\\", ""))
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if figures(PAGES[page])])
def test_figures_are_those_of_the_results(page):
    """Every value with an interval stands in RESULTS.md or in a model card, perhaps with more decimals."""
    sources = [ROOT / "benchmarks/RESULTS.md", *(ROOT / "model_cards").glob("*.md")]
    measured = [values for path in sources for values, _ in figures(path.read_text(encoding="utf-8"))]
    unknown = [
        values
        for values, decimals in figures(PAGES[page])
        if not any(
            all(abs(a - b) < 0.51 * 10**-decimals for a, b in zip(values, known, strict=True)) for known in measured
        )
    ]
    assert unknown == []


def test_the_results_in_readme_are_those_of_the_picture():
    """Also the bare ones, with the general text behind them: README's table beside the rows that the picture shows."""
    results = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8").partition("## Loss by size")[2]
    results = results.partition("<!-- end frontier -->")[0]
    lines = re.findall(r"^\| (\d+) % \| (.+) \|$", PAGES["README.md"], re.MULTILINE)
    assert [share for share, _ in lines] == ["10", "20", "30", "50"]
    for share, cells in lines:
        law, medicine, finance, trained, general, general_trained = map(re.escape, re.split(r" \| |(?<=%), ", cells))
        by_domain = rf"^\| {share}% \| default \| {law} \(.+ \| {medicine} \| {finance} \("
        compared = rf"^\| {share}% \| default \| {medicine} \| {general} \["
        healed = rf"^\| {share}% \| default, 8 .+ \| {trained} \| {general_trained} \["
        assert all(re.search(row, results, re.MULTILINE) for row in (by_domain, compared, healed)), share
    assert "](docs/frontier.png)" in PAGES["README.md"]
    assert (ROOT / "docs/frontier.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_the_answers_are_those_of_the_results():
    """Also the bare ones: every number of the questions and answers with a decimal or thousands."""
    results = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    found = re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+|,\d{3})(?![\w.]*\w)", re.sub(r"`[^`]*`", "", prose("docs/faq.md")))
    assert len(found) > 20
    assert [number for number in found if not re.search(rf"(?<![\d.,]){re.escape(number)}(?!\d)", results)] == []


def test_the_table_of_families_is_written_from_the_tables():
    assert PAGES["docs/families.md"] == families_page(), "run python -m tests.support.families_page"
    assert f"{len(GGUF_FAMILIES)} of [{len(BUILT_IN)} families]" in PAGES["README.md"]
    assert f"{len(GGUF_FAMILIES)} of {len(BUILT_IN)} [families]" in PAGES["docs/export.md"]


def test_install_commands_work_today():
    """The package is on no index: `pip install .` in a checkout, or the URL of a repository."""
    files = [path for pattern in TEXTS for path in ROOT.glob(pattern) if path.is_file()]
    assert len(files) > 100
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            text = re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)  # strings over several lines
        found = re.findall(r"pip install[^\n`(]*?[ \"'\\]hf[-_]context[-_]prune(?![\w./@-]*(?:\.git|/))[^\n]*", text)
        assert found == [], path
