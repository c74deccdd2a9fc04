"""LoRA adapters → adapters of a bundle. With the units of their structure at hand, no torch is imported."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from bedplate.assemble.adding import Adding
from bedplate.assemble.bundle_structure import read_recipe
from bedplate.assemble.publish import Publisher
from bedplate.bundle.store import Bundle
from bedplate.errors import AdapterError, RunError
from bedplate.model.adapter import read_adapter
from bedplate.model.adapter.text import AdapterText, read_text
from bedplate.model.adapter.tokenizer import BaseTokenizer
from bedplate.model.folder_template import TEMPLATE
from bedplate.model.tokenizer_settings import SETTINGS
from bedplate.quantize.options import AdapterScheme
from bedplate.quantize.recipe import default_adapter_scheme
from bedplate.runtime.model_spec import read_spec


def add_adapters(
    bundle: Bundle,
    sources: Mapping[str, Path],
    *,
    quantize: AdapterScheme | None,
    adding: Adding,
) -> None:
    """Pack LoRA adapters against the bundle's foundation and add them under the names in `sources`: all or none.

    quantize: None: the default for the bundle's recipe.
    Raises AdapterError, UnsupportedError, NameTakenError, NotFoundError, LoweringError. After an error, the
    bundle is as it was before.
    """
    for name in sources:
        bundle.check_name(name)
    spec = read_spec(bundle)
    publisher = Publisher(bundle, spec, adding)
    adapters = {name: read_adapter(source, spec) for name, source in sources.items()}
    tokenizer = bundle.manifest.tokenizer
    base = BaseTokenizer(bundle.tokenizer_file, tokenizer.special_tokens)
    texts = {
        name: _read_text(source, base, adapters[name].spec.vocab_size) for name, source in sources.items()
    }
    for name, source in sources.items():
        for warning in (
            *adapters[name].warnings,
            *_other_end(source, texts[name], base, tokenizer.eos_ids),
            *_no_tokenizer(source, texts[name], adapters[name].spec.vocab_size - spec.vocab_size),
        ):
            adding.reporter.notice(warning)
    scheme = quantize or default_adapter_scheme(read_recipe(bundle))
    publisher.publish({name: (adapters[name], texts[name]) for name in sources}, scheme)


def _read_text(source: Path, base: BaseTokenizer, vocab: int) -> AdapterText:
    text = read_text(source, base, vocab=vocab)
    if text.chat_template is not None:
        from bedplate.runtime.template_guard import GuardedTemplate, Templates

        templates = Templates(processes=1)  # to read one is to compute what is constant in it
        try:
            GuardedTemplate(text.chat_template, templates)
        except RunError as error:
            hint = f"correct or remove it in {TEMPLATE} or {SETTINGS}; without it, the base model's template is used"
            raise AdapterError(error.what, where=source, hint=hint) from error
        finally:
            templates.close()
    return text


def _other_end(
    source: Path, text: AdapterText, base: BaseTokenizer, eos_ids: Collection[int]
) -> Iterator[str]:
    """A warning where text ends otherwise than answers do: as in transformers, the base model says when they end. A
    tokenizer of the adapter's own says it, too.
    """
    end = (text.special_tokens or {}).get("eos_token")
    if end is not None and text.tokenizer_json is None and base.token_id(end) not in eos_ids:
        yield f"{source}: its tokenizer ends a text with {end}; answers go on, as that does not end the base model's"


def _no_tokenizer(source: Path, text: AdapterText, further: int) -> Iterator[str]:
    if further and text.tokenizer_json is None:
        yield f"{source}: it has {further} tokens more than the base, but no tokenizer for them: they have no text"
