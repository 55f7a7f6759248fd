"""`python -m llmkit`, and the `llmkit` command.

Modules are not taken from the working directory, which may be a download. `python -m` puts it first, in this process
and in those that it or a library starts, unless PYTHONSAFEPATH is set. In a checkout the directory has llmkit itself.
"""

import os
import sys

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ != "__main__" or sys.flags.safe_path or sys.path[0] != HERE:
    os.environ["PYTHONSAFEPATH"] = "1"
    if __name__ == "__main__" and not sys.flags.safe_path:
        del sys.path[0]

from llmkit.cli.main import main

if __name__ == "__main__":
    main()
