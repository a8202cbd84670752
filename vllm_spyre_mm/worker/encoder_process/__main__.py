# SPDX-License-Identifier: Apache-2.0
"""The encoder's process; its one argument is the file descriptor of its end of the channel.

Before anything large is imported, it is made to end with the worker and with nothing else.
"""

import os
import select
import signal
import socket
import sys
import threading


def leave() -> None:
    """End this process at once, whatever its threads are in the middle of."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also if nobody reads them any more
        os._exit(0)


def leave_with(other: socket.socket) -> None:
    """End this process when the other end of its channel is closed, as it is when the worker ends.

    Signals are for the worker: one that is sent to all processes of a terminal or of a service
    would end this one before the worker, which would take it for a fault.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    poll = select.poll()
    poll.register(other, select.POLLRDHUP)

    def wait() -> None:
        poll.poll()
        leave()

    threading.Thread(target=wait, name="worker-watchdog", daemon=True).start()


if __name__ == "__main__":
    end = socket.socket(fileno=int(sys.argv[1]))
    leave_with(end)

    from vllm.plugins import load_general_plugins
    from vllm.utils.system_utils import decorate_logs, set_process_title

    set_process_title("Encoder")
    decorate_logs("Encoder")
    load_general_plugins()  # as in every process of vLLM's

    from vllm_spyre_mm.worker.encoder_process.channel import Channel
    from vllm_spyre_mm.worker.encoder_process.child import serve

    serve(Channel(end))
    leave()
