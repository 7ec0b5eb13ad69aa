"""The sentences, tables and code of a card's body; every foreign value in them is inert."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from hf_context_prune.config import PrunerConfig
from hf_context_prune.evaluation.reports.markdown import Trusted, block, code, inert, one_line, table
from hf_context_prune.evaluation.reports.report import EvalReport
from hf_context_prune.evaluation.reports.rows import table_rows, text_rows
from hf_context_prune.utils.file_names import PICTURE_NAME

from .facts import CardFacts

REPOSITORY_PATH = "the id or folder of this model"
_SHOWN_ABOVE = ("bits per byte", "excess loss")
_COLUMNS = ("measure", "base", "pruned", "change")
_RECOVERY = (
    *("method", "max_minutes", "max_steps", "num_epochs", "learning_rate", "batch_size", "max_seq_length"),
    *("lora_rank", "num_evals", "early_stopping_patience", "recovery_seed"),
)
_RENAMED = {"evaluations": "num_evals", "patience": "early_stopping_patience"}
"""Recovery options of older folders, with their names of today."""
_REMOVED = {"distillation": 0.0, "temperature": 1.0, "rewind": "none"}
"""Recovery options of older folders that `recover` no longer has, with the values at which they changed nothing."""
CITATION = """@misc{valicenti2023minigpts,
  title = {Mini-GPTs: Efficient Large Language Models through Contextual Pruning},
  author = {Valicenti, Tim and Vidal, Justice and Patnaik, Ritik},
  year = {2023},
  eprint = {2312.12682},
  archivePrefix = {arXiv}
}"""


def body_values(facts: CardFacts) -> dict[str, Any]:
    """What the template is filled with."""
    report = facts.report
    return {
        "name": facts.name,
        "summary": _summary(facts),
        "picture": Trusted(f"![MLP neurons and KV groups of every layer, before and after]({PICTURE_NAME})"),
        "purpose": _purpose(facts),
        "not_for": _NOT_FOR,
        "removed": _removed(facts),
        "size_table": _table(report, "size") if report else Trusted(""),
        "calibration": _calibration(facts),
        "measured": _measured(report) if report else Trusted(""),
        "text_table": _text_table(report) if report else None,
        "more_table": _table(report, "loss", "general", "budget", "multiple_choice") if report else None,
        "notes": [*report.notes] if report else [],
        "measure_command": block("sh", _evaluate(facts)),
        "speed_table": _table(report, "speed", "memory") if report else None,
        "hardware": _hardware(report) if report else None,
        "bench_hint": Trusted(f"`hf-context-prune bench` measures both models in turns: {_bench(facts)}."),
        "loading": _loading(facts),
        "reproduce": _reproduce(facts),
        "versions": _versions(facts),
        "limits": _limits(facts),
        "licence": _licence(facts),
        "citation": block("bibtex", CITATION),
    }


_NOT_FOR = Trusted(
    "It is **not** a general assistant: what the domain's text does not use was removed. It is no source of legal, "
    "medical or financial advice, and nobody has checked its answers. Don't use it for text of other domains, "
    "languages or code without measuring it there, nor where a wrong answer does harm."
)


def _share(now: int, before: int) -> str:
    return f"{100 * (1 - now / before):.1f} %" if before else "0 %"


def _summary(facts: CardFacts) -> Trusted:
    what = f"the domain *{inert(facts.domain)}*" if facts.domain else "one domain"
    base = f"{code(facts.base_id)} (from {code(facts.base_place)})" if facts.base_id else f"{code(facts.base_place)}"
    text = f"{base}, made smaller for {what} by contextual pruning"
    size = facts.report.size if facts.report else None
    if size and size.pruned_parameters is not None:
        text += (
            f": {size.pruned_parameters:,} of {size.base_parameters:,} parameters are left "
            f"({_share(size.pruned_parameters, size.base_parameters)} are gone). They were removed, not zeroed"
        )
    zeroed = (facts.plan.provenance.get("zeroed") or {}).get("zeroed_not_removed")
    if zeroed:
        text += f"; {zeroed:,} other parameters are zeros that stay in the file"
    recovered = ", and it was then trained on the domain's text" if facts.plan.provenance.get("recoveries") else ""
    return Trusted(f"{text}{recovered}.")


def _purpose(facts: CardFacts) -> Trusted:
    data = facts.told("data").get("name")
    text = f"Text like that of {code(str(data))}" if data else "Text like that which it was fitted to"
    domain = f", of the domain *{inert(facts.domain)}*" if facts.domain else ""
    return Trusted(f"{text}{domain}: language modelling, completion, and as a start for fine-tuning.")


def _removed(facts: CardFacts) -> Trusted:
    plan, lines = facts.plan, []
    for label, unit in (("MLP neurons", "neurons"), ("attention KV groups (with their query heads)", "kv_groups")):
        before = [getattr(widths, unit) for widths in plan.dense]
        now = [getattr(widths, unit) for widths in plan.widths]
        spread = f"{min(now):,}" if min(now) == max(now) else f"{min(now):,} to {max(now):,}"
        lines.append(
            f"- {label}: {sum(now):,} of {sum(before):,} are left ({_share(sum(now), sum(before))} gone); {spread} a "
            f"layer, before {max(before):,}"
        )
    if plan.vocabulary is not None:
        kept, dense = len(plan.vocabulary.kept), plan.vocabulary.dense
        lines.append(f"- tokens of the vocabulary: {kept:,} of {dense:,} are left ({_share(kept, dense)} gone)")
    return Trusted("\n".join(lines))


def _table(report: EvalReport, *groups: str) -> Trusted | None:
    rows = [row for row in table_rows(report, *groups) if not row[0].startswith(_SHOWN_ABOVE)]
    if not rows:
        return None
    names = list(_COLUMNS[: len(rows[0])])
    if report.loss.recovered is not None and len(names) > 2 and groups[0] in ("size", "speed"):
        names[2] = "recovered"
    return table(names, rows)


def _text_table(report: EvalReport) -> Trusted:
    header, *rows = text_rows(report)
    return table(header, rows)


def _calibration(facts: CardFacts) -> Trusted:
    data, tokens = facts.told("data"), facts.plan.provenance.get("num_calibration_tokens")
    parts = []
    if data.get("name"):
        revision = f", revision {code(str(data['revision']))}" if data.get("revision") else ""
        parts.append(f"{code(str(data['name']))}{revision}; sha256 of its texts {code(str(data.get('fingerprint')))}.")
    elif facts.plan.provenance.get("schedule"):
        parts.append(
            "The batches of its training: it was pruned inside a Trainer, by the last tokens before each step."
        )
    else:
        parts.append("The plan does not name it.")
    if isinstance(tokens, int):
        parts.append(f"{tokens:,} tokens of it chose the units and refitted what is left.")
    search = facts.told("search_data")
    if search.get("name"):
        parts.append(f"The size was searched on other documents of it ({code(str(search['name']))}).")
    return Trusted(" ".join(parts))


def _measured(report: EvalReport) -> Trusted:
    first = report.loss.base
    return Trusted(
        f"Bits per byte, lower is better: what a byte of text costs, so models with different vocabularies compare. In "
        f"brackets 95 % bootstrap intervals over documents ({first.n_resamples:,} resamples, seed {first.seed}); base "
        f"and pruned model read the same documents, none of which was used to calibrate. "
        f"{inert(report.dataset.held_out)}"
    )


def _hardware(report: EvalReport) -> Trusted:
    environment = report.environment
    speed = report.speed.base if report.speed else None
    place = inert(environment.platform)
    if speed is None:
        return Trusted(f"On {place}, {inert(environment.dtype)}.")
    return Trusted(
        f"Measured in turns on {inert(speed.hardware)} ({inert(speed.device)}, {speed.threads} threads, "
        f"{inert(speed.dtype)}, {place}): a prompt of {speed.prompt_tokens} tokens, then {speed.new_tokens} new ones, "
        f"batch {speed.batch_size}; median and quartiles."
    )


def _loading(facts: CardFacts) -> Trusted:
    stock = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})"""
    name = json.dumps(one_line(facts.name), ensure_ascii=False)
    if facts.is_stock:
        return Trusted(
            f"It is a plain {code(facts.architecture or 'model of transformers')}: nothing else is needed.\n\n"
            f"{block('python', stock.format(name=name))}"
        )
    remote = stock.replace("({name})", "({name}, trust_remote_code=True)").format(name=name)
    ours = stock.replace("from transformers", "import hf_context_prune.modeling\nfrom transformers").format(name=name)
    return Trusted(
        f"Its layers have different widths, so it is a {code(facts.architecture)}. With the package "
        f"(`pip install hf-context-prune`), whose import registers the class; no code of this repository runs:\n\n"
        f"{block('python', ours)}\n\nWithout it, by the modeling files beside the weights (read them first):\n\n"
        f"{block('python', remote)}"
    )


