"""The fields of a JobSet that ours may have, after the API reference (jobset.x-k8s.io/v1alpha2, batch/v1, core/v1).

A field that is not listed is one that Kubernetes would reject, or a typing error that it would drop.
"""

import yaml


class _Unique(yaml.SafeLoader):
    """Of two equal keys YAML takes the last without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"a key twice: {keys}"
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> dict:
    """The one document in `text`."""
    [document] = yaml.load_all(text, _Unique)
    return document


NAME, PATTERN, COUNT = str, str, int
CONTAINER = {
    "name": NAME,
    "image": str,
    "command": [str],
    "env": [{"name": NAME, "value": str}],
    "ports": [{"containerPort": COUNT}],
    "resources": {"limits": {"google.com/tpu": COUNT}},
    "volumeMounts": [{"name": NAME, "mountPath": str}],
}
POD = {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": COUNT,
    "nodeSelector": {
        "cloud.google.com/gke-tpu-accelerator": str,
        "cloud.google.com/gke-tpu-topology": str,
        "cloud.google.com/gke-spot?": "true",
    },
    "containers": [CONTAINER],
    "volumes": [{"name": NAME, "persistentVolumeClaim": {"claimName": NAME}}],
}
EXIT_CODES = {"containerName": NAME, "operator": "In", "values": [COUNT]}
JOB = {
    "parallelism": COUNT,
    "completions": COUNT,
    "completionMode": "Indexed",
    "backoffLimit": COUNT,
    "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": EXIT_CODES}]},
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
        "name": NAME,
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
    },
    "spec": {
        "failurePolicy": {
            "maxRestarts": COUNT,
            "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
        },
        "replicatedJobs": [{"name": NAME, "replicas": COUNT, "template": {"spec": JOB}}],
    },
}


def _check(value, schema, where: str) -> None:
    if isinstance(schema, dict):
        assert isinstance(value, dict), f"{where}: {value!r}"
        needed = {key for key in schema if not key.endswith("?")}
        known = {key.rstrip("?") for key in schema}
        assert needed <= value.keys() <= known, f"{where}: {sorted(value)}"
        for key, part in value.items():
            _check(part, schema.get(key, schema.get(f"{key}?")), f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, f"{where}: {value!r}"
        for number, part in enumerate(value):
            _check(part, schema[0], f"{where}[{number}]")
    elif isinstance(schema, type):
        assert type(value) is schema and value != "", f"{where}: {value!r}"
    else:
        assert value == schema, f"{where}: {value!r}"


def check_jobset(document: dict) -> tuple[tuple[int, int], dict]:
    """Checks fields and types, and what hangs together; ((slices, hosts of each), the pod)."""
    _check(document, JOBSET, "")
    [replicated] = document["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    # JAX's own port of the coordinator.
    assert 8482 in {port["containerPort"] for port in container["ports"]}
    return (replicated["replicas"], job["parallelism"]), pod
