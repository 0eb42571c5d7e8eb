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
from support.service import IMAGES, ROOT

from app import store
from app.errors import TooLarge
from app.networks import build
from app.networks.cnn import LeNet, LeNetSizes, WhitenedNet, WhitenedNetSizes, max_pool, probabilities, unsmoothed
from app.store import Store
from app.tasks import check_loading
from app.tasks.classification import ImageClassifier
from app.tasks.image_codecs import ImageDecoder, overlay_heat_map
from training.loops.airbench import whiten


@pytest.fixture
def classifier(tmp_path: Path) -> ImageClassifier:
    return ImageClassifier(publish_tiny(tmp_path, "tiny-cnn"), torch.device("cpu"))


@pytest.mark.parametrize("thresholds", [[], [0.5], [0.5] * 11])
def test_a_card_has_a_threshold_for_each_label_or_none(tmp_path: Path, thresholds: list[float]) -> None:
    version = publish_tiny(tmp_path, "tiny-cnn")
    rewrite_card(version.folder, thresholds=[0.5] * 10)
    check_loading(Store(tmp_path).read("tiny-cnn", 1))
    rewrite_card(version.folder, thresholds=thresholds)
    with pytest.raises(store.StoreError, match=rf"^tiny-cnn@1: there are {len(thresholds)} thresholds, expected 10$"):
        check_loading(Store(tmp_path).read("tiny-cnn", 1))


def test_an_image_of_the_right_size_is_decoded_exactly(classifier: ImageClassifier) -> None:
    content = image_bytes()
    pixels = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1)
    assert np.array_equal(classifier.parse(content).numpy(), pixels)


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


def test_a_lab_image_is_read_in_colour_and_in_grey() -> None:
    grey = Image.merge("LAB", [Image.new("L", (32, 32), level) for level in (136, 128, 128)])
    assert grey.convert("RGB").getpixel((0, 0)) == (127, 127, 127)
    for channels in (1, 3):
        assert (ImageDecoder(channels, 32).parse(save_image(grey, "TIFF")) == 127).all()


def test_the_edges_of_a_large_image_are_used(classifier: ImageClassifier) -> None:
    photo = Image.new("RGB", (640, 320), "black")
    photo.paste("white", (0, 0, 40, 320))
    photo.paste("white", (600, 0, 640, 320))
    pixels = classifier.parse(save_image(photo))
    assert (pixels[:, :, 0] > 200).all()
    assert (pixels[:, :, 31] > 200).all()
    assert (pixels[:, :, 8:24] < 20).all()


def test_resizing_is_antialiased(classifier: ImageClassifier) -> None:
    board = np.indices((320, 320)).sum(axis=0) % 2 * 255
    pixels = classifier.parse(save_image(Image.fromarray(board.astype(np.uint8)))).float()
    assert (pixels - 127.5).abs().max() < 10


def test_a_batch_gives_the_same_results_as_single_images(classifier: ImageClassifier) -> None:
    images = [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8) for _ in range(9)]
    together = classifier.predict(images)
    for image, row in zip(images, together, strict=True):
        assert classifier.predict([image])[0] == pytest.approx(row, abs=1e-6)
        assert sum(row) == pytest.approx(1)


def test_the_workshops_network_has_its_exact_sizes() -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in build("lenet", {}).state_dict().items() if "weight" in key}
    assert shapes == {
        "conv1.weight": (6, 3, 5, 5), "conv2.weight": (16, 6, 5, 5),
        "fc1.weight": (120, 400), "fc2.weight": (84, 120), "fc3.weight": (10, 84),
    }  # fmt: skip
    rnn = {key: tuple(t.shape) for key, t in build("character-rnn", {"vocabulary": 66}).state_dict().items()}
    assert (rnn["embedding.weight"], rnn["rnn.weight_hh_l0"], rnn["head.weight"]) == ((66, 128), (128, 128), (66, 128))
    lstm = {key: tuple(t.shape) for key, t in build("series-lstm", {}).state_dict().items()}
    assert (lstm["lstm.weight_ih_l0"], lstm["lstm.weight_hh_l0"], lstm["head.weight"]) == ((256, 1), (256, 64), (1, 64))
    gan = [tuple(t.shape) for key, t in build("gan-generator", {}).state_dict().items() if "weight" in key]
    assert gan == [(128, 100), (256, 128), (512, 256), (784, 512)]


@pytest.mark.parametrize("count", [1, 4, 5, 64])
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


def test_a_heat_map_is_grad_cam_of_the_likeliest_class(tmp_path: Path) -> None:
    classifier = ImageClassifier(publish_tiny(tmp_path, "tiny-cnn"), torch.device("cpu"))
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


def test_a_palette_with_transparency_is_read_before_the_image_is_resized(classifier: ImageClassifier) -> None:
    colours = np.zeros((64, 64, 4), np.uint8)
    colours[:, :32], colours[:, 32:] = (255, 0, 0, 255), (0, 0, 255, 255)
    palette = Image.fromarray(colours[..., :3]).quantize(4)
    with_alpha = palette.convert("PA")
    assert with_alpha.mode == "PA"
    pixels = classifier.parse(save_image(with_alpha, "TIFF"))
    assert torch.equal(pixels, classifier.parse(save_image(palette.convert("RGB"))))
    assert pixels[0, 0, 0] > 200


