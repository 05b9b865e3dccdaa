"""What other engines are given to start a run: manifests for Kubernetes, JobSet and Kubeflow, and a script for Ray.

No cluster runs here. Manifests are compared with their schemas, and their commands with jvitmoe's flags.
"""

import json
import os
import re
import secrets
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jax._src.clusters import ClusterEnv
from jax._src.clusters.k8s_cluster import K8sCluster
from kubeflow_trainer_api import models

import processes
from jvitmoe.commands import cli, train
from run_folders import losses, tiny, write_experiment

MODELS = {
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}
KUBEFLOW = "trainer.kubeflow.org/v1alpha1"
VERSIONS = {"JobSet": "jobset.x-k8s.io/v1alpha2", "TrainJob": KUBEFLOW, "TrainingRuntime": KUBEFLOW}
# What Kubeflow's runtime sets in the pods of the TrainJob.
RUNTIME = {
    "JAX_COORDINATOR_ADDRESS": "jvitmoe-node-0-0.jvitmoe:1234",
    "JAX_NUM_PROCESSES": "8",
    "JAX_PROCESS_ID": "3",
}


def manifests() -> list[dict[str, Any]]:
    """Returns the documents of all manifests."""
    paths = sorted((processes.ROOT / "scripts").glob("*.yaml"))
    return [document for path in paths for document in yaml.safe_load_all(path.read_text())]


def kind(name: str) -> dict[str, Any]:
    """Returns the only document of that kind."""
    (document,) = (document for document in manifests() if document["kind"] == name)
    return document


def check(document: dict[str, Any]) -> None:
    """Raises an error unless the document fits its schema. Kubeflow's models ignore unknown fields, so what they
    have read is compared with the document."""
    model = MODELS.get(document["kind"])
    if model is None:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    else:
        assert document["apiVersion"] == VERSIONS[document["kind"]]
        assert model.from_dict(document).to_dict() == document


def jobs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns kind -> (name of the Job in the cluster, its spec), for those in which JAX finds its processes."""
    job, (replicated,) = kind("Job"), kind("JobSet")["spec"]["replicatedJobs"]
    name = f"{kind('JobSet')['metadata']['name']}-{replicated['name']}-0"
    return {"Job": (job["metadata"]["name"], job["spec"]), "JobSet": (name, replicated["template"]["spec"])}


def commands() -> dict[str, list[str]]:
    """Returns kind -> command line of a pod, with its variables replaced as Kubernetes does."""
    pods = {name: spec["template"]["spec"]["containers"] for name, (_, spec) in jobs().items()}
    found = {name: container["command"] + container["args"] for name, (container,) in pods.items()}
    trainer = kind("TrainJob")["spec"]["trainer"]
    return found | {"TrainJob": expand(trainer["command"] + trainer["args"], RUNTIME)}


def expand(command: list[str], variables: dict[str, str]) -> list[str]:
    return [re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], word) for word in command]


@pytest.mark.parametrize("document", manifests(), ids=lambda document: document["kind"])
def test_a_manifest_fits_its_schema(document):
    check(document)


def test_manifests_start_the_same_run_with_flags_that_exist_and_the_service_selects_its_pods(monkeypatch):
    monkeypatch.chdir(processes.ROOT)
    service, (job, spec) = kind("Service"), jobs()["Job"]
    assert service["spec"] == {"clusterIP": "None", "selector": {"job-name": job}}
    assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
    for name, command in commands().items():
        start = command.index("python")
        assert command[start : start + 3] == ["python", "-m", "jvitmoe.train"]
        values = cli.parse(["train.py", *command[start + 3 :]], train.define_flags, config=True)
        cli.experiment(values)
        assert cli.config_path(command) == "cifar10_random"
        assert values.config.data.dir == "/runs/tfds"
        assert values.workdir == "/runs/cifar10_random"
        assert values.join_seconds == 600
        if name == "TrainJob":
            joined = values.coordinator, str(values.processes), str(values.process)
            assert (values.distributed, *joined) == (False, *RUNTIME.values())
        else:
            assert (values.distributed, values.coordinator) == (True, "")


@pytest.mark.parametrize("name", ["Job", "JobSet"])
def test_jax_finds_the_processes_of_a_job(monkeypatch, name):
    """JAX asks Kubernetes for the pod and its Job. Here it gets them from the manifest, named as controllers do."""
    job_name, spec = jobs()[name]
    assert spec["completions"] == spec["parallelism"] == 8
    assert kind("JobSet")["spec"]["replicatedJobs"][0]["replicas"] == 1
    labels = {"jobset.sigs.k8s.io/jobset-name": kind("JobSet")["metadata"]["name"]} if name == "JobSet" else {}
    job = SimpleNamespace(
        metadata=SimpleNamespace(name=job_name, labels=labels),
        spec=SimpleNamespace(parallelism=spec["parallelism"]),
    )
    pod = SimpleNamespace(spec=SimpleNamespace(subdomain=spec["template"]["spec"].get("subdomain")))
    answers = {"is_env_present": True, "_job": job, "_pod": pod, "_controller": SimpleNamespace(kind="Job")}
    for method, answer in answers.items():
        monkeypatch.setattr(K8sCluster, method, classmethod(lambda cls, answer=answer: answer))
    (variable,) = spec["template"]["spec"]["containers"][0]["env"]
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 0)
    assert found == (variable["value"], 8, 3, None)  # so the variable says what JAX would find in the end
    assert variable["name"] == "JAX_COORDINATOR_ADDRESS"


def test_a_failed_pod_restarts_all_and_the_run_goes_on():
    """JobSet and Kubeflow's runtime restart the set at the first failed pod. In the Job every pod restarts by itself,
    as all processes end when one is lost."""
    for spec in (kind("JobSet")["spec"], kind("TrainingRuntime")["spec"]["template"]["spec"]):
        assert spec["failurePolicy"] == {"maxRestarts": 10}
        (replicated,) = spec["replicatedJobs"]
        job = replicated["template"]["spec"]
        assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    job = kind("Job")["spec"]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (10 * job["completions"], "OnFailure")
    runtime, trainjob = kind("TrainingRuntime"), kind("TrainJob")["spec"]
    assert trainjob["runtimeRef"]["kind"] == "TrainingRuntime"
    assert trainjob["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert trainjob["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"] == 8


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
OMPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "1"}
OMPI |= {"OMPI_COMM_WORLD_RANK": "0"}
GPUS = [  # variables of the launcher, the GPUs that the process uses
    (SLURM | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, "all"),
    (SLURM | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}, "all"),
    (SLURM | {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "1"),
    (SLURM | {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "7,1"}, "1"),
    (SLURM | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1", "JAX_LOCAL_DEVICE_IDS": "0,3"}, "0,3"),
    (OMPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "all"),
    (OMPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "1"),
]
JOINS = """
import json, os, sys
import jax
from absl import flags
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
from jvitmoe.commands import train
from jvitmoe.machine import devices, processes

