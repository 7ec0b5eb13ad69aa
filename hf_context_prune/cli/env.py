"""``hf-context-prune env``."""

from __future__ import annotations

from .options import FormatOption, OutputFormat
from .output import out, out_json


def env(format: FormatOption = OutputFormat.auto) -> None:
    """Show versions, machine and cache, for a bug report.

    Nothing is sent anywhere. To empty the cache, remove the folder that this shows: what is needed is fetched or made
    again, but runs that were interrupted can't be resumed then.
    """
    from hf_context_prune.pipelines.env import describe_environment

    found = describe_environment()
    if format is OutputFormat.json:
        out_json(found.to_dict())
        return
    if format is OutputFormat.quiet:
        out(found.version)
        return
    out(f"hf-context-prune: {found.version}")
    out(f"Python: {found.python}")
    for name, version in found.packages.items():
        out(f"{name}: {version}")
    out(f"Platform: {found.platform}")
    out(f"Device: {found.device} ({found.processor})")
    out(f"Cores: {found.cpus}, threads of torch: {found.threads}")
    out(f"Memory: {_gigabytes(found.memory_free)} of {_gigabytes(found.memory_total)} free")
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in found.cache_bytes.items())
    out(f"Cache: {found.cache_folder}, {_gigabytes(sum(found.cache_bytes.values()))}{parts and f' ({parts})'}")
    out("To empty the cache, remove that folder. Interrupted runs can't be resumed then.")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
