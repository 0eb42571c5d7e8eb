"""Shadows: their answers go to nobody, wait for all requests, and are compared with those of the active version."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from threading import Semaphore
from typing import Any

import httpx
import numpy as np
import pytest
from support.faults import Fault
from support.images import image_bytes
from support.networks import publish_tiny
from support.responses import ADMIN_HEADERS, ADMIN_KEY, CLASSIFY, CONTINUE, FORECAST, PNG, ask, captures, metric_samples
from support.service import Serve, run_models_command
from support.waiting import wait_until
from torch import Tensor

from app.records.captured import Captured, Compared, FeedbackRequest, Measured
from app.records.database import Database
from app.store import RolloutRefused, Store

MODELS = ("tiny-cnn", "tiny-rnn", "tiny-lstm")


def has_shadow(client: httpx.Client, name: str) -> bool:
    model = client.get(f"/v1/models/{name}").json()
    return bool(model["shadow"]) and model["loaded"] == [1, 2]


def test_answers_of_both_versions_are_compared_and_measured(serve: Serve, tiny_store: Path, tmp_path: Path) -> None:
    series = {"values": [1.0, 3.0, 2.0, 5.0] * 10, "horizon": 4}
    images = [image_bytes(size=size) for size in ((32, 32), (20, 32), (32, 24))]
    answers: dict[int, list[list[float]]] = {1: [], 2: []}
    for name in MODELS:
        publish_tiny(tiny_store, name)
        Store(tiny_store).activate(name, 1)
    with serve(
        store_poll_seconds=0.02, admin_key=ADMIN_KEY, capture=",".join(MODELS), records_folder=tmp_path / "records"
    ) as client:
        labels = client.get("/v1/models/tiny-cnn").json()["labels"]
        for version, image in product(answers, images):
            answer = client.post(f"/v1/images/classify?model=tiny-cnn@{version}&top_k=10", content=image).json()
            rows = {each["label"]: each["probability"] for each in answer["results"][0]["predictions"]}
            answers[version].append([rows[label] for label in labels])
        for name in MODELS:
            answer = client.post(f"/v1/admin/models/{name}/shadow", json={"version": 2}, headers=ADMIN_HEADERS)
            row = answer.raise_for_status().json()
            assert row["state"] == f"{name}@1 is active, {name}@2 is the shadow (100 %)"
            assert [version["role"] for version in row["versions"]] == ["active", "shadow"]
            wait_until(lambda name=name: has_shadow(client, name))
        requests = [(MODELS[0], CLASSIFY, {"content": image}) for image in images]
        requests.append((MODELS[1], CONTINUE, {"json": {"prompt": "abcabc", "max_characters": 2}}))
        requests.append((MODELS[2], FORECAST, {"json": series}))
        for number, (name, path, body) in enumerate(requests):  # a request drops the copy of the one before it
            before = captures(client, name, "compared")
            assert ask(client, str(number), path, **body).json()["version"] == 1
            wait_until(lambda name=name, before=before: captures(client, name, "compared") == before + 1)
        for number in range(3):
            client.post("/v1/feedback", json={"request_id": str(number), "label": labels[0]}).raise_for_status()
        wait_until(lambda: len(client.get("/v1/feedback").json()["data"]) > 10)
        log_probs = {}
        for version in (1, 2):
            body = {"model": f"tiny-rnn@{version}", "prompt": "abcabc", "echo": True, "logprobs": 0, "max_tokens": 0}
            choice = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]
            log_probs[version] = choice["logprobs"]["token_logprobs"][1:]
        figures = {
            (row["model"], row["version"], row["name"]): row for row in client.get("/v1/feedback").json()["data"]
        }
    first, second = (np.array(answers[version]) for version in (1, 2))
    agreement = (first.argmax(axis=1) == second.argmax(axis=1)).mean()
    assert figures["tiny-cnn", 2, "agreement"]["mean"] == pytest.approx(agreement)
    assert figures["tiny-cnn", 2, "difference"]["mean"] == pytest.approx(np.abs(first - second).sum() / 6, abs=1e-6)
    for version, probabilities in ((1, first), (2, second)):
        assert figures["tiny-cnn", version, "accuracy"]["mean"] == (probabilities.argmax(axis=1) == 0).mean()
        assert figures["tiny-cnn", version, "seconds"]["count"] == 3
        assert figures["tiny-rnn", version, "loss"]["mean"] == pytest.approx(-np.mean(log_probs[version]), abs=1e-6)
    assert figures["tiny-lstm", 2, "difference"]["mean"] > 0


def test_a_copy_never_delays_a_request(
    serve: Serve, tiny_store: Path, tmp_path: Path, faults: dict[str, Fault]
) -> None:
    allowed, entered = Semaphore(0), Semaphore(0)

    def wait(outputs: Tensor, *_: Any) -> Tensor:
        entered.release()
        assert allowed.acquire(timeout=60)
        return outputs

    publish_tiny(tiny_store, "tiny-cnn")
    Store(tiny_store).activate("tiny-cnn", 1)
    Store(tiny_store).shadow("tiny-cnn", 2)
    with (
        serve(inline_seconds=0, capture="tiny-cnn", records_folder=tmp_path / "records") as client,
        ThreadPoolExecutor(2) as threads,
    ):
        wait_until(lambda: has_shadow(client, "tiny-cnn"))
        faults["classify"] = wait
        send = [threads.submit(ask, client, "0", CLASSIFY, content=PNG)]
        assert entered.acquire(timeout=60)
        send.append(threads.submit(ask, client, "1", CLASSIFY, content=PNG))  # is computed while the copy of 0 waits
        wait_until(lambda: metric_samples(client)["quartet_requests_running",] >= 2)
        allowed.release()
        send[0].result(60)
        assert entered.acquire(timeout=60)
        wait_until(lambda: captures(client, "tiny-cnn", "skipped") == 1)
        assert not entered.acquire(blocking=False)
        del faults["classify"]
        allowed.release(10)
        assert [each.result(60).json()["version"] for each in send] == [1] * 2


@pytest.mark.parametrize(
    ("right", "count", "status", "verdict"),
    [
        ((20, 36), 40, 0, "tiny-cnn@2 is better: accuracy +0.4 (95 % interval +0.2462 to +0.5538)"),
        ((36, 20), 40, 1, "tiny-cnn@2 is worse: accuracy -0.4"),
        ((20, 21), 40, 1, "tiny-cnn@2 is not clearly better or worse: accuracy +0.025"),
        ((0, 29), 29, 1, "tiny-cnn@2 cannot be judged yet: 29 requests have accuracy for both versions, 30 are needed"),
    ],
)
def test_only_a_better_shadow_is_promoted(
    tiny_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    right: tuple[int, int],
    count: int,
    status: int,
    verdict: str,
) -> None:
    publish_tiny(tiny_store, "tiny-cnn")
    Store(tiny_store).activate("tiny-cnn", 1)
    records = Database(tmp_path / "records")
    records.open()
    for i in range(count):
        records.add(
            [Captured(str(i), "tiny-cnn", 1, "classify", "{}", "{}"), Compared(str(i), "tiny-cnn", 2, "{}", {})]
        )
        measured = {version + 1: [Measured(0, 0, "accuracy", float(i < right[version]))] for version in (0, 1)}
        records.add_feedback(FeedbackRequest(request_id=str(i), label="x"), measured)
    records.close()
    folder = ["--records", str(records.folder)]
    message = "error: tiny-cnn has no shadow; `shadow tiny-cnn VERSION` makes a version the shadow\n"
    assert run_models_command(capsys, tiny_store, "compare", "tiny-cnn", *folder) == (1, "", message)
    Store(tiny_store).shadow("tiny-cnn", 2)
    code, out, _ = run_models_command(capsys, tiny_store, "compare", "tiny-cnn", *folder)
    means = [f"{each / count:.4g}" for each in right]
    assert (code, out.splitlines()[1].split()[:3]) == (0, ["accuracy", *means])
    assert out.splitlines()[2].startswith(verdict)
    code, out, error = run_models_command(capsys, tiny_store, "promote", "tiny-cnn", *folder)
    assert (code, verdict in out + error) == (status, True)
    assert Store(tiny_store).roles("tiny-cnn").active == (1 if status else 2)


def test_a_shadow_is_another_version_that_can_be_served(three: Path) -> None:
    store = Store(three)
    with pytest.raises(RolloutRefused, match="tiny-gan@3 is active; a shadow must be another version"):
        store.shadow("tiny-gan", 3)
    with pytest.raises(RolloutRefused, match="the share is 101"):
        store.shadow("tiny-gan", 2, 101)
    store.shadow("tiny-gan", 2)
    with pytest.raises(RolloutRefused, match="tiny-gan@2 is the shadow; `shadow tiny-gan off` ends it"):
        store.retire("tiny-gan", 2)
    store.activate("tiny-gan", 1, 10)  # a canary
    assert store.roles("tiny-gan").shadow
    store.activate("tiny-gan", 1)
    assert store.rollout("tiny-gan").shadow is None
