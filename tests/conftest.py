"""What every test relies on."""

import os
import signal

# A run that was put into the background ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# pytest's workers say how wide their terminal is, and our tables would be as narrow.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
