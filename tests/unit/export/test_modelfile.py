"""The Modelfile for Ollama: chat templates as Go templates, where that is exact."""

from __future__ import annotations

import re

import pytest

from hf_context_prune.export.modelfile import write_modelfile
from hf_context_prune.utils.file_names import MODELFILE_NAME
from tests.support.tiny import tiny_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content }}</s>{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CHATS = (
    ["user"],
    ["system", "user"],
    ["system", "user", "assistant", "user"],
    ["user", "assistant", "user", "assistant", "user"],
)


def written(template, folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    write_modelfile(folder, "model.gguf", tokenizer)
    return tokenizer, (folder / MODELFILE_NAME).read_text()


def run(text, messages):
    """What Ollama makes of the file, in the few words of Go's templates that it uses."""
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL).group(1)
    system = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
    begin, end = template.index("{{- range .Messages }}"), template.rindex("{{ end }}{{ end }}")
    body, prompt = template[begin + len("{{- range .Messages }}") : end], template[end + len("{{ end }}{{ end }}") :]
    turns = dict(re.findall(r'{{ (?:else )?if eq \.Role "(\w+)" }}(.*?)(?={{ else|\Z)', body, re.DOTALL))
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system.group(1)}, *messages]
    return "".join(turns[one["role"]].replace("{{ .Content }}", one["content"]) for one in messages) + prompt


@pytest.mark.parametrize(
    ("template", "roles", "stop"),
    [
        (CHATML, {"system", "user", "assistant"}, "<|im_end|>"),
        (MISTRAL, {"system", "user", "assistant"}, "</s>"),
        (GEMMA, {"user", "assistant"}, "<end_of_turn>"),
    ],
    ids=["chatml", "mistral", "gemma"],
)
def test_a_chat_gives_the_same_prompt(template, roles, stop, tmp_path):
    tokenizer, text = written(template, tmp_path)
    assert text.startswith("FROM ./model.gguf\n")
    assert f'PARAMETER stop "{stop}"' in text
    for chat in CHATS:
        if not set(chat) <= roles:
            continue
        messages = [{"role": role, "content": f"turn {number}"} for number, role in enumerate(chat)]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert run(text, messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",  # only the last turn
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ loop.index }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        '{% for m in messages %}"""{{ m.role }} {{ m.content }}{% endfor %}',
        "{{ raise_exception('never') }}",
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ ' MANY' if loop.index > 5 }}\n{% endfor %}",
    ],
)
def test_a_template_that_does_more_is_left_out(template, tmp_path):
    text = written(template, tmp_path)[1]
    assert "TEMPLATE" not in text
    assert "The chat template can't be written as a template of Ollama's" in text


def test_a_model_without_a_chat_template(tmp_path):
    assert written(None, tmp_path)[1] == "FROM ./model.gguf\n"
