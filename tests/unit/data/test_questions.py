"""Multiple-choice questions: what is read, what is refused, and what a model gets to see."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from hf_context_prune.data.questions import Question, format_example, format_prompt, format_question, load_questions
from hf_context_prune.errors import ConfigError, DataError

ROW = {"id": "q1", "question": "Who decides?", "choices": ["The court", "The clerk"], "answer": 0, "source": "a/law"}


def write(tmp_path, *rows):
    path = tmp_path / "mcq.jsonl"
    path.write_text("\n".join(json.dumps(ROW | row) for row in rows), encoding="utf-8")
    return path


def test_rows_of_a_file(tmp_path):
    path = write(tmp_path, {}, {"split": "dev", "id": "d"}, {"split": "train"}, {"context": " A bench \u2028 sat. "})
    found = load_questions(path)
    assert found.name == "mcq.jsonl"
    assert [question.split for question in found.questions] == ["test", "test"]
    assert found.questions[0] == Question("q1", "Who decides?", ("The court", "The clerk"), 0, "a/law")
    assert found.questions[1].context == "A bench \u2028 sat."
    assert [question.id for question in found.examples["a/law"]] == ["d"]
    assert len(load_questions(path, splits=("train", "test")).questions) == 3
    assert [question.id for question in load_questions(path, max_questions=1).questions] == ["q1"]


def test_a_source_that_is_a_number():
    rows = [ROW | {"source": number} for number in (0, 1)]
    assert [row.source for row in load_questions(rows).questions] == ["0", "1"]


def test_a_file_that_is_named_as_all_sources(tmp_path):
    (tmp_path / "all").mkdir()
    row = {name: value for name, value in ROW.items() if name != "source"}
    (tmp_path / "all" / "mcq.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"is 'all' \(the name of the file or folder, since the row has none\)"):
        load_questions(tmp_path / "all")


def test_labels_that_look_like_indices():
    def answer(label, names):
        choices = {"text": ["w", "x", "y", "z"], "label": names}
        (found,) = load_questions([{"question": "Q?", "choices": choices, "answer": label}]).questions
        return found.answer

    assert [answer(str(number), ["1", "2", "3", "4"]) for number in range(1, 5)] == [0, 1, 2, 3]
    assert [answer(letter, ["A", "B", "C", "D"]) for letter in "ADb"] == [0, 3, 1]


def test_no_example_is_the_question_itself():
    rows = [ROW | {"id": f"d{number}", "question": f"Q{number}?", "split": "dev"} for number in range(3)]
    found = load_questions([*rows, ROW | {"question": "Q1?"}])
    assert [row.id for row in found.shots(found.questions[0], 5)] == ["d0", "d2"]
    assert [row.id for row in found.shots(found.questions[0], 1)] == ["d0"]


def test_one_instruction_may_be_asked_of_many_contexts_or_choices():
    asked = {"question": "Is it hearsay?", "choices": ["yes", "no"]}
    rows = [ROW | asked | {"id": f"d{i}", "context": f"Case {i}.", "split": "dev"} for i in range(3)]
    other = ROW | asked | {"id": "d3", "context": "Case 1.", "choices": ["yes", "never"], "split": "dev"}
    mixed = ROW | asked | {"context": "Case 1.", "choices": ["no", "yes"], "answer": 0}
    found = load_questions([*rows, other, mixed])
    assert [row.id for row in found.shots(found.questions[0], 5)] == ["d0", "d2", "d3"]


def test_fewer_questions_are_of_all_sources():
    rows = [ROW | {"id": str(number), "source": "abcd"[number % 4]} for number in range(400)]
    some = load_questions(rows, max_questions=100).questions
    assert [sum(row.source == source for row in some) for source in "abcd"] == [25] * 4
    assert [int(row.id) for row in some] == sorted(int(row.id) for row in some)


def test_a_data_set_with_columns_of_its_own():
    rows = [
        {"query": "One?", "options": ["a", "b", "c"], "label": "C", "topic": "x"},
        {"query": "Two?", "options": ["a", "b", "c"], "label": "1", "topic": None},
    ]
    columns = {"question": "query", "choices": "options", "answer": "label", "source": "topic"}
    found = load_questions(Dataset.from_list(rows), columns=columns).questions
    assert [question.answer for question in found] == [2, 1]
    assert [question.source for question in found] == ["x", "in-memory"]
    assert len({question.id for question in found}) == 2


def test_choices_as_arc_has_them():
    rows = [{"question": "One?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}]
    assert load_questions(rows, columns={"answer": "answerKey"}).questions[0].choices == ("a", "b")


REFUSED_ROWS = [
    ({"question": " "}, r"record 1: 'question' is ' '; it must be the text of a question"),
    ({"choices": ["one"]}, r"'choices' is \['one'\]; it must be a list of 2 to 26 texts"),
    ({"choices": "one or two"}, "'choices' is 'one or two'"),
    ({"choices": ["one", 2]}, "'choices' is"),
    ({"answer": 2}, "'answer' is 2; it must be the index of one of the 2 choices, from 0, or its letter"),
    ({"answer": "C"}, "'answer' is 'C'"),
    ({"answer": True}, "'answer' is True"),
    ({"answer": None}, "'answer' is None"),
    ({"source": "all"}, "the source is 'all', which names all sources together"),
    ({"split": "val"}, "no question of the splits 'test'; there are 'val'"),
    ({"split": "dev"}, "no question of the splits 'test'; there are 'dev'"),
]


def test_rows_that_are_refused(tmp_path, subtests):
    for row, said in REFUSED_ROWS:
        with subtests.test(row=row, said=said), pytest.raises(DataError, match=said):
            load_questions(write(tmp_path, row))


def test_options_that_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"Unknown question column 'choice'; .* Did you mean 'choices'"):
        load_questions(write(tmp_path, {}), columns={"choice": "x"})
    with pytest.raises(DataError, match=r"mcq\.jsonl has no column 'quest' for the question; there are 'id', 'quest"):
        load_questions(write(tmp_path, {}), columns={"question": "quest"})
    with pytest.raises(DataError, match=r"record 2 has no column 'choices' .* --question-columns choices=NAME"):
        load_questions([ROW, {"question": "Q?", "options": ["a", "b"]}])
    with pytest.raises(ConfigError, match="max_questions is 0"):
        load_questions(write(tmp_path, {}), max_questions=0)
    with pytest.raises(DataError, match="no such file"):
        load_questions(tmp_path / "missing.jsonl")


def test_prompts():
    question = Question("q", "Who decides?", ("The court", "The clerk"), 1, "law", context="A case.")
    assert format_question(question) == "A case.\n\nQuestion: Who decides?\nAnswer:"
    assert format_example(question, letters=True) == (
        "A case.\n\nQuestion: Who decides?\nA. The court\nB. The clerk\nAnswer: B"
    )
    assert format_prompt(question, [question]) == f"{format_example(question)}\n\n{format_question(question)}"
