"""API keys: who may use a server."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from bedplate.errors import NotFoundError, RunError

VARIABLE = "BEDPLATE_API_KEYS"


class Keys:
    """Keys by name. Only their hashes are held."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._hashes = {name: _hash(key.encode()) for name, key in keys.items()}

    @classmethod
    def of(cls, lines: Iterable[str]) -> Keys:
        """Of lines `KEY` or `NAME=KEY`. Empty lines and those that begin with `#` say nothing.

        RunError: there is no key, two have one name, or one is not of visible ASCII characters.
        """
        keys: dict[str, str] = {}
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            name, found, key = text.partition("=")
            if not found or not key.strip("="):  # base64 ends with it
                name, key = f"key{number}", text
            if name in keys:
                raise RunError(f"two API keys have the name {name!r}", hint="give each a name of its own")
            if not all("!" <= character <= "~" for character in key):
                hint = "a key has no spaces, and only visible ASCII characters"
                raise RunError(f"the API key {name!r} is not one", hint=hint)
            keys[name] = key
        if not keys:
            raise RunError("there is no API key", hint="write one key, or NAME=KEY, on each line")
        return cls(keys)

    @classmethod
    def of_file(cls, file: Path) -> Keys:
        """As `of`. NotFoundError: there is no such file."""
        try:
            return cls.of(file.read_text("utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            hint = "give a text file that this user may read"
            raise NotFoundError("the file of API keys cannot be read", where=file, hint=hint) from error

    def name_of(self, key: bytes) -> str | None:
        """Whose it is. None: nobody's. It takes as long for a wrong key as for a right one."""
        given, found = _hash(key), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(given, known):
                found = name
        return found


def key_in(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key of a request: `Authorization: Bearer KEY` as OpenAI's clients send it, or Anthropic's `x-api-key`."""
    for name, value in headers:
        if name == b"x-api-key":
            return value.strip()
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
    return None


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
