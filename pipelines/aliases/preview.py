"""The old name of `posttrain preview`."""

from pipelines.commands.console import run_old_name

if __name__ == "__main__":
    run_old_name("preview")
