"""Chat templates, which run in another process: the same text as in transformers, within limits."""

import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from hf_context_prune.data import chat_templates
from hf_context_prune.data.chat_templates import ChatRefused, render_chat, render_chats
from hf_context_prune.data.documents import load_documents
from hf_context_prune.errors import DataError, LoadError
from hf_context_prune.pruning.vocabulary.chat_template import template_ids
from tests.support.limits import within
from tests.support.tiny import tiny_tokenizer

CHATML = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- set content = message.content if message.content is string else message.content[0].text %}
{{- '<|im_start|>' + message.role + '\\n' + content | trim + '<|im_end|>' + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}
{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
NAMESPACE = """{%- set ns = namespace(last=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}
{%- set ns.last = loop.index0 %}{%- endif %}{%- if loop.index0 > 2 %}{%- break %}{%- endif %}{%- endfor %}
{%- for message in messages %}{% generation %}{{ message | tojson(indent=1) }}{% endgeneration %}
{{- message.reasoning_content or '' }}{% endfor %}{{ ns.last }} {{ strftime_now('%Y') }}
{{ documents }} {{ dict(a=1) }}"""
TEMPLATES = [CHATML, LLAMA_2, GEMMA, NAMESPACE, {"default": CHATML, "tool_use": NAMESPACE}]

CONVERSATIONS = [
    [{"role": "user", "content": "A café? <b>&</b> \u2028 \ud83d \U0001f600 {{ 7 }}"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Hi \n"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "reasoning": "Hm", "tool_calls": None}],
    [{"role": "user", "content": [{"type": "text", "text": "blocks"}], "weight": np.float64(0.5), "at": b"x"}],
]
OPTIONS = [
    {},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "enable_thinking": False},
    {"continue_final_message": True},
    {"tools": None},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
    {"documents": [{"title": "a", "text": "b"}]},
    {"bos_token": "<other>"},
]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set x='a'*999999999 %}{{x}}"
HOSTILE = [
    (ENDLESS, "longer than a second"),
    ("{{ 'a' * 9000000 }}", "much more text"),
]
MORE_HOSTILE = [
    (HUGE, "more memory"),
    ("{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}", "more memory"),
    ("{{ '%2000000000d' % 1 }}", "more memory"),
    ("{% for i in range(999) %}" * 19 + "{% endfor %}" * 19, "longer than a second"),
    ("{{ ('a' * 5000000) | urlize | wordwrap(1) }}", "longer than a second|more memory"),
]


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def in_process(tokenizer, messages, options):
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # of the template
        return f"refused: {error}"


def test_the_text_is_that_of_transformers(subtests):
    for number, template in enumerate(TEMPLATES):
        with subtests.test(number):
            tokenizer = with_template(template)
            jobs = list(itertools.product(CONVERSATIONS, OPTIONS))
            found = [f"refused: {r}" if isinstance(r, ChatRefused) else r for r in render_chats(tokenizer, jobs)]
            assert found == [in_process(tokenizer, *job) for job in jobs]
            assert any("refused" not in text for text in found)
    tokenizer = with_template({"a": GEMMA, "b": CHATML})
    chosen = render_chat(tokenizer, CONVERSATIONS[0], chat_template="b")
    assert chosen == tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False, chat_template="b")
    assert render_chat(tokenizer, CONVERSATIONS[0], chat_template="{{ eos_token }}") == "</s>"


@pytest.mark.parametrize("hostile", [HOSTILE, pytest.param(MORE_HOSTILE, marks=pytest.mark.slow)])
def test_templates_without_end_or_measure(hostile, subtests):
    render_chat(with_template("a"), CONVERSATIONS[1])  # the process is started once
    for template, said in hostile:
        with subtests.test(template[:40]), within(seconds=8):  # 1 s of processor time, 0.6 s for a new child
            with pytest.raises(LoadError, match=rf"chat template of .* {said}.*Use a tokenizer"):
                render_chat(with_template(template), CONVERSATIONS[1])
            assert render_chat(with_template("{{ 1 + 1 }}"), CONVERSATIONS[1]) == "2"
    for template in ("{% if x %}" * 5000, "{{ " + "(" * 100000):
        with subtests.test(template[:10]), within(seconds=8), pytest.raises(ChatRefused):
            render_chat(with_template(template), CONVERSATIONS[1])


def test_the_answer_from_a_cold_start():
    chat_templates._close()
    with within(seconds=5), pytest.raises(LoadError, match="longer than a second"):
        render_chat(with_template(ENDLESS), CONVERSATIONS[1])


def test_text_and_vocabulary_name_the_template(subtests):
    tokenizer = with_template(HUGE)
    tokenizer.name_or_path = "someone/model"
    records = [{"messages": CONVERSATIONS[1]}]
    with subtests.test("text"), within(seconds=8), pytest.raises(LoadError, match="template of someone/model"):
        load_documents(records, tokenizer=tokenizer)
    with subtests.test("vocabulary"), within(seconds=8), pytest.raises(LoadError, match="plain text, remove this one"):
        template_ids(tokenizer)


def test_a_record_that_is_refused_is_named():
    records = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(200)]
    records[150] = {"messages": [{"role": "assistant", "content": "first"}]}
    tokenizer = with_template(LLAMA_2)
    with pytest.raises(DataError, match=r"record 151.*roles must alternate"):
        load_documents(records, tokenizer=tokenizer)
    source = load_documents(records, tokenizer=tokenizer, max_documents=149)
    assert [d.text for d in source.documents] == [in_process(tokenizer, r["messages"], {}) for r in records[:149]]
    held = {"role": "user", "content": []}
    held["content"].append(held)
    with pytest.raises(DataError, match=r"record 1.*can't be given"):
        load_documents([{"messages": [held]}], tokenizer=tokenizer)


