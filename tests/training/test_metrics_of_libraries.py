"""The metrics of images equal the metrics of torchmetrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.evaluation import calibration, generation, image_classifier

# The tests import torchmetrics, not this file, because the import takes 3 s.


@pytest.fixture(scope="module")
def classification() -> Any:
    return pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is not installed")


def test_accuracy_and_calibration_of_classes(classification: Any) -> None:
    torch.manual_seed(0)
    probability = (3 * torch.randn(500, 6)).softmax(dim=1)
    labels = torch.where(torch.rand(500) < 0.6, probability.argmax(dim=1), torch.randint(6, (500,)))
    own = {name: entry["value"] for name, entry in calibration.classification_metrics(probability, labels, "").items()}
    accuracy = classification.multiclass_accuracy(probability, labels, num_classes=6, average="micro")
    assert own["accuracy"] == pytest.approx(accuracy.item(), abs=0.005)
    error = classification.multiclass_calibration_error(probability, labels, num_classes=6, n_bins=15, norm="l1")
    assert own["calibration_error"] == pytest.approx(error.item(), abs=1e-4)


def test_precision_and_f1_of_several_labels(classification: Any) -> None:
    torch.manual_seed(0)
    labels = torch.rand(300, 5) < torch.tensor([0.1, 0.2, 0.3, 0.5, 0.8])
    probability = (2 * torch.randn(300, 5) + 2 * labels - 1).sigmoid()
    own = image_classifier.multi_label_metrics(probability, labels, torch.full((5,), 0.4), "")
    precision = classification.multilabel_average_precision(probability, labels.int(), num_labels=5, average="macro")
    assert own["mean_average_precision"]["value"] == pytest.approx(precision.item(), abs=1e-4)
    f1 = classification.multilabel_f1_score(probability, labels.int(), num_labels=5, threshold=0.4, average="micro")
    assert own["f1"]["value"] == pytest.approx(f1.item(), abs=1e-4)


class Pixels(nn.Module):
    """A network whose features are the pixels of images [N, 1, 2, 3]. It replaces the Inception network."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


def test_frechet_distance() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    torch.manual_seed(0)
    real, fake = (torch.randint(0, high, (400, 1, 2, 3), dtype=torch.uint8) for high in (256, 200))
    distance = fid.FrechetInceptionDistance(feature=Pixels()).set_dtype(torch.float64)
    distance.update(real, real=True)
    distance.update(fake, real=False)
    own = generation.frechet_distance(real.flatten(1).float(), fake.flatten(1).float())
    assert own == pytest.approx(distance.compute().item(), rel=1e-6)
