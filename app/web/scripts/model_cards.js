// One card for each model, with its metrics, its versions and the pictures of its training.

import { json, send, showPicture } from "./api.js";
import { byId, createElement } from "./dom.js";

const TASKS = { classify: "image classification", continue: "text generation", forecast: "forecasting", sample: "image generation", infer: "tensor inference" };
const SHOWN = 4; // metrics shown without opening the table

/** Show one card for each model. The buttons on a card switch it to another version. */
export function showModelCards(models) {
  const order = Object.keys(TASKS);
  const sorted = [...models].sort((a, b) => order.indexOf(a.task) - order.indexOf(b.task) || b.default - a.default);
  byId("cards").replaceChildren(...sorted.map((model) => (model.state === "ready" ? card(model) : failedCard(model))));
}

function card(model) {
  const metrics = Object.entries(model.card.metrics);
  return createElement("article", { class: "card", "aria-label": model.id },
    createElement("header", {},
      createElement("h3", {}, model.id),
      createElement("div", { class: "marks" },
        createElement("span", { class: "task" }, TASKS[model.task] ?? model.task),
        model.default ? createElement("span", { class: "good" }, "default") : null,
        ...versions(model)),
      createElement("p", {}, model.title)),
    metrics.length ? createElement("dl", { class: "metrics" }, ...metrics.slice(0, SHOWN).map(metricItem)) : null,
    pictures(model),
    metrics.length > SHOWN ? details(`All ${metrics.length} metrics`, metricsTable(metrics)) : null,
    details(isImported(model.card) ? "Import" : "Training", origin(model)),
    ...model.failed.map(failure));
}

const readable = (name) => name.replaceAll("_", " ");

function metricItem([name, { value, decimals, split }]) {
  return createElement("div", {}, createElement("dt", {}, readable(name), createElement("small", {}, split)), createElement("dd", {}, value.toFixed(decimals)));
}

/** Return the served versions as buttons that switch the card. The active version answers requests without a version. */
function versions(model) {
  if (model.versions.length < 2) return [createElement("span", {}, `version ${model.version}`)];
  return model.versions.map((version) => createElement("button", {
    type: "button",
    "aria-pressed": String(version === model.version),
    on: { click: (event) => switchVersion(event.currentTarget.closest(".card"), `${model.id}@${version}`) },
  }, `version ${version}${role(model, version)}`));
}

function role({ active, canary }, version) {
  if (version === active) return ", active";
  return version === canary?.version ? `, canary, ${canary.share} %` : "";
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
  const other = card(model);
  element.replaceWith(other);
  other.querySelector('.marks button[aria-pressed="true"]').focus();
}

function pictures(model) {
  if (!model.pictures.length) return null;
  return createElement("div", { class: "pictures" }, ...model.pictures.map((file) => {
    const src = `v1/models/${model.id}@${model.version}/pictures/${file}`;
    const description = `${file.replace(".png", "")} of ${model.id}, version ${model.version}`;
    const image = createElement("img", { alt: "", loading: "lazy" });
    const button = createElement("button", { type: "button", "aria-label": `Show the ${description}`, on: { click: () => enlarge(image.src, description) } }, image);
    showPicture(image, src).catch(() => button.remove());
    return button;
  }));
}

function enlarge(src, description) {
  byId("large-title").textContent = description[0].toUpperCase() + description.slice(1);
  byId("large-picture").src = src;
  byId("large-picture").alt = description;
  byId("large").showModal();
}

function metricsTable(metrics) {
  return createElement("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "All metrics" }, createElement("table", {},
    createElement("thead", {}, createElement("tr", {}, createElement("th", { scope: "col" }, "metric"), createElement("th", { scope: "col", class: "number" }, "value"),
      createElement("th", { scope: "col" }, "measured on"))),
    createElement("tbody", {}, ...metrics.map(([name, { value, decimals, split }]) => createElement("tr", {},
      createElement("th", { scope: "row" }, readable(name)), createElement("td", { class: "number" }, value.toFixed(decimals)), createElement("td", {}, split))))));
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

function details(summary, content) {
  return createElement("details", {}, createElement("summary", {}, summary), content);
}

const failure = ({ version, reason }) => createElement("p", { class: "error" }, `Version ${version} is not served: ${reason}`);

function failedCard(model) {
  return createElement("article", { class: "card", "aria-label": model.id },
    createElement("header", {}, createElement("h3", {}, model.id), createElement("div", { class: "marks" }, createElement("span", {}, model.state === "unloaded" ? "unloaded" : "not served"))),
    ...model.failed.map(failure));
}
