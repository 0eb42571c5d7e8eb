"""Selection of images and augmentation in the recipe of airbench96."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from app.networks.cnn import WhitenedNet, WhitenedNetSizes
from training.configs.classifiers import CNN_ACCURATE
from training.data.image_batches import corrupted, masked
from training.loops.airbench import Selector, whiten


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_the_images_with_the_largest_loss_are_selected(images: Tensor) -> None:
    torch.manual_seed(0)
    network = WhitenedNet(WhitenedNetSizes(widths=(26, 26, 26), label_smoothing=0.2))
    whiten(network, images)
    selector = Selector(CNN_ACCURATE.model_copy(update={"batch": 40, "selected": 10}), network)
    labels = torch.arange(40) % 10
    before = {key: tensor.clone() for key, tensor in selector.network.named_parameters()}
    with torch.no_grad():
        scores = selector.network.scores(images)
        losses = F.cross_entropy(scores, labels, label_smoothing=0.2, reduction="none")
    expected = losses.topk(10).indices.sort().values
    assert torch.equal(selector.select(images, labels, step=1, rate=1.0).sort().values, expected)
    assert all(torch.equal(before[key], tensor) for key, tensor in selector.network.named_parameters())
    assert torch.equal(selector.select(images, labels, step=4, rate=1.0).sort().values, expected)
    changed = {key for key, tensor in selector.network.named_parameters() if not torch.equal(before[key], tensor)}
    assert changed == {key for key, tensor in selector.network.named_parameters() if tensor.requires_grad}
    assert not any(key.startswith("whiten") for key in changed)


def test_a_mask_covers_one_square_in_each_image(images: Tensor) -> None:
    torch.manual_seed(0)
    images = images.clamp(min=1)
    result = masked(images, 12, torch.zeros(3, 1, 1))
    covered = result == 0
    assert torch.equal(result[~covered], images[~covered])
    assert covered.sum(dim=(1, 2, 3)).tolist() == [3 * 12 * 12] * 40
    rows, columns = covered[:, 0].any(dim=2), covered[:, 0].any(dim=1)
    assert rows.sum(dim=1).tolist() == columns.sum(dim=1).tolist() == [12] * 40
    assert len(rows.int().argmax(dim=1).unique()) > 5


def test_a_share_of_the_images_is_corrupted(images: Tensor) -> None:
    torch.manual_seed(0)
    original = images.clone()
    changed = corrupted(images, 0.5)
    assert torch.equal(images, original)
    assert changed.dtype == torch.uint8
    assert (changed != images).any(dim=(1, 2, 3)).sum() == 20
    assert corrupted(images, 0.0) is images
    assert (corrupted(images[:7], 1.0) != images[:7]).any(dim=(1, 2, 3)).sum() == 4
