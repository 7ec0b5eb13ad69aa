"""The command lines and the code of a card; every foreign value in them is quoted."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from hf_context_prune.config import PrunerConfig, ThresholdConfig
from hf_context_prune.errors import ConfigError
from hf_context_prune.evaluation.reports.markdown import Trusted, block, code, one_line
from hf_context_prune.storage.provenance import config_from_provenance
from hf_context_prune.utils.options import help_of

from .facts import CardFacts

_RECOVERY = (
    *("method", "max_minutes", "max_steps", "num_epochs", "learning_rate", "batch_size", "max_seq_length"),
    *("lora_rank", "num_evals", "early_stopping_patience", "recovery_seed"),
)
_RENAMED = {"evaluations": "num_evals", "patience": "early_stopping_patience"}
"""Recovery options of older folders, with their names of today."""
_REMOVED = {"distillation": 0.0, "temperature": 1.0, "rewind": "none"}
"""Recovery options of older folders that `recover` no longer has, with the values at which they changed nothing."""


def reproduce_commands(facts: CardFacts) -> Trusted:
    """Return the commands that make the model again, or the callback where it was pruned in a training."""
    values = facts.recorded("config")
    if not values:
        return Trusted("The plan does not record the options of the run.")
    try:
        config = config_from_provenance(values)
    except ConfigError:
        return Trusted(
            "This version of hf-context-prune does not have all options of the run, which were: "
            f"{code(json.dumps(dict(values), ensure_ascii=False))}."
        )
    if facts.plan.provenance.get("schedule"):
        return _callback(facts, config)
    name = "mini-gpt"
    commands = [_prune_command(facts, config, name)]
    recoveries = facts.plan.provenance.get("recoveries")
    for number, run in enumerate(recoveries if isinstance(recoveries, list) else (), 1):
        made_with = run.get("config") if isinstance(run, Mapping) else None
        if isinstance(made_with, Mapping):
            after = f"{name}-recovered" if number == 1 else f"mini-gpt-recovered-{number}"
            commands += _recover_commands(facts, made_with, run.get("test_data"), name, after)
            name = after
    return Trusted(block("sh", "\n".join(commands)))


def evaluate_command(facts: CardFacts) -> str:
    """Return the command that measures the model beside its base."""
    return _command(
        "evaluate", facts.name, [_option("base", facts.base_place), "--data DATA", "--general-data GENERAL"]
    )


def bench_command(facts: CardFacts) -> str:
    """Return the command that times the model beside its base."""
    return f"hf-context-prune bench {shlex.quote(one_line(facts.base_place))} {shlex.quote(one_line(facts.name))}"


def _callback(facts: CardFacts, config: PrunerConfig | ThresholdConfig) -> Trusted:
    recorded = facts.recorded("schedule").items()
    schedule = ", ".join(f"{name}={value!r}" for name, value in recorded if name.isidentifier())  # not code
    given = ", ".join(f"{name}={value!r}" for name, value in _given_options(config).items())
    made = f"{type(config).__name__}({one_line(given)})"
    call = f"ContextPruneCallback({made}, PruningSchedule({one_line(schedule)}))"
    return Trusted(f"Train the base with this callback:\n\n{block('python', call)}")


def _prune_command(facts: CardFacts, config: PrunerConfig | ThresholdConfig, output: str) -> str:
    provenance, report = facts.plan.provenance, facts.report
    data = _data_of(facts)
    pinned = {"revision": provenance.get("base_revision"), "dtype": provenance.get("base_dtype")}
    options = [_option(name, value) for name, value in pinned.items() if value]
    options.append(_option("data", data))
    general, test = facts.recorded("general_data").get("name"), provenance.get("test_data")
    if report is not None and not provenance.get("recoveries"):
        test = report.dataset.name
        if report.general is not None:
            general = report.general.dataset.name
    if test and test != data:
        options.append(_option("eval_data", test))
    if general:
        options.append(_option("general_data", general))
    flags = {item.name: about.flag for item in dataclasses.fields(config) if (about := help_of(item)) is not None}
    given = {name: value for name, value in _given_options(config).items() if general or name != "general_data_ratio"}
    options += [_option(flags.get(name) or name, value) for name, value in given.items()]
    return _command("prune", facts.base_place, [*options, _option("output", output)])


def _recover_commands(
    facts: CardFacts, made_with: Mapping[str, Any], test: object, folder: str, output: str
) -> list[str]:
    asked = {_RENAMED.get(name, name): value for name, value in made_with.items()}
    flags = {"recovery_seed": "seed"}
    options = [_option("eval_data", test)] if test else []
    options += [_option(flags.get(name, name), asked[name]) for name in _RECOVERY if asked.get(name) is not None]
    gone = [_option(name, asked[name]) for name, idle in _REMOVED.items() if asked.get(name, idle) not in (None, idle)]
    note = [f"# This run also had {' '.join(gone)}, which `recover` no longer has:"] if gone else []
    if general := facts.recorded("general_data").get("name"):  # the same share of it is trained on
        options.append(_option("general_data", general))
    return [*note, _command("recover", folder, [_option("data", _data_of(facts)), *options, _option("output", output)])]


def _data_of(facts: CardFacts) -> str:
    return str(facts.recorded("data").get("name", "DATA"))


def _given_options(config: PrunerConfig | ThresholdConfig) -> dict[str, Any]:
    """Return the options that differ from their defaults, by name."""
    values = {item.name: (getattr(config, item.name), item.default) for item in dataclasses.fields(config)}
    return {name: value for name, (value, usual) in sorted(values.items()) if value is not None and value != usual}


def _option(name: str, value: object) -> str:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    return f"{flag} {shlex.quote(one_line(str(value)))}"


def _command(verb: str, place: str, options: Iterable[str]) -> str:
    return " \\\n  ".join([f"hf-context-prune {verb} {shlex.quote(one_line(place))}", *options])
