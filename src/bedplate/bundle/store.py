"""Bundles on disk: open one, create one, add and remove adapters.

Writers take turns: they lock the bundle. Readers need no lock, because one rename makes each change visible.
A killed writer can leave a hidden folder, which the next writer removes. It can also leave the folder of an adapter
that `bundle.json` does not list. Nobody reads that one, and the next adapter of that name replaces it.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

from bedplate.bundle import files, integrity, manifest, strict_json
from bedplate.bundle.entries import AdapterEntry, ChatSettings, check_foundation
from bedplate.bundle.manifest import AdapterRecord, FoundationInfo, Manifest, TokenizerInfo
from bedplate.errors import (
    AdapterError,
    BedplateError,
    BundleError,
    NameTakenError,
    NotFoundError,
)
from bedplate.hashing import sha256_of_few

if TYPE_CHECKING:
    from bedplate.bundle.facts import AdapterFacts, BundleFacts

__all__ = [
    "AdapterEntry",
    "Bundle",
    "ChatSettings",
    "check_free",
    "create_bundle",
    "remove_adapter",
]


class _Refreshing:
    """One thread at a time, so that nobody puts what it has read before in the place of what another has read since. A
    process that is forked meanwhile has a lock of its own.
    """

    def __init__(self) -> None:
        self._begin()
        os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self.lock = threading.Lock()


_refreshing = _Refreshing()


class Bundle:
    """An open bundle. `manifest` and `adapters` show it as it was when it was opened, or when this object last changed
    it.
    """

    def __init__(self, path: Path, document: Manifest, adapters: Mapping[str, AdapterEntry]) -> None:
        self.path = path
        self._show(document, adapters)

    def _show(self, document: Manifest, adapters: Mapping[str, AdapterEntry]) -> None:
        """What is on disk now."""
        self.manifest = document
        self.adapters = adapters

    @classmethod
    def open(cls, path: str | Path, *, check: bool = True) -> Self:
        """Open a bundle. Every file must be there with its size and, with `check`, its SHA-256.

        NotFoundError: there is no bundle.  BundleError: a file is damaged or missing, `bundle.json` has another
        version or was edited, or an adapter was packed against another foundation.
        """
        path = Path(path)
        return cls(path, *_read_now(path, check))

    @property
    def foundation(self) -> Path:
        return self.path / manifest.FOUNDATION

    @property
    def foundation_sha256(self) -> str:
        return self.manifest.files[manifest.FOUNDATION].sha256

    @property
    def foundation_info(self) -> FoundationInfo:
        """The content of `foundation.json`. BundleError: it is not the file that the manifest lists."""
        path = self.path / manifest.FOUNDATION_INFO
        data = strict_json.read(path)
        if sha256_of_few(data) != self.manifest.files[manifest.FOUNDATION_INFO].sha256:
            hint = "the bundle was replaced or damaged: run bedplate verify BUNDLE, and open it again"
            raise BundleError("its SHA-256 is not the one in bundle.json", where=path, hint=hint)
        return manifest.load(FoundationInfo, data, str(path))

    def check_base(self) -> None:
        """BundleError: a file of the base has another SHA-256 than the manifest lists. Adapters are not looked at."""
        integrity.check_files(self.path, self.manifest.files, hashes=True)

    @property
    def base_program(self) -> Path | None:
        """None: the bundle was built without programs."""
        return self.path / manifest.BASE_PROGRAM if manifest.BASE_PROGRAM in self.manifest.files else None

    @property
    def static_program(self) -> Path | None:
        """None: the bundle was built without a program of fixed shapes."""
        return self.path / manifest.STATIC_PROGRAM if manifest.STATIC_PROGRAM in self.manifest.files else None

    def program(self, adapter: str | None, *, static: bool = False) -> Path:
        """The program of an adapter (None: of the base). NotFoundError: there is no such adapter or no program.

        static: the one of fixed shapes.
        """
        if adapter is not None and adapter not in self.adapters:
            known = ", ".join(sorted(self.adapters)) or "none"
            raise NotFoundError(f"no adapter {adapter!r}", where=self.path, hint=f"the bundle has: {known}")
        if adapter is None:
            found = self.static_program if static else self.base_program
        else:
            entry = self.adapters[adapter]
            found = entry.static_program if static else entry.program
        if found is None:
            raise self._no_program(adapter, static)
        return found

    def _no_program(self, adapter: str | None, static: bool) -> NotFoundError:
        of_base = self.static_program if static else self.base_program
        again = f"bedplate build MODEL -o {self.path} --force, and bedplate add for each adapter"
        if of_base is not None:
            again = f"bedplate remove {self.path} {adapter}, and bedplate add"
        who = "the bundle" if adapter is None else f"the adapter {adapter!r}"
        if static and of_base is None:
            what, how = "no program of fixed shapes", "make it again with --static-shapes"
        else:
            made = "it was made without programs"
            if adapter is not None and of_base is not None:
                made += ", or is more than a LoRA"
            what, how = f"no program: {made}", "make it again without --no-programs"
        return NotFoundError(f"{who} has {what}", where=self.path, hint=f"{how}: {again}")

    @property
    def tokenizer_file(self) -> Path:
        return self.path / manifest.TOKENIZER

    def tokenizer_of(self, adapter: str | None) -> Path:
        """The `tokenizer.json` of an adapter that has further tokens; of others (and of None) the base's."""
        entry = None if adapter is None else self.adapters[adapter]
        if entry is not None and manifest.TOKENIZER in entry.record.files:
            return entry.folder / manifest.TOKENIZER
        return self.tokenizer_file

    @property
    def chat_template_file(self) -> Path | None:
        """None: the model has no chat template."""
        return self.path / manifest.CHAT_TEMPLATE if manifest.CHAT_TEMPLATE in self.manifest.files else None

    def chat_settings(self, adapter: str | None) -> ChatSettings:
        """For conversations with an adapter (None: the base). What an adapter does not have comes from the base."""
        template, special_tokens = self.chat_template_file, self.manifest.tokenizer.special_tokens
        if adapter is not None:
            entry = self.adapters[adapter]
            if manifest.CHAT_TEMPLATE in entry.record.files:
                template = entry.folder / manifest.CHAT_TEMPLATE
            if entry.record.special_tokens is not None:
                special_tokens = entry.record.special_tokens
        return ChatSettings(template_file=template, special_tokens=special_tokens)

    def check_name(self, name: str) -> None:
        """AdapterError: this cannot be the name of an adapter.  NameTakenError: an adapter already has this name."""
        if not manifest.is_adapter_name(name):
            hint = (
                "use letters, digits, '.', '_' and '-', first a letter or digit; 'base' is the model itself"
            )
            raise AdapterError(f"{name!r} cannot be the name of an adapter", where=self.path, hint=hint)
        if name in self.manifest.adapters:
            hint = f"choose another name, or remove it first: bedplate remove {self.path} {name}"
            raise NameTakenError(f"there is an adapter {name!r} already", where=self.path, hint=hint)

    def add_adapters(
        self,
        writers: Mapping[str, Callable[[Path], AdapterFacts]],
        *,
        check: Callable[[Bundle], None] = lambda drafts: None,
    ) -> None:
        """Add adapters, all or none. Each writer puts `weights.ptd` into the folder that it gets, and, if the adapter
        has them, its programs and its own `chat_template.jinja` and `tokenizer.json`.

        check: gets this bundle with only the new adapters, before anybody else can see them. If it raises an error,
        they are not added. The lock is held only to publish, so several processes can write adapters at the same
        time. After an error, or if the process is killed, the bundle is as it was before.
        AdapterError: the name is not valid, or an adapter does not fit the foundation.  NameTakenError: the name is in
        use.  LoweringError: its program names a constant that no file holds, or its file holds one that its program
        does not name.
        """
        for name in writers:
            self.check_name(name)
        adapters = self.path / manifest.ADAPTERS
        adapters.mkdir(exist_ok=True)
        with files.workspace(adapters, "add") as draft, files.naming(adapters, draft):
            try:
                records = {name: self._write(name, write, draft / name) for name, write in writers.items()}
                check(self._drafts(draft, records))
                files.sync_tree(draft)
                self._publish_drafts(draft, records)
            except (FileNotFoundError, BedplateError) as error:
                if draft.exists() and self._has_its_foundation():
                    raise
                raise self._replaced() from error  # by `build --force`, which may take our draft with it

    def _has_its_foundation(self) -> bool:
        """Whether the bundle on disk has the foundation that this one was opened with."""
        document = manifest.load(Manifest, _manifest_bytes(self.path), str(self.path / manifest.MANIFEST))
        return document.files[manifest.FOUNDATION].sha256 == self.foundation_sha256

    def _write(self, name: str, write: Callable[[Path], AdapterFacts], folder: Path) -> AdapterRecord:
        from bedplate.bundle import fit

        folder.mkdir()
        facts = write(folder)
        assert facts.info.name == name, f"{facts.info.name} is written as {name}"
        if facts.info.foundation != self.foundation_sha256:
            raise AdapterError(
                f"packed against the foundation {facts.info.foundation[:12]}…, not {self.foundation_sha256[:12]}…",
                where=f"adapter {name}",
                hint="add the adapter again, to this bundle",
            )
        fit.check_adapter(facts.info, folder, self.foundation)
        files.write(folder / manifest.ADAPTER_INFO, manifest.dump(facts.info))
        return AdapterRecord(
            foundation=facts.info.foundation,
            files=integrity.measure(folder),
            special_tokens=facts.special_tokens,
        )

    def _drafts(self, draft: Path, records: Mapping[str, AdapterRecord]) -> Bundle:
        """The bundle with only these adapters, from the draft folder."""
        entries = {
            name: AdapterEntry.of(name, draft / name, self.foundation_sha256, record)
            for name, record in records.items()
        }
        return Bundle(self.path, dataclasses.replace(self.manifest, adapters=dict(records)), entries)

    def _publish_drafts(self, draft: Path, records: Mapping[str, AdapterRecord]) -> None:
        adapters = self.path / manifest.ADAPTERS
        with files.locked(self.path):
            self.refresh()
            if any(record.foundation != self.foundation_sha256 for record in records.values()):
                raise self._replaced()
            for name in records:
                self.check_name(name)
            for name in records:
                files.remove_tree(adapters / name)  # not listed, so of a writer that was killed
                (draft / name).rename(adapters / name)
            files.sync_folder(adapters)
            _write_manifest(
                self.path, dataclasses.replace(self.manifest, adapters={**self.manifest.adapters, **records})
            )
            self.refresh()

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter. The function `remove_adapter` does the same without an open bundle."""
        remove_adapter(self.path, name)
        self.refresh()

    def _replaced(self) -> BundleError:
        return BundleError(
            "the bundle was replaced at the same time", where=self.path, hint="add the adapter again"
        )

    def refresh(self) -> None:
        """Read the bundle again, as it is on disk now. Raises the same errors as `open`."""
        with _refreshing.lock:
            self._show(*_read_now(self.path, check=False))


def check_free(out: Path, *, replace: bool) -> None:
    """NameTakenError: `out` exists (with `replace`: and is not a bundle).  NotFoundError: the folder of `out` does not
    exist.
    """
    if not out.resolve().parent.is_dir():
        raise NotFoundError("no such folder", where=out.resolve().parent, hint="create it first")
    if not out.exists() or (replace and (out / manifest.MANIFEST).is_file()):
        return
    if replace:
        raise NameTakenError("it exists and is not a bundle", where=out, hint="choose another place")
    raise NameTakenError(
        "it exists already", where=out, hint="choose another place, or replace it with --force"
    )


def create_bundle(out: Path, write: Callable[[Path], BundleFacts], *, replace: bool = False) -> Bundle:
    """Create a bundle: `write` puts the foundation, the tokenizer and, if there are some, the base program and the
    chat template into the folder that it gets. `out` appears when all of it is on disk, or not at all.

    replace: if `out` is a bundle, replace it. Its adapters are lost. Anything else at `out` stays.
    NameTakenError: `out` exists.  NotFoundError: the folder of `out` does not exist.
    """
    out = out.resolve()
    check_free(out, replace=replace)
    with files.workspace(out.parent, out.name) as draft, files.naming(out, draft):
        facts = write(draft)
        info = FoundationInfo(constants=facts.constants)
        files.write(draft / manifest.FOUNDATION_INFO, manifest.dump(info))
        _write_manifest(draft, _describe(draft, facts))
        (draft / manifest.ADAPTERS).mkdir()
        files.sync_tree(draft)
        check_free(out, replace=replace)
        if out.exists():
            with files.locked(out):
                files.swap(draft, out)
        else:
            files.rename_new(draft, out)
        files.sync_folder(out.parent)
    return Bundle.open(out, check=False)


def remove_adapter(path: Path, name: str) -> None:
    """Remove an adapter, even if its files are damaged.  NotFoundError: there is no such bundle or adapter."""
    _manifest_bytes(path)  # before the lock, which would leave its file in any folder
    with files.locked(path):
        document = manifest.load(Manifest, _manifest_bytes(path), str(path / manifest.MANIFEST))
        records = dict(document.adapters)
        if records.pop(name, None) is None:
            known = ", ".join(sorted(document.adapters)) or "none"
            raise NotFoundError(f"no adapter {name!r}", where=path, hint=f"the bundle has: {known}")
        _write_manifest(path, dataclasses.replace(document, adapters=records))
        files.remove_tree(path / manifest.ADAPTERS / name)


def _describe(folder: Path, facts: BundleFacts) -> Manifest:
    measured = integrity.measure(folder)
    return Manifest(
        written_by=_version(),
        model=facts.model,
        recipe=facts.recipe,
        tokenizer=TokenizerInfo(
            sha256=measured[manifest.TOKENIZER].sha256,
            bos_id=facts.bos_id,
            eos_ids=facts.eos_ids,
            special_tokens=facts.special_tokens,
        ),
        files=measured,
        adapters={},
    )


def _write_manifest(folder: Path, document: Manifest) -> None:
    data = manifest.dump(document)
    manifest.load(Manifest, data, manifest.MANIFEST)  # what no reader would accept must not be published
    with files.replacing(folder / manifest.MANIFEST) as file:
        file.write(data)


def _manifest_bytes(path: Path) -> bytes:
    try:
        return strict_json.read(path / manifest.MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = f"build one first: bedplate build MODEL -o {path}"
        raise NotFoundError("not a bundle: it has no bundle.json", where=path, hint=hint) from error


def _read_now(path: Path, check: bool) -> tuple[Manifest, dict[str, AdapterEntry]]:
    while True:
        data = _manifest_bytes(path)
        try:
            return _read(path, data, check)
        except (BundleError, FileNotFoundError):
            if _manifest_bytes(path) == data:
                raise  # otherwise a writer was at work just now: look again


def _read(path: Path, data: bytes, check: bool) -> tuple[Manifest, dict[str, AdapterEntry]]:
    document = manifest.load(Manifest, data, str(path / manifest.MANIFEST))
    integrity.check_files(path, integrity.all_files(document), hashes=check)
    adapters = {}
    for name, record in sorted(document.adapters.items()):
        foundation = document.files[manifest.FOUNDATION].sha256
        adapters[name] = AdapterEntry.of(name, path / manifest.ADAPTERS / name, foundation, record)
        check_foundation(adapters[name], record.foundation, adapters[name].folder / manifest.ADAPTER_INFO)
        if check:
            adapters[name].read_info()
    return document, adapters


def _version() -> str:
    from importlib.metadata import version  # imports half an email client: not for whoever only runs a bundle

    return version("bedplate")
