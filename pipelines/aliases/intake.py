"""The old name of `posttrain intake`."""

from pipelines.commands.console import run_old_name

if __name__ == "__main__":
    run_old_name("intake")
