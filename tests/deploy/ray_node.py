"""A Ray of one machine that serves an application: a process of its own, which ends when its input does.

It prints a line of JSON when it serves. Usage: ray_node.py PORT OPTIONS
"""

from __future__ import annotations

import json
import sys
import tempfile

import ray
from ray import serve

from bedplate.deploy.ray import build_app


def main(port: int, options: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # sockets need a short path
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            object_store_memory=100 << 20,
            log_to_driver=False,
            configure_logging=False,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(build_app(options), name="bedplate")
            print(json.dumps({"ready": True}), flush=True)
            sys.stdin.read()
            serve.shutdown()
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
