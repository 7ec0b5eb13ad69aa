"""``hf-context-prune check``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hf_context_prune.utils.options import MODEL

from .options import FormatOption, ModelArgument, OutputFormat, RevisionOption, shared
from .output import mark, out, out_json

if TYPE_CHECKING:
    from hf_context_prune.pipelines.architecture.contract import Check


def check(
    model: ModelArgument,
    revision: RevisionOption = None,
    trust_remote_code: Annotated[
        bool,
        shared("Run the code that the folder or repository brings along. Read it first.", MODEL, "--trust-remote-code"),
    ] = False,
    format: FormatOption = OutputFormat.auto,
) -> None:
    """Test whether a model can be pruned, and propose the entry of an unknown architecture.

    Only its config is read. The entry is proposed from the names and shapes of its layers, and tested on a tiny random
    copy: the smaller model computes what the model with silenced units does, it can be saved and reloaded, it trains.
    Where all holds, the entry is printed as code for register_architecture; else the first check that fails, and why.
    """
    from hf_context_prune.pipelines.architecture.check import check_architecture, entry_code

    shown = format is OutputFormat.auto
    found = check_architecture(
        model, revision=revision, trust_remote_code=trust_remote_code, report=_show if shown else lambda done: None
    )
    if format is OutputFormat.json:
        out_json(found.to_dict())
    elif not shown:
        out(entry_code(found.spec))
    else:
        _tell(found.model_type, known=found.known, passed=found.passed, code=entry_code(found.spec))
    if not found.passed:
        raise typer.Exit(1)


def _show(done: Check) -> None:
    out(f"{mark(done.why is None)} {done.name}{'' if done.why is None else f': {done.why}'}")


def _tell(model_type: str, *, known: bool, passed: bool, code: str) -> None:
    if passed and known:
        out(f"{model_type} is supported.")
        return
    if known:
        out(f"{model_type} is supported, but this model of it does not pass.")
        return
    if not passed:
        out(f"{model_type} has no entry that passes. This one came furthest; mend it, and register it:")
        out(code)
        return
    out(f"{model_type} can be pruned once this has run:")
    out("")
    out("from hf_context_prune import ArchSpec, Projection, register_architecture")
    out("")
    out(f"register_architecture({code})")
    if "transformers_modules." in code:
        out("")
        out("Its classes are code of the folder or repository. Install that code as a package, and name it in their")
        out('place, such as "my_package.modeling:MyForCausalLM": another process finds them only there.')
