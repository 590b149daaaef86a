"""`python -m keye_model` is the script `keye`."""

import sys

from keye_model.cli import main

if __name__ == "__main__":
    sys.exit(main())
