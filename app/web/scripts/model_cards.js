// The models: a card for each, with its figures, its versions and the pictures of its training.

import { json, send, show } from "./api.js";
import { find, make } from "./dom.js";

const TASKS = { classify: "images", continue: "text", forecast: "series", sample: "digits" };
const SHOWN = 4; // figures before the others are asked for

/** A card for each model; a version's button asks for that one's own. */
export function showModels(models) {
  const order = Object.keys(TASKS);
  const sorted = [...models].sort((a, b) => order.indexOf(a.task) - order.indexOf(b.task) || b.default - a.default);
  find("cards").replaceChildren(...sorted.map((model) => (model.state === "ready" ? card(model) : brokenCard(model))));
}

function card(model) {
  const figures = Object.entries(model.card.metrics);
  return make("article", { class: "card", "aria-label": model.id },
    make("header", {},
      make("h3", {}, model.id),
      make("div", { class: "marks" },
        make("span", { class: "task" }, TASKS[model.task] ?? model.task),
        model.default ? make("span", { class: "good" }, "answers by default") : null,
        ...versions(model)),
      make("p", {}, model.title)),
    figures.length ? make("dl", { class: "figures" }, ...figures.slice(0, SHOWN).map(figure)) : null,
    pictures(model),
    figures.length > SHOWN ? details(`All ${figures.length} figures`, table(figures)) : null,
    details("How it came about", history(model)),
    ...model.broken.map(broken));
}

const words = (name) => name.replaceAll("_", " ");

function figure([name, { value, decimals, split }]) {
  return make("div", {}, make("dt", {}, words(name), make("small", {}, split)), make("dd", {}, value.toFixed(decimals)));
}

/** The versions that are served: the active one answers for the plain name, another is shown when it is chosen. */
function versions(model) {
  if (model.versions.length < 2) return [make("span", {}, `version ${model.version} is live`)];
  return model.versions.map((version) => make("button", {
    type: "button",
    "aria-pressed": String(version === model.version),
    on: { click: (event) => swap(event.currentTarget.closest(".card"), `${model.id}@${version}`) },
  }, `version ${version}${role(model, version)}`));
}

function role({ active, canary }, version) {
  if (version === active) return ", live";
  return version === canary?.version ? `, tried on ${canary.share} %` : "";
}

async function swap(element, id) {
  let model;
  try {
    model = await json(await send({ path: `v1/models/${id}` }));
  } catch (error) { // removed in the meantime, or the service is away
    element.querySelector(".error")?.remove();
    element.append(make("p", { class: "error", role: "alert" }, error.message));
    return;
  }
  const other = card(model);
  element.replaceWith(other);
  other.querySelector('.marks button[aria-pressed="true"]').focus();
}

function pictures(model) {
  if (!model.pictures.length) return null;
  return make("div", { class: "pictures" }, ...model.pictures.map((file) => {
    const src = `v1/models/${model.id}@${model.version}/pictures/${file}`;
    const what = `${file.replace(".png", "")} of ${model.id}, version ${model.version}`;
    const image = make("img", { alt: "", loading: "lazy" });
    show(image, src).catch(() => image.remove());
    return make("button", { type: "button", "aria-label": `Show the ${what}`, on: { click: () => enlarge(image.src, what) } }, image);
  }));
}

function enlarge(src, what) {
  find("large-title").textContent = what[0].toUpperCase() + what.slice(1);
  find("large-picture").src = src;
  find("large-picture").alt = what;
  find("large").showModal();
}

function table(figures) {
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "All figures" }, make("table", {},
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "figure"), make("th", { scope: "col", class: "number" }, "value"),
      make("th", { scope: "col" }, "measured on"))),
    make("tbody", {}, ...figures.map(([name, { value, decimals, split }]) => make("tr", {},
      make("th", { scope: "row" }, words(name)), make("td", { class: "number" }, value.toFixed(decimals)), make("td", {}, split))))));
}

const UNITS = { classify: "image", continue: "character", forecast: "forecast", sample: "image" };

function fast({ task, speed }) {
  if (!speed) return "";
  const each = speed.per_second.toLocaleString("en", { maximumFractionDigits: 0 });
  return `${speed.milliseconds} ms for one ${UNITS[task]} alone, ${each} a second in batches of ${speed.rows}; one thread, ${speed.hardware}`;
}

function history({ card }) {
  const { created, minutes, hardware, seed, command, commit, notes, kind } = card;
  const facts = {
    speed: fast(card),
    trained: `${created.slice(0, 10)}, ${Math.round(minutes)} minutes, ${hardware}`,
    network: kind,
    command,
    seed: String(seed),
    commit: commit.slice(0, 12),
    notes,
  };
  return make("dl", {}, ...Object.entries(facts).filter(([, fact]) => fact)
    .flatMap(([name, fact]) => [make("dt", {}, name), make("dd", {}, fact)]));
}

function details(summary, content) {
  return make("details", {}, make("summary", {}, summary), content);
}

const broken = ({ version, reason }) => make("p", { class: "error" }, `Version ${version} is not served: ${reason}`);

function brokenCard(model) {
  return make("article", { class: "card", "aria-label": model.id },
    make("header", {}, make("h3", {}, model.id), make("div", { class: "marks" }, make("span", {}, model.state === "unloaded" ? "unloaded" : "not served"))),
    ...model.broken.map(broken));
}