def _option(name: str, value: object) -> str:
    flag = "--" + {"pruning_seed": "seed", "recovery_seed": "seed"}.get(name, name).replace("_", "-")
    return flag if value is True else f"{flag} {shlex.quote(one_line(str(value)))}"


def _command(verb: str, place: str, options: Iterable[str]) -> str:
    return " \\\n  ".join([f"hf-context-prune {verb} {shlex.quote(one_line(place))}", *options])


def _reproduce(facts: CardFacts) -> Trusted:
    provenance, config = facts.plan.provenance, facts.told("config")
    if not config:
        return Trusted("The plan does not say with which options it was made.")
    defaults = {item.name: item.default for item in dataclasses.fields(PrunerConfig)}
    chosen = {
        name: value for name, value in config.items() if name in defaults and value not in (None, False, defaults[name])
    }
    if provenance.get("schedule"):
        told = facts.told("schedule").items()
        schedule = ", ".join(f"{name}={value!r}" for name, value in told if name.isidentifier())  # not code
        given = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
        call = f"ContextPruneCallback(PrunerConfig({one_line(given)}), PruningSchedule({one_line(schedule)}))"
        return Trusted(f"Train the base with this callback:\n\n{block('python', call)}")
    data, name = str(facts.told("data").get("name", "DATA")), "mini-gpt"
    sources = [_option("data", data)]
    report, recoveries = facts.report, provenance.get("recoveries")
    if report is not None and not recoveries:
        if report.dataset.name != data:
            sources.append(_option("eval_data", report.dataset.name))
        if report.general is not None:
            sources.append(_option("general_data", report.general.dataset.name))
    revision = [_option("revision", provenance["base_revision"])] if provenance.get("base_revision") else []
    options = [*revision, *sources, *(_option(*item) for item in chosen.items()), _option("output", name)]
    commands = [_command("prune", facts.base_place, options)]
    for number, run in enumerate(recoveries if isinstance(recoveries, list) else (), 1):
        made_with = run.get("config") if isinstance(run, Mapping) else None
        if isinstance(made_with, Mapping):
            asked = {_RENAMED.get(key, key): value for key, value in made_with.items()}
            choices = [_option(key, asked[key]) for key in _RECOVERY if asked.get(key) is not None]
            gone = [
                _option(key, asked[key]) for key, idle in _REMOVED.items() if asked.get(key, idle) not in (None, idle)
            ]
            if gone:
                commands.append(f"# This run also had {' '.join(gone)}, which `recover` no longer has:")
            after = f"{name}-recovered" + (f"-{number}" if number > 1 else "")
            commands.append(_command("recover", name, [_option("data", data), *choices, _option("output", after)]))
            name = after
    return Trusted(block("sh", "\n".join(commands)))


