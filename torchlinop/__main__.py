"""The commands of the package: ``python -m torchlinop --help``."""

import sys

from torchlinop.command_line import main

if __name__ == "__main__":
    sys.exit(main())
