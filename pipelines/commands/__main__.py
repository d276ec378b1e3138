"""Run the console script as `python -m pipelines.commands`."""

from __future__ import annotations

import sys

from pipelines.commands.console import main

sys.exit(main())
