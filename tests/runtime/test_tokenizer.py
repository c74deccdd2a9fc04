from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jinja2
import pytest

from bedplate.bundle.store import Bundle
from bedplate.errors import RunError
from bedplate.runtime.tokenizer import Tokenizer, open_backend

TURNS = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "Say <b>“hé”</b> & {{ no }}"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "\n again\n"},
]

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- strftime_now("%Y") }}
{%- for message in messages %}
    {%- if message.role not in ["user", "assistant"] %}
        {{- raise_exception("no role " + message.role) }}
    {%- endif %}
    {%- if not message.content %}{% continue %}{% endif %}
    {{- '<|start|>' + message['role'] + '\\n\\n' + message['content'] | trim + eos_token }}
{%- endfor %}
{% if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif %}
{{ messages | tojson }}
"""

TRAINED_ON = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!"


def tokenizer(bundle: Bundle, template: str | None) -> Tokenizer:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(open_backend(bundle.tokenizer_file), chat_template=template, special_tokens=special)


@pytest.mark.parametrize("template", [CHATML, LLAMA, TRAINED_ON])
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[:2]])
def test_templates_render_as_in_transformers(
    toy_bundle: Bundle, template: str, turns: list[dict[str, Any]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils.chat_template_utils import render_jinja_template
    (expected,), _ = render_jinja_template(
        [turns], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert tokenizer(toy_bundle, template).render(turns) == expected


def test_a_refusal_of_the_template_names_the_roles(toy_bundle: Bundle) -> None:
    with pytest.raises(RunError, match=r"no role robot\nhint: .*user, robot"):
        tokenizer(toy_bundle, LLAMA).render([TURNS[1], {"role": "robot", "content": "beep"}])


@pytest.mark.parametrize("template", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_templates_run_in_a_sandbox(toy_bundle: Bundle, template: str) -> None:
    with pytest.raises(RunError, match="unsafe"):
        tokenizer(toy_bundle, template).render(TURNS)


def test_a_malformed_template(toy_bundle: Bundle) -> None:
    with pytest.raises(RunError, match="malformed") as caught:
        tokenizer(toy_bundle, "{% for %}").render(TURNS)
    assert isinstance(caught.value.__cause__, jinja2.TemplateError)


def test_without_a_template_there_are_no_messages(toy_bundle: Bundle) -> None:
    with pytest.raises(RunError, match=r"no chat template.*\nhint: give the prompt as text"):
        tokenizer(toy_bundle, None).encode_chat(TURNS)


@pytest.mark.parametrize("message", ["hello", {"content": "no role"}, {"role": 3}])
def test_what_is_no_message(toy_bundle: Bundle, message: Any) -> None:
    with pytest.raises(RunError, match="not a message"):
        tokenizer(toy_bundle, CHATML).render([message])


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(RunError, match=r"tokenizer\.json: not a tokenizer"):
        open_backend(file)


def test_text_goes_there_and_back(toy_bundle: Bundle) -> None:
    bundled = Tokenizer.of_bundle(toy_bundle)
    assert bundled.decode(bundled.encode("hé, 世界\n")) == "hé, 世界\n"
