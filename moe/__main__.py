"""`python -m moe` is the command `sparse-moe`."""

import sys

from moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
