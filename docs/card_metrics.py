"""The metrics on model cards: what each metric means, and which values are good."""

from __future__ import annotations

from collections.abc import Iterator

from docs.markdown import code

LOWER, HIGHER = "lower", "higher"
FEATURES = "in the features of the reference classifier `mnist-judge`"
AFFIXES = {  # parts of names that select a variant of a metric
    "_views": "with test-time augmentation (`QUARTET_TTA`)",
    "_before": "before temperature scaling, which divides the logits by a number fitted to validation data",
    "hourly_": "on the hourly series of M4",
    "weekly_": "on the weekly series of M4",
    "untuned_": "of the network from which the training started",
    "known_": "with the effects of the known covariates",
    "naive_": "of a forecast that repeats the last season",
    "autoets_": "of exponential smoothing (AutoETS of the package statsforecast)",
    "autotheta_": "of the Theta method (AutoTheta of the package statsforecast)",
}
CORRUPTIONS = ("noise", "blur", "contrast", "brightness", "pixelate", "jpeg")
METRICS = {  # names of metrics: meaning, better values
    ("accuracy",): ("share of the images for which the most probable label is correct", HIGHER),
    ("nll",): (
        "negative log-likelihood: mean of -ln p, where p is the probability of the correct label. If an image may have several labels: mean over all labels",
        LOWER,
    ),
    ("calibration_error",): (
        "expected calibration error: mean difference between the probability of the predicted label and the accuracy, in 15 bins of the probability",
        LOWER,
    ),
    ("brier",): (
        "Brier score: sum over the labels of the squared errors of their probabilities, mean over the images",
        LOWER,
    ),
    tuple(f"accuracy_{kind}" for kind in CORRUPTIONS): (
        "accuracy on images with this corruption, mean of three strengths",
        HIGHER,
    ),
    ("accuracy_damaged",): ("mean of the accuracies on images with corruptions", HIGHER),
    ("worst_class_accuracy",): (
        "accuracy of the class with the lowest accuracy. For generators: `conditional_accuracy` of the label with the lowest value",
        HIGHER,
    ),
    ("mean_average_precision",): (
        "for several labels per image: mean over the labels of the average precision. For the average precision of a label, all images are sorted by probability, and the precisions at the images with the label are averaged",
        HIGHER,
    ),
    ("f1",): (
        "for several labels per image: F1 score of all pairs of an image and a label, with the thresholds of the card",
        HIGHER,
    ),
    ("exact_match",): ("for several labels per image: share of the images for which all labels are correct", HIGHER),
    ("nats_per_character",): (
        "mean of -ln p, where p is the probability of the actual next character. Each window of the text starts from a zero state",
        LOWER,
    ),
    ("bits_per_character",): ("`nats_per_character` / ln 2", LOWER),
    ("nats_per_character_carried",): (
        "the same as `nats_per_character`, but the network reads the text in one pass, and its state is carried along",
        LOWER,
    ),
    ("smape",): ("symmetric mean absolute percentage error of the medians, from 0 to 200", LOWER),
    ("mase",): (
        "mean absolute scaled error: mean absolute error of the medians, divided by the mean absolute difference between past values that are one season apart",
        LOWER,
    ),
    ("wql",): (
        "weighted quantile loss: twice the sum of the pinball losses, divided by the sum of the absolute values, mean over the quantiles from 0.1 to 0.9",
        LOWER,
    ),
    ("quantile_loss",): (
        "twice the pinball loss, divided by the scale of `mase`, mean over the quantiles from 0.1 to 0.9",
        LOWER,
    ),
    ("msis",): (
        "mean scaled interval score of 95 % intervals: their width, plus 40 times the distance of each value outside its interval, divided by the scale of `mase`",
        LOWER,
    ),
    ("owa",): (
        "overall weighted average of M4: mean of `smape` and `mase`, each divided by that of the benchmark Naive2",
        LOWER,
    ),
    ("coverage_95",): ("share of the values that are inside their 95 % interval", "near 0.95"),
    ("one_step_mse",): ("mean squared error of the forecasts of the next value", LOWER),
    ("one_step_mse_over_noise",): (
        "`one_step_mse`, divided by the variance of the distribution from which the noise was drawn",
        "lower; forecasts without error in the noiseless series have 1 on average",
    ),
    ("one_step_mse_over_realised_noise",): (
        "`one_step_mse`, divided by the variance of the noise in these values",
        "lower; forecasts without error in the noiseless series have 1",
    ),
    ("one_step_mse_over_noise_fresh",): (
        "mean of `one_step_mse_over_noise` over 50 series with the same sine and other noise",
        "lower; forecasts without error in the noiseless series have 1 on average",
    ),
    ("free_running_rmse",): (
        "root mean squared error of forecasts of 50 steps, compared with the sine without noise",
        LOWER,
    ),
    ("frechet_distance", "frechet_distance_5000"): (
        f"Fréchet distance between 10,000 (or 5,000) generated images and the test images, {FEATURES}",
        LOWER,
    ),
    ("frechet_floor",): (
        f"Fréchet distance between 10,000 training images and the test images, {FEATURES}, mean of five draws. The classifier was trained on most of the training images",
        "",
    ),
    ("frechet_floor_5000", "frechet_floor_5000_spread"): (
        "Fréchet distance between 5,000 training images that the reference classifier has not seen and the test images, and its standard error",
        "",
    ),
    ("frechet_ratio",): ("`frechet_distance` / `frechet_floor`", "lower; real images have about 1"),
    ("frechet_ratio_unseen", "frechet_ratio_unseen_spread"): (
        "`frechet_distance_5000` / `frechet_floor_5000`, and the standard error that the floor contributes to this ratio",
        "lower; real images have about 1",
    ),
    ("nearest_neighbour_ratio",): (
        "median distance of generated images to the nearest training image, in pixel values, divided by that of real images that were not used in training",
        "near 1; values far below 1 mean copies of training images",
    ),
    ("conditional_accuracy",): (
        "share of the generated images that the reference classifier assigns to the requested label, mean over the labels",
        HIGHER,
    ),
    ("samples_only_accuracy",): (
        "accuracy on the test images of a classifier that was trained only on generated images",
        HIGHER,
    ),
    ("density", "density_of_real"): (
        f"mean number of test images to which a generated image (or a training image) is near, divided by 5. *Near* means closer to the test image than its fifth nearest other test image, {FEATURES}",
        "higher; `density_of_real` is the value of real images",
    ),
    ("coverage", "coverage_of_real"): (
        "share of the test images to which at least one generated image (or training image) is near, in the sense of `density`",
        "higher; `coverage_of_real` is the value of real images",
    ),
    ("rarest_class",): (
        "for generators without labels: share of the generated images in the rarest class, according to the reference classifier",
        "near its share in the training images",
    ),
    ("commonest_class",): (
        "for classifiers: accuracy of always predicting the most common class of the test images. For generators without labels: share of the most common class in the generated images",
        "for generators, near its share in the training images",
    ),
    ("label_accuracy", "label_accuracy_of_real"): (
        "share of the generated images (or of real images) that a classifier assigns to their label. The classifier was trained on the real images of the training",
        "higher; `label_accuracy_of_real` is the value of real images",
    ),
}
HEAD = """
## Metrics

The field `metrics` contains these figures. Each figure has the fields `value`, `split` and `decimals`. `split` states
the data on which it was measured. The column *better* states which values are good.

"""
AFFIXES_HEAD = """
Parts of a name select a variant of a metric:

"""


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield the names, the meaning and the better values of each metric."""
    for names, (meaning, better) in METRICS.items():
        yield ", ".join(map(code, names)), meaning, better


def affix_rows() -> Iterator[tuple[str, str]]:
    for affix, meaning in AFFIXES.items():
        yield code(f"{affix}*" if affix.endswith("_") else f"*{affix}"), meaning


def base_name(name: str) -> str:
    """Return the name of a metric without the parts in ``AFFIXES``."""
    for affix in AFFIXES:
        name = name.removeprefix(affix) if affix.endswith("_") else name.removesuffix(affix)
    return name
