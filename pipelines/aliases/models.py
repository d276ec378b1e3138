"""The old name of `posttrain models`."""

from pipelines.commands.console import run_old_name

if __name__ == "__main__":
    run_old_name("models")
