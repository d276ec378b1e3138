"""The old name of `posttrain calibrate`."""

from pipelines.commands.console import run_old_name

if __name__ == "__main__":
    run_old_name("calibrate")