def test_with_tta_explain_returns_the_same_probabilities(whitened: WhitenedNet, tmp_path: Path) -> None:
    labels = {"labels": [str(label) for label in range(10)]}
    card = tiny_card("w", "classify", "whitened-net", {"widths": [26, 30, 30]}, labels)
    Store(tmp_path).publish(card, whitened.state_dict())
    classifier = ImageClassifier(Store(tmp_path).read("w", 1), torch.device("cpu"), tta=True)
    images = list(noise_images(3))
    for (class_probabilities, heat), alone in zip(classifier.explain(images), classifier.predict(images), strict=True):
        assert class_probabilities == pytest.approx(alone, abs=1e-6)
        assert heat.max() <= 1


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


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_the_heat_map_of_a_large_image_is_that_of_its_parts(mode: str) -> None:
    """Large images are processed in bands. With a constant heat map, each part has the same picture alone."""
    heat = np.full((4, 4), 0.5, np.float32)
    large = Image.open(io.BytesIO(image_bytes("PNG", mode, (1100, 2100))))
    overlay = Image.open(io.BytesIO(overlay_heat_map(large, heat)))
    for top in (0, 900, 2000):
        part = large.crop((0, top, 1100, top + 100))
        expected = Image.open(io.BytesIO(overlay_heat_map(part, heat)))
        assert np.array_equal(np.asarray(overlay.crop((0, top, 1100, top + 100))), np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize(("side", "resize"), [(32, 0), (40, 50)])
def test_a_large_image_is_resized_as_in_one_piece(mode: str, side: int, resize: int) -> None:
    content = image_bytes("TIFF" if mode == "CMYK" else "PNG", mode, (900, 1300))
    image = Image.open(io.BytesIO(content))
    image = image.convert({"P": "RGB", "1": "L"}.get(mode, mode))
    box = _cropped(900, 1300, side, resize) if resize else None
    small = image.resize((side, side), Image.Resampling.BICUBIC, box)
    if "A" in small.mode:
        small = small.convert("RGBA")
        small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
    expected = np.asarray(small.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(ImageDecoder(3, side, resize).parse(content).numpy(), expected)


def _cropped(width: int, height: int, side: int, resize: int) -> tuple[float, float, float, float]:
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
def test_uint8_and_float_pixels_give_the_same_result(whitened: WhitenedNet) -> None:
    images = noise_images(5)
    assert torch.equal(whitened(images), whitened(images.float()))
    assert torch.allclose(whitened(images[:1]), whitened(images)[:1], atol=1e-5)


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
def test_temperatures_divide_the_logits_and_are_stored_with_the_weights(whitened: WhitenedNet) -> None:
    images = noise_images(4)
    assert torch.equal(whitened(images), whitened.scores(images) / 0.5)
    state = whitened.state_dict()
    assert (state["temperature"], state["views_temperature"]) == (0.5, 0.25)
    other = build("whitened-net", {"widths": [26, 30, 30]}).eval()
    other.load_state_dict(state)
    assert torch.equal(other(images), whitened(images))


@torch.no_grad()
def test_logits_undo_label_smoothing(whitened: WhitenedNet) -> None:
    torch.manual_seed(0)
    true_probabilities = torch.distributions.Dirichlet(torch.full((10,), 0.3)).sample((1000,))
    smoothed_logits = (true_probabilities * 0.8 + 0.02).log()  # the minimum of cross-entropy with smoothing 0.2
    corrected = unsmoothed(smoothed_logits + 3, 0.2)
    assert torch.allclose(corrected.softmax(dim=1), true_probabilities, atol=0.02)  # probability 0 becomes 0.0025
    assert not torch.allclose(smoothed_logits.softmax(dim=1), true_probabilities, atol=0.15)
    extreme = torch.tensor([[60.0, 2, 1, 0, 0, 0, 0, 0, 0, -60]])  # beyond the logits that training can reach
    for smoothing in (0.01, 0.2, 0.9):
        others = unsmoothed(extreme, smoothing).softmax(dim=1)[0, 1:]
        assert 0 < others.min() <= others.max() < smoothing / 100
        ordered = unsmoothed(torch.linspace(-4, 4, 10).unsqueeze(0), smoothing).diff()
        assert (ordered > 0).all()
    assert unsmoothed(extreme, 0.0) is extreme

    images = noise_images(4)
    other = WhitenedNet(WhitenedNetSizes(widths=(26, 30, 30), label_smoothing=0.2)).eval()
    other.load_state_dict(whitened.state_dict())
    assert torch.equal(other.scores(images), whitened.scores(images))
    assert torch.equal(other(images), unsmoothed(whitened.scores(images), 0.2) / 0.5)
    assert torch.allclose(
        other.tta_logits(images), unsmoothed(whitened.tta_logits(images) * 0.25, 0.2) / 0.25, atol=1e-4
    )


@pytest.mark.slow
def test_a_photo_gets_the_same_label_if_it_is_decoded_at_reduced_size() -> None:
    classifier = ImageClassifier(Store(ROOT / "models_store").read("cifar10-whitened", 1), torch.device("cpu"))
    photos = []
    for path in sorted(IMAGES.glob("cifar10/*.png")):
        photo = Image.open(path).resize((1600, 1200), Image.Resampling.BICUBIC)
        photos.append(save_image(photo, "JPEG", quality=90))
    assert classifier.open(photos[0], 10**7).draft("RGB", (128, 128)) is not None
    reduced = classifier.predict([classifier.parse(photo) for photo in photos])
    lossless = [save_image(Image.open(io.BytesIO(photo)), "PNG") for photo in photos]
    whole = classifier.predict([classifier.parse(photo) for photo in lossless])
    assert reduced != whole
    for first, second in zip(reduced, whole, strict=True):
        assert first == pytest.approx(second, abs=0.05)
        assert int(np.argmax(first)) == int(np.argmax(second))


@pytest.mark.slow
@torch.no_grad()
def test_bfloat16_is_close_to_float32_and_batch_invariant() -> None:
    network = Store(ROOT / "models_store").read("cifar10-whitened", 1).network()
    images = torch.stack(
        [ImageDecoder(3, 32).parse(path.read_bytes()) for path in sorted(IMAGES.glob("cifar10/*.png"))]
    )
    before, before_views = probabilities(network(images)), probabilities(network.tta_logits(images))
    network.to_bfloat16()
    after = probabilities(network(images))
    assert network.groups[1].conv1.weight.dtype == torch.bfloat16
    assert 0 < float((after - before).abs().max()) < 0.01
    assert float((probabilities(network.tta_logits(images)) - before_views).abs().max()) < 0.01
    alone = torch.cat([probabilities(network(image.unsqueeze(0))) for image in images])
    assert torch.allclose(alone, after, atol=1e-6)


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
        classifier = ImageClassifier(Store(tmp_path).read("w", 1), torch.device("cpu"))
        assert classifier.network.groups[0].conv2.weight.dtype == dtype
        ((class_probabilities, heat),) = classifier.explain(list(noise_images(1)))
        assert class_probabilities == pytest.approx(classifier.predict(list(noise_images(1)))[0], abs=1e-6)
        assert (heat.dtype, heat.shape, heat.max()) == (np.float32, (7, 7), 1)


def test_convolutions_are_initialised_as_the_identity() -> None:
    network = WhitenedNet(WhitenedNetSizes(widths=(26, 30, 40)))
    x = torch.rand(1, 26, 5, 5)
    assert torch.allclose(network.groups[1].conv1(x)[:, :26], x, atol=1e-6)
    assert network.groups[0].conv2(x).equal(x)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert not {name for name in trained if name.endswith("weight") and ("norm" in name or "whiten" in name)}


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    return file.getvalue()


END = b"\xff\xd9"  # of a JPEG
SCANS = b"\xff\xda\0\2" * 100


@pytest.mark.parametrize("start", [2**20 - 2, 2**20 - 1, 2**20])
def test_scans_of_a_jpeg_are_counted_across_the_borders_of_bands(start: int) -> None:
    content = jpeg().removesuffix(END).ljust(start, b"\0") + SCANS
    with pytest.raises(TooLarge, match="101 scans"):
        ImageDecoder(3, 32).open(content, max_pixels=100)


def test_markers_of_scans_that_are_not_read_do_not_count() -> None:
    content = jpeg()
    comment = b"\xff\xfe" + (2 + len(SCANS)).to_bytes(2, "big") + SCANS
    for photo in (content + SCANS, content[:2] + comment + content[2:]):  # behind the image, and in a comment
        image = ImageDecoder(3, 8).parse(photo, max_pixels=100)
        assert torch.equal(image, ImageDecoder(3, 8).parse(content, max_pixels=100))


@pytest.mark.parametrize(
    "before",
    [
        b"",  # scan data
        b"\xff\xfe\0\4" + END,  # in a comment
        b"\xff\xfe\0\0",  # a comment whose length is too small
        b"\xff\xff",  # fill bytes
        b"\xff\5\xff\0",  # an unknown marker
        b"\xff\xd0\xff\0",  # a restart
        b"\xff\xfe\0\2" * 10_000 + END,
    ],
    ids=["data", "end in a comment", "no length", "fill bytes", "unknown marker", "restart", "10,000 segments"],
)
def test_scans_cannot_be_hidden(before: bytes) -> None:
    with pytest.raises(TooLarge, match="101 scans; the maximum is 100"):
        ImageDecoder(3, 32).open(jpeg().removesuffix(END) + before + SCANS, max_pixels=100)


def test_weights_have_the_memory_format_of_the_network() -> None:
    """Otherwise, the weights are copied in each call."""
    classifier = ImageClassifier(Store(ROOT / "models_store").read("cifar10-whitened", 1), torch.device("cpu"))
    for group in classifier.network.groups:
        for weight in (group.conv1.weight, group.conv2.weight):
            assert weight.is_contiguous(memory_format=torch.channels_last)
