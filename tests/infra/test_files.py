"""Files that only a container engine or a cluster can run are checked by schemas, by linters and against the code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.utilities.schema_tools.validation import ValidationError, is_valid_schema, validate
from ruamel.yaml import YAML

from flows.deploy import APPROVALS, POOL, TRAINING
from flows.node import accelerate_settings
from infra.postgres import DATABASES
from pipelines.config.yaml_files import read_yaml
from pipelines.runtime.credentials import prefect_client, prefect_server
from tasks.slots import has_several_processes

PLACEHOLDER = re.compile(r"\{\{ (\w+) \}\}")
BIN = Path(sys.executable).parent


def check(root: Path, *command: str) -> str:
    done = subprocess.run([str(BIN / command[0]), *command[1:]], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def test_linters_and_schemas_find_nothing(root: Path, tmp_path: Path) -> None:
    check(root, "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "infra/compose.yaml")
    check(root, "hadolint", "infra/Dockerfile")
    check(root, "kubernetes-validate", "--strict", "infra/kubernetes/worker.yaml")
    check(root, "kubernetes-validate", "--strict", "infra/kubernetes/stage-workers.yaml")
    scripts = ("infra/setup.sh", "infra/vllm/setup.sh", "infra/slurm/stage.sh", "infra/slurm/worker.sh", ".ci/run")
    check(root, "shellcheck", *scripts)
    yamls = [
        "infra/compose.yaml",
        "infra/kubernetes/worker.yaml",
        "infra/kubernetes/hosts.yaml",
        "infra/kubernetes/stage-workers.yaml",
        "prefect.yaml",
        "dvc.yaml",
        "params.yaml",
    ]
    check(root, "yamllint", "--strict", "--config-file", "infra/yamllint.yaml", *yamls)


@pytest.mark.parametrize(
    ("file", "compiled"),
    [
        ("prefect/client/orchestration.py", True),
        ("transformers/models/auto/modeling_auto.py", True),
        ("transformers/models/qwen3_moe/modeling_qwen3_moe.py", True),
        ("transformers/models/__init__.py", True),
        ("pip_audit/cli.py", True),
        ("_pytest/python.py", True),
        ("numpy/testing/__init__.py", True),
        ("transformers/models/qwen3_vl/modeling_qwen3_vl.py", False),
        ("sympy/core/tests/test_expr.py", False),
        ("pip/_internal/main.py", False),
        ("moto/server.py", True),
        ("moto/s3/models.py", True),
        ("moto/ec2/models/instances.py", False),
        ("sympy/physics/units/quantities.py", True),
        ("sympy/physics/quantum/state.py", False),
        ("fontTools/agl.py", True),
    ],
)
def test_setup_compiles_what_processes_import(root: Path, file: str, compiled: bool) -> None:
    """A checkout in a folder named `tests` is no reason to leave anything out."""
    parts = re.findall(r"^SKIPPED\+?='(.*)'$", (root / "infra/setup.sh").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(parts) > 1
    path = f"/home/tests/posttrain/.venv/lib/python3.11/site-packages/{file}"
    assert (re.search("".join(parts), path) is None) == compiled


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        ("580.65.06", "NVIDIA driver 580.65.06: PyTorch for CUDA 13.0"),
        ("570.86.15", "NVIDIA driver 570.86.15, older than 580: PyTorch for CUDA 12.6, from download.pytorch.org"),
        (
            "470.57.02",
            "NVIDIA driver 470.57.02, older than 525, runs no CUDA that PyTorch supports: PyTorch for the CPU; update the driver",
        ),
        (
            "",
            "nvidia-smi names no driver (NVIDIA-SMI has failed): PyTorch as the package index has it; no GPU can be used until the driver"
            " answers",
        ),
        (" 545.23.08 ", "NVIDIA driver 545.23.08, older than 580: PyTorch for CUDA 12.6, from download.pytorch.org"),
    ],
)  # fmt: skip
def test_setup_takes_the_wheels_that_the_driver_runs(root: Path, tmp_path: Path, driver: str, said: str) -> None:
    """Show the words of a driver that fails."""
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        f"#!/bin/sh\necho '{driver or 'NVIDIA-SMI has failed'}'\nexit {0 if driver else 9}\n", encoding="utf-8"
    )
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = [str(root / "infra" / "setup.sh"), "torch"]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout == f"setup: {said}\n"


def pool(root: Path, kind: str) -> Any:
    return json.loads((root / "infra" / "work-pools" / f"{kind}.json").read_text(encoding="utf-8"))


def filled(value: Any, variables: dict[str, Any]) -> Any:
    """Return the template as Prefect fills it: a value that is one placeholder takes the variable's type, an empty one goes."""
    if isinstance(value, dict):
        made = {key: filled(inner, variables) for key, inner in value.items()}
        return {key: inner for key, inner in made.items() if inner is not None}
    if isinstance(value, list):
        return [filled(inner, variables) for inner in value]
    if isinstance(value, str) and (whole := PLACEHOLDER.fullmatch(value)):
        return variables.get(whole[1])
    return PLACEHOLDER.sub(lambda found: str(variables[found[1]]), value) if isinstance(value, str) else value


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_a_work_pool_uses_exactly_the_variables_that_it_declares(root: Path, kind: str) -> None:
    template = pool(root, kind)
    used = set(PLACEHOLDER.findall(json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_prefect_accepts_the_template_of_a_work_pool_and_its_defaults(root: Path, kind: str) -> None:
    template = pool(root, kind)
    WorkPoolCreate(name="posttrain", type=kind, base_job_template=template)
    is_valid_schema(template["variables"])  # raises if it is not
    defaults = {
        name: field["default"] for name, field in template["variables"]["properties"].items() if "default" in field
    }
    validate(defaults, template["variables"], raise_on_error=True)
    for name in defaults.keys() & {"stream_output", "gpus", "env"}:
        with pytest.raises(ValidationError):
            validate({**defaults, name: "wrong"}, template["variables"], raise_on_error=True)


def test_a_stage_worker_is_a_slurm_job_in_its_own_clone(root: Path, tmp_path: Path) -> None:
    origin, submit = tmp_path / "origin", tmp_path / "submit"
    (origin / ".dvc").mkdir(parents=True)
    (origin / ".dvc" / "config").write_text("")
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *command], cwd=origin, check=True)
    subprocess.run(["git", "clone", "-q", str(origin), str(submit)], check=True)
    (submit / ".dvc" / "config.local").write_text("[core]\n")
    setup = "install -D /dev/stdin .venv/bin/python"
    environment = {
        "PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(submit), "SLURM_JOB_ID": "42", "SCRATCH": str(tmp_path),
        "SETUP": setup, "PREFECT_API_URL": "http://host:4200/api",
    }  # fmt: skip
    script = ["bash", str(root / "infra" / "slurm" / "worker.sh")]
    python = '#!/bin/sh\necho "$PWD" "$@"\n'
    done = subprocess.run(script, env=environment, capture_output=True, text=True, input=python, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    clone = tmp_path / "posttrain-slurm-42"
    assert done.stdout == f"{clone} -m flows.workers add stages --name slurm-42\n"
    assert (clone / ".dvc" / "config.local").read_text() == "[core]\n"
    del environment["PREFECT_API_URL"]
    refused = subprocess.run(script, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode != 0
    assert "the address of the Prefect server" in refused.stderr


def test_the_kubernetes_job_is_valid_asks_for_gpus_and_runs_without_rights(root: Path, tmp_path: Path) -> None:
    template = pool(root, "kubernetes")
    variables = {name: field.get("default") for name, field in template["variables"]["properties"].items()}
    variables |= {"name": "calm-newt", "command": ["prefect", "flow-run", "execute"]}
    # As prefect-kubernetes does, the environment's mapping becomes a list.
    variables["env"] = [{"name": "POSTTRAIN_SLOTS", "value": "2"}]
    job = filled(template["job_configuration"]["job_manifest"], variables)
    job["metadata"]["name"] = job["metadata"].pop("generateName") + "x7k2p"  # as the cluster does
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    check(root, "kubernetes-validate", "--strict", str(tmp_path / "job.json"))
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["resources"]["requests"]["nvidia.com/gpu"] == 1
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_the_jobset_starts_one_stage_on_each_host_with_gpus_and_shared_memory(root: Path, tmp_path: Path) -> None:
    jobset = read(root / "infra" / "kubernetes" / "hosts.yaml")
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(jobset["spec"]) == {"failurePolicy", "network", "replicatedJobs"}
    jobs = jobset["spec"]["replicatedJobs"]
    for rank, job in enumerate(jobs):
        assert set(job) == {"name", "replicas", "template"}
        # the schema of a JobSet is not built in, that of the jobs in it is
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        (tmp_path / "job.json").write_text(json.dumps(whole), encoding="utf-8")
        check(root, "kubernetes-validate", "--strict", str(tmp_path / "job.json"))
        pod = job["template"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        *command, stage = container["command"]
        options = dict(zip(*[iter(container["args"])] * 2, strict=True))
        assert "python -m flows.node" in " ".join(command)
        assert (options["--rank"], options["--hosts"]) == (str(rank), str(len(jobs)))
        # a pod's name is JOBSET-JOB-REPLICA-INDEX.JOBSET
        assert (
            options["--address"] == f"{jobset['metadata']['name']}-{jobs[0]['name']}-0-0.{jobset['metadata']['name']}"
        )
        settings = accelerate_settings(
            root / "infra/accelerate/fsdp2_gpu.yaml", rank, len(jobs), options["--address"], 29500
        )
        assert settings["num_processes"] == len(jobs) * container["resources"]["limits"]["nvidia.com/gpu"]
        assert has_several_processes(stage)
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert pod["securityContext"]["runAsNonRoot"] is True


def test_the_slurm_script_starts_a_stage_on_each_host_with_its_rank(root: Path, tmp_path: Path) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "scontrol").write_text('#!/bin/sh\nprintf "node7\\nnode9\\n"\n')
    # stands in for srun: it starts the command once on each host
    (tmp_path / "srun").write_text(
        '#!/bin/sh\nshift 2\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; (cd "$WORKSPACE" && "$@"); done\n'
    )
    for path in (python, tmp_path / "scontrol", tmp_path / "srun"):
        path.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "WORKSPACE": str(tmp_path), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7,9]",
        "SLURM_SUBMIT_DIR": "/nowhere",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(root / "infra/slurm/stage.sh"), "align@grpo-0"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"-m flows.node align@grpo-0 --rank {rank} --hosts 2 --address node7 --config infra/accelerate/fsdp2_gpu.yaml"
        for rank in (0, 1)
    ]


