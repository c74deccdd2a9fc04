"""The proof that each key of a bundle names the bytes that lie under it.

Hashes show that files are as they were written. But programs find constants by their keys alone. So each key is
computed again, from the bytes and from their description in `foundation.json` or `adapter.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from bedplate.bundle import manifest
from bedplate.bundle.flat_tensor import Layout
from bedplate.bundle.manifest import ConstantInfo
from bedplate.bundle.ptd import Ptd, read_ptd
from bedplate.errors import BundleError

if TYPE_CHECKING:
    from bedplate.bundle.store import Bundle

_SHOWN = 5


def check_keys(bundle: Bundle) -> None:
    """Compute every key of the foundation and of all adapters again. Reads every byte of their constants.

    BundleError: the bytes under a key do not give this key, a key is not described, or a described key is missing.
    The error names the file and the constants.
    """
    foundation = read_ptd(bundle.foundation)
    infos = bundle.foundation_info.constants
    hint = f"build the bundle again: bedplate build MODEL -o {bundle.path} --force"
    _check_file(foundation, infos, {}, hint)
    shared = dict.fromkeys((info.key for info in infos), foundation)
    held = {_what(info) for info in infos}
    for name, entry in bundle.adapters.items():
        hint = f"add the adapter again after bedplate remove {bundle.path} {name}"
        _check_file(read_ptd(entry.weights), entry.info.constants, shared, hint)
        for info in entry.info.shared:
            if _what(info) not in held:
                raise BundleError(
                    f"{info.name} is not in the foundation: no constant of this form has the key {info.key}",
                    where=entry.folder / manifest.ADAPTER_INFO,
                    hint=hint,
                )


def _what(info: ConstantInfo) -> tuple[object, ...]:
    return info.key, info.dtype, info.shape, info.layout, info.nbytes


def _check_file(ptd: Ptd, infos: Sequence[ConstantInfo], elsewhere: Mapping[str, Ptd], hint: str) -> None:
    """elsewhere: files by the keys that they hold, where scales are looked for that this file does not hold."""
    problems = [*_problems(ptd, infos, elsewhere)]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BundleError("; ".join(problems[:_SHOWN]) + more, where=ptd.path, hint=hint)


def _problems(ptd: Ptd, infos: Sequence[ConstantInfo], elsewhere: Mapping[str, Ptd]) -> Iterator[str]:
    proven: set[tuple[object, ...]] = set()  # names of one constant are many where layers are alike
    for info in infos:
        claim = (info.key, info.dtype, info.shape, info.layout, info.scales, info.nbytes)
        if claim in proven:
            continue
        problem = _problem(ptd, info, elsewhere)
        if problem is None:
            proven.add(claim)
        else:
            yield f"{info.name} {problem}"
    for key in ptd.entries.keys() - {info.key for info in infos}:
        yield f"no file describes the key {key}"


def _problem(ptd: Ptd, info: ConstantInfo, elsewhere: Mapping[str, Ptd]) -> str | None:
    from bedplate.constants import TENSOR, content_key  # numpy, which whoever only runs a bundle does without

    entry = ptd.entries.get(info.key)
    if entry is None:
        return f"is not in it: no constant has the key {info.key}"
    layout = Layout(dtype=info.dtype, shape=info.shape) if info.layout == TENSOR else None
    if entry.nbytes != info.nbytes or entry.layout != layout:
        return f"is not stored as {info.dtype} of {info.nbytes} bytes and shape {info.shape}"
    covered = []
    if info.scales is not None:
        holder = ptd if info.scales in ptd.entries else elsewhere.get(info.scales)
        if holder is None:
            return f"has scales that are nowhere: no constant has the key {info.scales}"
        covered.append(holder.data(info.scales))
    if content_key(info.dtype, info.shape, info.layout, ptd.data(info.key), *covered) != info.key:
        return f"is not what its key says: {info.key} names other bytes, or other scales"
    return None
