"""Chat templates: they render as in transformers, and a hostile one costs neither time nor memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from pmpd.runtime.chat import render

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Weather in Zürich? "},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "n": 2}}}],
    },
    {"role": "tool", "content": '{"t": 3}'},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says 'it' & <more>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def ours(template: str, **options: Any) -> str:
    arguments: dict[str, Any] = {
        "messages": MESSAGES,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        "variables": {"bos_token": "<s>", "eos_token": "</s>"},
        "limit": 100_000,
    }
    return render(template, **arguments | options)


TEMPLATES = [
    # In the manner of Llama 3.1, Qwen 2.5, Mistral, Gemma, Hermes and DeepSeek.
    "{{- bos_token }}{%- if tools is not none %}{{ '# Tools\\n' }}{% for tool in tools %}{{ tool | tojson(indent=4) }}"
    "\n{% endfor %}{% endif %}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m.content | trim }}{% endfor %}",
    "{%- if tools %}<tools>{%- for tool in tools %}\n{{- tool | tojson }}{%- endfor %}</tools>{%- endif %}"
    "{%- for message in messages %}{%- if message.tool_calls %}{%- for call in message.tool_calls %}"
    '{%- set call = call.function %}{{- \'\\n{"name": "\' ~ call.name ~ \'", "arguments": \' }}'
    "{{- call.arguments | tojson }}{{- '}' }}{%- endfor %}{%- endif %}{%- endfor %}",
    "{% set ns = namespace(system='', n=0) %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = ns.system + m.content %}{% set ns.n = ns.n + 1 %}{% continue %}{% endif %}"
    "{{ loop.index0 }}{{ loop.last }}{{ m.content.strip().split(' ')[-1].rstrip('?') }}{% endfor %}{{ ns.system }}",
    "{% macro show(m, depth=1) %}{{ '[' * depth }}{{ m.role | upper }}{{ caller() if caller else '' }}{% endmacro %}"
    "{% for m in messages[1:] %}{% call show(m, 2) %}{{ loop.length }}{% endcall %}{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}"
    "{{ messages | map(attribute='role') | unique | list | length }}{{ messages[::-1][0].role }}",
    "{% for k, v in {'b': 1, 'a': (2, 3)} | dictsort %}{{ k }}={{ v }};{% endfor %}{{ [1, 2] + [3] }}{{ 2 ** 10 }}"
    "{{ '%s-%03d' % ('x', 7) }}{{ 'a-b' | replace('-', '+') }}{{ 'a\nb' | indent(2) }}{{ none }}{{ undefined_name }}",
    "{% generation %}{{ messages[1].content | replace(' ', '_') }}{% endgeneration %}{{ 'a,b'.split(',') | join('|') }}"
    "{{ ', '.join(['x', 'y']) }}{{ 'xx'.replace('x', 'yz', 1) }}{{ 'x' ~ 1 ~ none ~ [1] }}",
    "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }}{% else %}none{% endfor %}",
    "{{ messages | tojson }}{{ messages[2].tool_calls[0] | tojson(sort_keys=true) }}{{ {'a': '<&\\'>'} | tojson }}"
    "{{ [1, 2] | tojson(separators=(',', ':')) }}",
    "{% if add_generation_prompt %}{{ strftime_now('%Y')[:2] }}{% endif %}{{ documents }}{{ eos_token }}",
    # Namespaces as messages, as arguments, and beside calls in a loop.
    "{% set first = namespace(role='system', content='Hi') %}{% for m in [first] + messages %}{{ m.role }}"
    "{{ m.content }}{% set ns = namespace(n=loop.index) %}{% set more = namespace(ns=ns, d=dict(a=1)) %}{{ more.ns.n }}"
    "{{ more.d }}{% endfor %}{% macro add(ns, n) %}{% set ns.n = ns.n + n %}{% endmacro %}{% set ns = namespace(n=1) %}"
    "{{ add(ns, 2) }}{{ ns.n }}{{ ns in [ns] }}{{ [ns, 2] | last }}",
    "{% set x %}{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ x | length }}{{ x[2:5] }}"
    "{% filter upper %}{{ x }}{% endfilter %}{% for i in range(5) if i % 2 %}{{ i }}{{ loop.length }}{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_templates_render_as_in_transformers(template: str, tools: Any) -> None:
    (want,), _ = render_jinja_template(
        [MESSAGES], tools, chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert ours(template, tools=tools) == want


def test_a_template_raises_its_own_error() -> None:
    with pytest.raises(TemplateError, match="no tools here"):
        ours("{{ raise_exception('no tools here') }}")


def test_long_conversations_are_fine() -> None:
    turns = [{"role": role, "content": "word " * 4000} for _ in range(100) for role in ("user", "assistant")]
    template = (
        "{% for m in messages %}{% if loop.index0 < messages | length - 1 or messages[loop.index0:] | length %}"
        "{{ '<' ~ m.role ~ '>' + m.content | trim + '\\n' }}{% endif %}{% endfor %}"
    )
    assert len(ours(template, messages=turns, limit=10**8)) > 4_000_000
    with pytest.raises(TemplateError, match="longer than 1000 characters, more than the model's context holds"):
        ours(template, messages=turns, limit=1000)


GROW = "{% set ns = namespace(v=START) %}{% for i in range(60) %}{% set ns.v = STEP %}{% endfor %}{{ ns.v | length }}"
# 60 namespaces of lists, each twice in the one before: small as long as none is written as text.
NESTED = (
    "".join(f"{{% set a{i} = namespace() %}}" for i in range(61))
    + "".join(f"{{% set a{i}.v = [a{i + 1}, a{i + 1}] %}}" for i in range(60))
    + "USE"
)
ATTACKS = [
    "{{ 'x' | string | center(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' % 1.5 }}",
    "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ lipsum(n=100000) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) if false %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "{% for a in range(99999) %}{{ a }}{{ 'x' * 1000 }}{% endfor %}",
    "{{ range(1000000000) | list }}",
    "{{ 'x'.center(1000000000) }}",
    "{{ 'x'.ljust(1000000000) }}{{ 'x'['rjust'](1000000000) }}{{ 'x'.zfill(1000000000) }}",
    "{{ ('x' | attr('ljust'))(1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format_map({'': 1, 'w': 1000000000}) }}",
    "{{ 'x' * 10000000000 }}",
    "{{ 10000000000 * 'x' }}{{ [1] * 10000000000 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ 2 ** 4000 ** 2000 }}",
    GROW.replace("START", "7").replace("STEP", "ns.v * ns.v"),
    GROW.replace("START", "'xx'").replace("STEP", "ns.v + ns.v"),
    GROW.replace("START", "'xx'").replace("STEP", "ns.v ~ ns.v"),
    GROW.replace("START", "'xx'").replace("STEP", "ns.v | replace('x', ns.v)"),
    GROW.replace("START", "'xx'").replace("STEP", "ns.v.replace('x', ns.v)"),
    GROW.replace("START", "'xx'").replace("STEP", "ns.v.join([ns.v, ns.v, ns.v])"),
    GROW.replace("START", "'xx'").replace("STEP", "[ns.v, ns.v, ns.v] | join(ns.v)"),
    GROW.replace("START", "'xx'").replace("STEP", "'%s%s' % (ns.v, ns.v)"),
    GROW.replace("START", "[1, 2]").replace("STEP", "ns.v + ns.v"),
    GROW.replace("START", "[1, 2]").replace("STEP", "[ns.v, ns.v]").replace("| length", ""),
    GROW.replace("START", "(1, 2)").replace("STEP", "(ns.v, ns.v)").replace("| length", "| tojson"),
    GROW.replace("START", "{}").replace("STEP", "{'a': ns.v, 'b': ns.v}").replace("| length", "| string"),
    GROW.replace("START", "{}").replace("STEP", "dict(a=ns.v, b=ns.v)").replace("| length", ""),
    GROW.replace("START", "1").replace("STEP", "namespace(a=ns.v, b=ns.v)").replace("| length", ""),
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    NESTED.replace("USE", "{{ a0 }}"),
    NESTED.replace("USE", "{{ a0 | string }}"),
    NESTED.replace("USE", "{{ [a0] | upper }}"),
    NESTED.replace("USE", "{{ 'x' | attr(a0) }}"),
    NESTED.replace("USE", "{{ messages[a0].x }}"),
    NESTED.replace("USE", "{{ '%s' % a0 }}"),
    NESTED.replace("USE", "{{ 'x' ~ a0 }}"),
    NESTED.replace("USE", "{{ [a0] | tojson }}"),
    NESTED.replace("USE", "{{ raise_exception(a0) }}"),
    "{% set a = namespace(v=[1]) %}{% set b = namespace(v=[1]) %}{% for i in range(60) %}{% set a.v = [a.v, a.v] %}"
    "{% set b.v = [b.v, b.v] %}{% endfor %}{{ a.v == b.v }}",
    "{% macro m(n) %}{{ m(n - 1) }}{{ m(n - 1) }}{% endmacro %}{{ m(100) }}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}" + "{% set s = 'x' * 1000 %}" + "{% set s = m(s) %}" * 40,
    "{% for x in [1, 2, 3] recursive %}{{ loop([1, 2, 3]) }}{% endfor %}",
    "{% set s = 'x' * 900000 %}{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [s[i:]] %}"
    "{% endfor %}",
    "{% set s = 'x' * 900000 %}{% for i in range(99999) %}{% if s ~ i in s %}{% endif %}{% endfor %}",
    "{{ 'x' | indent(1000000000) }}{{ 'x' | indent(1000000000, true) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ 1.5 | round(1000000000) }}{{ 1 | round(1000000000, 'ceil') }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ [1] | slice(1000000000) | list }}{{ [1] | batch(1000000000, 'x') | list }}",
    "{{ 'x y' | wordwrap(1, wrapstring='x' * 100000) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "-" * 50000 + "1 }}",
    "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "x" * 10_000_000,
]
# Runs each template on its standard input in turn, and says how it ended, within 2 GB of address space.
CHILD = """
import json, resource, sys, time
from pmpd.runtime.chat import render
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for template in json.load(sys.stdin):
    begin = time.monotonic()
    try:
        render(template, messages=[{"role": "user", "content": "Hi"}], tools=None, documents=None,
               add_generation_prompt=True, variables={}, limit=1_000_000)
        outcome = "rendered"
    except Exception as error:
        outcome = type(error).__name__
    print(json.dumps([outcome, time.monotonic() - begin]), flush=True)
"""


@pytest.mark.full
def test_hostile_templates_end_soon_and_stay_small() -> None:
    process = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(ATTACKS),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    outcomes = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(outcomes) == len(ATTACKS), f"{ATTACKS[len(outcomes)][:300]}: {process.stderr[-300:]}"
    for attack, (outcome, seconds) in zip(ATTACKS, outcomes, strict=True):
        assert outcome not in ("rendered", "MemoryError"), attack[:300]
        assert seconds < 30, attack[:300]