def test_compose_publishes_on_loopback_checks_health_and_gives_no_password_a_default(root: Path) -> None:
    compose = read(root / "infra" / "compose.yaml")
    services = compose["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports == ["127.0.0.1:5000:5000", "127.0.0.1:4200:4200"]
    assert {name for name, service in services.items() if "healthcheck" in service} == {
        "postgres",
        "s3",
        "mlflow",
        "prefect",
    }
    for service in services.values():
        for name, condition in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if name == "bucket" else "service_healthy"
            assert condition["condition"] == wanted
    assert services["mlflow"]["command"][:4] == ["python", "-m", "pipelines.tracking.server", "server"], (
        "bodies have a limit"
    )
    text = (root / "infra" / "compose.yaml").read_text(encoding="utf-8")
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    example = (root / "infra" / "env.example").read_text(encoding="utf-8")
    offered = dict(line.split("=", 1) for line in example.splitlines() if line and not line.startswith("#"))
    assert set(offered) == asked | {"POSTTRAIN_WEBHOOK"}
    assert set(offered.values()) == {""}
    assert set(re.findall(r"CREATE DATABASE (\w+)", text)) == set(DATABASES)
    assert services["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    images = {service["image"] for service in services.values()}
    assert all(re.search(r":(\d|cpu$|cuda$)", image) for image in images), "every image is pinned"
    server = prefect_server("admin:word", 4200)
    prefect = services["prefect"]["environment"]
    assert set(server) - set(prefect) <= set(prefect_client("")), "the container is protected as `make ui` is"
    assert {name: server[name] for name in prefect if name in server and "AUTH" not in name} == {
        name: prefect[name] for name in prefect if name in server and "AUTH" not in name
    }


def test_images_are_pinned_and_do_not_run_as_root(root: Path) -> None:
    text = (root / "infra" / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    targets = text.split("\nFROM ")[2:]
    assert [target.split()[2] for target in targets] == ["cpu", "cuda"]
    for target in targets:
        assert "\nUSER 10001\n" in target
        assert target.count("--constraint constraints.txt") == 2
        assert target.index("USER 10001") < target.index("ENTRYPOINT")
    assert targets[1].count("TORCH_INDEX") == 2  # wheels for older drivers
    assert "--no-install-recommends gcc libc6-dev" in targets[1]  # Triton compiles with it


def test_deployments_are_the_flows_with_their_own_parameters(root: Path) -> None:
    import importlib
    import inspect

    deployed = {entry["name"]: entry for entry in read(root / "prefect.yaml")["deployments"]}
    assert {name: [each["cron"] for each in entry["schedules"]] for name, entry in deployed.items()} == {
        "nightly": ["0 2 * * *"],
        "weekly": ["0 6 * * 0"],
        "promote": [],
    }
    for name, entry in deployed.items():
        module, function = entry["entrypoint"].split(".py:")
        flow = getattr(importlib.import_module(module.replace("/", ".")), function)
        assert set(entry["parameters"]) <= set(inspect.signature(flow.fn).parameters)
        assert entry["work_pool"]["name"] == POOL
        assert entry["work_pool"]["work_queue_name"] == (APPROVALS if name == "promote" else TRAINING)
        assert "concurrency_limit" not in entry, "a flow would not outlive an outage of the server that keeps its lease"


def test_the_unit_of_systemd_starts_the_command_that_make_serve_starts(root: Path, tmp_path: Path) -> None:
    text = (root / "infra/systemd/posttrain.service").read_text(encoding="utf-8")
    (command,) = re.findall(r"^ExecStart=%h/posttrain/\.venv/bin/python -m (.+)$", text, re.MULTILINE)
    assert f"-m {command.replace('4200', '$(PREFECT_PORT)')}\n" in (root / "Makefile").read_text(encoding="utf-8")
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    unit = tmp_path / "posttrain.service"
    unit.write_text(text.replace("%h/posttrain", str(tmp_path)), encoding="utf-8")
    done = subprocess.run(
        [analyze, "--man=no", "verify", "--user", str(unit)], env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_fresh_clone_has_every_source_of_the_dag(root: Path) -> None:
    graph = read_yaml(root / "dvc.yaml")["stages"].values()
    made = [str(out) for stage in graph for out in stage["outs"] if isinstance(out, str) and "${" not in out]
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    files = tracked.stdout.split("\0")
    sources = {str(dep) for stage in graph for dep in stage["deps"] if "${" not in str(dep)}
    sources -= {
        dep
        for dep in sources
        if dep.split("/")[0] in ("models", "runs") or any(f"{dep}/".startswith(f"{out}/") for out in made)
    }
    missing = sorted(dep for dep in sources if not any(f"{file}/".startswith(f"{dep}/") for file in files))
    assert (missing, "data/raw" in sources) == ([], True)