devices.start, processes.is_single = lambda: None, lambda: True  # JAX cannot join again once its devices run
values = flags.FlagValues()
train.define_flags(values)
values(["train", "--distributed"])
for variables in json.loads(sys.argv[1]):
    os.environ.update(variables)
    jax.config.update("jax_cuda_visible_devices", "all")
    processes.join(train.join_of(values))
    print(CUDA_VISIBLE_DEVICES.value)
    jax.distributed.shutdown()
    for name in variables:
        del os.environ[name]
"""


@pytest.mark.process
def test_a_process_uses_the_gpu_of_its_number_or_alone_on_its_node_all():
    given = [variables | {"JAX_COORDINATOR_PORT": str(processes.free_port())} for variables, _ in GPUS]
    ended = processes.run([sys.executable, "-c", JOINS, json.dumps(given)])
    assert ended.code == 0, ended.err
    assert ended.out.split() == [gpus for _, gpus in GPUS]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(0, 0, False), (1, 9, True), (143, 0, True), (2, 0, False), (1, 10, False)]
)
def test_the_slurm_script_gives_each_task_its_cores_and_the_flags_and_queues_a_failed_job_again(
    tmp_path, code, restarts, requeued
):
    script = processes.ROOT / "scripts" / "slurm.sbatch"
    for command, last in (("srun", f"exit {code}"), ("scontrol", "")):
        path = tmp_path / command
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" {command} "$@"\n{last}\n')
        path.chmod(0o755)
    slurm = {"SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restarts)}
    environment = processes.environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | slurm
    flags = f"--config={processes.ROOT}/configs/digits_dense.py", "--workdir=two words"
    ended = processes.run(["bash", str(script), *flags], environment)
    assert ended.code == code
    given, _, after = ended.out.partition("scontrol\n")
    assert after.split() == (["requeue", "77"] if requeued else [])
    command = given.splitlines()
    start = command.index("python")
    assert command[:start] == ["srun", "--cpus-per-task=8", "--kill-on-bad-exit=1"]
    assert command[start : start + 3] == ["python", "-m", "jvitmoe.train"]
    values = cli.parse(["train.py", *command[start + 3 :]], train.define_flags, config=True)
    assert (values.distributed, values.workdir) == (True, "two words")


LOSES = {"epochs": 12, "eval_every": 12, "checkpoint_every": 10, "devices": 0}  # 60 steps; a process is lost at 25
SRUN = """#!/bin/bash
# As srun: starts two tasks, ends both when one fails, and returns the highest code.
while [[ $1 == --* ]]; do shift; done
for number in 0 1; do
    SLURM_PROCID=$number SLURM_LOCALID=$number "$@" &
    tasks+=($!)
