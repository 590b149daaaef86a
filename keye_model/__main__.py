"""`python -m keye_model` is the script `keye`."""

from keye_model.cli import main

raise SystemExit(main())
