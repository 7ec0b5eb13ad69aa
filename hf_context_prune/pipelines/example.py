"""What a pruned model writes after a prompt of its domain, for its card."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.evaluation.reports.report import GeneratedText
from hf_context_prune.modeling.generation import generate_completion
from hf_context_prune.modeling.in_turns import fits_with_weights
from hf_context_prune.modeling.plan import PruningPlan
from hf_context_prune.publishing.prompts import choose_plan_prompts
from hf_context_prune.utils.distributed import on_main_process


def write_example(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: PruningPlan
) -> GeneratedText | None:
    """Continue a prompt of the plan's domain; None for a model that would be read again for every token."""
    if not fits_with_weights(model):
        return None
    prompt = choose_plan_prompts(plan)[0]
    return GeneratedText(prompt, on_main_process(lambda: generate_completion(model, tokenizer, prompt)))
