"""Serve SmolLM2-135M with the two example adapters, over HTTP and with a page for the browser.

    python examples/serve_demo.py [OPTION...]     # or `make serve-demo`, which installs what it needs

The bundle is that of `demo.py`: what was built before is used again. Options are those of `bedplate serve`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from demo import ADAPTERS, BUNDLE, add_adapter, current_bundle

from bedplate.cli.output import progress_bars, reported_errors, stderr

TRY = (
    "Is this review positive, negative or mixed? The food was wonderful, but the service was a disaster.",
    "Reply with JSON: item, quantity, city, day. We need ten microphones delivered to our shop in Accra by Friday.",
)


def main() -> None:
    with progress_bars() as bars:
        bundle = current_bundle(bars)
        for config in sorted(ADAPTERS.glob("*/adapter_config.json")):
            add_adapter(bundle, config.parent, bars)
    stderr.print("Open the address in a browser, and ask all models at once. For example:")
    for prompt in TRY:
        stderr.print(f"  {prompt}", markup=False, highlight=False, soft_wrap=True)
    bedplate_command = str(Path(sys.executable).with_name("bedplate"))
    os.execv(bedplate_command, [bedplate_command, "serve", str(BUNDLE), *sys.argv[1:]])


if __name__ == "__main__":
    with reported_errors():
        main()
