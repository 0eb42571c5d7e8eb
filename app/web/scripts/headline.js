// One plain sentence or two about what a model can do, from the metrics of its card.

import { formatCount, formatNumber } from "./dom.js";

const LISTED = 12; // labels

const percent = (share) => `${formatNumber(share * 100, share > 0.99 ? 3 : 2)} %`;

/** Return how good a model is, as measured on data that it has not seen, or the title of its card. */
export function quality({ task, title, card: { metrics, vocabulary } }) {
  const value = (name) => metrics[name]?.value;
  const sentences = [];
  if (task === "classify") {
    if (value("accuracy")) sentences.push(`${percent(value("accuracy"))} of the test images are right`);
    else if (value("exact_match")) sentences.push(`For ${percent(value("exact_match"))} of the test images, all labels are right`);
  } else if (task === "continue" && value("nats_per_character")) {
    sentences.push(`On unseen text, it narrows the next of ${vocabulary.length} characters down to ${formatNumber(Math.exp(value("nats_per_character")), 2)}`);
  } else if (task === "forecast") {
    const relative = value("hourly_owa") ?? value("mase") / value("naive_mase");
    const benchmark = value("hourly_owa") ? "the benchmark Naive2 (M4, hourly)" : "a repetition of the last season";
    if (relative) sentences.push(`Errors are ${formatNumber(Math.abs(1 - relative) * 100, 2)} % ${relative < 1 ? "smaller" : "larger"} than those of ${benchmark}`);
    const coverage = value("hourly_coverage_95") ?? value("coverage_95");
    if (coverage) sentences.push(`${percent(coverage)} of the values are inside the 95 % interval`);
  } else if (task === "sample") {
    if (value("conditional_accuracy")) sentences.push(`${percent(value("conditional_accuracy"))} of the images are recognised as the requested label`);
    const ratio = value("frechet_ratio");
    if (ratio) sentences.push(ratio < 1.1 ? "As close to real images as other real images are" : `${formatNumber(ratio, 3)} times as far from real images as other real images are`);
  }
  return sentences.length ? `${sentences.join(". ")}.` : `${title ?? ""}`;
}

/** Return which labels a model knows, or "". It answers with one of them for every image. */
export function knowledge({ task, labels }) {
  if (!labels?.length) return "";
  const rest = labels.length - LISTED;
  const list = labels.slice(0, LISTED).join(", ") + (rest > 0 ? ` and ${formatCount(rest, "more label")}` : "");
  return task === "classify" ? `Knows only: ${list}.` : `Knows: ${list}.`;
}
