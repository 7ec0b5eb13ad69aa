"""The sentences and tables of a card's body; every foreign value in them is inert."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hf_context_prune.data.records import IN_MEMORY
from hf_context_prune.evaluation.reports.markdown import Trusted, block, code, inert, one_line, table
from hf_context_prune.evaluation.reports.report import EvalReport
from hf_context_prune.evaluation.reports.rows import source_tables, table_header, table_rows, text_rows
from hf_context_prune.evaluation.reports.summary import headline, legend
from hf_context_prune.modeling.depth import WARNING, describe_layers
from hf_context_prune.modeling.geometry import units_of, widths_vary
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.modeling.runtimes import runtimes_of
from hf_context_prune.publishing.prompts import choose_plan_prompts
from hf_context_prune.utils.file_names import PICTURE_NAME

from .commands import bench_command, evaluate_command, reproduce_commands
from .facts import CardFacts

_SHOWN_ABOVE = ("bits per byte", "excess loss")
CITATION = """@misc{valicenti2023minigpts,
  title = {Mini-GPTs: Efficient Large Language Models through Contextual Pruning},
  author = {Valicenti, Tim and Vidal, Justice and Patnaik, Ritik},
  year = {2023},
  eprint = {2312.12682},
  archivePrefix = {arXiv}
}"""


def body_values(facts: CardFacts) -> dict[str, Any]:
    """Return the values that fill the template."""
    report = facts.report
    return {
        "name": facts.name,
        "headline": _headline(facts),
        "summary": _summary(facts),
        "picture": _picture(facts.plan),
        "purpose": _purpose(facts),
        "not_for": _NOT_FOR,
        "removed": _removed(facts),
        "size_table": _table(report, "size") if report else Trusted(""),
        "calibration": _calibration(facts),
        "measured": _measured(report) if report else Trusted(""),
        "text_table": _text_table(report) if report else None,
        "more_table": _table(report, "loss", "general", "budget", "multiple_choice") if report else None,
        "text_sources": _text_sources(report) if report else None,
        "sources": _by_source(report) if report else None,
        "notes": [*report.notes] if report else [],
        "measure_command": block("sh", evaluate_command(facts)),
        "speed_table": _table(report, "speed", "memory") if report else None,
        "hardware": _hardware(report) if report else None,
        "bench_hint": Trusted(f"`hf-context-prune bench` measures both models in turns: {code(bench_command(facts))}."),
        "loading": _loading(facts),
        "opens": _opens(facts),
        "example": _example(facts.report) if facts.report else None,
        "reproduce": reproduce_commands(facts),
        "versions": _versions(facts),
        "limits": _limits(facts),
        "licence": licence_text(facts.base, facts.base_name),
        "citation": block("bibtex", CITATION),
    }


_NOT_FOR = Trusted(
    "This model is **not** a general assistant: the parts that the domain's text does not use were removed. It is no "
    "source of legal, medical or financial advice, and nobody has checked its answers. Don't use it for text of other "
    "domains, other languages or code without measuring it there, nor where a wrong answer does harm."
)


def _share(now: int, before: int) -> str:
    return f"{100 * (1 - now / before):.1f} %" if before else "0 %"


def _headline(facts: CardFacts) -> Trusted:
    if facts.report is None:
        return Trusted("")
    size, *others = headline(facts.report)
    return Trusted(f"**{inert(size)}** {inert(' '.join(others))}")


def _summary(facts: CardFacts) -> Trusted:
    domain = f"the domain *{inert(facts.domain)}*" if facts.domain else "one domain"
    base = f"{code(facts.base_id)} (from {code(facts.base_name)})" if facts.base_id else f"{code(facts.base_name)}"
    text = f"{base}, pruned for {domain} by contextual pruning"
    size = facts.report.size if facts.report else None
    if size and size.pruned_parameters is not None:
        text += (
            f": {size.pruned_parameters:,} of {size.base_parameters:,} parameters remain "
            f"({_share(size.pruned_parameters, size.base_parameters)} were removed, not zeroed)"
        )
    zeroed = (facts.plan.provenance.get("zeroed") or {}).get("zeroed_not_removed")
    if zeroed:
        text += f"; {zeroed:,} further parameters are zeros that stay in the file"
    recovered = "; it was then trained on text of the domain" if facts.plan.provenance.get("recoveries") else ""
    return Trusted(f"{text}{recovered}.")


def _purpose(facts: CardFacts) -> Trusted:
    data = facts.recorded("data").get("name")
    text = f"Text like {_text_name(data)}" if data else "Text like its calibration text"
    domain = f", of the domain *{inert(facts.domain)}*" if facts.domain else ""
    return Trusted(f"{text}{domain}: language modelling and completion, and as a starting point for fine-tuning.")


def _picture(plan: PruningPlan) -> Trusted:
    """Return the picture of the widths; "" where all layers are alike."""
    names = {"neurons": "MLP neurons", "kv_groups": "KV groups", "experts": "experts"}
    shown = " and ".join(names[unit] for unit in units_of(plan.dense))
    return Trusted(f"![{shown} of every layer, before and after]({PICTURE_NAME})" if widths_vary(plan.widths) else "")


def _removed(facts: CardFacts) -> Trusted:
    plan = facts.plan
    lines = [] if (layers := describe_layers(plan)) is None else [f"- {layers} {WARNING}"]
    labels = {
        "neurons": "MLP neurons",
        "kv_groups": "attention KV groups (with their query heads)",
        "experts": "experts (with their rows of the router)",
    }
    for unit in units_of(plan.dense):
        left = [widths for index, widths in enumerate(plan.dense) if index not in plan.removed_layers]
        before = [count for widths in left if (count := getattr(widths, unit))]
        now = [count for widths in plan.widths if (count := getattr(widths, unit))]
        if not before:
            continue
        of_these = " of the layers that stay" if plan.removed_layers else ""
        some = "" if len(before) == len(left) else f", in {len(before)} of {len(left)} layers"
        label = f"{labels[unit]}{of_these}{some}"
        spread = f"{min(now):,}" if min(now) == max(now) else f"{min(now):,} to {max(now):,}"
        lines.append(
            f"- {label}: {sum(now):,} of {sum(before):,} remain ({_share(sum(now), sum(before))} removed); {spread} "
            f"per layer, {max(before):,} in the base"
        )
    if (inside := plan.expert_neurons) is not None:
        for label, stay, dense in (
            ("neurons inside every expert", inside.width, inside.dense),
            ("neurons of every shared expert", inside.shared_width, inside.dense_shared),
        ):
            if stay < dense:
                lines.append(f"- {label}: {stay:,} of {dense:,} remain ({_share(stay, dense)} removed)")
    if plan.vocabulary is not None:
        kept, dense = len(plan.vocabulary.kept), plan.vocabulary.dense
        lines.append(f"- vocabulary entries: {kept:,} of {dense:,} remain ({_share(kept, dense)} removed)")
    return Trusted("\n".join(lines))


def _table(report: EvalReport, *groups: str) -> Trusted | None:
    rows = [row for row in table_rows(report, *groups, intervals=True) if not row[0].startswith(_SHOWN_ABOVE)]
    rows = [row for row in rows if row not in _rows_of_sources(report)]
    return table(table_header(report), rows) if rows else None


def _rows_of_sources(report: EvalReport) -> list[tuple[str, ...]]:
    """Return the rows of the questions of single sources; the last row of the questions is that of all."""
    return table_rows(report, "multiple_choice", intervals=True)[:-1]


def _by_source(report: EvalReport) -> Trusted | None:
    return _folded("Accuracy by source of the questions", [table_header(report), *_rows_of_sources(report)])


def _text_sources(report: EvalReport) -> Trusted | None:
    found = [_folded(title, rows) for title, rows in source_tables(report)]
    return Trusted("\n\n".join(one for one in found if one)) or None


def _folded(title: str, rows: Sequence[tuple[str, ...]]) -> Trusted | None:
    """Return a table that opens at a click, from its headings and rows; None without rows."""
    if len(rows) < 2:
        return None
    summary = f"<summary>{title} ({len(rows) - 1})</summary>"
    return Trusted(f"<details>\n{summary}\n\n{table(rows[0], rows[1:])}\n\n</details>")


def _text_table(report: EvalReport) -> Trusted:
    header, *rows = text_rows(report)
    return table(header, rows)


def _calibration(facts: CardFacts) -> Trusted:
    data, tokens = facts.recorded("data"), facts.plan.provenance.get("num_calibration_tokens")
    parts = []
    if data.get("name"):
        revision = f", revision {code(str(data['revision']))}" if data.get("revision") else ""
        parts.append(f"{_text_name(data['name'])}{revision}.")
    elif facts.plan.provenance.get("schedule"):
        parts.append(
            "The training batches: the model was pruned inside a Trainer, on the last tokens before each pruning step."
        )
    else:
        parts.append("The plan does not name the text.")
    if isinstance(tokens, int):
        mixed_in = facts.recorded("general_data").get("name")
        also = f" and of {_text_name(mixed_in)}" if mixed_in else ""
        parts.append(f"{tokens:,} tokens of it{also} chose the units to remove and reconstructed the layers.")
    search = facts.recorded("search_data")
    if search.get("name"):
        parts.append(f"The size was searched on validation documents of it ({_text_name(search['name'])}).")
    return Trusted(" ".join(parts))


def _text_name(name: object) -> Trusted:
    return Trusted("text that was given in Python") if name == IN_MEMORY else code(str(name))


def _measured(report: EvalReport) -> Trusted:
    length = report.dataset.max_seq_length
    windows = "" if length is None else f" in windows of {length:,} tokens"
    brackets = "".join(f"{sentence} " for sentence in legend(report))
    return Trusted(
        f"Bits per byte; lower is better. The unit is a byte of text, so models with different vocabularies are "
        f"comparable. {brackets}Base and pruned model read the same documents{windows}, and none of them was used to "
        f"calibrate. {inert(report.dataset.held_out)}"
    )


def _hardware(report: EvalReport) -> Trusted:
    environment = report.environment
    speed = report.speed.base if report.speed else None
    place = inert(environment.platform)
    if speed is None:
        return Trusted(f"On {place}, {inert(environment.dtype)}.")
    return Trusted(
        f"Both models measured in turns on {inert(speed.hardware)} ({inert(speed.device)}, {speed.threads} threads, "
        f"{inert(speed.dtype)}, {place}): a prompt of {speed.prompt_tokens} tokens, then {speed.new_tokens} new ones, "
        f"batch size {speed.batch_size}; median and quartiles of the rounds, and of their ratios."
    )


def _loading(facts: CardFacts) -> Trusted:
    prompt = json.dumps(choose_plan_prompts(facts.plan)[0]).replace("{", "{{").replace("}", "}}")
    native = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({{name}})
tokenizer = AutoTokenizer.from_pretrained({{name}})
inputs = tokenizer({prompt}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]))"""
    name = json.dumps(one_line(facts.name), ensure_ascii=False)
    images = ""
    if facts.reads_images:
        native = native.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
        images = "\n\nIt reads images too, by the processor beside it (`AutoProcessor`)."
    if facts.is_native:
        return Trusted(
            f"The model is a plain transformers class ({code(facts.architecture or 'native architecture')}); no other "
            f"package is needed.\n\n{block('python', native.format(name=name))}{images}"
        )
    remote = native.replace("({name})", "({name}, trust_remote_code=True)").format(name=name)
    packaged = native.replace("from transformers", "import hf_context_prune\nfrom transformers", 1).format(name=name)
    without = (
        f"Without the package, the modeling files beside the weights are run (read them first):\n\n"
        f"{block('python', remote)}"
    )
    if facts.foreign_code:
        without = (
            f"**Don't load it with `trust_remote_code`.** Its files name code of others, which would be run: "
            f"{inert('; '.join(facts.foreign_code))}."
        )
    return Trusted(
        f"The layers have different widths, so the class is {code(facts.architecture)}. With the package "
        f"(from a checkout of its source: `pip install .`), importing it registers the class, and no code of this "
        f"repository runs:\n\n"
        f"{block('python', packaged)}\n\n{without}{images}"
    )


