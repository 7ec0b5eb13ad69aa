"""Train a causal LM on text of your domain, and prune it while it trains.

    python examples/train_and_prune.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data contracts.jsonl \
        --output_dir mini-gpt --pruning_ratio 0.2 --num_train_epochs 1 --learning_rate 2e-4

It takes every option of `PrunerConfig`, `PruningSchedule` and `TrainingArguments`. The model is saved to
``mini-gpt/model``, with tokenizer, plan and card. To continue after a kill, run the same command with
``--resume_from_checkpoint mini-gpt/checkpoint-500``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, Trainer, TrainingArguments, default_data_collator

from hf_context_prune import PrunerConfig, load_model
from hf_context_prune.data.documents import load_documents
from hf_context_prune.data.samples import tokenize_samples
from hf_context_prune.data.splits import hold_out_documents
from hf_context_prune.training.callback.callback import ContextPruneCallback
from hf_context_prune.training.callback.checkpoints import load_checkpoint
from hf_context_prune.training.callback.schedule import PruningSchedule


@dataclass
class ScriptArguments:
    """Options that belong neither to pruning nor to training."""

    model: str = field(metadata={"help": "Model folder, .gguf file, or Hub id."})
    data: str = field(metadata={"help": "Text of the domain: a file, a folder, or a Hub dataset."})
    max_samples: int = field(default=100_000, metadata={"help": "Most samples of --max_seq_length tokens."})


def main() -> None:
    """Parse the options, train, and save."""
    parser = HfArgumentParser((ScriptArguments, PrunerConfig, PruningSchedule, TrainingArguments))
    script, config, schedule, training = parser.parse_args_into_dataclasses()

    base = load_model(script.model, dtype="float32")
    source = load_documents(script.data, text_column=config.text_column, tokenizer=base.tokenizer)
    rest, held_out = hold_out_documents(source, seed=config.pruning_seed)

    def samples(text, count):  # noqa: ANN001, ANN202
        cut = tokenize_samples(
            text, base.tokenizer, num_samples=count, max_seq_length=config.max_seq_length, warn_if_short=False
        )
        return [{"input_ids": row, "labels": row} for row in cut]

    checkpoint = training.resume_from_checkpoint
    callback = ContextPruneCallback(config, schedule)
    trainer = Trainer(
        model=load_checkpoint(checkpoint) if checkpoint else base.model,
        args=training,
        train_dataset=samples(rest, script.max_samples),
        eval_dataset=samples(held_out, 32),
        processing_class=base.tokenizer,
        data_collator=default_data_collator,  # samples of one length need no padding token
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_metrics("eval", trainer.evaluate())
    if trainer.is_world_process_zero():
        callback.save_pretrained(Path(training.output_dir) / "model")
    trainer.accelerator.end_training()  # several processes: torch may abort one that ends while its group is open


if __name__ == "__main__":
    main()
