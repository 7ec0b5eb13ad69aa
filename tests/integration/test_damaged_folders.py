"""Every command refuses a folder of this package whose manifest does not verify, before it writes anything."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.support.tiny import model_and_text

SMALL = ("--max-seq-length", 32, "--num-calibration-samples", 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return model_and_text(tmp_path_factory.mktemp("damaged"), "data.jsonl")


def commands(folder):
    """Every command that reads a folder, and its words."""
    data = ("--data", "@data.jsonl")
    return {
        "prune": ("prune", folder, *data, "--output", "@new", *SMALL),
        "prune --dry-run": ("prune", folder, "--pruning-ratio", 0.1, "--dry-run"),
        "recover": ("recover", folder, *data, "--output", "@new"),
        "recover --base": ("recover", "@whole", *data, "--output", "@new", "--base", folder),
        "evaluate": ("evaluate", folder, *data),
        "evaluate --base": ("evaluate", "@base", *data, "--base", folder),
        "bench": ("bench", "@base", folder),
        "cross-domain": (
            "cross-domain",
            folder,
            "--domain",
            "a=@data.jsonl",
            "--domain",
            "b=@base",
            "--output",
            "@new",
        ),
        "paper-grid": ("paper-grid", folder, *data, "--output", "@new"),
        "report": ("report", folder),
        "card": ("card", folder),
        "inspect": ("inspect", folder),
        "export": ("export", folder, "--to", "onnx", "--output", "@new"),
        "space": ("space", folder, "--base", "@base", "--output", "@new"),
        "space --base": ("space", "@whole", "--base", folder, "--output", "@new"),
        "push": ("push", folder, "owner/name"),
        "serve": ("serve", folder),
    }


def test_a_damaged_manifest_is_an_error_in_every_command(run, place, subtests):
    code, _, err = run("prune", "@base", "--data", "@data.jsonl", "--output", "@whole", *SMALL, "--no-benchmark")
    assert code == 0, err
    for state in ("cut", "absent"):
        folder = shutil.copytree(place / "whole", place / state)
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        manifest = folder / "manifest.json"
        if state == "cut":
            manifest.write_bytes(manifest.read_bytes()[:100])
        else:
            manifest.unlink()
    for name, words in [*commands("@cut").items(), *commands("@absent").items()]:
        with subtests.test(name, words=words):
            code, _, err = run(*words)
            assert code in (1, 2)
            assert "manifest.json" in err
            assert "Traceback" not in err
    assert sorted(os.listdir(place)) == ["absent", "base", "cut", "data.jsonl", "whole"]
