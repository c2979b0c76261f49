"""Chat templates against transformers' rendering, and templates that mean harm."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.helpers.tiny_vocabulary import tiny_vocabulary

from driftscope.artifacts.chat import MAX_TEMPLATE_CHARACTERS, render_chat, render_chats
from driftscope.artifacts.open import open_artifact
from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer, tokenizer_from_vocabulary
from driftscope.errors import InputError

# ChatML with a default system message, tools and tool calls, in the way of Qwen2.5.
CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are helpful.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Blocks on lines of their own, with blanks around them that trim_blocks and lstrip_blocks take away.
SPACED = """
  {% set ns = namespace(count=0) %}
{{ bos_token }}
    {% for message in messages %}
  {# a comment #}
  {% if message.role == 'skip' %}{% continue %}{% endif %}
      {% set ns.count = ns.count + 1 %}
  [{{ ns.count }}] {{ message['role'] | upper }}: {{ message['content'] | trim }}  
   {%+ if loop.last %}last{% endif %}

    {% generation %}  {{ message.content | length }}  {% endgeneration %}
    {% if ns.count >= 3 %}{% break %}{% endif %}
    {% endfor %}
{{ missing }}{{ missing is defined }} {{ {'b': 'é<&>', 'a': [1, none, true]} | tojson(indent=2) }}
{% if add_generation_prompt %}GO {{ eos_token }}{% endif %}

"""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is 2+2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  spaces \n kept\t\n"}],
    [
        {"role": "user", "content": "Übung 🙂 <|im_end|> {{ 7 * 7 }} {% raw %} & <b>"},
        {"role": "assistant", "content": ""},
        {"role": "skip", "content": "x"},
        {"role": "user", "content": "line\r\nline\u2028line"},
        {"role": "assistant", "content": "four"},
        {"role": "system", "content": "late"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "w", "arguments": {"z": 1, "a": "é"}}]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "wind"},
    ],
]
TOOLS = [
    {"type": "function", "function": {"name": "w", "description": "it's", "parameters": {"b": 1, "a": []}}}
]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizer_from_vocabulary(tiny_vocabulary("gpt-2"), "here")
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    )
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def _compare(
    hugging_face: transformers.PreTrainedTokenizerFast,
    template: str,
    tools: list[dict[str, Any]] | None = None,
) -> None:
    for generation in (True, False):
        found = render_chats(
            template,
            CONVERSATIONS,
            add_generation_prompt=generation,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            variables={"tools": tools} if tools else None,
        )
        expected = [
            hugging_face.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation,
                tools=tools,
            )
            for messages in CONVERSATIONS
        ]
        assert found == expected


@pytest.mark.parametrize("template", [CHATML, SPACED], ids=["ChatML", "spaced"])
def test_rendering_is_that_of_transformers(
    hugging_face: transformers.PreTrainedTokenizerFast, template: str
) -> None:
    _compare(hugging_face, template)


def test_tools_are_rendered_as_transformers_does(hugging_face: transformers.PreTrainedTokenizerFast) -> None:
    _compare(hugging_face, CHATML, TOOLS)


@pytest.mark.model
def test_template_of_the_default_model(
    default_gguf: Path, hugging_face: transformers.PreTrainedTokenizerFast
) -> None:
    tokenizer = load_tokenizer(open_artifact(default_gguf))
    assert tokenizer.chat_template is not None
    _compare(hugging_face, tokenizer.chat_template)
    prompt = render_chat(tokenizer.chat_template, [{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_clock_stands_still() -> None:
    template = "{{ strftime_now('%d %b %Y') }}"
    assert render_chat(template, [{"role": "user", "content": ""}]) == "26 Jul 2024"


def test_an_attribute_out_of_bounds_is_empty_as_in_transformers(
    hugging_face: transformers.PreTrainedTokenizerFast,
) -> None:
    template = (
        "{{ ''.__class__ }}{{ strftime_now.__self__ }}{{ dict(a=1) }}{{ dict.fromkeys('b') }}{{ joiner }}"
    )
    messages = [{"role": "user", "content": ""}]
    expected = hugging_face.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert render_chat(template, messages) == expected


def test_special_tokens_that_a_model_lacks_are_undefined() -> None:
    template = "{{ bos_token is defined }} {{ eos_token }}"
    assert render_chat(template, [{"role": "user", "content": ""}], eos_token="E") == "False E"


HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested ranges": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    "growing list": "{% set l = [1] %}{% for i in range(99999) %}{% set _ = l.append(1) %}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "long text": "{{ 'x' * 10**12 }}",
    "large text": "{{ 'x' * (9 * 1024 * 1024) }}",
    "many texts": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "list": "{{ [0] * 10**11 }}",
    "padding": "{{ '%0999999999d' % 1 }}",
    "format padding": "{{ '{:>9999999999}'.format('x') }}",
    "filter": "{{ 'x' | center(10**10) }}",
    "doubling": "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr filter": "{{ ('' | attr('__class__')).__mro__[1] }}",
    "format attribute": "{{ '{0.__class__.__mro__}'.format('') | length * 0 + raise_exception.__globals__ }}",
    "globals": "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "clock": "{{ strftime_now.__self__.__class__.__mro__ }}",
    "namespace": "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "namespace later": "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns }}",
    "dictionary": "{{ dict.mro() }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('true') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "refusal": "{{ raise_exception('roles must\nalternate') }}",
    "syntax": "{% if %}",
    "unclosed": "{{ messages",
    "missing": "{{ messages[9].content.x }}",
    "type": "{{ 1 + 'a' }}",
    "zero": "{{ 1 // 0 }}",
    "exit": "{{ raise_exception.mro() }}",
    "deep nesting": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep blocks": "{% if 1 %}" * 20_000 + "{% endif %}" * 20_000,
    "too long": "x" * (MAX_TEMPLATE_CHARACTERS + 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_refused_soon_and_in_one_line(name: str) -> None:
    started = time.process_time()
    with pytest.raises(InputError, match=r"^chat template: ") as refused:
        render_chat(HOSTILE[name], [{"role": "user", "content": "x"}])
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700
    # Of this process: the one that renders has a limit of its own.
    assert time.process_time() - started < 2


def test_a_template_cannot_change_the_messages_or_write_files(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(InputError, match="SecurityError"):
        render_chat("{{ messages.append(1) }}", messages)
    target = tmp_path / "written"
    with pytest.raises(InputError):
        render_chat(f"{{{{ messages.__class__.__base__('{target}', 'w') }}}}", messages)
    assert not target.exists()
    assert messages == [{"role": "user", "content": "x"}]


def test_refusal_gives_the_reason_of_the_template() -> None:
    with pytest.raises(InputError, match=r"chat template: TemplateError: roles must alternate$"):
        render_chat(HOSTILE["refusal"], [{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages"),
        ([{"content": "x"}], "message 0 has no role"),
        ([{"role": 1, "content": "x"}], "message 0 has no role"),
        (["x"], "message 0 has no role"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], r"message 1 \(user\) has no content"),
        ([{"role": "user", "content": {1, 2}}], "JSON cannot"),
    ],
)
def test_bad_messages_are_refused(messages: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        render_chat("{{ messages }}", messages)