def _versions(facts: CardFacts) -> Trusted:
    versions = dict(facts.told("versions"))
    if facts.report is not None:
        versions = {**facts.report.environment.packages, **versions}
    shown = ", ".join(f"{inert(str(name))} {inert(str(version))}" for name, version in sorted(versions.items()))
    when = f" Measured {inert(facts.report.created)}." if facts.report else ""
    return Trusted(
        f"Plan {code(facts.plan.sha256)} (`pruning_plan.json`). {'Versions: ' + shown + '.' if shown else ''}{when}"
    )


def _evaluate(facts: CardFacts) -> str:
    return _command(
        "evaluate", facts.name, [_option("base", facts.base_place), "--data DATA", "--general-data GENERAL"]
    )


def _bench(facts: CardFacts) -> Trusted:
    return code(f"hf-context-prune bench {shlex.quote(one_line(facts.base_place))} {shlex.quote(one_line(facts.name))}")


def _limits(facts: CardFacts) -> list[Trusted]:
    general = facts.report.general if facts.report else None
    limits = [_forgotten(facts)]
    if general is None and facts.report is not None:
        limits.append(Trusted(f"Measure it: {code(' '.join(_evaluate(facts).replace(chr(92), '').split()))}."))
    limits += [
        Trusted(
            "Removing weights can change refusals and other safety behaviour; none of it was tested here. Test it "
            "before you let others use the model."
        ),
        Trusted("What its base does wrong (bias, invented facts) it does too; see the base's card."),
    ]
    if facts.plan.vocabulary is not None:
        limits.append(
            Trusted(
                "Tokens were removed: any text still goes in and out, but text of other domains takes more tokens. "
                "Losses and perplexities a token don't compare with the base's; bits per byte do."
            )
        )
    return limits


def _forgotten(facts: CardFacts) -> Trusted:
    general = facts.report.general if facts.report else None
    loss = general.loss if general else None
    last = None if loss is None else (loss.comparison if loss.recovered is None else loss.recovered_comparison)
    if general is None or loss is None or last is None:
        return Trusted(
            "**What it forgot outside the domain was not measured**; expect more loss there than on the domain."
        )
    change = 100 * (last.bits_per_byte_ratio.value - 1)
    now = loss.recovered or loss.pruned or loss.base
    before, after = loss.base.bits_per_byte.value, now.bits_per_byte.value
    return Trusted(
        f"**What it forgot:** on general text ({code(general.dataset.name)}, {loss.base.num_documents:,} documents) "
        f"bits per byte went from {before:.4f} to {after:.4f} ({change:+.1f} %)."
    )


def _licence(facts: CardFacts) -> Trusted:
    base, licence = facts.base, facts.base.get("license")
    if not licence:
        why = inert(str(base.get("unknown") or f"{base.get('stated_by', 'the plan')} names none"))
        return Trusted(
            f"The base's licence is not known ({why}), so none is given here. Find out under which licence "
            f"{code(facts.base_place)} is before you use or share this model."
        )
    shown = ", ".join(str(item) for item in licence) if isinstance(licence, list) else str(licence)
    name = f" ({inert(str(base['license_name']))})" if base.get("license_name") else ""
    stated_by = inert(str(base.get("stated_by", "the plan")))
    return Trusted(f"That of the base, {inert(shown)}{name}, as stated by {stated_by}. It binds this model too.")
