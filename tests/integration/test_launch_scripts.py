"""The files of launch/ that start jobs: checked as text, and started where what they need is here."""

from __future__ import annotations

import copy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubeflow_trainer_api.models as kubeflow
import pytest
import yaml

from tests.elastic.torchrun import ROOT, TINY, Job, read_lives

SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci" / "run"])
DOCUMENTS = list(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()))
SHORT = [*TINY, "--batch=12", "--steps=6", "--checkpoint-every=3"]


def shellcheck(*arguments: str | Path, script: str | None = None) -> str:
    command = [
        Path(sys.executable).with_name("shellcheck"),
        "--external-sources",
        "--source-path=SCRIPTDIR",
        *arguments,
    ]
    return subprocess.run(command, input=script, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    assert shellcheck(script) == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_parse_it(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False).stderr == ""


def test_torchrun_sh_trains_on_two_ranks(tmp_path: Path) -> None:
    with Job(tmp_path) as job:
        agent = job.start(*SHORT, f"--out={tmp_path / 'run'}")
        assert agent.wait(60) == 0, agent.output()
    (life,) = read_lives(tmp_path / "run")
    assert (life.world_size, life.last_step) == (2, 6)


def complaints(document: Any, read: Any, at: str = "") -> Iterator[str]:
    """Compare a document with what its schema's model made of it. The model drops what it does not know."""
    if isinstance(document, dict):
        for key, value in document.items():
            if isinstance(read, dict) and key in read:
                yield from complaints(value, read[key], f"{at}.{key}")
            else:
                yield f"{at}.{key} is not in the schema"
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from complaints(value, read[index], f"{at}[{index}]")
    elif document != read:
        yield f"{at} was read as {read!r}"


def check_against_schema(document: dict[str, Any]) -> list[str]:
    """Return what is wrong with a Kubernetes object of Kubeflow Trainer, as its own models see it."""
    assert document["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    model = getattr(kubeflow, f"TrainerV1alpha1{document['kind']}")
    try:
        return list(complaints(document, model.from_dict(document).to_dict()))
    except ValueError as error:  # pydantic: a wrong type, or something that must be there is not
        return [str(error)]


@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda document: f"{document['kind']} {document['metadata']['name']}"
)
def test_kubernetes_yaml_keeps_to_the_schema(document: dict[str, Any]) -> None:
    assert check_against_schema(document) == []


def test_the_check_against_the_schema_sees_a_wrong_name_a_wrong_type_and_an_omission() -> None:
    assert check_against_schema(DOCUMENTS[0]) == []
    misspelt, mistyped, omitted = (copy.deepcopy(DOCUMENTS[0]) for _ in range(3))
    misspelt["spec"]["trainer"]["nodes"] = misspelt["spec"]["trainer"].pop("numNodes")
    assert check_against_schema(misspelt) == [".spec.trainer.nodes is not in the schema"]
    mistyped["spec"]["trainer"]["numNodes"] = "two"
    assert "numNodes" in str(check_against_schema(mistyped))
    del omitted["spec"]["runtimeRef"]
    assert check_against_schema(omitted) != []


def test_the_documents_of_kubernetes_yaml_fit_together() -> None:
    torchrun, mpi, runtime = DOCUMENTS
    assert torchrun["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    assert mpi["spec"]["runtimeRef"]["kind"] == runtime["kind"]
    assert mpi["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    trainer, policy = mpi["spec"]["trainer"], runtime["spec"]["mlPolicy"]
    assert trainer["numNodes"] == policy["numNodes"]
    assert trainer["numProcPerNode"] == policy["mpi"]["numProcPerNode"]
    environment = {variable["name"]: variable["value"] for variable in trainer["env"]}
    assert int(environment["RANKS"]) == trainer["numNodes"] * trainer["numProcPerNode"]


def test_what_the_pods_of_kubernetes_yaml_run_trains_with_the_variables_of_kubeflow_trainer(tmp_path: Path) -> None:
    (in_pod,) = DOCUMENTS[0]["spec"]["trainer"]["args"]
    assert shellcheck("--shell=bash", "-", script=in_pod) == ""
    arguments = f"{' '.join(SHORT)} --out {tmp_path / 'run'}"
    script = in_pod.replace("/workspace", str(ROOT)).replace("--out /checkpoints/run", arguments)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with Job(tmp_path) as job:
        pods = [
            job.start_command(
                ["bash", "-c", script],
                PET_NNODES="2",
                PET_NPROC_PER_NODE="1",
                PET_NODE_RANK=str(rank),
                PET_MASTER_ADDR="localhost",
                PET_MASTER_PORT=str(port),
            )
            for rank in range(2)
        ]
        for pod in pods:
            assert pod.wait(60) == 0, pod.output()
    (life,) = read_lives(tmp_path / "run")
    assert (life.world_size, life.last_step) == (2, 6)
