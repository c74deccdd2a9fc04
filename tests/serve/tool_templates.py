"""Chat templates that know tools, as published models have them, in short; and toy models that have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer
from toy import save_adapter, save_toy_model, toy_config

import bedplate


class Kind(NamedTuple):
    """template: None for the toy's own.  added: further tokens.  special: whether these are special."""

    template: str | None
    added: tuple[str, ...] = ()
    special: bool = False


HERMES = r"""{%- if tools %}<|im_start|>system
# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
For each call, return a JSON object within <tool_call></tool_call>:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for tool_call in message.tool_calls or [] %}
{%- set call = tool_call.function %}
<tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = r"""{{- bos_token }}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if tools is not none %}
{{- "Environment: ipython\nRespond in the format " }}
{{- '{"name": function name, "parameters": dictionary of argument name and its value}.\n' }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{- raise_exception("only single tool-calls") }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- 'assistant\n{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}" + eos_token }}
{%- else %}{{- message.role + "\n" + message.content + eos_token }}
{%- endif %}
{%- endfor %}{{- "assistant\n" }}"""
MISTRAL = r"""{{- bos_token }}{%- if tools %}{{- "[AVAILABLE_TOOLS] [" }}
{%- for tool in tools %}{{- tool | tojson }}{{- ", " if not loop.last }}{%- endfor %}{{- "][/AVAILABLE_TOOLS]" }}
{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}{{- "[TOOL_CALLS] [" }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{- raise_exception("ids have a length of 9") }}{%- endif %}
{%- set out = call.function | tojson %}{{- out[:-1] }}{{- ', "id": "' + call.id + '"}' }}
{{- ", " if not loop.last }}
{%- endfor %}{{- "]" + eos_token }}
{%- else %}{{- "[INST] " + message.content + "[/INST]" }}
{%- endif %}
{%- endfor %}"""
CODER = "{% for t in tools %}{{ t }}{% endfor %}<tool_call>\n<function=example>{{ messages }}</function></tool_call>"

KINDS = {
    "words": Kind(None),
    "hermes": Kind(HERMES, ("<tool_call>", "</tool_call>", "<think>")),
    "plain": Kind(HERMES),
    "special": Kind(HERMES, ("<tool_call>", "</tool_call>"), special=True),
    "llama": Kind(LLAMA),
    "mistral": Kind(MISTRAL, ("[TOOL_CALLS]",), special=True),
    "coder": Kind(CODER),
}


def build(folder: Path) -> None:
    """A bundle of each kind in a folder, with the adapter `KIND-ad`. They have room for what tools say."""
    model = folder / "model"
    model.mkdir()
    save_toy_model(model, toy_config(max_position_embeddings=4096))
    adapter = save_adapter(folder / "adapter", model, seed=1)
    for name, kind in KINDS.items():
        own = shutil.copytree(model, folder / f"model-{name}")
        if kind.template is not None:
            file = own / "tokenizer_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": kind.template}))
        tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
        added = [AddedToken(one, normalized=False, special=kind.special) for one in kind.added]
        (tokenizer.add_special_tokens if kind.special else tokenizer.add_tokens)(added)
        tokenizer.save(str(own / "tokenizer.json"))
        bundle = bedplate.build(own, folder / f"{name}.bundle", max_context=4096, programs=False)
        bundle.add(adapter, name=f"{name}-ad", quantize="none")
