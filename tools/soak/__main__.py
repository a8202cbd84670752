# SPDX-License-Identifier: Apache-2.0
"""``python -m tools.soak``: soak a server of the embedded checkpoint and report."""

import argparse
import asyncio
import math
import sys
import tempfile
from pathlib import Path

from tools.soak.report import faults, report
from tools.soak.soak import Soak, SoakOptions, soaked_server


def main() -> int:
    """Soak; the exit status is 1 if anything went wrong."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    defaults = SoakOptions()
    parser.add_argument("--requests", type=int, default=defaults.requests, help="at most")
    parser.add_argument("--seconds", type=float, default=math.inf, help="at most")
    parser.add_argument(
        "--outstanding", type=int, default=defaults.outstanding, help="requests under way at a time"
    )
    parser.add_argument("--pool", type=int, default=defaults.pool, help="distinct requests")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--log", type=Path, help="what the server prints (default: forgotten)")
    parser.add_argument(
        "--defaults", action="store_true", help="the default dtype, compiled (default: fp32, eager)"
    )
    parser.add_argument(
        "--stand-in", action="store_true", help="on the stand-in for a card, with its defaults"
    )
    arguments = vars(parser.parse_args())
    log, defaults, stand_in = map(arguments.pop, ("log", "defaults", "stand_in"))
    with (
        tempfile.TemporaryDirectory() as folder,
        soaked_server(
            log or Path(folder) / "log.txt", defaults=defaults, stand_in=stand_in
        ) as server,
    ):
        server.wait_until_healthy()
        soak = Soak(server.address, server.process.pid, SoakOptions(**arguments))
        result = asyncio.run(soak.run())
    print(report(result))
    return int(bool(faults(result)))


if __name__ == "__main__":
    sys.exit(main())
