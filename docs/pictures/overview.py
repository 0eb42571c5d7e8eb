"""Draw the picture in the README. It shows one answer of a running service for each task.

python -m docs.pictures.overview http://127.0.0.1:8000     # writes docs/pictures/overview.png
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import httpx
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from training.data import datasets

ROOT = Path(__file__).parent.parent.parent


def main(address: str) -> None:
    figure = Figure(figsize=(13, 7.4), layout="constrained")
    figure.set_facecolor("white")
    (images, text), (series, digits) = figure.subfigures(2, 2, wspace=0.04, hspace=0.04)  # type: ignore[misc]
    with httpx.Client(base_url=address, timeout=60) as client:
        files = sorted((ROOT / "tests" / "images" / "cifar10").glob("*.png"))[:10]
        parts = [("file", (path.name, path.read_bytes())) for path in files]
        answer = client.post("/v1/images/classify", params={"top_k": 1}, files=parts).raise_for_status().json()
        images.suptitle("POST /v1/images/classify", family="monospace")
        for axis, path, result in zip(images.subplots(2, 5).flat, files, answer["results"], strict=True):
            best = result["predictions"][0]
            axis.imshow(np.asarray(Image.open(path)))
            color = "black" if best["label"] in path.name else "crimson"
            axis.set_title(f"{best['label']} {best['probability']:.0%}", fontsize=9, color=color)
            axis.axis("off")

        body = {"prompt": "ROMEO:", "max_characters": 420, "temperature": 0.7, "seed": 5}
        answer = client.post("/v1/text/continue", json=body).raise_for_status().json()
        text.suptitle("POST /v1/text/continue", family="monospace")
        lines = "\n".join(line[i : i + 62] for line in ("ROMEO:" + answer["results"][0]["text"]).split("\n")
                          for i in range(0, max(len(line), 1), 62))  # fmt: skip
        text.text(0.05, 0.86, lines, family="monospace", fontsize=8.5, va="top", parse_math=False)

        sine = datasets.sine()
        known = sine.values[750:900].tolist()
        body = {"values": known, "horizon": 80, "levels": [50, 80, 95]}
        answer = client.post("/v1/series/forecast", json=body).raise_for_status().json()["results"][0]
        series.suptitle("POST /v1/series/forecast", family="monospace")
        axis = series.subplots()
        axis.plot(range(150), known, ".", color="gray", markersize=4, label="history")
        axis.plot(range(150, 230), answer["mean"], color="tab:blue", label="forecast")
        for level, bounds in answer["intervals"].items():
            axis.fill_between(range(150, 230), bounds["lower"], bounds["upper"], color="tab:blue", alpha=0.15,
                              linewidth=0, label=f"{level} %")  # fmt: skip
        axis.plot(range(230), sine.noiseless[750:980].tolist(), color="black", linewidth=0.8, label="true sine")
        axis.legend(fontsize=8, ncols=2)

        body = {"count": 40, "seed": 7}
        answer = client.post("/v1/images/sample", json=body).raise_for_status().json()
        digits.suptitle("POST /v1/images/sample", family="monospace")
        for axis, result in zip(digits.subplots(4, 10).flat, answer["results"], strict=True):
            axis.imshow(np.asarray(Image.open(io.BytesIO(base64.b64decode(result["image"])))), cmap="gray")
            axis.axis("off")
    figure.savefig(ROOT / "docs" / "pictures" / "overview.png", dpi=75)


if __name__ == "__main__":
    main(sys.argv[1])
