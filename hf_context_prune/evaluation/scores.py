"""Scores of a model on text and questions, document by document, as JSON values that are compared later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_context_prune.data.documents import TextSource
from hf_context_prune.data.questions import QuestionSet
from hf_context_prune.errors import LoadError
from hf_context_prune.evaluation.reports.report import MultipleChoiceFacts
from hf_context_prune.utils.rounding import six_digits

from .accuracy import Answer, compare_answers, summarize_answers
from .general_text import ModelAndTokenizer
from .losses import DocumentLoss, compare_losses, summarize_losses
from .multiple_choice import answer_questions
from .options import QuestionOptions, Scorer
from .passages import Passages
from .perplexity import document_losses

ROW_LAYOUT = 3
"""Version of the rows of scores, part of the setting of a run: rows of another version are refused, not read."""


@dataclass(frozen=True)
class HeldOut:
    """Text and questions on which models are compared.

    Attributes:
        passages: Held-out text.
        questions: Multiple-choice questions, if any.
        scorer: See [`answer_questions`][].
        num_fewshot: Largest number of examples before a question.
        max_seq_length: Tokens per window.
    """

    passages: Passages
    questions: QuestionSet | None = None
    scorer: Scorer = "likelihood_normalised"
    num_fewshot: int = 0
    max_seq_length: int = 512

    @property
    def text(self) -> TextSource:
        """The text that is scored."""
        return self.passages.text

    @property
    def docs(self) -> list[str]:
        """Ids of the documents that are scored, in their order."""
        return [*dict.fromkeys(record.doc for record in self.text.documents)]

    def setting(self) -> dict[str, Any]:
        """Return everything but the model that scores depend on, without names of texts and documents."""
        asked = self.questions
        return {
            "text": self.text.fingerprint,
            "questions": None if asked is None else [asked.fingerprint, self.scorer],
            "num_fewshot": self.num_fewshot,
            "max_seq_length": self.max_seq_length,
        }


@dataclass(frozen=True)
class Scores:
    """Scores of one model on held-out text and questions.

    Attributes:
        parameters: Number of parameters of the model, tied ones counted once.
        losses: One per document.
        answers: One per question, in their order; None where none were asked.
    """

    parameters: int
    losses: tuple[DocumentLoss, ...]
    answers: tuple[Answer, ...] | None

    def to_row(self, held_out: HeldOut) -> dict[str, Any]:
        """Return JSON values, with losses and scores to six significant digits.

        Documents and questions are known by their places alone: their names are the user's, and rows may be shared.

        Args:
            held_out: The text and questions that were scored.
        """
        places = {doc: place for place, doc in enumerate(held_out.docs)}
        return {
            "parameters": self.parameters,
            "losses": [[places[x.doc], six_digits(x.nll), x.num_tokens, x.num_bytes] for x in self.losses],
            "answers": None
            if self.answers is None
            else [[[*map(six_digits, x.scores)], x.chosen, x.correct, x.shots] for x in self.answers],
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any], held_out: HeldOut) -> Scores:
        """Return the scores that `to_row` gave.

        Args:
            row: The row.
            held_out: The text and questions that were scored.

        Raises:
            LoadError: The row is damaged.
        """
        sources = {document.doc: document.source for document in reversed(held_out.text.documents)}  # of first records
        answers = None
        try:
            if row["answers"] is not None and held_out.questions is not None:
                asked = zip(held_out.questions.questions, row["answers"], strict=True)
                answers = tuple(Answer(one.id, one.source, tuple(scores), *rest) for one, (scores, *rest) in asked)
            docs = held_out.docs
            scored = [(docs[place], values) for place, *values in row["losses"]]
            losses = tuple(DocumentLoss(doc, sources[doc], *values) for doc, values in scored)
            return cls(row["parameters"], losses, answers)
        except (LookupError, TypeError, ValueError) as error:
            raise LoadError(
                f"A row of scores is damaged ({error!r:.200}). Remove its line, so that it is measured again, or name "
                f"another --output."
            ) from error


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut) -> Scores:
    """Score a model on held-out text and questions."""
    answers = None
    losses = document_losses(model, tokenizer, held_out.text, max_seq_length=held_out.max_seq_length)
    if held_out.questions is not None:
        answers = tuple(
            answer_questions(
                model, tokenizer, held_out.questions, scorer=held_out.scorer, num_fewshot=held_out.num_fewshot
            )
        )
    return Scores(model.num_parameters(), tuple(losses), answers)


def summarize_scores(scores: Scores, held_out: HeldOut, base: Scores | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Return figures with intervals as plain JSON values, paired with those of a base where one is given."""
    found: dict[str, Any] = {
        "parameters": scores.parameters,
        "loss": asdict(summarize_losses(scores.losses, seed=seed)),
    }
    if base is not None:
        found["change"] = asdict(compare_losses(base.losses, scores.losses, seed=seed))
    if scores.answers is not None and held_out.questions is not None:
        found["accuracy"] = [asdict(group) for group in summarize_answers(held_out.questions, scores.answers)]
        if base is not None and base.answers is not None:
            found["accuracy_change"] = [asdict(group) for group in compare_answers(base.answers, scores.answers)]
    return found


def choose_held_out(
    text: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None,
    max_seq_length: int,
    questions: QuestionOptions | None = None,
) -> HeldOut:
    """Choose passages and questions once, so that all models are scored on the same ones."""
    asked, how = None, dict[str, Any]()
    if questions is not None:
        asked = questions.load()
        how = {"scorer": questions.scorer, "num_fewshot": questions.num_fewshot}
    passages = Passages.of(text, tokenizer, max_tokens=max_tokens)
    return HeldOut(passages, asked, max_seq_length=max_seq_length, **how)


def answer_with_models(
    asked: QuestionSet, options: QuestionOptions, base: ModelAndTokenizer, pruned: ModelAndTokenizer | None = None
) -> MultipleChoiceFacts:
    """Answer questions with one model, or with a base and the model pruned from it.

    Args:
        asked: The questions, as [`load_questions`][] gave them.
        options: How the questions are answered; its `source` is not read again.
        base: The base and its tokenizer.
        pruned: The pruned model and its tokenizer.
    """
    how: dict[str, Any] = {"scorer": options.scorer, "num_fewshot": options.num_fewshot}
    answers = answer_questions(*base, asked, **how)
    return build_choice_facts(
        asked, answers, None if pruned is None else answer_questions(*pruned, asked, **how), **how
    )


def build_choice_facts(
    asked: QuestionSet,
    answers: Sequence[Answer],
    others: Sequence[Answer] | None,
    *,
    scorer: Scorer,
    num_fewshot: int,
) -> MultipleChoiceFacts:
    """Return the answers of a base, and of the model pruned from it where given, as facts of a report."""
    return MultipleChoiceFacts(
        asked.name,
        asked.revision,
        scorer,
        num_fewshot,
        summarize_answers(asked, answers),
        None if others is None else summarize_answers(asked, others),
        None if others is None else compare_answers(answers, others),
    )
