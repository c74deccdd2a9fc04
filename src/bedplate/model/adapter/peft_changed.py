"""What a PEFT adapter puts in place of the base model's own: parameters, rows of tokens, layers used again.

Nothing is left out that PEFT would use, and nothing is taken that it would drop. On a head that shares its weight with
the embedding, PEFT does one of three things: what is copied into the weight counts for both; what is trained beside it
for one of them; and with `ensure_weight_tying` it keeps them equal.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bedplate.errors import AdapterError, UnsupportedError
from bedplate.model.adapter.peft_config import MERGE, PeftConfig
from bedplate.model.adapter.peft_keys import NotTaken, meaning_of
from bedplate.model.adapter.peft_targets import saves_tables
from bedplate.model.adapter.peft_weights import Sorted, refuse
from bedplate.model.adapter.types import EMBEDDING, HEAD, TokenRows
from bedplate.model.stored import stored_linears, stored_shapes
from bedplate.spec import ModelSpec

_ONE = "use the config and the weights of one adapter"
_TABLES = (EMBEDDING, HEAD)
_ORIGINAL = "original_module"


def replicated(config: PeftConfig, spec: ModelSpec, where: Path) -> tuple[int, ...] | None:
    """The base's layer that each layer is. None: the model is as it is. Raises AdapterError, UnsupportedError."""
    if config.replication is None:
        return None
    if any(behind > spec.n_layers for _, behind in config.replication):
        raise AdapterError(
            f"layer_replication goes beyond the {spec.n_layers} layers of the model",
            where=where,
            hint="add the adapter to the model that it was trained on",
        )
    layers = tuple(layer for first, behind in config.replication for layer in range(first, behind))
    if len(layers) > 2**12:
        raise AdapterError(f"layer_replication makes {len(layers)} layers", where=where, hint=_ONE)
    if len(set(spec.layers)) > 1:
        raise UnsupportedError(
            "layer_replication of a model whose layers differ (windows, rotary embeddings) is not supported",
            where=where,
            hint=MERGE,
        )
    return layers


