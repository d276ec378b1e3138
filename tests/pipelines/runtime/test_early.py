"""A stage's command asks the fork server before it imports its module."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


@pytest.mark.parametrize(
    ("extra", "asked"), [({}, True), ({"POSTTRAIN_ACCELERATE": "infra/accelerate/none.yaml"}, False)]
)
def test_a_stage_is_handed_over_before_its_module_is_imported(root: Path, extra: dict[str, str], asked: bool) -> None:
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        path = f"{folder}/warm"
        server.bind(path)
        server.listen()
        variables = {"POSTTRAIN_WARM": path, "DVC_STAGE": "align@grpo-0", "PYTHONPATH": str(root)} | extra
        command = [sys.executable, "-X", "importtime", "-m", "pipelines.align", "--algorithm", "grpo", "--seed", "0"]
        with subprocess.Popen(command, env=os.environ | variables, cwd=root, stderr=subprocess.PIPE, text=True) as step:
            if asked:
                connection, _ = server.accept()
                with connection:
                    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
                    for descriptor in descriptors:
                        os.close(descriptor)
                    request = json.loads(connection.makefile("r", encoding="utf-8").readline())
                    connection.sendall(f"{os.getpid()}\n7\n".encode())
                assert (request["module"], request["arguments"]) == (
                    "pipelines.align",
                    ["--algorithm", "grpo", "--seed", "0"],
                )
            _, imported = step.communicate()
        assert step.returncode == (7 if asked else 2)
        assert ("pipelines.config" in imported) is not asked, "the types of the parameters are for the fork"
