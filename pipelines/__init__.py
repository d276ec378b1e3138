"""The versioned steps, one module per stage of dvc.yaml. `aliases` keeps the old names of commands."""

from pathlib import Path

__path__.append(str(Path(__file__).with_name("aliases")))