class Changed:
    """spec: of the model with the adapter's own layers. Raises AdapterError or UnsupportedError, as all here."""

    def __init__(
        self, config: PeftConfig, spec: ModelSpec, found: Sorted, *, config_file: Path, weights: Path
    ) -> None:
        self._config, self._spec, self._found = config, spec, found
        self._config_file, self._weights = config_file, weights
        self._tokens = self._tokens_of_tables()

    def parameters(self) -> dict[str, NDArray[np.float32]]:
        """New values of parameters, by their names in the model's files."""
        self._refuse_linears()
        self._refuse_unknown()
        values = {name: value for name, (_, value) in self._found.values.items()}
        for name, (inside, _) in self._found.values.items():
            module = name.rpartition(".")[0]
            if inside != self._inside(module):
                raise AdapterError(
                    f"the weights hold {self._found.names[name]}, for which PEFT finds no place: it would drop it",
                    where=self._weights,
                    hint=_ONE,
                )
        self._check_saved(values)
        self._check_copies(values)
        tables = {table: values.pop(f"{table}.weight", None) for table in _TABLES}
        return values | self._tables(tables[EMBEDDING], tables[HEAD])

    def rows(self) -> dict[str, TokenRows]:
        """Rows of tokens, by `embed_tokens` and `lm_head`."""
        found = {}
        for table, ids in self._tokens.items():
            values = self._rows_of(table)
            if values.shape != (len(ids), self._spec.dim):
                raise AdapterError(
                    f"the trained tokens of {table} have shape {values.shape}, "
                    f"but trainable_token_indices names {len(ids)}, and a row has {self._spec.dim} columns",
                    where=self._weights,
                    hint=_ONE,
                )
            order = np.argsort(np.array(ids, np.int64), kind="stable")
            if len(ids):
                found[table] = TokenRows(ids=np.array(ids, np.int64)[order], values=values[order])
        if further := sorted(self._found.rows.keys() - self._tokens.keys()):
            raise AdapterError(
                f"the weights hold {self._found.names[further[0]]}, but trainable_token_indices does not name "
                "its tokens: PEFT would drop it",
                where=self._config_file,
                hint=_ONE,
            )
        return found

    def _rows_of(self, table: str) -> NDArray[np.float32]:
        """Of a head that goes with the embedding, they are those of the embedding."""
        rows = self._found.rows
        if table == HEAD and self._tied_tokens:
            if HEAD in rows and not np.array_equal(rows[HEAD], rows.get(EMBEDDING, rows[HEAD])):
                raise AdapterError(
                    f"the weights hold {self._found.names[HEAD]}, but the head goes with the embedding",
                    where=self._weights,
                    hint=_ONE,
                )
            table = EMBEDDING
        if table not in rows:
            raise AdapterError(f"the trained tokens of {table} are missing", where=self._weights, hint=_ONE)
        return rows[table]

    def _tokens_of_tables(self) -> dict[str, tuple[int, ...]]:
        """Whose rows are trained, with a head that goes with the embedding."""
        found: dict[str, tuple[int, ...]] = {}
        for name, ids in self._config.tokens.items():
            tables = [table for table in _TABLES if _path(table).endswith(name)]
            if len(tables) != 1 or tables[0] in found:
                raise UnsupportedError(
                    f"trainable_token_indices names {name!r}: only the embedding and the head can be named, once each",
                    where=self._config_file,
                    hint=MERGE,
                )
            found[tables[0]] = ids
        both = HEAD in found and EMBEDDING in found
        differ = both and found[HEAD] != found[EMBEDDING]
        if differ and self._spec.tied_head and self._config.keeps_tied:
            raise AdapterError(
                "trainable_token_indices names other tokens of the head than of the embedding, "
                "and ensure_weight_tying is true: PEFT refuses it",
                where=self._config_file,
                hint=_ONE,
            )
        self._tied_tokens = self._spec.tied_head and EMBEDDING in found and not differ
        if self._tied_tokens:
            found[HEAD] = found[EMBEDDING]
        for table in found:
            if (None, table) in self._found.halves or self._is_saved(_path(table)):
                raise UnsupportedError(
                    f"trained tokens (trainable_token_indices) of {table}, which is adapted or trained in full too, "
                    "are not supported",
                    where=self._config_file,
                    hint=MERGE,
                )
        return found

    def _tables(
        self, embedding: NDArray[np.float32] | None, head: NDArray[np.float32] | None
    ) -> dict[str, NDArray[np.float32]]:
        if self._spec.tied_head:
            embedding, head = self._tied(embedding, head)
        both = {f"{EMBEDDING}.weight": embedding, f"{HEAD}.weight": head}
        return {name: value for name, value in both.items() if value is not None}

    def _tied(
        self, embedding: NDArray[np.float32] | None, head: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None]:
        """What each of the two is, given what is in the file of each."""
        own = {table: self._is_saved(_path(table)) for table in _TABLES}
        originals = [value for (_, inside), value in self._found.copies.items() if inside == _ORIGINAL]
        if self._saves_one_table():
            own, originals = (
                {EMBEDDING: False, HEAD: False},
                [],
            )  # one weight, which has both names in the file
            if embedding is None or head is None:
                raise self._missing(EMBEDDING if embedding is None else HEAD)
        copies = [
            value
            for table, value in ((EMBEDDING, embedding), (HEAD, head))
            if value is not None and not own[table]
        ]
        copies += originals
        if not all(np.array_equal(copies[0], other) for other in copies[1:]):
            raise AdapterError(
                "its embedding and its head share one weight, but the file has different numbers for them",
                where=self._weights,
                hint=_ONE,
            )
        shared = copies[0] if copies else None
        return (embedding if own[EMBEDDING] else shared), (head if own[HEAD] else shared)

    def _saves_one_table(self) -> bool:
        return self._spec.tied_head and self._config.keeps_tied and saves_tables(self._config)

    def _check_copies(self, values: dict[str, NDArray[np.float32]]) -> None:
        """They stand beside what is trained in full, and are as large; one of it is the same."""
        for (module, inside), value in self._found.copies.items():
            trained = values.get(f"{module}.weight")
            is_saved = self._is_saved(_path(module)) or self._saves_one_table()
            if (
                not is_saved
                or trained is None
                or trained.shape != value.shape
                or (inside != _ORIGINAL and not np.array_equal(trained, value))
            ):
                raise AdapterError(
                    f"the weights hold {module}.{inside}.weight, which PEFT would drop or not take",
                    where=self._weights,
                    hint=_ONE,
                )

    def _inside(self, module: str) -> str:
        """The name of PEFT's module that the parameters of a module are in."""
        layer, linear = _place(module)
        if module in self._tokens:
            return "token_adapter.base_layer"
        return "base_layer" if (layer, linear) in self._found.halves else ""

    def _refuse_linears(self) -> None:
        """What the config trains in full may be no linear of a layer."""
        linears = stored_linears(self._spec)
        for layer in range(self._spec.n_layers):
            if found := next(
                (name for name in linears if self._is_saved(f"model.layers.{layer}.{name}")), None
            ):
                raise UnsupportedError(
                    f"modules_to_save names layers.{layer}.{found}: a linear that is trained in full is not supported",
                    where=self._config_file,
                    hint=MERGE,
                )

    def _refuse_unknown(self) -> None:
        shapes = stored_shapes(self._spec)
        not_taken: dict[str, NotTaken] = {}
        for name in self._found.values:
            module, _, leaf = name.rpartition(".")
            in_full = leaf == "weight" and _place(module)[1] in stored_linears(self._spec)
            if in_full or name not in (f"{HEAD}.weight", *shapes):
                not_taken[self._found.names[name]] = meaning_of(name)
        refuse(not_taken, self._weights)

    def _is_saved(self, path: str) -> bool:
        """Whether a module is trained in full, or one that it is in. PEFT goes by the ends of paths."""
        pieces = path.split(".")
        paths = [".".join(pieces[:length]) for length in range(1, len(pieces) + 1)]
        return any(one.endswith(name) for one in paths for name in self._config.saved)

    def _check_saved(self, values: dict[str, NDArray[np.float32]]) -> None:
        """What is trained in full must be there. What is adapted too is not taken."""
        names = [*stored_shapes(self._spec), *([f"{HEAD}.weight"] if self._spec.tied_head else [])]
        for name in names:
            module = name.rpartition(".")[0]
            if not self._is_saved(_path(module)):
                continue
            if _place(module) in self._found.halves:
                raise UnsupportedError(
                    f"modules_to_save names {module}, which is adapted too: this is not supported",
                    where=self._config_file,
                    hint=MERGE,
                )
            if name not in values:
                raise self._missing(module)

    def _missing(self, module: str) -> AdapterError:
        return AdapterError(
            f"the config trains {module} in full (modules_to_save), but the weights do not hold it",
            where=self._weights,
            hint=_ONE,
        )


def _path(module: str) -> str:
    """As transformers names it."""
    return module if module == HEAD else f"model.{module}"


def _place(module: str) -> tuple[int | None, str]:
    if not module.startswith("layers."):
        return None, module
    _, layer, linear = module.split(".", 2)
    return int(layer), linear