done
echo "${tasks[1]}" > "$TASK"
highest=0
for task in 0 1; do
    wait -n
    code=$?
    if ((code)); then kill -TERM "${tasks[@]}"; fi
    if ((code > highest)); then highest=$code; fi
done
exit "$highest"
"""


def python_first() -> dict[str, str]:
    """Returns the environment of a process in which `python` is this one."""
    return processes.environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def check_resumed(workdir: Path, out: str) -> None:
    """Raises AssertionError unless the run went on from a checkpoint before the loss, to its end."""
    assert re.search(r"resuming +from step [12]0\n", out), out
    assert sorted(losses(workdir)) == list(range(1, 61))
    result = json.loads((workdir / "result.json").read_text())
    assert result["hardware"].endswith("2 processes")
    assert result["rows"][0]["images"] == 360


@pytest.mark.process
@pytest.mark.long
def test_a_slurm_job_that_loses_a_task_is_queued_again_and_goes_on(tmp_path):
    experiment = write_experiment(tmp_path / "tiny.py", tiny(routing={"experts": 1, "kind": "batch"}, train=LOSES))
    for command, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\necho "$@"\n')):
        (tmp_path / command).write_text(text)
        (tmp_path / command).chmod(0o755)
    env = python_first() | SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    env |= {"JAX_COORDINATOR_PORT": str(processes.free_port()), "TASK": str(tmp_path / "task")}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    job = "bash", "scripts/slurm.sbatch", f"--config={experiment}", f"--workdir={tmp_path / 'run'}"
    started = processes.start(job, env)
    processes.wait_for_step(tmp_path / "run", 25, started)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGKILL)
    (ended,) = processes.collect([started])
    assert (ended.code, ended.out.splitlines()[-1]) == (137, "requeue 7"), ended
    ended = processes.run(job, env | {"SLURM_RESTART_COUNT": "1"})
    assert ended.code == 0, ended
    check_resumed(tmp_path / "run", ended.out)


@pytest.mark.process
@pytest.mark.long
def test_two_pods_of_the_trainjob_train_one_run_and_go_on_when_one_was_lost(tmp_path):
    experiment = write_experiment(tmp_path / "tiny.py", tiny(routing={"experts": 1, "kind": "batch"}, train=LOSES))
    trainer = kind("TrainJob")["spec"]["trainer"]
    own = {"cifar10_random": str(experiment), "/runs/cifar10_random": str(tmp_path / "run")}
    command = trainer["command"] + [re.sub("=(.*)", lambda m: "=" + own.get(m[1], m[1]), a) for a in trainer["args"]]
    env = python_first() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{processes.free_port()}", "JAX_NUM_PROCESSES": "2"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    pods = [env | {"JAX_PROCESS_ID": str(number)} for number in range(2)]
    started = [processes.start(expand(command, pod), pod) for pod in pods]
    processes.wait_for_step(tmp_path / "run", 25, started[0])
    started[1].process.kill()
    for one in processes.collect(started, 60):
        assert one.code not in (0, 2), one
    ended = processes.collect([processes.start(expand(command, pod), pod) for pod in pods])
    assert [one.code for one in ended] == [0, 0], ended
    check_resumed(tmp_path / "run", ended[0].out)
    assert not (tmp_path / "cache").exists()  # one of several processes keeps no compiled programs of its own accord


@pytest.mark.process
@pytest.mark.long
def test_two_workers_of_ray_train_one_run_and_start_again_when_one_is_killed(tmp_path):
    experiment = write_experiment(tmp_path / "tiny.py", tiny(routing={"experts": 1, "kind": "batch"}, train=LOSES))
    workdir = tmp_path / "run"
    experiment.write_text(experiment.read_text().replace("def get_config()", "def get_config(variant)"))
    arguments = f"--config={experiment}:dense", f"--workdir={workdir}", "--workers=2"
    # Ray's sockets need a short path. Without a token of its own Ray would write one into the home folder.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        private = {"RAY_TMPDIR": folder, "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        private["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(processes.HANGS)
        env = processes.environment() | private
        started = processes.start([sys.executable, "scripts/ray_train.py", *arguments], env)
        processes.wait_for_step(workdir, 25, started)
        os.kill(json.loads((workdir / "lock").read_text())["pid"], signal.SIGKILL)
        (ended,) = processes.collect([started])
    assert ended.code == 0, ended
    check_resumed(workdir, ended.out + ended.err)
