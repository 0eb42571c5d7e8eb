// One card for each model: what it does and how good it is. Its details are metrics, versions, pictures and the training.

import { blob, json, send } from "./api.js";
import { byId, createElement, enlarge } from "./dom.js";
import { knowledge, quality } from "./headline.js";

const TASKS = { classify: "labels", continue: "text", forecast: "forecasts", sample: "images", infer: "tensors" }; // what a model returns

/** Show one card for each model. The buttons on a card switch it to another version. */
export function showModelCards(models) {
  const order = Object.keys(TASKS);
  const sorted = [...models].sort((a, b) => order.indexOf(a.task) - order.indexOf(b.task) || b.default - a.default);
  byId("cards").replaceChildren(...sorted.map((model) => (model.state === "ready" ? card(model) : failedCard(model))));
}

const heading = (name, mark, text) => [createElement("h3", {}, name), createElement("span", { class: "task" }, mark), text ? createElement("span", { class: "about" }, text) : null];

function card(model, open = false) {
  const mark = `${TASKS[model.task] ?? model.task}${model.default ? ", default" : ""}`;
  const pictures = createElement("div", {});
  const details = createElement("details", { open },
    createElement("summary", {}, ...heading(model.id, mark, quality(model))),
    createElement("p", {}, [model.title, knowledge(model)].filter(Boolean).join(". ")),
    versions(model), pictures, metricsTable([...Object.entries(model.card.metrics), ...feedback(model)]), origin(model));
  details.addEventListener("toggle", () => showPictures(model, pictures), { once: true });
  return createElement("article", { class: "card", "aria-label": model.id }, details, ...model.failed.map(failure));
}

/** Return what feedback on the answers says, as metrics. */
const feedback = ({ feedback: figures = [] }) => figures.map(({ name, mean, count, interval }) => [name, { value: mean, decimals: 3, split: `${count} answers with feedback`, interval }]);

/** Return the data of a figure, its confidence interval, and its network if that is not the published one. */
const measuredOn = ({ split, decimals, interval, weights }) => [
  split, interval ? `95 % interval ${interval.map((bound) => bound.toFixed(decimals)).join(" to ")}` : "", (weights ?? "published") === "published" ? "" : weights,
].filter(Boolean).join("; ");

/** Return the served versions as buttons that switch the card. The active version answers requests without a version. */
function versions(model) {
  return createElement("div", { class: "inputs" }, ...model.versions.map((version) => createElement("button", {
    type: "button",
    class: "secondary small",
    "aria-pressed": String(version === model.version),
    on: { click: (event) => switchVersion(event.currentTarget.closest(".card"), `${model.id}@${version}`) },
  }, `version ${version}${role(model, version)}`)));
}

function role({ active, canary, shadow }, version) {
  if (version === active) return ", active";
  if (version === canary?.version) return `, canary, ${canary.share} %`;
  return version === shadow?.version ? `, shadow, ${shadow.share} %` : "";
}

async function switchVersion(element, id) {
  element.dataset.chosen = id;
  let model;
  try {
    model = await json(await send({ path: `v1/models/${id}` }));
  } catch (error) { // removed meanwhile, or the service does not answer
    if (error.status === 401) byId("key").hidden = false; // the key was revoked meanwhile
    element.querySelector('[role="alert"]')?.remove();
    element.append(createElement("p", { class: "error", role: "alert" }, error.message));
    return;
  }
  if (element.dataset.chosen !== id) return; // another version was chosen meanwhile
  const other = card(model, true);
  element.replaceWith(other);
  other.querySelector('button[aria-pressed="true"]').focus();
}

/** Load the pictures of a training. A click shows one large. */
async function showPictures(model, container) {
  for (const file of model.pictures) {
    const description = `${file.replace(".png", "")} of ${model.id}, version ${model.version}`;
    try { // <img src> would send no key
      const src = URL.createObjectURL(await blob(await send({ path: `v1/models/${model.id}@${model.version}/pictures/${file}` })));
      container.append(createElement("button", { type: "button", class: "training", "aria-label": `Show the ${description}`, on: { click: () => enlarge(src, description) } },
        createElement("img", { src, alt: "" })));
    } catch (error) {
      container.append(createElement("p", { class: "error", role: "alert" }, error.message));
    }
  }
}

function metricsTable(metrics) {
  if (!metrics.length) return null;
  return createElement("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "All metrics" }, createElement("table", {},
    createElement("thead", {}, createElement("tr", {}, createElement("th", { scope: "col" }, "metric"), createElement("th", { scope: "col", class: "number" }, "value"),
      createElement("th", { scope: "col" }, "measured on"))),
    createElement("tbody", {}, ...metrics.map(([name, metric]) => createElement("tr", {},
      createElement("th", { scope: "row" }, name.replaceAll("_", " ")), createElement("td", { class: "number" }, metric.value.toFixed(metric.decimals)), createElement("td", {}, measuredOn(metric)))))));
}

const UNITS = { classify: "image", continue: "character", forecast: "forecast", sample: "image", infer: "row" };

function describeSpeed({ task, speed }) {
  if (!speed) return "";
  const throughput = speed.per_second.toLocaleString("en", { maximumFractionDigits: 0 });
  return `${speed.milliseconds} ms for one ${UNITS[task]}, ${throughput} per second in batches of ${speed.rows}; one thread, ${speed.hardware}`;
}

const describeTensors = (tensors) => tensors.map(({ name, dtype, shape }) => `${name} ${dtype} [${shape.join(", ")}]`).join("; ");

/** Return whether the network of a card was imported. */
export const isImported = ({ kind }) => kind === "onnx";

/** Return the facts of a training or of an import. An import has tensors instead of a seed and a duration. */
function origin({ card }) {
  const { created, minutes, hardware, seed, command, commit, notes, kind, licence, source } = card;
  const made = isImported(card)
    ? { imported: `${created.slice(0, 10)}, ${hardware}`, inputs: describeTensors(card.inputs), outputs: describeTensors(card.outputs) }
    : { trained: `${created.slice(0, 10)}, ${Math.round(minutes)} minutes, ${hardware}`, seed: String(seed), commit: commit.slice(0, 12) };
  const facts = { speed: describeSpeed(card), network: kind, command, ...made, licence, source, notes };
  return createElement("dl", {}, ...Object.entries(facts).filter(([, fact]) => fact)
    .flatMap(([name, fact]) => [createElement("dt", {}, name), createElement("dd", {}, fact)]));
}

const failure = ({ version, reason }) => createElement("p", { class: "error" }, `Version ${version} is not served: ${reason}`);

function failedCard(model) {
  return createElement("article", { class: "card", "aria-label": model.id },
    ...heading(model.id, model.state === "unloaded" ? "unloaded" : "not served"), ...model.failed.map(failure));
}
