"""Templates in the styles of the supported families, against transformers' rendering."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
import pytest
import transformers
from tests.helpers.tiny_vocabulary import tiny_vocabulary

from driftscope.artifacts.chat import TEMPLATE_DATE, render_chat, render_chats
from driftscope.artifacts.tokenizers.tokenizer import tokenizer_from_vocabulary
from driftscope.errors import InputError

# One long expression a line, a system message wrapped into the user's first one, roles that alternate.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# A namespace that counts turns, tools in front of the last one, filters over messages.
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Conversation roles must alternate user/assistant") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
            {%- endfor %}
            {{- "] [/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
# No system role, the assistant under another name, content that may be a list of parts.
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""  # noqa: E501
# Every role by its own name; the end of the text where no answer is asked for.
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# A date that comes from a clock, macros, loop controls, a dictionary walked in order.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- macro header(role) -%}
<|start_header_id|>{{ role }}<|end_header_id|>

{% endmacro %}
{{- header("system") }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content|trim }}
        {%- continue %}
    {%- endif %}
    {%- if loop.index > 6 %}{% break %}{% endif %}
    {{- "<|eot_id|>" + header(message['role']) + (message['content'] if message.content is string else message.content|tojson)|trim }}
{%- endfor %}
{{- "<|eot_id|>" }}
{%- for key, value in {'b': [1, 2.5, none], 'a': {'é': true}}.items() %}
{{ key }}={{ value | tojson(indent=4) }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header("assistant") }}
{%- endif %}
"""  # noqa: E501
FAMILIES = {"llama-2": LLAMA2, "mistral": MISTRAL, "gemma": GEMMA, "phi-3": PHI3, "llama-3": LLAMA3}

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "  What is 2+2? \n"}],
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hi\n\n<b>&'\"</b>"}],
    [
        {"role": "user", "content": "Übung 🙂 {{ 7 * 7 }} {% raw %}"},
        {"role": "assistant", "content": " yes </s> "},
        {"role": "user", "content": "\u2028\u00a0more\t"},
    ],
    [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
    [{"role": "assistant", "content": "first"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " look "}]}],
    [{"role": "tool", "content": "rain"}, {"role": "user", "content": "and?"}],
]
TOOLS = [{"type": "function", "function": {"name": "w", "description": "it is", "parameters": {"b": ["é"]}}}]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizer_from_vocabulary(tiny_vocabulary("gpt-2"), "here")
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def _expected(
    hugging_face: transformers.PreTrainedTokenizerFast, template: str, messages: list[dict[str, Any]]
) -> str | Exception:
    """What transformers renders, or how it refuses."""
    try:
        today = datetime.now()
        text = str(
            hugging_face.apply_chat_template(messages, chat_template=template, tokenize=False, tools=TOOLS)
        )
    except (jinja2.TemplateError, TypeError) as error:
        return error
    # The clock is the one difference.
    return text.replace(today.strftime("%d %b %Y"), TEMPLATE_DATE.strftime("%d %b %Y"))


@pytest.mark.parametrize("family", FAMILIES)
def test_rendering_is_that_of_transformers(
    family: str, hugging_face: transformers.PreTrainedTokenizerFast
) -> None:
    """The same bytes, or the same refusal."""
    options: dict[str, Any] = {
        "add_generation_prompt": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "variables": {"tools": TOOLS},
    }
    template = FAMILIES[family]
    expected = [_expected(hugging_face, template, messages) for messages in CONVERSATIONS]
    taken = [m for m, result in zip(CONVERSATIONS, expected, strict=True) if isinstance(result, str)]
    assert render_chats(template, taken, **options) == [text for text in expected if isinstance(text, str)]
    refusals = {str(result): number for number, result in enumerate(expected) if not isinstance(result, str)}
    assert len(taken) >= 3
    for message, number in refusals.items():
        with pytest.raises(InputError) as caught:
            render_chat(template, CONVERSATIONS[number], **options)
        name = type(expected[number]).__name__
        assert str(caught.value) == f"chat template: {name}: {message}"


def test_a_system_message_that_is_refused_can_go_into_the_user_s() -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Yes."}
    with pytest.raises(InputError, match="System role not supported"):
        render_chat(GEMMA, [system, user], bos_token="<bos>")
    folded = render_chat(GEMMA, [system, user], bos_token="<bos>", fold_system=True)
    assert folded == "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    # What the template takes stays as it is, and what cannot be folded is refused for the same reason.
    assert render_chat(PHI3, [system, user], eos_token="E", fold_system=True).startswith("<|system|>\nBe")
    for messages in ([system], [system, answer], [system, user, user]):
        with pytest.raises(InputError, match="System role not supported"):
            render_chat(GEMMA, messages, bos_token="<bos>", fold_system=True)
