# SPDX-License-Identifier: Apache-2.0
"""vLLM's load generator against a real server, as the page about clients says."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()


def test_vllm_bench_serve_sends_pictures(
    server: str, demo_checkpoint: Path, tmp_path: Path
) -> None:
    (command,) = re.findall(r"^<!-- runnable -->\n```bash\n(.*?)^```$", PAGE, re.M | re.S)
    for on_the_page, here in (("http://localhost:8000", server), ("shapes", "demo")):
        assert on_the_page in command
        command = command.replace(on_the_page, here)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "MODEL": str(demo_checkpoint)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = dict(re.findall(r"^([A-Z][\w ]+?)(?: \(.*\))?: +([\d.]+)", done.stdout, re.M))
    assert (counts["Successful requests"], counts["Failed requests"]) == ("6", "0")
    assert float(counts["Total generated tokens"]) == 6 * 8
