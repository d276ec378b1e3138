"""Runs a step as a user who owns nothing: python -m tests.reliability.nobody pipelines.sft"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    os.setgid(65534)
    os.setuid(65534)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
