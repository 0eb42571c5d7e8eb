// Image generation: show a grid of images for a seed and a label, or an interpolation between two seeds.

import { blob, send } from "../api.js";
import { byId, createElement, enlarge, formatCount } from "../dom.js";
import { fieldNumber, Panel, randomSeed, showSliderValue } from "./panel.js";

export function imageGenerationPanel() {
  const sheet = byId("generation-sheet"), interpolation = byId("generation-interpolation"), frame = byId("generation-frame");
  const step = byId("generation-step"), label = byId("generation-label");
  let images = [], answered = null; // the request of the images

  const panel = new Panel("generation", "sample", {
    request() {
      updateControls();
      const { seed, end_seed: to, count } = panel.form.elements;
      const json = { model: panel.model || undefined, count: Number(count.value), seed: fieldNumber(seed) ?? undefined };
      if (label.value) json.label = label.value;
      if (interpolates()) json.end_seed = fieldNumber(to) ?? randomSeed();
      return { path: "v1/images/sample", json };
    },
    show({ seed, results }, request) {
      panel.pinSeed(request, seed);
      answered = request;
      images = results.map(({ image }) => `data:image/png;base64,${image}`);
      const altText = (i) => `${results[i].label === null ? "Image" : `Label ${results[i].label}`}, number ${i + 1} of seed ${seed}`;
      sheet.replaceChildren(...images.map((src, i) => createElement("li", {},
        createElement("img", { src, alt: altText(i), width: 28, height: 28, on: { click: () => enlarge(src, altText(i)) } }))));
      interpolation.hidden = !interpolates();
      if (interpolates()) showInterpolation(seed, request.json.end_seed);
      const shown = formatCount(results.length, interpolates() ? "step" : "image");
      return `${shown} from seed ${seed}${interpolates() ? ` to seed ${request.json.end_seed}` : ""}`;
    },
    clear() {
      sheet.replaceChildren();
      interpolation.hidden = true;
    },
    save: async () => ({ name: "images.png", content: await blob(await send({ ...answered, accept: "image/png" })) }),
  });
  const interpolates = () => panel.form.elements.mode.value === "interpolation";

  /** Show the controls for this mode and this model. */
  function updateControls() {
    panel.form.querySelector('[data-param="end_seed"]').hidden = !interpolates();
    const labels = panel.modelInfo?.labels ?? [];
    label.closest(".field").hidden = !labels.length;
    const current = [...label.options].slice(1).map((option) => option.value);
    if (current.join() !== labels.join() || !label.options.length) {
      label.replaceChildren(createElement("option", { value: "" }, ""),
        ...labels.map((name) => createElement("option", { value: name }, name)));
    }
    label.options[0].textContent = interpolates() ? "chosen by the seed" : "all labels";
  }

  function showInterpolation(seed, to) {
    step.max = String(images.length - 1);
    frame.alt = `Step of the interpolation from seed ${seed} to seed ${to}`;
    showStep(0);
  }

  function showStep(i) {
    step.value = String(i);
    updateStep();
    frame.src = images[i];
    sheet.querySelector("[aria-current]")?.removeAttribute("aria-current");
    sheet.children[i]?.setAttribute("aria-current", "step");
  }

  const updateStep = showSliderValue(step);
  step.addEventListener("input", () => showStep(Number(step.value)));
  frame.addEventListener("click", () => enlarge(frame.src, frame.alt));
  for (const radio of panel.form.elements.mode) radio.addEventListener("change", updateControls);
  panel.start = () => panel.run();
  return panel;
}
