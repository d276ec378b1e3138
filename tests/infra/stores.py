"""The S3 store of `make up` as a process of a test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from infra.topology import responds
from posttrain.network import free_port, wait_until

KEY, SECRET = "posttrain-store-key", "the-store's-secret"


@contextmanager
def serving(root: Path, folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the store on a folder; yield its address and its process."""
    port = free_port()
    environment = os.environ | {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    command = [sys.executable, "-m", "infra.s3", str(port), str(folder)]
    process = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        assert wait_until(lambda: responds(url), lambda: process.poll() is None, 120)
        yield url, process
    finally:
        process.kill()
        process.wait()


def client(url: str, key: str = KEY, secret: str = SECRET) -> Any:
    """Return Amazon's own client of the store."""
    return boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=key, aws_secret_access_key=secret,
        config=Config(retries={"total_max_attempts": 1}),
    )  # fmt: skip
