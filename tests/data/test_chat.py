"""Chat templates: what they write, against the transformers package, and what a hostile one cannot do."""

import json
import subprocess
import sys
from typing import Any

import pytest
import tokenizers
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from qkv.data.chat import ChatTemplate
from qkv.data.tokenizer import Tokenizer
from qkv.errors import QkvError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# One small template in the style of each family.
TEMPLATES = {
    "smollm": """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You help.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "llama3": """{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}{% for t in tools %}{{- t | tojson(indent=4) }}{{ "\\n\\n" }}{% endfor %}{% endif %}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\\n\\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set first = "" -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must\\nalternate") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}""",
    "mistral": """{{ bos_token }}{% for message in messages if message.role != 'system' %}
{% if message['role'] == 'user' %}
    {{ '[INST] ' ~ message['content'] ~ ' [/INST]' -}}
{% elif message['role'] == 'assistant' %}{% generation %}{{ ' ' ~ message.content ~ eos_token }}{% endgeneration %}
{% endif %}
{% endfor %}""",
    "qwen": """{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- macro tool_text(tool, depth=1) %}
    {{- tool.name }}{% if depth > 0 %}({{ tool_text(tool, depth - 1) }}){% endif %}
{%- endmacro %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- set tool = message.content.startswith('<t>') and message.content.endswith('</t>') %}
    {%- if not ns.seen and message.role == "user" and not tool %}
        {%- set ns.seen = true %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
    {{- message.role | upper ~ ': ' ~ content.replace('a', 'A') }}
    {{- (' (last)' if loop.index0 == ns.last else '') ~ '\\n' }}
    {%- if loop.last %}{% continue %}{% endif %}{{- loop.cycle('-', '+') ~ '\\n' }}
{%- endfor %}
{%- for tool in tools or [] %}
    {{ tool_text(tool, 2) }} {{ tool | tojson }} {{ tool.items() | list | length }}
{% endfor %}
{%- for key, value in {'b': 1, 'a': [1, 'é', none, true]} | dictsort %}{{ key }}={{ value }};{% endfor %}
{{- messages | map(attribute='role') | unique | join(', ') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- ' on' if enable_thinking is defined and enable_thinking is true else ' off' }}
{{ 7 // 2 }} {{ 2 ** 10 }} {{ missing }}""",
}
TALK = [
    {"role": "user", "content": "Hi, <b>what</b> is 'a'?"},
    {"role": "assistant", "content": "<think>hm</think>\nAn é 你好 🙂 letter  "},
    {"role": "user", "content": " And\n\tb? "},
]
TALKS = {
    "one": TALK[:1],
    "three": TALK,
    "system": [{"role": "system", "content": " Be brief. "}, *TALK],
}
TOOLS = [{"name": "get", "parameters": {"type": "object", "required": ["x"], "text": "é <&> '\""}}]


def reference() -> PreTrainedTokenizerFast:
    made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, **TOKENS)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("style", TEMPLATES)
def test_what_a_template_writes(style: str, talk: str) -> None:
    """Against the transformers package."""
    template = ChatTemplate(TEMPLATES[style], TOKENS)
    for prompt in (True, False):
        for more in ({}, {"tools": TOOLS}, {"enable_thinking": True, "date_string": "26 Jul 2024"}):
            if style == "gemma" and more:
                continue
            found = template.render(TALKS[talk], add_generation_prompt=prompt, **more)
            assert found == reference().apply_chat_template(
                TALKS[talk], chat_template=TEMPLATES[style], add_generation_prompt=prompt, tokenize=False, **more
            )
            assert len(found) > 20


def test_parts_of_a_message_are_values_too() -> None:
    talk: list[dict[str, Any]] = [{"role": "user", "content": ({"type": "text", "text": " a "}, {"type": "image"})}]
    assert "user\na<end_of_turn>" in ChatTemplate(TEMPLATES["gemma"], TOKENS).render(talk)
    with pytest.raises(QkvError, match="a message holds a object; text, numbers, lists and tables are expected"):
        ChatTemplate("", {}).render([{"role": object()}])


def test_a_template_that_refuses_or_fails_says_so_in_one_sentence() -> None:
    with pytest.raises(QkvError, match=r"^the chat template refuses the messages: Roles must alternate$"):
        ChatTemplate(TEMPLATES["gemma"], TOKENS).render(TALK[1:])
    with pytest.raises(QkvError, match="the chat template fails at line 2: .*endif"):
        ChatTemplate("a\n{% endif %}", {})
    with pytest.raises(QkvError, match="the chat template fails: list object has no element 9"):
        ChatTemplate("{{ messages[9].content.x }}", {}).render(TALK)


