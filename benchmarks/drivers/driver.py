# SPDX-License-Identifier: Apache-2.0
"""One model in one process, measured from outside; run by path, also in other environments.

    python drivers/driver.py '{"model": PATH, "kind": "vllm", "engine": {...}}'

It answers each JSON line on its standard input with one on its standard output that begins with
``@@``. The kinds are those of :data:`KINDS`. Nothing of this project is imported: the same files
measure the references.
"""

import importlib
import json
import resource
import sys
import time

KINDS = {
    "vllm": ("vllm_engine", "Vllm", ("vllm", "vllm.entrypoints.llm")),
    "transformers": ("transformers_model", "Transformers", ("transformers",)),
    "openvino": ("openvino_model", "OpenVino", ("optimum.intel.openvino",)),
    "vllm operators": ("vllm_operators", "VllmOperators", ("vllm", "vllm._custom_ops")),
}
"""Module and class of each, and what is imported before the clock starts, besides what the command
line names."""


def main() -> None:
    """Start, say how long it took, and obey."""
    arguments = json.loads(sys.argv[1])
    started = time.perf_counter()
    module, name, imports = KINDS[arguments["kind"]]
    for each in (*imports, *arguments.get("imports", [])):
        importlib.import_module(each)
    kind = getattr(importlib.import_module(module), name)
    imported = time.perf_counter()
    target = kind(arguments["model"], arguments.get("engine", {}))
    reply = {
        "import_seconds": imported - started,
        "start_seconds": time.perf_counter() - imported,
        "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }
    print("@@" + json.dumps(reply), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        reply = getattr(target, command.pop("do"))(**command)
        print("@@" + json.dumps(reply), flush=True)
    target.close()


if __name__ == "__main__":
    main()
