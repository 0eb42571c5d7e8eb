"""The files in deploy/ are valid and match the service."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from support.imported.onnx_models import linear_model
from support.responses import metric_samples
from support.service import ROOT, Serve

from app.cli import models
from app.observability.metrics import Metrics
from app.settings import PREFIX, Settings
from deploy.image_check import send_requests

DEPLOY = ROOT / "deploy"
VERSION = "1.34"  # the first Kubernetes version in which preStop sleeps without a shell
KUBERNETES = sorted(path.name for path in (DEPLOY / "kubernetes").glob("*.yaml"))
OTHER_SCHEMAS = {"kustomization.yaml", "adapter.yaml", "kserve.yaml"}  # kinds that are not part of Kubernetes
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()) if document]


@pytest.fixture
def metric_labels(serve: Serve) -> dict[str, set[str]]:
    """Return the metric names and labels of a service that has answered several kinds of requests."""
    with serve() as client:
        client.post("/v1/images/sample", json={"count": 5})
        client.post("/v1/images/sample", json={"count": 0})
        client.post("/v1/text/continue", json={"prompt": "abc", "max_characters": 4})
        samples = list(metric_samples(client))
    metrics: Any = Metrics()
    metrics.for_version("m", 1).on_rejected("queue_full")  # a small test causes no rejections
    metrics.for_version("m", 1).on_failure(ValueError("test"))
    metrics.on_rate_limited("alice")
    metrics.on_captured("m", "stored")
    metrics.capture = SimpleNamespace(figures=[], drift=[("m", "1", "level", 0.5)])
    samples += [
        (sample.name, *sample.labels.items())
        for family in metrics.collect()
        for sample in family.samples
        if re.fullmatch(
            "quartet_drift|quartet_(rejected_requests|failures|rate_limited|captured_requests)_total", sample.name
        )
    ]
    names: dict[str, set[str]] = {"up": {"job", "instance"}}
    for name, *labels in (row for row in samples if not str(row[0]).endswith("_created")):
        names.setdefault(name, set()).update(key for key, _ in labels)
    return names


def queries() -> Iterator[tuple[str, str]]:
    """Yield the location and text of all PromQL queries in deploy/."""
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"dashboard: {panel['title']}", target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield f"dashboard: ${variable['name']}", variable["query"]["query"]
    for rule in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]:
        yield f"alerts: {rule['alert']}", rule["expr"]
    (rule,) = yaml.safe_load((DEPLOY / "kubernetes" / "adapter.yaml").read_text())["rules"]["custom"]
    yield "adapter", rule["seriesQuery"].replace("namespace", "job").replace("pod", "instance")
    (pods, _) = documents("autoscaler.yaml")[0]["spec"]["metrics"]
    yield "autoscaler", pods["pods"]["metric"]["name"]


def test_every_query_uses_existing_metrics(metric_labels: dict[str, set[str]]) -> None:
    used = set()
    for location, query in queries():
        assert query.count("(") == query.count(")"), location
        assert query.count("{") == query.count("}"), location
        selections = re.findall(r"\b(quartet_[a-z_]+|up)\b(?:\{([^}]*)\})?", query)
        assert selections, location
        for name, selector in selections:
            assert name in metric_labels, f"{location}: {name}"
            selected = set(re.findall(r"([a-z_]+)\s*(?:=|!)", selector))
            assert selected <= metric_labels[name] | {"job", "instance"}, f"{location}: {name}{{{selector}}}"
            used.add(re.sub(r"_(bucket|sum|count)$", "", name))
        for label_list in re.findall(r"by \(([^)]*)\)", query):
            labels = {label.strip() for label in label_list.split(",")}
            assert any(labels <= metric_labels[name] | {"job", "instance"} for name, _ in selections), (
                f"{location}: by ({label_list})"
            )
        if "histogram_quantile" in query:
            assert re.search(r"by \(le\b", query), location
    metric_names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in metric_labels} - {"up", "quartet_drift"}
    assert metric_names == used - {"up", "quartet_drift"}  # each metric is used by a query
    documented = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(quartet_[a-z_]+)`", documented, re.MULTILINE)) == metric_names


@pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is not installed (Debian: apt-get install prometheus)"
)
def test_promtool_accepts_alerts_and_configuration() -> None:
    for arguments in (
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
        ["check", "config", "prometheus.yml"],
    ):
        result = subprocess.run(["promtool", *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow  # because the package has 17,000 files
@pytest.mark.parametrize("name", [name for name in KUBERNETES if name not in OTHER_SCHEMAS])
def test_manifests_match_the_kubernetes_schema(name: str) -> None:
    schemas = pytest.importorskip("kubernetes_validate")
    for document in documents(name):
        schemas.validate(document, VERSION, strict=True)
        assert document["metadata"]["name"].startswith("quartet")


def test_kustomize_lists_all_manifests_and_labels_match() -> None:
    (kustomization,) = documents("kustomization.yaml")
    assert set(kustomization["resources"]) == set(KUBERNETES) - OTHER_SCHEMAS - {"manage.yaml"}
    (deployment,), (service,), (scaler,) = map(documents, ("deployment.yaml", "service.yaml", "autoscaler.yaml"))
    (disruption,), (network,), (store,) = map(documents, ("disruption.yaml", "network.yaml", "store.yaml"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert disruption["spec"]["selector"]["matchLabels"] == network["spec"]["podSelector"]["matchLabels"] == labels
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == (deployment["kind"], deployment["metadata"]["name"])
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume]
    assert claims == [store["metadata"]["name"]]
    (image,) = kustomization["images"]
    used = {container["image"] for container in deployment["spec"]["template"]["spec"]["containers"]}
    assert used == {f"{image['name']}:{image['newTag']}"}


def test_the_pod_that_manages_the_store_can_write_to_it_and_gets_no_requests() -> None:
    (pod,), (service,), (store,) = map(documents, ("manage.yaml", "service.yaml", "store.yaml"))
    (container,) = pod["spec"]["containers"]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    claims = {each["name"]: each.get("persistentVolumeClaim", {}).get("claimName") for each in pod["spec"]["volumes"]}
    assert claims["store"] == store["metadata"]["name"]
    assert not mounts["store"].get("readOnly")
    assert {entry["name"]: entry["value"] for entry in container["env"]} == {"QUARTET_STORE": "/store"}
    assert mounts["store"]["mountPath"] == "/store"
    assert pod["spec"]["enableServiceLinks"] is False  # its variables would be unknown settings
    assert not service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "deployment.yaml", documents("deployment.yaml")[0]["spec"]["template"]["spec"]["containers"][0]
    yield "kserve.yaml", documents("kserve.yaml")[0]["spec"]["containers"][0]
    yield "manage.yaml", documents("manage.yaml")[0]["spec"]["containers"][0]


def test_probes_and_settings_of_pods_exist(serve: Serve) -> None:
    with serve() as client:
        for name, container in containers():
            for probe in (name for name in container if name.endswith("Probe")):
                assert client.get(container[probe]["httpGet"]["path"]).status_code == 200
            variables = {entry["name"] for entry in container["env"]}
            assert variables <= {PREFIX + field.upper() for field in Settings.model_fields}, name
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"]
            assert not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
    pod = documents("deployment.yaml")[0]["spec"]["template"]["spec"]
    assert pod["enableServiceLinks"] is False
    grace = 2 * Settings().shutdown_grace_seconds + 5
    sleep = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= sleep + grace
    assert documents("kserve.yaml")[1]["spec"]["predictor"]["timeout"] >= grace
    for path in (ROOT / "Dockerfile", ROOT / "docs" / "how-to" / "production.md"):
        commands = re.findall(r"docker run --rm -p (?:.*\\\n)*.*", path.read_text())
        assert commands
        for command in commands:
            stated = re.search(r"--stop-timeout (\d+)", command)
            assert stated, command
            assert int(stated[1]) >= grace


def test_only_an_empty_volume_gets_the_networks_of_the_image(tmp_path: Path) -> None:
    (init_container,) = documents("deployment.yaml")[0]["spec"]["template"]["spec"]["initContainers"]
    image, volume, programs = tmp_path / "image", tmp_path / "volume", tmp_path / "programs"
    variables = {"QUARTET_STORE": str(image), "HOSTNAME": "pod", "PATH": f"{programs}:{os.defpath}"}

    def run() -> set[str]:
        (shell, option, script) = init_container["command"]
        script = script.replace("/store", str(volume))
        subprocess.run([shell, option, script], env=variables, check=True)
        return {str(path.relative_to(volume)) for path in volume.rglob("*") if path.is_file()}

    for name in ("a/1/card.json", "b/2/card.json", "defaults.json"):
        (image / name).parent.mkdir(parents=True, exist_ok=True)
        (image / name).write_text(name)
    complete = {"a/1/card.json", "b/2/card.json", "defaults.json", ".seeded"}
    volume.mkdir()
    (volume / "lost+found").mkdir()
    assert run() == complete
    shutil.rmtree(volume / "a")  # removed by an administrator
    assert run() == complete - {"a/1/card.json"}
    (volume / ".seeded").rename(volume / ".seeding")  # the state after a pod was killed while it copied
    (volume / ".a-pod" / "1").mkdir(parents=True)
    assert run() == complete
    (volume / ".seeded").unlink()
    shutil.rmtree(volume / "b")  # the volume now has other content
    assert run() == complete - {"b/2/card.json", ".seeded"}
    shutil.rmtree(volume)
    volume.mkdir()
    programs.mkdir()  # this cp also does the work of another pod, which copies the same networks a moment earlier
    (programs / "cp").write_text(f'#!/bin/sh\n"{shutil.which("cp")}" "$@"\n"{shutil.which("cp")}" -r "$2" {volume}/\n')
    (programs / "cp").chmod(0o755)
    assert run() == complete


def test_compose_profiles_and_mounted_files_exist() -> None:
    services = COMPOSE["services"]
    profiles = {name: service.get("profiles", []) for name, service in services.items()}
    assert profiles == {
        "quartet": [], "quartet-gpu": ["gpu"], "quartet-1": ["scale"], "quartet-2": ["scale"], "nginx": ["scale"],
        "prometheus": ["monitoring"], "grafana": ["monitoring"],
    }  # fmt: skip
    for name, service in services.items():
        assert service["read_only"], name
        for volume in service["volumes"]:
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], source
        assert "image" not in service or re.search(r":v?\d+\.\d+", service["image"]), name
    ports = [re.sub(r"\$\{\w+:-(\d+)\}", r"\1", port) for service in services.values() for port in service["ports"]]
    assert len({port.split(":")[-2] for port in ports}) == len(ports)


def resolved_compose(text: str) -> str:
    """Return a compose file with its variables and merge keys resolved."""
    content = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    for service in content["services"].values():
        if "cpus" in service:
            service["cpus"] = float(service["cpus"])  # compose_spec rejects integers in this field
    return yaml.safe_dump(content)


def test_compose_matches_its_specification() -> None:
    specification = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    text = (ROOT / "docker-compose.yml").read_text()
    compose = specification.PyCompose.from_yaml(resolved_compose(text))
    assert set(compose.service_names()) == set(COMPOSE["services"])
    for valid, invalid in (("cap_drop", "cap_drops"), ("interval: 10s", "interval: ten"), ("_healthy", "_fine")):
        with pytest.raises(ValueError, match=re.escape(invalid.split(": ")[-1])):
            specification.PyCompose.from_yaml(resolved_compose(text.replace(valid, invalid)))
    for name, service in COMPOSE["services"].items():
        for other in service.get("depends_on", []):  # a profile must start all services that a service needs
            assert COMPOSE["services"][other].get("profiles", []) == service["profiles"], name


def test_grafana_uses_the_mounted_files_and_accepts_no_passwords() -> None:
    grafana = COMPOSE["services"]["grafana"]
    assert grafana["environment"]["GF_AUTH_BASIC_ENABLED"] == "false"
    assert grafana["environment"]["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    mounted = {target: source for source, target, *_ in (volume.split(":") for volume in grafana["volumes"])}
    assert mounted["/etc/grafana/provisioning"] == "./deploy/grafana/provisioning"  # the path that the image reads
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/quartet.yml").read_text())["providers"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert mounted[home] == "./deploy/grafana/dashboard.json"
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    ports = [port.rsplit(":", 1)[-1] for port in COMPOSE["services"]["prometheus"]["ports"]]
    assert source["url"] in {f"http://prometheus:{port}" for port in ports}


def test_nginx_and_prometheus_name_services_of_compose() -> None:
    services = set(COMPOSE["services"])
    upstreams = re.findall(r"server (\S+):8000 ", (DEPLOY / "nginx.conf").read_text())
    assert set(upstreams) == {"quartet-1", "quartet-2"} <= services
    (seconds,) = re.findall(r"keepalive_timeout (\d+)s;", (DEPLOY / "nginx.conf").read_text())
    assert int(seconds) < Settings().keep_alive_seconds  # the service must not close a connection first
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert set(job["dns_sd_configs"][0]["names"]) == {name for name in services if name.startswith("quartet")}
    assert job["job_name"] == "quartet"  # the alerts select this job


def test_containers_are_not_root_and_contain_an_sbom() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    final = dockerfile.rsplit("\nFROM ", 1)[1]
    assert re.search(r"^USER 10001:10001$", final, re.MULTILINE)
    assert "cyclonedx-py environment" in dockerfile
    assert "sbom.json" in final
    assert not re.findall(r"\b(ENV|ARG) \S*(KEY|TOKEN|PASSWORD|SECRET)", dockerfile)
    pod = documents("deployment.yaml")[0]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert documents("kserve.yaml")[0]["spec"]["containers"][0]["securityContext"]["runAsNonRoot"]
    assert documents("manage.yaml")[0]["spec"]["securityContext"]["runAsNonRoot"]
    for name, service in COMPOSE["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_the_image_check_sends_a_request_to_each_model(shipped: httpx.Client) -> None:
    assert send_requests(shipped) == [model["id"] for model in shipped.get("/v1/models").json()["data"]]


def test_the_image_check_accepts_a_network_without_a_task(serve: Serve, tiny_store: Path, tmp_path: Path) -> None:
    (tmp_path / "linear.onnx").write_bytes(linear_model()[0].SerializeToString())
    assert models.main(["add", str(tmp_path / "linear.onnx"), "--name", "linear", "--store", str(tiny_store)]) == 0
    with serve() as client:
        assert "linear" in send_requests(client)
