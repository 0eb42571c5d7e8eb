"""The metrics on model cards: what each metric means, and which values are good."""

from __future__ import annotations

from collections.abc import Iterator

from docs.markdown import code

FEATURES = "in the features of the reference classifier `mnist-judge`"
AFFIXES = {  # parts of names that select a variant of a metric
    "_views": "with test-time augmentation (`QUARTET_TTA`)",
    "hourly_": "on the hourly series of M4",
    "weekly_": "on the weekly series of M4",
    "untuned_": "of the network from which the training started",
    "known_": "with the effects of the known covariates",
    "naive_": "of a forecast that repeats the last season",
    "autoets_": "of exponential smoothing (AutoETS of the package statsforecast)",
    "autotheta_": "of the Theta method (AutoTheta of the package statsforecast)",
}
METRICS = {  # names, separated by commas: meaning
    "accuracy": "share of the images for which the most probable label is correct; higher is better",
    "nll": "negative log-likelihood: mean of -ln p, where p is the probability of the correct label. If an image may have several labels: mean over all labels; lower is better",
    "calibration_error": "expected calibration error: mean difference between the probability of the predicted label and the accuracy, in 15 bins of the probability; lower is better",
    "brier": "Brier score: sum over the labels of the squared errors of their probabilities, mean over the images; lower is better",
    "worst_class_accuracy": "accuracy of the class with the lowest accuracy. For generators: `conditional_accuracy` of the label with the lowest value; higher is better",
    "mean_average_precision": "for several labels per image: mean over the labels of the average precision. For the average precision of a label, all images are sorted by probability, and the precisions at the images with the label are averaged; higher is better",
    "f1": "for several labels per image: F1 score of all pairs of an image and a label, with the thresholds of the card; higher is better",
    "exact_match": "for several labels per image: share of the images for which all labels are correct; higher is better",
    "nats_per_character": "mean of -ln p, where p is the probability of the actual next character. Each window of the text starts from a zero state; lower is better",
    "bits_per_character": "`nats_per_character` / ln 2; lower is better",
    "smape": "symmetric mean absolute percentage error of the medians, from 0 to 200; lower is better",
    "mase": "mean absolute scaled error: mean absolute error of the medians, divided by the mean absolute difference between past values that are one season apart; lower is better",
    "wql": "weighted quantile loss: twice the sum of the pinball losses, divided by the sum of the absolute values, mean over the quantiles from 0.1 to 0.9; lower is better",
    "quantile_loss": "twice the pinball loss, divided by the scale of `mase`, mean over the quantiles from 0.1 to 0.9; lower is better",
    "msis": "mean scaled interval score of 95 % intervals: their width, plus 40 times the distance of each value outside its interval, divided by the scale of `mase`; lower is better",
    "owa": "overall weighted average of M4: mean of `smape` and `mase`, each divided by that of the benchmark Naive2; lower is better",
    "coverage_95": "share of the values that are inside their 95 % interval; near 0.95",
    "one_step_mse": "mean squared error of the forecasts of the next value; lower is better",
    "one_step_mse_over_noise": "`one_step_mse`, divided by the variance of the distribution from which the noise was drawn; lower is better; forecasts without error in the noiseless series have 1 on average",
    "one_step_mse_over_noise_fresh": "mean of `one_step_mse_over_noise` over 50 series with the same sine and other noise; lower is better; forecasts without error in the noiseless series have 1 on average",
    "free_running_rmse": "root mean squared error of forecasts of 50 steps, compared with the sine without noise; lower is better",
    "frechet_distance": f"Fréchet distance between 5,000 generated images and the test images, {FEATURES}; lower is better",
    "frechet_floor": f"Fréchet distance between 5,000 training images that the reference classifier has not seen and the test images, {FEATURES}",
    "frechet_ratio": "`frechet_distance` / `frechet_floor`; lower is better; real images have about 1",
    "nearest_neighbour_ratio": "median distance of generated images to the nearest training image, in pixel values, divided by that of real images that were not used in training; near 1; values far below 1 mean copies of training images",
    "conditional_accuracy": "share of the generated images that the reference classifier assigns to the requested label, mean over the labels; higher is better",
    "samples_only_accuracy": "accuracy on the test images of a classifier that was trained only on generated images; higher is better",
    "rarest_class": "for generators without labels: share of the generated images in the rarest class, according to the reference classifier; near its share in the training images",
    "commonest_class": "for classifiers: accuracy of always predicting the most common class of the test images. For generators without labels: share of the most common class in the generated images; for generators, near its share in the training images",
    "label_accuracy, label_accuracy_of_real": "share of the generated images (or of real images) that a classifier assigns to their label. The classifier was trained on the real images of the training; higher is better; `label_accuracy_of_real` is the value of real images",
}
HEAD = """
## Metrics

The field `metrics` contains these figures. Each figure has the fields `value`, `split` (the data on which it was
measured), `decimals`, `interval` (its 95 % confidence interval: Wilson for shares, otherwise a bootstrap over images,
windows or forecasts) and `weights`. `weights` says which network was measured: the `published` one, the network
`before refit` (before the training on all data), or another method.

"""
AFFIXES_HEAD = """
Parts of a name select a variant of a metric:

"""


def names() -> set[str]:
    return {name for group in METRICS for name in group.split(", ")}


def rows() -> Iterator[tuple[str, str]]:
    """Yield the names and the meaning of each metric."""
    for group, meaning in METRICS.items():
        yield ", ".join(map(code, group.split(", "))), meaning


def affix_rows() -> Iterator[tuple[str, str]]:
    for affix, meaning in AFFIXES.items():
        yield code(f"{affix}*" if affix.endswith("_") else f"*{affix}"), meaning


def base_name(name: str) -> str:
    """Return the name of a metric without the parts in ``AFFIXES``."""
    for affix in AFFIXES:
        name = name.removeprefix(affix) if affix.endswith("_") else name.removesuffix(affix)
    return name
