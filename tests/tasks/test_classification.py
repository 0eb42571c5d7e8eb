"""Decoding images, classifying them, and heat maps."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import image_bytes, save_image
from support.networks import publish_tiny, rewrite_card, tiny_card
from support.service import ROOT

from app import store
from app.errors import TooLarge
from app.networks import build
from app.networks.cnn import LeNet, LeNetSizes, WhitenedNet, WhitenedNetSizes, max_pool, unsmoothed
from app.store import Store
from app.tasks import check_loading
from app.tasks.classification import ImageClassifier
from app.tasks.image_codecs import ImageDecoder, overlay_heat_map
from training.loops.airbench import whiten


@pytest.fixture
def classifier(tmp_path: Path) -> ImageClassifier:
    return ImageClassifier(publish_tiny(tmp_path, "tiny-cnn"), torch.device("cpu"))


def test_a_card_has_a_threshold_for_each_label_or_none(tmp_path: Path) -> None:
    version = publish_tiny(tmp_path, "tiny-cnn")
    rewrite_card(version.folder, thresholds=[0.5] * 10)
    check_loading(Store(tmp_path).read("tiny-cnn", 1))
    rewrite_card(version.folder, thresholds=[])
    with pytest.raises(store.StoreError, match=r"^tiny-cnn@1: there are 0 thresholds, expected 10$"):
        check_loading(Store(tmp_path).read("tiny-cnn", 1))


def test_the_orientation_of_a_photo_is_applied(classifier: ImageClassifier) -> None:
    upright = Image.new("RGB", (32, 32), "black")
    upright.paste("white", (0, 0, 32, 8))  # a light upper part
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated by 90 degrees
    turned = save_image(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert np.array_equal(classifier.parse(turned).numpy(), classifier.parse(save_image(upright)).numpy())


def test_transparent_pixels_become_white(classifier: ImageClassifier) -> None:
    for mode, clear in (("RGBA", (255, 0, 0, 0)), ("LA", (9, 0))):
        assert (classifier.parse(save_image(Image.new(mode, (32, 32), clear))) == 255).all()
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([255, 0, 0] + [0] * 765)
    assert (classifier.parse(save_image(palette, transparency=0)) == 255).all()


@pytest.mark.parametrize(
    ("kind", "sizes", "weights"),
    [
        ("lenet", {}, 62_006),
        ("character-rnn", {"vocabulary": 66}, 49_986),
        ("series-lstm", {}, 17_217),
        ("gan-generator", {}, 579_728),
    ],
)
def test_the_workshops_networks_have_their_exact_sizes(kind: str, sizes: dict[str, int], weights: int) -> None:
    assert sum(weight.numel() for weight in build(kind, sizes).parameters()) == weights


@pytest.mark.parametrize("count", [1, 5])
def test_the_fast_operations_without_gradients_equal_the_simple_ones(count: int) -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    network = LeNet(LeNetSizes()).eval()
    simple = network(pixels).detach()
    with torch.inference_mode():
        assert torch.allclose(network(pixels), simple, atol=1e-5)
    odd = torch.rand(count, 2, 7, 9)
    with torch.inference_mode():
        assert torch.equal(max_pool(odd), torch.nn.functional.max_pool2d(odd, 2))


def test_a_heat_map_is_grad_cam_of_the_likeliest_class(classifier: ImageClassifier) -> None:
    torch.manual_seed(0)
    images = list(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8))
    for image, (class_probabilities, heat) in zip(images, classifier.explain(images), strict=True):
        assert class_probabilities == pytest.approx(classifier.predict([image])[0], abs=1e-6)
        maps = classifier.network.maps(image.unsqueeze(0))
        likeliest = int(np.argmax(class_probabilities))
        gradients = torch.autograd.functional.jacobian(
            lambda x, k=likeliest: classifier.network.classified(x)[0, k], maps
        )[0]
        expected = sum(gradients[k].mean() * maps[0, k] for k in range(len(gradients))).clamp(min=0)
        assert heat == pytest.approx((expected / max(float(expected.max()), 1e-12)).numpy(), abs=1e-5)


def test_a_heat_map_covers_the_image_at_its_own_size() -> None:
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 1
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated by 90 degrees
    photo = Image.open(io.BytesIO(image_bytes("JPEG", size=(60, 40), exif=exif)))
    overlay = Image.open(io.BytesIO(overlay_heat_map(photo, heat)))
    assert (overlay.format, overlay.mode, overlay.size) == ("PNG", "RGB", (40, 60))
    grey = Image.open(io.BytesIO(image_bytes("PNG", "L", size=(50, 50))))
    difference = np.abs(np.asarray(Image.open(io.BytesIO(overlay_heat_map(grey, heat))), float)
                     - np.asarray(grey.convert("RGB"), float)).sum(axis=2)  # fmt: skip
    assert difference[:10, :10].mean() > 50
    assert difference[30:, 30:].max() == 0


def test_the_heat_map_of_a_large_image_is_that_of_its_parts() -> None:
    """Large images are processed in bands. With a constant heat map, each part has the same picture alone."""
    heat = np.full((4, 4), 0.5, np.float32)
    large = Image.open(io.BytesIO(image_bytes("PNG", "P", (1100, 1100))))
    overlay = Image.open(io.BytesIO(overlay_heat_map(large, heat)))
    part = large.crop((0, 900, 1100, 1000))
    expected = Image.open(io.BytesIO(overlay_heat_map(part, heat)))
    assert np.array_equal(np.asarray(overlay.crop((0, 900, 1100, 1000))), np.asarray(expected))


@pytest.mark.parametrize(
    ("mode", "width", "height", "side", "resize"),
    [
        ("RGB", 90, 130, 32, 0),
        ("RGB", 900, 1300, 40, 50),
        ("RGBA", 900, 1300, 32, 0),
        ("LA", 900, 1300, 32, 0),
        ("P", 900, 1300, 40, 50),
        ("1", 900, 1300, 40, 50),
    ],
)
def test_a_large_image_is_resized_as_in_one_piece(mode: str, width: int, height: int, side: int, resize: int) -> None:
    content = image_bytes("PNG", mode, (width, height))
    image = Image.open(io.BytesIO(content))
    image = image.convert({"P": "RGB", "1": "L"}.get(mode, mode))
    box = cropped(width, height, side, resize) if resize else None
    small = image.resize((side, side), Image.Resampling.BICUBIC, box)
    if "A" in small.mode:
        small = small.convert("RGBA")
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    expected = np.asarray(small.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(ImageDecoder(3, side, resize).parse(content).numpy(), expected)


def cropped(width: int, height: int, side: int, resize: int) -> tuple[float, float, float, float]:
    """Return the part of a portrait image that remains if its width becomes ``resize`` and its centre is cropped."""
    scaled = resize * height // width
    left, top = round((resize - side) / 2) * width / resize, round((scaled - side) / 2) * height / scaled
    return left, top, left + side * width / resize, top + side * height / scaled


def noise_images(count: int) -> torch.Tensor:
    """Return uint8 images [count, 3, 32, 32] whose neighbouring pixels and channels are correlated."""
    coarse = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
    coarse = coarse + coarse.mean(dim=1, keepdim=True)
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")
    return (128 + 40 * smooth).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def whitened() -> WhitenedNet:
    """Return a narrow network in evaluation mode, with temperatures and with batch-norm statistics of some images."""
    torch.manual_seed(0)
    network = WhitenedNet(WhitenedNetSizes(widths=(26, 30, 30)))
    whiten(network, noise_images(64))
    network(noise_images(64))
    network.temperature.fill_(0.5)
    network.views_temperature.fill_(0.25)
    return network.eval()


@torch.no_grad()
def test_the_first_layer_whitens_with_filters_and_their_negatives(whitened: WhitenedNet) -> None:
    pixels = (noise_images(64) - whitened.mean) / whitened.deviation
    outputs = whitened.whiten(pixels).transpose(0, 1).flatten(1)  # [24, places]
    assert torch.allclose(outputs[:12], -outputs[12:], atol=1e-4)
    covariance = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    assert (covariance - torch.diag(covariance.diag())).abs().max() < 1e-3
    assert covariance.diag().max() < 1.001
    assert covariance.diag().max() > 0.99


@torch.no_grad()
def test_six_views_are_averaged_with_weights(whitened: WhitenedNet) -> None:
    images = noise_images(4).float()
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    total = torch.zeros(4, 10)
    for top, weight in ((1, 0.25), (0, 0.125), (2, 0.125)):
        shifted = padded[:, :, top : top + 32, top : top + 32]
        total += weight * (whitened.scores(shifted) + whitened.scores(shifted.flip(-1)))
    assert torch.allclose(whitened.tta_logits(noise_images(4)), total / 0.25, atol=1e-4)


@torch.no_grad()
def test_logits_undo_label_smoothing(whitened: WhitenedNet) -> None:
    torch.manual_seed(0)
    true_probabilities = torch.distributions.Dirichlet(torch.full((10,), 0.3)).sample((1000,))
    smoothed_logits = (true_probabilities * 0.8 + 0.02).log()  # the minimum of cross-entropy with smoothing 0.2
    corrected = unsmoothed(smoothed_logits + 3, 0.2)
    assert torch.allclose(corrected.softmax(dim=1), true_probabilities, atol=0.02)  # probability 0 becomes 0.0025
    assert (unsmoothed(torch.linspace(-4, 4, 10).unsqueeze(0), 0.2).diff() > 0).all()

    images = noise_images(4)
    scores, views = whitened.scores(images), whitened.tta_logits(images) * 0.25
    assert torch.equal(whitened(images), scores / 0.5)
    other = WhitenedNet(WhitenedNetSizes(widths=(26, 30, 30), label_smoothing=0.2)).eval()
    other.load_state_dict(whitened.state_dict())
    assert torch.equal(other(images), unsmoothed(scores, 0.2) / 0.5)
    assert torch.allclose(other.tta_logits(images), unsmoothed(views, 0.2) / 0.25, atol=1e-4)


def test_the_predictor_uses_bfloat16_only_where_it_is_faster(
    whitened: WhitenedNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {"labels": [str(label) for label in range(10)]}
    card = tiny_card("w", "classify", "whitened-net", {"widths": [26, 30, 30]}, labels)
    Store(tmp_path).publish(card, whitened.state_dict())
    for supported, faster in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda supported=supported: supported)
        monkeypatch.setattr("app.tasks.precision._bfloat16_is_faster", lambda faster=faster: faster)
        dtype = torch.bfloat16 if supported and faster else torch.float32
        classifier = ImageClassifier(Store(tmp_path).read("w", 1), torch.device("cpu"), tta=True)
        assert classifier.network.groups[0].conv2.weight.dtype == dtype
        ((class_probabilities, heat),) = classifier.explain(list(noise_images(1)))
        assert class_probabilities == pytest.approx(classifier.predict(list(noise_images(1)))[0], abs=1e-6)
        assert (heat.dtype, heat.shape, heat.max()) == (np.float32, (7, 7), 1)


def test_convolutions_are_initialised_as_the_identity() -> None:
    network = WhitenedNet(WhitenedNetSizes(widths=(26, 30, 40)))
    x = torch.rand(1, 26, 5, 5)
    assert torch.allclose(network.groups[1].conv1(x)[:, :26], x, atol=1e-6)
    assert network.groups[0].conv2(x).equal(x)


JPEG = save_image(Image.new("RGB", (8, 8)), "JPEG")
END = b"\xff\xd9"  # of a JPEG
SCANS = b"\xff\xda\0\2" * 100


def test_scans_of_a_jpeg_are_counted_across_the_borders_of_bands() -> None:
    content = JPEG.removesuffix(END).ljust(2**20 - 1, b"\0") + SCANS
    with pytest.raises(TooLarge, match="101 scans"):
        ImageDecoder(3, 32).open(content, max_pixels=100)


def test_markers_of_scans_that_are_not_read_do_not_count() -> None:
    comment = b"\xff\xfe" + (2 + len(SCANS)).to_bytes(2, "big") + SCANS
    for photo in (JPEG + SCANS, JPEG[:2] + comment + JPEG[2:]):  # behind the image, and in a comment
        image = ImageDecoder(3, 8).parse(photo, max_pixels=100)
        assert torch.equal(image, ImageDecoder(3, 8).parse(JPEG, max_pixels=100))


@pytest.mark.parametrize(
    "before",
    [
        b"",  # scan data
        b"\xff\xfe\0\4" + END,  # in a comment
        b"\xff\xfe\0\0",  # a comment whose length is too small
        b"\xff\xff",  # fill bytes
        b"\xff\xfe\0\2" * 10_000 + END,
    ],
    ids=["data", "end in a comment", "no length", "fill bytes", "10,000 segments"],
)
def test_scans_cannot_be_hidden(before: bytes) -> None:
    with pytest.raises(TooLarge, match="101 scans; the maximum is 100"):
        ImageDecoder(3, 32).open(JPEG.removesuffix(END) + before + SCANS, max_pixels=100)


def test_weights_have_the_memory_format_of_the_network() -> None:
    """Otherwise, the weights are copied in each call."""
    classifier = ImageClassifier(Store(ROOT / "models_store").read("cifar10-whitened", 1), torch.device("cpu"))
    for group in classifier.network.groups:
        for weight in (group.conv1.weight, group.conv2.weight):
            assert weight.is_contiguous(memory_format=torch.channels_last)
