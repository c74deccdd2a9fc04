"""What a user names of a recipe, and gets who names nothing. Apart from it: whoever runs a bundle needs no recipe."""

from __future__ import annotations

from typing import Literal

Method = Literal["plain", "hqq", "offset"]
AdapterScheme = Literal["none", "8w"]

# Measured: docs/recipes.md has the table.
METHOD: Method = "offset"
RECOVERY_RANK = 0
