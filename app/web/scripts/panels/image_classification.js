// Image classification: choose, drop or paste an image. Show its labels as bars, and a heat map over the image.

import { blob, send } from "../api.js";
import { byId, createElement, formatPercent } from "../dom.js";
import { isImported } from "../model_cards.js";
import { acceptDrops, Panel, showSliderValue } from "./panel.js";

const SAMPLES = ["bird", "horse", "frog", "ship", "cat", "truck", "three", "seven"];
const SAMPLE_LABELS = { three: "3", seven: "7" }; // where the label differs from the file name
const samplePath = (name) => `web/samples/${name}.png`;
const MAX_COARSE = 96; // pixels; smaller images are scaled without smoothing

export function imageClassificationPanel() {
  const picture = byId("image-picture"), heat = byId("image-heat"), bars = byId("image-bars");
  const blend = byId("image-blend"), opacity = byId("image-opacity"), chooser = byId("image-file");
  let file = null, sample = null; // path of the sample, or null for an image of the user
  let choices = 0;

  const panel = new Panel("image", "classify", {
    request() {
      updateSamples();
      if (!file) return null;
      const { top_k: top, explain } = panel.form.elements;
      // Imported networks have no heat maps. The page knows the card of the active version only.
      explain.disabled = !panel.model.includes("@") && Boolean(panel.modelInfo) && isImported(panel.modelInfo.card);
      const query = { model: panel.model, top_k: top.value, explain: explain.checked && !explain.disabled ? true : null };
      return { path: "v1/images/classify", query, file, sample };
    },
    show({ results: [result] }) {
      bars.replaceChildren(...result.predictions.map(bar));
      URL.revokeObjectURL(heat.src);
      heat.hidden = blend.hidden = !result.explanation;
      if (result.explanation) heat.src = URL.createObjectURL(pngBlob(result.explanation));
      heat.alt = result.explanation ? `The same image with a heat map for ${result.predictions[0].label}` : "";
      const [best] = result.predictions;
      return `${best.label}, ${formatPercent(best.probability)}`;
    },
  });

  /** Classify an image file. `path` is its path on this service if it is a sample. */
  async function classify(chosen, path = null) {
    choices += 1;
    [file, sample] = [chosen, path];
    URL.revokeObjectURL(picture.src);
    picture.src = URL.createObjectURL(file);
    picture.alt = `Image ${file.name}`;
    picture.hidden = false;
    heat.hidden = blend.hidden = true;
    bars.replaceChildren();
    for (const button of byId("image-examples").children) {
      button.setAttribute("aria-pressed", String(path === samplePath(button.dataset.example)));
    }
    await panel.run();
  }

  async function classifySample(name) {
    const path = samplePath(name), choice = (choices += 1);
    try {
      const content = await blob(await send({ path }));
      if (choice === choices) await classify(new File([content], `${name}.png`, { type: "image/png" }), path);
    } catch (error) { // the service does not answer
      if (choice === choices) panel.showError(error);
    }
  }

  /** Classify an image that the user chose. */
  function choose(image) {
    panel.announce();
    return classify(image);
  }

  function chooseSample(name) {
    panel.announce();
    return classifySample(name);
  }

  /** Show only samples for which the chosen model has a label. */
  function updateSamples() {
    const labels = panel.modelInfo?.labels ?? [];
    for (const button of byId("image-examples").children) {
      button.hidden = !labels.includes(SAMPLE_LABELS[button.dataset.example] ?? button.dataset.example);
    }
    panel.root.querySelector(".examples").hidden = ![...byId("image-examples").children].some((button) => !button.hidden);
  }

  picture.addEventListener("load", () => {
    for (const image of [picture, heat]) image.classList.toggle("coarse", picture.naturalWidth <= MAX_COARSE);
  });
  picture.addEventListener("error", () => (picture.hidden = true)); // the service reports the error
  heat.addEventListener("error", () => (heat.hidden = blend.hidden = true)); // the image remains visible
  opacity.dataset.unit = " %";
  showSliderValue(opacity);
  opacity.addEventListener("input", () => heat.style.setProperty("opacity", String(opacity.value / 100)));
  byId("image-examples").append(...SAMPLES.map((name) =>
    createElement("button", { type: "button", "data-example": name, "aria-pressed": "false", on: { click: () => chooseSample(name) } },
      createElement("img", { src: `web/samples/${name}.png`, alt: `Example: ${name}`, width: 44, height: 44 }))));
  chooser.addEventListener("change", () => {
    const [chosen] = chooser.files;
    chooser.value = ""; // so that the same file can be chosen again
    if (chosen) choose(chosen);
  });
  document.addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
    // Spreadsheets copy cells as text and as a picture. A text field takes the text.
    const isText = event.clipboardData.types.includes("text/plain") && event.target.closest("input, textarea");
    if (pasted && !isText) choose(pasted).then(() => panel.root.scrollIntoView({ block: "nearest" }));
  });
  acceptDrops(panel.root, choose);

  panel.start = () => (file ? panel.run() : classifySample(panel.modelInfo?.labels?.includes("3") ? "three" : "bird"));
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
