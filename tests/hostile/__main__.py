# SPDX-License-Identifier: Apache-2.0
"""``make hostile``: every hostile request, for several seeds, to a server of its own.

It prints what came back by verdict and status, and what was wrong; the exit status says whether
anything was.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.e2e.serving import running_server
from tests.hostile.all import all_cases
from tests.hostile.drive import Judge, send
from tests.reference import Reference
from vllm_spyre_mm.demo import checkpoint_path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--first", type=int, default=0, help="the first one (default: 0)")
    arguments = parser.parse_args()
    judge, faults = Judge(Reference(checkpoint_path())), 0
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with running_server(checkpoint_path(), log, "--enable-mm-embeds") as address:
            for seed in range(arguments.first, arguments.first + arguments.seeds):
                cases = list(all_cases(str(seed)))
                start = time.monotonic()
                answers = send(address, cases)
                seconds = time.monotonic() - start
                found = {answer.case.name: judge.fault(answer) for answer in answers}
                wrong = {name: fault for name, fault in found.items() if fault is not None}
                statuses = sorted(Counter(str(answer.status) for answer in answers).items())
                print(
                    f"seed {seed}: {len(cases)} requests in {seconds:.0f} s,",
                    *(f"{count} times {status}," for status, count in statuses),
                    f"{len(wrong)} wrong",
                    *(f"\n  {name}: {fault}" for name, fault in wrong.items()),
                    flush=True,
                )
                faults += len(wrong)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