def test_long_talks_are_no_attack() -> None:
    talk = [{"role": "user", "content": "x" * 200_000}] * 20 + TALK * 300
    text = ChatTemplate(TEMPLATES["smollm"], TOKENS).render(talk)
    assert text.count("<|im_start|>") == len(talk) + 2


def test_the_template_that_came_with_a_tokenizer() -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    templates = {"default": "{{ bos_token }}{{ messages[0].content }}", "tool_use": "{{ eos_token }}"}
    tokenizer = Tokenizer(library, {"begin": 0, "end": 1}, templates=templates)
    assert ChatTemplate.of(tokenizer).render(TALK) == "<s>" + TALK[0]["content"]
    assert ChatTemplate.of(tokenizer, "tool_use").render(TALK) == "</s>"
    with pytest.raises(QkvError, match=r"no chat template 'rag' came with the tokenizer \(default, tool_use did\)"):
        ChatTemplate.of(tokenizer, "rag")


# --- attacks --------------------------------------------------------------------------------------------------------


def doubled(start: str, step: str, end: str) -> str:
    """A value made of itself twice, 60 times over."""
    loop = (
        "{% for i in range(60) %}{% set a.x = "
        + step
        + " %}{% set b.x = "
        + step.replace("a.", "b.")
        + " %}{% endfor %}"
    )
    return f"{{% set a = namespace(x={start}) %}}{{% set b = namespace(x={start}) %}}{loop}{{{{ {end} }}}}"