def test_long_conversations_may_take_more():
    messages = [{"role": "user", "content": "a b " * 2_000_000}, {"role": "assistant", "content": "c"}]
    tokenizer = with_template(CHATML)
    assert render_chat(tokenizer, messages) == in_process(tokenizer, messages, {})


def test_a_child_that_stands_still_or_is_ended(monkeypatch):
    tokenizer = with_template("{{ 1 + 1 }}")
    render_chat(tokenizer, CONVERSATIONS[1])
    monkeypatch.setattr(chat_templates, "_WAIT_SECONDS", 0.2)
    os.kill(chat_templates._worker._process.pid, signal.SIGSTOP)
    with pytest.raises(LoadError, match="longer than a second"):
        render_chat(tokenizer, CONVERSATIONS[1])
    monkeypatch.undo()
    assert render_chat(tokenizer, CONVERSATIONS[1]) == "2"
    chat_templates._worker._process.kill()
    chat_templates._worker._process.wait()
    with pytest.raises(LoadError, match="makes its process fail"):
        render_chat(tokenizer, CONVERSATIONS[1])
    assert render_chat(tokenizer, CONVERSATIONS[1]) == "2"


def test_a_child_that_can_not_be_started(monkeypatch, tmp_path):
    chat_templates._close()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    with pytest.raises(LoadError, match=r"can't be started.*No such file"):
        render_chat(with_template("a"), CONVERSATIONS[1])
    monkeypatch.undo()
    (tmp_path / "worker.py").write_text("raise SystemExit('no memory left')")
    monkeypatch.setattr(chat_templates, "_WORKER", tmp_path / "worker.py")
    with pytest.raises(LoadError, match=r"can't be started: no memory left"):
        render_chat(with_template("a"), CONVERSATIONS[1])


def test_the_child_ends_with_its_parent():
    program = (
        "import os, signal\n"
        "from types import SimpleNamespace\n"
        "from hf_context_prune.data import chat_templates\n"
        "tokenizer = SimpleNamespace(chat_template='a', special_tokens_map={})\n"
        "assert chat_templates.render_chat(tokenizer, [{'role': 'user'}]) == 'a'\n"
        "print(chat_templates._worker._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    with within(seconds=10):
        while _runs(pid):
            pass


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
