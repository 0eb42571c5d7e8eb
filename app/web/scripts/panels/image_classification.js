// Image classification: choose, drop or paste images. Show the labels of one image as bars, and of several as a strip.

import { blob, send } from "../api.js";
import { byId, createElement, csvFile, enlarge, formatCount, formatPercent } from "../dom.js";
import { isImported } from "../model_cards.js";
import { acceptDrops, Panel } from "./panel.js";

const SAMPLES = ["horse", "ship", "frog", "truck", "cat", "three", "seven"];
const SAMPLE_LABELS = { three: "3", seven: "7" }; // where the label differs from the file name
const samplePath = (name) => `web/samples/${name}.png`;

export function imageClassificationPanel() {
  const picture = byId("image-picture"), heat = byId("image-heat"), bars = byId("image-bars"), strip = byId("image-strip");
  const chooser = byId("image-file"), samples = byId("image-examples");
  let files = [], urls = [], results = [];
  let sample = null; // path of the sample, or null for images of the user
  let choices = 0;

  const panel = new Panel("image", "classify", {
    request() {
      for (const button of samples.children) button.hidden = !fits(button.dataset.example);
      if (!files.length) return null;
      const { top_k: top, explain } = panel.form.elements;
      explain.disabled = Boolean(panel.modelInfo) && isImported(panel.modelInfo.card); // imported networks have no heat maps
      const query = { model: panel.model, top_k: top.value, explain: explain.checked && !explain.disabled ? true : null };
      return { path: "v1/images/classify", query, files, sample };
    },
    show(answer) {
      results = answer.results;
      showStrip();
      showImage(0);
      const [{ label, probability }] = results[0].predictions;
      return results.length > 1 ? formatCount(results.length, "image") : `${label}, ${formatPercent(probability)}`;
    },
    clear() {
      results = [];
      bars.replaceChildren();
      heat.hidden = true;
    },
    save: () => ({
      name: "labels.csv",
      content: csvFile([["file", "label", "probability"],
        ...results.flatMap(({ filename, predictions }) => predictions.map(({ label, probability }) => [filename, label, probability]))]),
    }),
  });

  /** Show one of the images, with its labels and its heat map if they are known. */
  function showImage(i) {
    const result = results[i];
    picture.src = urls[i];
    picture.alt = `Image ${files[i].name}`;
    picture.hidden = false;
    URL.revokeObjectURL(heat.src);
    heat.hidden = !result?.explanation;
    if (result?.explanation) heat.src = URL.createObjectURL(pngBlob(result.explanation));
    heat.alt = result?.explanation ? `The same image with a heat map for ${result.predictions[0].label}` : "";
    bars.replaceChildren(...(result?.predictions ?? []).map(bar));
    [...strip.querySelectorAll("button")].forEach((button, j) => button.setAttribute("aria-pressed", String(i === j)));
  }

  /** Show several images side by side, each with its label. A click shows all labels of an image. */
  function showStrip() {
    strip.replaceChildren(...(results.length < 2 ? [] : results).map(({ predictions: [best] }, i) => createElement("li", {},
      createElement("button", { type: "button", "aria-pressed": "false", on: { click: () => showImage(i) } },
        createElement("img", { src: urls[i], alt: `${files[i].name}:` }), `${best.label} ${formatPercent(best.probability)}`))));
  }

  /** Classify image files. `path` is the path on this service if the file is a sample. */
  async function classify(chosen, path = null) {
    choices += 1;
    urls.forEach(URL.revokeObjectURL);
    [files, sample, results] = [chosen, path, []];
    urls = files.map((file) => URL.createObjectURL(file));
    strip.replaceChildren();
    showImage(0);
    for (const button of samples.children) button.setAttribute("aria-pressed", String(path === samplePath(button.dataset.example)));
    await panel.run();
  }

  async function classifySample(name) {
    const path = samplePath(name), choice = (choices += 1);
    try {
      const content = await blob(await send({ path }));
      if (choice === choices) await classify([new File([content], `${name}.png`, { type: "image/png" })], path);
    } catch (error) { // the service does not answer
      if (choice === choices) panel.showError(error);
    }
  }

  /** Classify images that the user chose. */
  function choose(images) {
    panel.announce();
    return classify(images);
  }

  /** Return whether the chosen model has a label for a sample. */
  const fits = (name) => (panel.modelInfo?.labels ?? []).includes(SAMPLE_LABELS[name] ?? name);

  picture.addEventListener("error", () => (picture.hidden = true)); // the service reports the error
  heat.addEventListener("error", () => (heat.hidden = true)); // the image remains visible
  byId("image-large").addEventListener("click", () => {
    const shown = heat.hidden ? picture : heat;
    if (!shown.hidden) enlarge(shown.src, shown.alt);
  });
  samples.append(...SAMPLES.map((name) => createElement("button", {
    type: "button", "data-example": name, "aria-pressed": "false",
    on: { click: () => (panel.announce(), classifySample(name)) },
  }, createElement("img", { src: samplePath(name), alt: `Example: ${name}`, width: 44, height: 44 }))));
  chooser.addEventListener("change", () => {
    const chosen = [...chooser.files];
    chooser.value = ""; // so that the same files can be chosen again
    if (chosen.length) choose(chosen);
  });
  document.addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    // Spreadsheets copy cells as text and as a picture. A text field takes the text.
    const isText = event.clipboardData.types.includes("text/plain") && event.target.closest("input, textarea");
    if (pasted.length && !isText) choose(pasted).then(() => panel.root.scrollIntoView({ block: "nearest" }));
  });
  acceptDrops(panel.root, choose);

  panel.start = () => (files.length ? panel.run() : classifySample(SAMPLES.find(fits) ?? SAMPLES[0]));
  return panel;
}

/** Return a PNG file in base64 as a blob. Firefox limits data URLs to 32 MB; heat maps of photographs can be larger. */
function pngBlob(base64) {
  const binary = atob(base64), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i += 1) bytes[i] = binary.charCodeAt(i);
  return new Blob([bytes], { type: "image/png" });
}

function bar({ label, probability }) {
  const filled = createElement("i");
  filled.style.setProperty("--part", `${probability * 100}%`);
  return createElement("li", {}, createElement("span", {}, label), createElement("span", {}, formatPercent(probability)),
    createElement("span", { class: "bar", "aria-hidden": "true" }, filled));
}
