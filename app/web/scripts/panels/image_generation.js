// The digits: a sheet by seed and label, or a walk from one to another, step by step.

import { find, make } from "../dom.js";
import { follow, numeric, Panel } from "./panel.js";

const STEP = 90; // milliseconds that a step of the walk is seen

export function digitsPanel() {
  const sheet = find("digits-sheet"), walk = find("digits-walk"), frame = find("digits-frame");
  const step = find("digits-step"), play = find("digits-play"), label = find("digits-label");
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  let images = [], timer = null;

  const panel = new Panel("digits", "sample", {
    request() {
      fit();
      const { seed, walk_to: to, count } = panel.form.elements;
      const json = { model: panel.model, count: Number(count.value), seed: numeric(seed) ?? undefined };
      if (label.value) json.label = label.value;
      if (walks()) json.walk_to = numeric(to) ?? undefined;
      return { path: "v1/images/sample", json };
    },
    show({ seed, results }, request) {
      stop(); // a walk that may still run: it is of other images
      panel.pin(request, seed);
      images = results.map(({ image }) => `data:image/png;base64,${image}`);
      const named = (i) => `${results[i].label === null ? "Digit" : `A ${results[i].label}`}, image ${i + 1} of seed ${seed}`;
      sheet.replaceChildren(...images.map((src, i) => make("li", {}, make("img", { src, alt: named(i), width: 28, height: 28 }))));
      walk.hidden = !walks();
      if (walks()) start(seed, request.json.walk_to);
      return walks() ? `${results.length} steps from seed ${seed} to ${request.json.walk_to}` : `${results.length} images of seed ${seed}`;
    },
  });
  const walks = () => panel.form.elements.way.value === "walk";

  /** The controls that this way of drawing and this model have. */
  function fit() {
    panel.form.querySelector('[data-param="walk_to"]').hidden = !walks();
    const labels = panel.described?.labels ?? [];
    label.closest(".field").hidden = !labels.length;
    const there = [...label.options].slice(1).map((option) => option.value);
    if (there.join() !== labels.join() || !label.options.length) {
      label.replaceChildren(make("option", { value: "" }, walks() ? "that of the first" : "one of each"),
        ...labels.map((name) => make("option", { value: name }, name)));
    }
    label.options[0].textContent = walks() ? "that of the seed" : "one of each";
  }

  function start(seed, to) {
    step.max = String(images.length - 1);
    frame.alt = `A step of the walk from seed ${seed} to seed ${to}`;
    show(0);
    if (!still.matches) go();
  }

  function show(i) {
    step.value = String(i);
    told();
    frame.src = images[i];
    sheet.querySelector("[aria-current]")?.removeAttribute("aria-current");
    sheet.children[i]?.setAttribute("aria-current", "step");
  }

  function go() {
    play.textContent = "Pause";
    if (Number(step.value) >= images.length - 1) show(0);
    timer = setInterval(() => {
      const next = Number(step.value) + 1;
      if (next < images.length) show(next);
      if (next >= images.length - 1) stop();
    }, STEP);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  const told = follow(step);
  step.addEventListener("input", () => {
    stop();
    show(Number(step.value));
  });
  play.addEventListener("click", () => (timer ? stop() : go()));
  for (const way of panel.form.elements.way) way.addEventListener("change", fit);
  panel.begin = () => panel.run();
  return panel;
}
