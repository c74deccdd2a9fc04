"""The chat template of a folder that has a tokenizer: the default one, as transformers chooses it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from bedplate.errors import UnsupportedError
from bedplate.model.json_file import read_text
from bedplate.model.tokenizer_settings import SETTINGS, check_encodable, wrong

TEMPLATE = "chat_template.jinja"


def default_template(folder: Path, setting: Any) -> str | None:
    """Jinja source; None: there is none. Templates in files of their own win over all those in the setting.

    setting: the field `chat_template` of tokenizer_config.json. Raises CheckpointError or UnsupportedError.
    """
    path = folder / SETTINGS
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (single := folder / TEMPLATE).is_file():
        files.setdefault("default", single)
    if files:
        return read_text(files["default"]) if "default" in files else _no_default(files, folder)
    if isinstance(setting, list):
        if not all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in setting):
            raise wrong("chat_template", "a text, or a list of templates with their names", setting, path)
        setting = {str(entry["name"]): entry["template"] for entry in setting}
    if isinstance(setting, dict):
        setting = setting["default"] if "default" in setting else _no_default(setting, path)
    if setting is None:
        return None
    if not isinstance(setting, str):
        raise wrong("chat_template", "a text, or a list of templates with their names", setting, path)
    check_encodable(setting, "chat_template", path)
    return setting


def _no_default(names: Iterable[str], where: Path) -> NoReturn:
    raise UnsupportedError(
        f"no chat template is the default one; there is: {', '.join(sorted(names)) or 'none'}",
        where=where,
        hint=f"write the template that is to be used into {TEMPLATE}",
    )
