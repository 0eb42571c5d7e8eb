// Image generation: show a grid of images for a seed and a label, or an interpolation between two seeds.

import { byId, createElement, formatCount } from "../dom.js";
import { fieldNumber, Panel, randomSeed, showSliderValue } from "./panel.js";

const STEP_MILLISECONDS = 90; // of the animated interpolation

export function imageGenerationPanel() {
  const sheet = byId("generation-sheet"), interpolation = byId("generation-interpolation"), frame = byId("generation-frame");
  const step = byId("generation-step"), play = byId("generation-play"), label = byId("generation-label");
  const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
  let images = [], timer = null;

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
      stop(); // the animation of an earlier answer
      panel.pinSeed(request, seed);
      images = results.map(({ image }) => `data:image/png;base64,${image}`);
      const altText = (i) => `${results[i].label === null ? "Image" : `Label ${results[i].label}`}, number ${i + 1} of seed ${seed}`;
      sheet.replaceChildren(...images.map((src, i) => createElement("li", {}, createElement("img", { src, alt: altText(i), width: 28, height: 28 }))));
      interpolation.hidden = !interpolates();
      if (interpolates()) showInterpolation(seed, request.json.end_seed);
      const shown = formatCount(results.length, interpolates() ? "step" : "image");
      return `${shown} from seed ${seed}${interpolates() ? ` to seed ${request.json.end_seed}` : ""}`;
    },
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
    if (!reducedMotion.matches) animate();
  }

  function showStep(i) {
    step.value = String(i);
    updateStep();
    frame.src = images[i];
    sheet.querySelector("[aria-current]")?.removeAttribute("aria-current");
    sheet.children[i]?.setAttribute("aria-current", "step");
  }

  function animate() {
    play.textContent = "Pause";
    if (Number(step.value) >= images.length - 1) showStep(0);
    timer = setInterval(() => {
      const next = Number(step.value) + 1;
      if (next < images.length) showStep(next);
      if (next >= images.length - 1) stop();
    }, STEP_MILLISECONDS);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  const updateStep = showSliderValue(step);
  step.addEventListener("input", () => {
    stop();
    showStep(Number(step.value));
  });
  play.addEventListener("click", () => (timer ? stop() : animate()));
  for (const radio of panel.form.elements.mode) radio.addEventListener("change", updateControls);
  panel.start = () => panel.run();
  return panel;
}
