"""Chat templates, written for these tests: together they use what published ones use."""

TEMPLATES = {
    "turns": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "default system": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    ),
    "system taken out": (
        "{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif -%}"
        "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST] "
        "{{ ('<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' if loop.first and system else '') ~ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "turns must alternate": (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    ),
    "unknown roles are refused": (
        "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}"
        "{{ raise_exception('no role ' + m.role) }}{% endif %}{{ m.content }}{% endfor %}"
    ),
    "whitespace of blocks": """
{% for m in messages %}
    {%- if m.role == 'user' %}
  user:
    {{ m.content }}
    {% else %}
  other
    {% endif -%}
  {# a comment #}
{% endfor %}
""",
    "tools": (
        "{% if tools %}{{ 'Tools:\n' }}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
        "{{ tools | map(attribute='function') | map(attribute='name') | join(', ') }}{% else %}no tools{% endif %}"
    ),
    "tools are none": "{{ tools is none }} {{ tools is defined }} {{ documents is none }} {{ documents is defined }}",
    "tools by their fields": (
        "{% if tools is not none %}{% for t in tools %}{% set f = t.function %}def {{ f.name }}("
        "{% for name, p in f.parameters.properties.items() %}{{ name }}: {{ p.type }}"
        "{% if name not in f.parameters.get('required', []) %} = None{% endif %}"
        "{{ ', ' if not loop.last }}{% endfor %}){{ f['parameters'] | tojson(indent=4) }}{% endfor %}{% endif %}"
    ),
    "tool calls": (
        "{% for m in messages %}{% if m.tool_calls is defined and m.tool_calls %}{% for call in m.tool_calls %}"
        '<tool_call>{"name": "{{ call.function.name }}", "arguments": '
        "{% if call.function.arguments is string %}{{ call.function.arguments }}"
        "{% else %}{{ call.function.arguments | tojson }}{% endif %}}</tool_call>{% endfor %}"
        "{% elif m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    ),
    "arguments item by item": (
        "{% for m in messages %}{% for call in m.get('tool_calls', []) %}"
        "{% for key, value in call.function.arguments | items %}<{{ key }}>"
        "{{ value if value is string else value | tojson }}</{{ key }}>{% endfor %}{% endfor %}{% endfor %}"
    ),
    "documents": (
        "{% if documents %}{% for d in documents %}[{{ loop.index }}] {{ d['title'] | upper }}: {{ d.text }}\n"
        "{% endfor %}{% else %}{{ documents }}{% endif %}"
    ),
    "thinking": (
        "{% set ns = namespace(last=-1, found=false) %}"
        "{% for m in messages[::-1] %}{% if m.role == 'user' and not ns.found %}"
        "{% set ns.last = messages | length - 1 - loop.index0 %}{% set ns.found = true %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
        "{% if '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if loop.index0 > ns.last and thought is defined %}({{ thought }}){% endif %}{{ content }}|{% endfor %}"
    ),
    "reasoning": (
        "{% for m in messages %}{% if m.reasoning_content is string %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}"
        "{% if m.thinking %}[{{ m.thinking }}]{% endif %}{{ m.content }}{% endfor %}"
    ),
    "a switch that nobody gave": (
        "{% if enable_thinking is defined and enable_thinking is false %}off{% else %}on{% endif %}"
        "{{ reasoning_effort | default('medium') }} {{ knowledge or 'none' }}"
    ),
    "content parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<image>{% endif %}{% endfor %}"
        "{% endif %}{% endfor %}"
    ),
    "content parts by attribute": (
        "{% for m in messages %}{{ m.content if m.content is string else m.content | map(attribute='text') | join }}"
        "{% endfor %}"
    ),
    "one text of strings alone": "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}",
    "macro": (
        "{% macro turn(role, content='nothing', sep='\n') %}<{{ role }}>{{ content }}{{ sep }}{{ varargs | length }}"
        "{% endmacro %}{% for m in messages %}{{ turn(m.role, m.content) }}{{ turn(m.role, sep='!') }}{% endfor %}"
    ),
    "macro with caller": (
        "{% macro box(title) %}[{{ title }}: {{ caller() }}]{% endmacro %}"
        "{% for m in messages %}{% call box(m.role) %}{{ m.content }}{% endcall %}{% endfor %}"
    ),
    "recursive macro": (
        "{% macro show(x) %}{% if x is mapping %}{% for k, v in x | dictsort %}{{ k }}={{ show(v) }};{% endfor %}"
        "{% elif x is sequence and x is not string %}{% for v in x %}{{ show(v) }},{% endfor %}"
        "{% else %}{{ x }}{% endif %}"
        "{% endmacro %}{{ show(messages) }}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if not m.content %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}"
        "{% endif %}{{ m.content }}{% endfor %}"
    ),
    "loop variables": (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.first }} {{ loop.last }} "
        "{{ loop.revindex0 }} "
        "{{ loop.cycle('a', 'b') }} {{ loop.previtem.role if loop.previtem is defined }} {{ loop.changed(m.role) }} "
        "{{ loop.nextitem is defined }}{% else %}none{% endfor %}"
    ),
    "date": "{{ strftime_now('%Y-%m-%d') }} {% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{{ date_string }}",
    "date by name": "{{ strftime_now(format='%d %B %Y') }}",
    "json": (
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ messages | tojson(ensure_ascii=True) }}"
        "{{ messages | tojson(separators=(',', ':')) }}{{ messages | tojson(sort_keys=True, indent=None) }}"
        "{{ messages | tojson(false, 1) }}"
    ),
    "json of html": "{{ '<b>&\"é\\'' | tojson }}{{ '<b>&' | e }}{{ '<b>' | safe }}",
    "string methods": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content.strip() | capitalize }}"
        "{{ m.content.startswith('H') }}{{ m.content.replace('e', '3') }}{{ m.content.upper()[:5] }}"
        "{{ m.content.split() | length }}{{ m.content[1:-1] }}{{ m.content | replace('a', 'b') | title }}"
        "{{ '%s-%d' % (m.role, 3) }}{{ '{}:{x}'.format(m.role, x=1) }}{{ m.content.find('l') }}{% endif %}{% endfor %}"
    ),
    "slices and filters": (
        "{{ messages[-1].content }}{{ messages[1:][0].role if messages[1:] }}"
        "{{ messages | map(attribute='role') | list }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ (messages | first).role }}"
        "{{ messages | rejectattr('role', 'in', ['system']) | map(attribute='content')"
        " | select('string') | join('|') }}"
        "{{ messages | groupby('role') | map('first') | list }}{{ [3, 1, 2] | sort | reverse | list }}"
        "{{ range(3) | list }}{{ {'a': 1} | length }}{{ 7 // 2 }}{{ 2 ** 5 }}{{ 1.5 | round | int }}"
    ),
    "dicts": (
        "{% set d = dict(a=1, b='x') %}{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}{{ d.keys() | list }}"
        "{{ dict.fromkeys(['p', 'q'], 0) }}{{ dict([('k', 'v')]) }}{{ {'a': {'b': 2}}.a.b }}"
        "{{ {'x': none}.get('x', 5) }}"
        "{{ dict(d, c=3) }}"
    ),
    "attributes of dict": "{{ dict.__class__ }}|{{ dict.mro }}|{{ dict.get is defined }}",
    "namespaces": (
        "{% set ns = namespace(text='', n=0) %}{% for m in messages %}{% set ns.text = ns.text ~ m.role %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.text }}{{ ns.n }}{{ ns.missing is defined }}"
        "{% set other = namespace({'a': 1}, b=2) %}{{ other.a }}{{ other.b }}"
    ),
    "a namespace with a name of its own": "{% set ns = namespace(self=3) %}{{ ns.self }}",
    "an underscored name in a namespace": "{% set ns = namespace(_x=3) %}{{ ns._x }}",
    "an underscored name set in a namespace": "{% set ns = namespace() %}{% set ns._x = 3 %}{{ ns._x }}",
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "a name set inside a generation block": (
        "{% set x = 'out' %}{% generation %}{% set x = 'in' %}{{ x }}{% endgeneration %}{{ x }}"
    ),
    "filter and set blocks": (
        "{% set block %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}{{ block | trim }}"
        "{% filter upper %}{{ messages[0].role }}{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}"
        "{% raw %}{{ raw }}{% endraw %}"
    ),
    "special tokens": (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}"
        "|{{ cls_token is defined }}{{ image_token }}"
    ),
    "tests": (
        "{{ messages is iterable }}{{ messages is mapping }}{{ 1 is number }}{{ true is boolean }}{{ none is none }}"
        "{{ 'a' in 'abc' }}{{ 3 is odd }}{{ 'x' is upper }}{{ 1 is integer }}{{ x is undefined }}"
        "{{ 4 is divisibleby 2 }}"
    ),
    "inline if": (
        "{{ 'yes' if messages | length > 1 else 'no' }}{{ 'a' if false }}"
        "{{ (x.y is defined) if x is defined }}"
    ),
    "an undefined name": "{{ nothing }}|{{ nothing | default('d') }}|{{ messages[0].nothing }}|{{ messages[99] }}",
    # What fails, as each language feature can.
    "an attribute of an undefined name": "{{ nothing.more }}",
    "a type that does not fit": "{{ messages[0].role + 1 }}",
    "a division by zero": "{{ 1 / 0 }}",
    "a number too large": "{{ 2.5 ** 10000 }}",
    "no end of recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a key that is not there": "{{ dict(a=1).pop('b') }}",
    "what json cannot write": "{{ namespace | tojson }}",
    "a way out of the sandbox": "{{ messages.__class__.__mro__ }}{{ ''.__class__.__bases__[0] }}",
    "a change to what it was given": "{{ messages.append(1) }}",
    "a loop without end": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "a filter that there is not": "{{ messages | nosuch }}",
    "a call of what is no function": "{{ messages[0].role() }}",
    "a wrong number of arguments": "{{ strftime_now() }}",
    "another template": "{% include 'other' %}",
    "what cannot be read": "{% for %}",
    "an end that is missing": "{% if messages %}",
}