BIG = "('a' * 1000000)"
ATTACKS = {
    "multiply": "{{ 'a' * 10**9 }}",
    "multiply a list": "{{ [0] * 10**9 }}",
    "multiply twice": "{{ ('a' * 1000000) * 1000 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "square": "{% set a = namespace(x=3) %}{% for i in range(99) %}{% set a.x = a.x * a.x %}{% endfor %}",
    "double text": doubled("'aaaa'", "a.x + a.x", "1"),
    "join text": doubled("'aaaa'", "a.x ~ a.x", "1"),
    "double a list": doubled("[1]", "a.x + a.x", "1"),
    "write a web": doubled("[1]", "[a.x, a.x]", "a.x"),
    "join a web": doubled("[1]", "[a.x, a.x]", "a.x ~ ''"),
    "compare webs": doubled("[1]", "[a.x, a.x]", "a.x == b.x"),
    "look for a web": doubled("[1]", "[a.x, a.x]", "a.x in [b.x]"),
    "test a web": doubled("[1]", "[a.x, a.x]", "a.x is eq b.x"),
    "sort webs": doubled("[1]", "[a.x, a.x]", "[a.x, b.x] | sort"),
    "web as JSON": doubled("[1]", "[a.x, a.x]", "a.x | tojson"),
    "web as text": doubled("[1]", "[a.x, a.x]", "a.x | string | length"),
    "web of tables": doubled("{'a': 1}", "{'a': a.x, 'b': a.x}", "a.x.values() | join"),
    "web as a key": doubled("(1,)", "(a.x, a.x)", "{a.x: 1} | length"),
    "look a web up": doubled("(1,)", "(a.x, a.x)", "messages[0][a.x]"),
    "web in a dict": doubled("(1,)", "(a.x, a.x)", "dict([(a.x, 1)])"),
    "raise a web": doubled("[1]", "[a.x, a.x]", "raise_exception(a.x)"),
    "silent loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "writing loops": "{% for a in range(99999) %}{% for b in range(99999) %}a{% endfor %}{% endfor %}",
    "loop condition": "{% for a in range(99999) if [a] | map('string') | list == ['x'] %}{% endfor %}" * 9,
    "loop length": "{% for a in 'a' * 7000000 %}{{ loop.length }}{% endfor %}",
    "long comparison": "{% set a = " + BIG + " %}{% set b = " + BIG + " %}"
    "{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}",
    "long search": "{% set a = "
    + BIG
    + " %}{% for i in range(99999) %}{% if 'ab' * 9999 in a %}{% endif %}{% endfor %}",
    "range": "{{ range(10**9) | list }}",
    "macro for ever": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "macro that grows": "{% macro m(n, s) %}{% if n %}{{ m(n - 1, s ~ s) }}{% endif %}{{ s }}{% endmacro %}"
    "{{ m(60, 'aa') }}",
    "macro that writes": "{% set s = " + BIG + " %}{% macro m() %}{% for i in range(9999) %}{{ s }}{% endfor %}"
    "{% endmacro %}{{ m() }}",
    "set that writes": "{% set s = " + BIG + " %}{% set t %}{% for i in range(9999) %}{{ s }}{% endfor %}{% endset %}",
    "plain text": "{% for i in range(99999) %}" + "a" * 9000 + "{% endfor %}",
    "calls": "{% macro a() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call a() %}" * 18
    + "a"
    + "{% endcall %}" * 18,
    "center": "{{ 'a' | center(10**9) }}",
    "center called": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "filter block": "{% filter center(1000000000) %}a{% endfilter %}",
    "mapped filter": "{{ ['a'] | map('center', 10**9) | list }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "odd": "{{ '%1000000000d' is odd }}",
    "divisible": "{{ '%1000000000d' is divisibleby 1 }}",
    "format": "{{ '%1000000000d' | format(1) }}",
    "format called": "{{ '{:>1000000000}'.format(1) }}",
    "format attribute": "{{ '{0.__class__}'.format(messages) }}",
    "format_map": "{{ '{a}'.format_map({'a': 1}) }}",
    "replace": "{{ " + BIG + " | replace('a', " + BIG + ") }}",
    "replace called": "{{ " + BIG + ".replace('', " + BIG + ") }}",
    "join": "{{ range(99999) | join(" + BIG + ") }}",
    "join called": "{{ " + BIG + ".join('a' * 99999) }}",
    "indent": "{{ ('\u2028' * 99999) | indent(99999) }}",
    "wide JSON": "{{ [1] | tojson(indent=10**9) }}",
    "separated JSON": "{{ range(9999) | list | tojson(separators=(" + BIG + ", ':')) }}",
    "split": "{% for i in range(99) %}{% set x = " + BIG + ".split('a') %}{% endfor %}",
    "lines": "{{ ('\n' * 5000000).splitlines() | length }}",
    "strip": "{{ ('b' * 1000000).strip(" + BIG + " ~ 'b') }}",
    "trim": "{{ ('b' * 1000000) | trim(" + BIG + " ~ 'b') }}",
    "names": "{{ [1] | map(attribute='a.' * 1000000) | list }}",
    "sort by": "{{ [1] | sort(attribute='a,' * 1000000) }}",
    "round": "{{ 1 | round(10**9, 'ceil') }}",
    "batch": "{{ [1] | batch(10**9, 'a') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "sum": "{{ [[1]] | sum(start=[]) }}",
    "lipsum": "{{ lipsum(10**6) }}",
    "stars": "{% macro m() %}{{ varargs | length }}{% endmacro %}{{ m(*" + BIG + ") }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop(a) }}{% endfor %}",
    "date": "{{ strftime_now('%1000000000d') }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "class by key": "{{ messages['__class__'] }}",
    "class by filter": "{{ '' | attr('__class__') }}",
    "class by map": "{{ messages | map(attribute='__class__') | list }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "code": "{{ namespace.__init__.__globals__ }}",
    "change": "{{ messages.append(1) }}",
    "function": "{{ ''.upper }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends 'a' %}",
    "block": "{% block a %}{{ self.a() }}{% endblock %}",
    "escapes": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "deep": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "deep tags": "{% if a %}" * 2300 + "{% endif %}" * 2300,
    "deep loops": "{% for a in b %}" * 25 + "{% endfor %}" * 25,
    "dots": "{{ a" + ".b" * 20000 + " }}",
    "sums": "{{ 1" + "+1" * 20000 + " }}",
    "digits": "{{ " + "9" * 40000 + " }}",
    "parts": "{{a.b}}" * 7000,
    "length": "a" * 50_001,
}
RUN = """
import json, sys
from pathlib import Path
from qkv.data.chat import ChatTemplate
from qkv.errors import QkvError
found = {}
for name, source in json.load(sys.stdin).items():
    try:
        found[name] = [ChatTemplate(source, {}).render([{"role": "user", "content": "a" * 1000}])[:99]]
    except QkvError as fault:
        found[name] = str(fault)
status = Path("/proc/self/status")
found["memory"] = int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else 0
found["torch"] = "torch" in sys.modules
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def attacked() -> dict[str, Any]:
    """All attacks in one process of their own, which is stopped where one of them hangs."""
    ended = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(ATTACKS), capture_output=True, text=True, timeout=100, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return dict(json.loads(ended.stdout))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_with_one_sentence(attacked: dict[str, Any], name: str) -> None:
    assert isinstance(attacked[name], str), attacked[name]
    assert attacked[name].startswith("the chat template") and "\n" not in attacked[name] and len(attacked[name]) < 400


def test_the_attacks_took_little_memory_and_no_torch(attacked: dict[str, Any]) -> None:
    assert attacked["memory"] < 200_000  # kilobytes at most, all in all
    assert attacked["torch"] is False
