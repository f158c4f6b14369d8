"""`python -m peta_fast` is `peta-fast`."""

import sys

from peta_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