def _opens(facts: CardFacts) -> Trusted:
    name = one_line(facts.name)
    config = {"model_type": facts.model_type, **facts.biases}
    rows = [(one.name, code(one.how) if one.opens else one.how) for one in runtimes_of(config, name)]
    return table(("runtime", "how"), rows)


def _example(report: EvalReport) -> Trusted | None:
    if report.example is None:
        return None
    return Trusted(f"It writes, greedily:\n\n{block('text', report.example.prompt + report.example.text)}")


def _versions(facts: CardFacts) -> Trusted:
    versions = dict(facts.recorded("versions"))
    if facts.report is not None:
        versions = {**facts.report.environment.packages, **versions}
    shown = ", ".join(f"{inert(str(name))} {inert(str(version))}" for name, version in sorted(versions.items()))
    when = f" Measured {inert(facts.report.created)}." if facts.report else ""
    fingerprint = facts.recorded("data").get("fingerprint")
    text = f" Calibration text {code(str(fingerprint))} (sha256 of its texts)." if fingerprint else ""
    plan = f"Plan {code(facts.plan.sha256)} (`pruning_plan.json`)."
    return Trusted(f"{plan}{text} {'Versions: ' + shown + '.' if shown else ''}{when}")


def _limits(facts: CardFacts) -> list[Trusted]:
    general = facts.report.general if facts.report else None
    limits = [_forgotten(facts)]
    if facts.plan.provenance.get("recoveries"):
        limits.append(
            Trusted(
                "The base of the tables was not trained. Training on text of the domain would improve it, too: what "
                "this model gains is not a gain of the pruning alone."
            )
        )
    if general is None and facts.report is not None:
        limits.append(
            Trusted(f"Measure this loss: {code(' '.join(evaluate_command(facts).replace(chr(92), '').split()))}.")
        )
    limits += [
        Trusted(
            "Pruning can change refusals and other safety behaviour. Neither was tested here. Test them before others "
            "use the model."
        ),
        Trusted("The model has the faults of its base (bias, invented facts); see the card of the base."),
    ]
    if facts.plan.vocabulary is not None:
        limits.append(
            Trusted(
                "Vocabulary entries were removed. Any text can still be read and written, but text of other domains "
                "takes more tokens. Losses and perplexities per token are not comparable with those of the base; bits "
                "per byte are."
            )
        )
    return limits


