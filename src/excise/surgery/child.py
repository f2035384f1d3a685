"""Run a script in this process, and die with the process that started it.

Run as `python -I child.py SCRIPT ARGUMENTS…`, with the read end of a pipe as standard input, whose other end only the
parent holds: when the parent dies, however it dies, the system closes it. That works on every system, and leaves no
moment in between.
"""

import os
import runpy
import sys
import threading


def _leave_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
