"""What the commands share. Until one of them runs, a signal just ends the process: there is nothing to clean up yet."""

import signal
import sys
from pathlib import Path

from lib.project import tell_missing_package

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent.parent:
    sys.excepthook = tell_missing_package
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of an import; lib.project.run_tool takes over
