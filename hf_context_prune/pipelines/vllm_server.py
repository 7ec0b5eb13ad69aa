"""A pruned folder -> vLLM's OpenAI-compatible server, in this environment or in another one.

vLLM reads the widths and heads of each layer from ``per_layer_config``, in its backend for models of `transformers`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from packaging.version import Version

from hf_context_prune.errors import ConfigError
from hf_context_prune.modeling.geometry import read_geometry
from hf_context_prune.modeling.specs import BUILT_IN, PREFIX
from hf_context_prune.modeling.wrappers import text_part, wrapper_spec
from hf_context_prune.storage.manifest import verify_folder
from hf_context_prune.storage.model_config import read_config
from hf_context_prune.utils.file_names import EXPORT_REPORT_NAME

from .serve import check_is_folder

LEAST_VERSION = "0.32"
"""First vLLM that reads sizes of single layers."""
INSTALL = "python3 -m venv vllm && vllm/bin/pip install vllm"
_ASK = """
import importlib.metadata as metadata, json
names = metadata.packages_distributions().get("vllm", [])
plugins = [one.name for one in metadata.entry_points(group="vllm.general_plugins")]
print(json.dumps({"version": metadata.version(names[0]) if names else None, "plugin": "hf_context_prune" in plugins}))
"""
_SIZE_OPTIONS = ("--tensor-parallel-size", "-tp")


def vllm_command(folder: Path, arguments: Sequence[str] = (), *, python: Path | None = None) -> list[str]:
    """Return the command that serves a folder with vLLM.

    Args:
        folder: A pruned folder. One of native widths runs in vLLM's own implementation of the architecture.
        arguments: Options of vLLM's server.
        python: The Python of the environment that has vLLM; None: this one.

    Raises:
        ConfigError: vLLM is missing or too old there, the folder is an export, or its KV groups can't be divided.
        LoadError: The folder is damaged.
    """
    check_is_folder(folder)
    if EXPORT_REPORT_NAME in verify_folder(folder)["files"]:
        raise ConfigError(f"{folder} is an export. vLLM serves the folder that it was made from.")
    config = read_config(str(folder), folder, None)
    variable = str(config.model_type).startswith(PREFIX)
    spec = text_part(config)[1]
    if variable and wrapper_spec(config) is not None:
        raise ConfigError(
            f"vLLM does not load a {config.model_type} model in its backend for models of transformers. Serve {folder} "
            f"without --engine vllm, prune to uniform widths (--native-architecture), or the text alone (--text-only)."
        )
    if variable and spec.transposed:
        raise ConfigError(
            f"vLLM does not load the stacked projections of {spec.model_type} in its backend for models of "
            f"transformers. Serve {folder} without --engine vllm, or prune to uniform widths (--native-architecture)."
        )
    check_tensor_parallel(config, arguments)
    own = Path(sys.executable) if python is None else _find(python)
    found = read_environment(own)
    command = [str(own), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    if variable:
        command += ["--model-impl", "transformers"]
    # vLLM runs the modeling files in the folder, whose sums are verified; the plugin knows no registered architecture.
    if variable and not (found["plugin"] and spec.model_type in BUILT_IN):
        if "AutoModel" not in config.auto_map:
            raise ConfigError(
                f"{folder} is of an older version, whose modeling files have no class for vLLM. Prune again, or "
                f"install hf-context-prune in vLLM's environment."
            )
        command += ["--trust-remote-code"]
    return [*command, *arguments]


def check_tensor_parallel(config: object, arguments: Sequence[str]) -> None:
    """Refuse to divide attention over more processes than the KV groups of every layer allow.

    Args:
        config: The folder's config.
        arguments: Options of vLLM's server.

    Raises:
        ConfigError: Names the layer and what divides all layers.
    """
    if (processes := _tensor_parallel_size(arguments)) < 2:
        return
    groups = [
        layer.kv_groups or 1 for layer in read_geometry(*text_part(config)).layers
    ]  # heads that stay: not known here
    bad = next((index for index, count in enumerate(groups) if count % processes), None)
    if bad is not None:
        allowed = [size for size in range(1, min(groups) + 1) if not any(count % size for count in groups)]
        able = f"{', '.join(map(str, allowed[1:]))} processes can" if allowed[1:] else "no number of processes can"
        advice = "" if max(groups) % processes else ", or prune with --units tokens,neurons, which keeps all KV groups"
        raise ConfigError(
            f"--tensor-parallel-size is {processes}, but layer {bad} has {groups[bad]} KV groups, which {processes} "
            f"processes can't share ({able}, with this folder). Leave the option out{advice}."
        )


def _tensor_parallel_size(arguments: Sequence[str]) -> int:
    """Return the value of the option; 1 where it is absent or no number (vLLM refuses that itself)."""
    for name, following in pairwise((*arguments, "")):
        option, equals, value = name.replace("_", "-").partition("=")
        if option in _SIZE_OPTIONS:
            text = value if equals else following
            return int(text) if text.isdecimal() else 1
    return 1


def _find(python: Path) -> Path:
    found = shutil.which(python)
    if found is None:
        raise ConfigError(f"--python {python} is no program. Name the Python of vLLM's environment: vllm/bin/python.")
    return Path(found)


def read_environment(python: Path) -> dict[str, object]:
    """Return vLLM's version in an environment, and whether this package is a plugin there.

    Raises:
        ConfigError: There is no vLLM, or one that is too old.
    """
    try:
        done = subprocess.run([str(python), "-c", _ASK], capture_output=True, text=True, check=True, timeout=120)
        found: dict[str, object] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"{python} is no Python that runs ({type(error).__name__}). Name one by --python.") from error
    advice = (
        f"Install vLLM {LEAST_VERSION} or later, best in an environment of its own ({INSTALL}), and name its Python: "
        f"--python vllm/bin/python."
    )
    if found["version"] is None:
        raise ConfigError(f"{python} has no vLLM. {advice}")
    if Version(str(found["version"])) < Version(LEAST_VERSION):
        raise ConfigError(f"{python} has vLLM {found['version']}, which takes all layers for equal. {advice}")
    return found
