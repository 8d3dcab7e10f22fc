"""python -m sap_hf.cli: the same as sap-hf."""

import sys

from sap_hf.cli import main

sys.exit(main())
