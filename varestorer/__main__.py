"""`python -m varestorer` is the `varestorer` command."""

import sys

from varestorer.commands import main

if __name__ == "__main__":
    sys.exit(main())