def _forgotten(facts: CardFacts) -> Trusted:
    general = facts.report.general if facts.report else None
    loss = general.loss if general else None
    last = None if loss is None else loss.last_comparison
    if general is None or loss is None or loss.base is None or last is None:
        return Trusted("**Loss outside the domain was not measured.** Expect more loss there than on the domain.")
    change = 100 * (last.bits_per_byte_ratio.value - 1)
    before, after = loss.base.bits_per_byte.value, loss.last.bits_per_byte.value
    return Trusted(
        f"**Loss outside the domain:** on general text ({code(general.dataset.name)}, {loss.base.num_documents:,} "
        f"documents) bits per byte changed from {before:.4f} to {after:.4f} ({change:+.1f} %)."
    )


def licence_text(base: Mapping[str, Any], place: str) -> Trusted:
    """Return the licence of a base as it states it, or that it states none.

    Args:
        base: What the base states of itself.
        place: The base, as the plan names it.
    """
    licence = base.get("license")
    if not licence:
        why = inert(str(base.get("unknown") or f"{base.get('stated_by', 'the plan')} names none"))
        return Trusted(
            f"The licence of the base is not known ({why}), so none is given here. Find out the licence of "
            f"{code(place)} before you use or share this model."
        )
    shown = ", ".join(str(item) for item in licence) if isinstance(licence, list) else str(licence)
    name = f" ({inert(str(base['license_name']))})" if base.get("license_name") else ""
    stated_by = inert(str(base.get("stated_by", "the plan")))
    return Trusted(
        f"The licence of the base, {inert(shown)}{name}, as stated by {stated_by}. It applies to this model too."
    )
