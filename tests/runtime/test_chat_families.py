"""Chat templates in the manner of real families, on many conversations: text for text as transformers renders them.

The templates are our own and small; those of real models are compared in `tests/real/test_chat_templates.py`.
"""

from __future__ import annotations

import pytest
from conversations import CASES, differences

CHATML = """
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
HERMES_TOOLS = """
{%- macro type_of(spec) -%}
    {%- if spec.type is string -%}
        {%- if spec.type == 'array' -%}list[{{ type_of(spec['items']) }}]
        {%- elif spec.type == 'object' -%}dict
        {%- else -%}{{ {'string': 'str', 'integer': 'int', 'boolean': 'bool', 'number': 'float'}[spec.type] }}
        {%- endif -%}
    {%- else -%}{{ spec.type | join(' | ') }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(system=none, messages=messages) %}
{%- if messages and messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content %}{%- set ns.messages = messages[1:] %}
{%- endif %}
{%- if tools is iterable and tools | length > 0 %}
    {{- '<|im_start|>system\\n' ~ (ns.system or 'Call functions.') ~ '\\n<tools>' }}
    {%- for tool in tools %}
        {%- set function = tool.function if tool.function is defined else tool %}
        {{- '\\n' ~ function.name ~ '(' }}
        {%- for name, spec in function.parameters.properties | items %}
            {{- name ~ ': ' ~ type_of(spec) }}{{ ', ' if not loop.last }}
        {%- endfor %}
        {{- ')\\n' ~ function | tojson(indent=2) ~ '\\n' ~ tool | tojson(separators=(',', ':'), sort_keys=true) }}
        {{- function.description | tojson(ensure_ascii=true) }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in ns.messages %}
    {%- if message.role == 'assistant' and message.tool_calls is defined and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{ '\\n' + message.content }}{% endif %}
        {%- for call in message.tool_calls %}
            {%- set call = call.function %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}{{ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>tool' }}{% endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""
LLAMA_3 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{% set date_string = "?" %}{% endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{ raise_exception("One call at a time!") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}
        {%- else %}{{ message.content }}{% endif %}{{ "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
GEMMA = """
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- elif message['content'] is iterable -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<image>' }}
{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
{%- endfor -%}
{%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
GEMMA_3 = """
{{ bos_token }}
{%- set system, rest = '', messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set content = messages[0]['content'] -%}
    {%- set system = (content if content is string else content[0]['text']) + '\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {{- system if loop.first else '' }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {{ '<start_of_image>' if item['type'] == 'image' else item['text'] | trim }}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
MISTRAL = """
{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in messages | rejectattr('role', 'in', ['system']) %}
    {%- if message.role == "user" %}
        {%- if tools is not none and message == user_messages[-1] %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{ '"' + key + '": "' + val + '"' }}
                    {%- else %}{{ '"' + key + '": ' + val | tojson }}{% endif %}
                    {%- if not loop.last %}{{ ", " }}{% endif %}
                {%- endfor %}
                {{- "}}" }}{{ ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {%- if call.id is undefined or call.id | length != 9 %}{{ raise_exception("bad id") }}{% endif %}
            {{- call.function | tojson | replace('}', ', "id": "' + call.id + '"}', 1) }}
        {%- endfor %}{{ eos_token }}
    {%- elif message.role == "assistant" %}{{ " " + message.content | trim + eos_token }}
    {%- elif message.role == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' ~ message.content ~ ', "call_id": "' ~ message.tool_call_id ~ '"}' }}
    {%- else %}{{ raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
"""
THINKING = """
{%- set ns = namespace(last=messages | length - 1, multi=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string
        and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi = false %}{% set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- set reasoning = '' %}
    {%- if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.last and (loop.last or reasoning) and message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {{- content.lstrip('\\n') }}
    {%- else %}{{ '<|im_start|>' + message.role + '\\n' + content }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""
TRAINING = """
{% for message in messages %}
{% if message['role'] == 'assistant' %}<|assistant|>
{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}

{% elif message.role in ['user', 'system'] %}<|{{ message['role'] }}|>
{{ message['content'] if message['content'] is string else message['content'] | map(attribute='text') | join('') }}
{% else %}{% continue %}{% endif %}
{% endfor %}
"""
DOCUMENTS = """
{%- set system = messages | selectattr('role', 'equalto', 'system') | list | first %}
{{- bos_token ~ system.content | default('None.') ~ '\\n' }}
{%- if documents is defined and documents %}
    {%- for document in documents %}
        {{- 'Document: ' ~ loop.index0 ~ '\\n' }}
        {%- for key, value in document | dictsort %}{{ key | title ~ ': ' ~ value | string ~ '\\n' }}{% endfor %}
    {%- endfor %}
{%- endif %}
{%- for group in messages | groupby('role') %}{{ group.grouper | upper }} {{ group.list | length }};{% endfor %}
{%- for message in messages if message.role not in ('system', 'tool') %}
    {%- set text = message.content | default('', true) %}
    {{- '%s: %s' % (message.role, text) if text is string else text | tojson }}{{ '\\n' if not loop.last else '' }}
{%- else %}{{ 'nothing' }}
{%- endfor %}
"""
PHI_3 = """
{% for message in messages %}{% if loop.first and message.role not in ['system', 'user'] %}{{ bos_token }}{% endif %}
{% if (message['role'] in ('system', 'user', 'assistant')) and message['content'] %}
{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>' + '\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}
"""
PHI_4_MINI = """
{%- set ns = namespace(tools=tools | tojson if tools else none) %}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>' + message['content'] }}
    {%- if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}
        {{- '<|tool|>' + message['tools'] + '<|/tool|>' }}
    {%- elif message['role'] == 'system' and ns.tools is not none %}{{ '<|tool|>' + ns.tools + '<|/tool|>' }}
    {%- endif %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}
"""
TEMPLATES = {
    "ChatML": CHATML,
    "Hermes with tools": HERMES_TOOLS,
    "Llama 3": LLAMA_3,
    "Gemma": GEMMA,
    "Gemma 3": GEMMA_3,
    "Mistral": MISTRAL,
    "Phi-3": PHI_3,
    "Phi-4-mini": PHI_4_MINI,
    "thinking": THINKING,
    "training": TRAINING,
    "documents": DOCUMENTS,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name: str) -> None:
    assert not differences(TEMPLATES[name])


def test_the_conversations_reach_the_templates() -> None:
    assert len(CASES) > 30
    assert differences("{{ messages | length }}{{ raise_exception('no') if messages | length > 3 }}") == []
