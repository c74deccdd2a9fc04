"""Where adapters may be loaded from while the server runs: folders and URLs that the operator allows."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from bedplate.bundle.manifest import ADAPTER_INFO, MANIFEST
from bedplate.errors import NotFoundError, RunError
from bedplate.serve.errors import ApiError

MOST_FILES = 64
_MOST_LOOKED_AT = 4096  # files of a folder that has an adapter, and more
_CHUNK = 1 << 20
_LOOKS_SECONDS = 0.2  # who waits for a download looks so often whether the server closes
# What training leaves beside an adapter, and nobody reads.
_OF_TRAINING = ("optimizer", "scheduler", "rng_state", "trainer_state", "training_args")
_FILE = "file://"


class Sources:
    """allowed: folders, and beginnings of URLs.  most_bytes, seconds: of what is downloaded.

    NotFoundError: there is no such folder.  RunError: this is no beginning of a URL.
    """

    def __init__(
        self, allowed: Sequence[str], *, most_bytes: int, seconds: float, closing: threading.Event
    ) -> None:
        self._most_bytes, self._seconds, self._closing = most_bytes, seconds, closing
        self._folders, self._urls = list[Path](), list[str]()
        for one in allowed:
            if "://" in one and not one.startswith(_FILE):
                if _strange(one):
                    hint = "write it as in s3://bucket/adapters"
                    raise RunError(f"{one!r} is no beginning of a URL", hint=hint)
                self._urls.append(one.rstrip("/"))
                continue
            folder = Path(one.removeprefix(_FILE)).resolve()
            if not folder.is_dir():
                raise NotFoundError("no such folder", where=folder, hint="--allow-adapters-from names one")
            self._folders.append(folder)

    def check_any(self) -> None:
        """ApiError: no place is allowed, so that nobody changes which adapters there are."""
        if not (self._folders or self._urls):
            hint = "start the server with --allow-adapters-from"
            raise ApiError(
                403, f"This server loads and unloads no adapters ({hint}).", kind="permission_error"
            )

    def get(self, place: str, into: Path) -> Path:
        """The folder (or file) of an adapter on this machine. into: an empty folder, for what is downloaded.

        ApiError: it is not there, or not allowed.
        """
        if "://" in place and not place.startswith(_FILE):
            if not self._allows(place):
                raise _forbidden()
            return self._download(place.rstrip("/"), into)
        return self._local(place.removeprefix(_FILE))

    def _local(self, place: str) -> Path:
        """A path that is not absolute is one in an allowed folder."""
        try:
            found = [path for root in self._folders if self._holds(path := (root / place).resolve())]
            if not found:
                raise _forbidden()
            there = next((one for one in found if one.exists()), None)
            if there is None:
                raise _missing()
            # Links in the folder lead nowhere else, either.
            inside = list(islice(there.rglob("*"), _MOST_LOOKED_AT + 1))
            if len(inside) > _MOST_LOOKED_AT or not all(self._holds(file.resolve()) for file in inside):
                raise _forbidden()
        except (OSError, RuntimeError, ValueError):  # a circle of links, a name that is too long or has a NUL
            raise _missing() from None
        return there

    def _holds(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self._folders)

    def _allows(self, url: str) -> bool:
        return not _strange(url) and any(f"{url}/".startswith(f"{allowed}/") for allowed in self._urls)

    def _download(self, url: str, into: Path) -> Path:
        """Its files, without folders in it. If it was packed, what its bundle says of it comes too."""
        try:
            folder = into / "adapters" / url.rpartition("/")[2]
            folder.mkdir(parents=True)
            _in_time(lambda: self._fetch(url, folder, into), self._seconds, self._closing)
        except (FileNotFoundError, NotADirectoryError):
            raise _missing() from None
        except ApiError:
            raise
        except Exception as error:  # of whatever reads URLs of this kind
            message = f"The adapter cannot be downloaded: {type(error).__name__}"
            raise ApiError(400, message, param="lora_path") from error
        return folder

    def _fetch(self, url: str, folder: Path, into: Path) -> None:
        budget = _Budget(self._most_bytes, self._seconds)
        _fetch(url, folder, budget)
        bundle = url.rsplit("/", 2)[0]
        if (folder / ADAPTER_INFO).exists() and self._allows(bundle):
            _fetch(bundle, into, budget, only=MANIFEST)


def _in_time(work: Callable[[], None], seconds: float, closing: threading.Event) -> None:
    """Do something in a thread of its own, which is left alone if it hangs. ApiError: it takes longer, or the server
    closes.
    """
    failed = list[BaseException]()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="bedplate-download", daemon=True)
    thread.start()
    until = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < until:
        thread.join(_LOOKS_SECONDS)
        if closing.is_set():
            raise ApiError(503, "The server is shutting down.")
    if thread.is_alive():
        raise _too_slow()
    if failed:
        raise failed.pop()


class _Budget:
    """What a download may still take."""

    def __init__(self, nbytes: int, seconds: float) -> None:
        self.nbytes, self._until = nbytes, time.monotonic() + seconds

    def take(self, nbytes: int) -> None:
        """ApiError: it is more than that."""
        self.nbytes -= nbytes
        if self.nbytes < 0:
            raise ApiError(400, "The adapter is larger than this server downloads.", param="lora_path")
        if time.monotonic() > self._until:
            raise _too_slow()


def _fetch(url: str, into: Path, budget: _Budget, only: str | None = None) -> None:
    import fsspec

    is_http = url.startswith(("http://", "https://"))
    # Servers redirect a folder without a slash to the one with it.
    system, path = fsspec.core.url_to_fs(f"{url}/" if is_http else url, **(_HTTP if is_http else {}))
    listed = [one["name"] for one in system.ls(path, detail=True) if one["type"] == "file"]
    wanted = list(_wanted(listed, path, only))
    if len(wanted) > MOST_FILES:
        message = f"The folder of the adapter has more than {MOST_FILES} files."
        raise ApiError(400, message, param="lora_path")
    for name in wanted:
        with system.open(name, "rb") as source, (into / PurePosixPath(name).name).open("wb") as target:
            _copy(source, target, budget)


def _wanted(names: Iterable[str], folder: str, only: str | None) -> Iterable[str]:
    """Of what a listing names. A page of links may name anything: what is not in the folder is left out."""
    begins = folder.strip("/") + "/"
    for name in names:
        above, last = name.lstrip("/")[: len(begins)], name.lstrip("/")[len(begins) :]
        if above != begins or last in ("", ".", "..") or any(sign in last for sign in "/%?#\\\0"):
            continue
        if last == only or (only is None and not last.startswith(_OF_TRAINING)):
            yield name


async def _no_redirect(response: Any) -> None:
    """FileNotFoundError: it is somewhere else, which nobody has allowed."""
    if 300 <= response.status < 400:
        raise FileNotFoundError(response.url)


# Options of fsspec, which gives the second one to aiohttp.
_HTTP = {"allow_redirects": False, "client_kwargs": {"raise_for_status": _no_redirect}}


def _copy(source: Any, target: Any, budget: _Budget) -> None:
    while piece := source.read(_CHUNK):
        budget.take(len(piece))
        target.write(piece)


def copy_files(folder: Path, names: Iterable[str], to: Path) -> None:
    """Copy files of an adapter."""
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, to / name)


def _strange(url: str) -> bool:
    """Whether a URL may lead elsewhere than it seems to: by steps up, escapes, queries, or chained URLs."""
    scheme, _, rest = url.partition("://")
    parts = rest.rstrip("/").split("/")
    return (
        not scheme.isalnum()
        or scheme in ("local", "file")
        or any(sign in rest for sign in ("%", "?", "#", "\\", "@", "::", "\0"))
        or any(part in ("", ".", "..") for part in (parts[1:] if rest.startswith("/") else parts))
    )


def _forbidden() -> ApiError:
    message = "The server does not allow adapters from there (--allow-adapters-from)."
    return ApiError(403, message, kind="permission_error", param="lora_path")


def _too_slow() -> ApiError:
    return ApiError(400, "The download of the adapter takes too long.", param="lora_path")


def _missing() -> ApiError:
    return ApiError(404, "There is no adapter at lora_path.", param="lora_path", code="not_found")
