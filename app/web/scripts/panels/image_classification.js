// The picture: chosen, dropped, pasted or an example; its labels as bars, and the heat map over it.

import { blob, send } from "../api.js";
import { find, make, percent } from "../dom.js";
import { accept, follow, Panel } from "./panel.js";

const EXAMPLES = ["bird", "horse", "frog", "ship", "cat", "truck", "three", "seven"];
const DIGITS = { three: "3", seven: "7" };
const COARSE = 96; // pixels; smaller pictures show their pixels

export function imagePanel() {
  const picture = find("image-picture"), heat = find("image-heat"), bars = find("image-bars");
  const mix = find("image-mix"), opacity = find("image-opacity"), chooser = find("image-file");
  let file = null;

  const panel = new Panel("image", "classify", {
    request() {
      fit();
      if (!file) return null;
      const { top_k: top, explain } = panel.form.elements;
      return { path: "v1/images/classify", query: { model: panel.model, top_k: top.value, explain: explain.checked ? true : null }, file };
    },
    show({ results: [result] }) {
      bars.replaceChildren(...result.predictions.map(bar));
      heat.hidden = mix.hidden = !result.explanation;
      if (result.explanation) heat.src = `data:image/png;base64,${result.explanation}`;
      heat.alt = result.explanation ? `The same, with what speaks for ${result.predictions[0].label} glowing` : "";
      const [best] = result.predictions;
      return `${best.label}, ${percent(best.probability)}`;
    },
  });

  /** Take a picture and ask what is in it. */
  async function take(chosen, speak = true) {
    if (speak) panel.speak();
    file = chosen;
    URL.revokeObjectURL(picture.src);
    picture.src = URL.createObjectURL(file);
    picture.alt = `The picture ${file.name}`;
    picture.hidden = false;
    heat.hidden = mix.hidden = true;
    bars.replaceChildren();
    for (const button of find("image-examples").children) {
      button.setAttribute("aria-pressed", String(`${button.dataset.example}.png` === file.name));
    }
    await panel.run();
  }

  async function example(name, speak) {
    let content;
    try {
      content = await blob(await send({ path: `web/samples/${name}.png` }));
    } catch (error) { // the service is away
      panel.clear();
      panel.fail(error);
      return;
    }
    await take(new File([content], `${name}.png`, { type: "image/png" }), speak);
  }

  /** Only examples that the chosen model has a label for; another kind of picture is not its fault. */
  function fit() {
    const labels = panel.described?.labels ?? [];
    for (const button of find("image-examples").children) {
      button.hidden = !labels.includes(DIGITS[button.dataset.example] ?? button.dataset.example);
    }
    panel.root.querySelector(".examples").hidden = ![...find("image-examples").children].some((button) => !button.hidden);
  }

  picture.addEventListener("load", () => {
    for (const image of [picture, heat]) image.classList.toggle("coarse", picture.naturalWidth <= COARSE);
  });
  picture.addEventListener("error", () => (picture.hidden = true)); // the service says what is wrong with it
  opacity.dataset.unit = " %";
  follow(opacity);
  opacity.addEventListener("input", () => heat.style.setProperty("opacity", String(opacity.value / 100)));
  find("image-examples").append(...EXAMPLES.map((name) =>
    make("button", { type: "button", "data-example": name, "aria-pressed": "false", on: { click: () => example(name) } },
      make("img", { src: `web/samples/${name}.png`, alt: `Example: ${name}`, width: 44, height: 44 }))));
  chooser.addEventListener("change", () => chooser.files[0] && take(chooser.files[0]));
  document.addEventListener("paste", (event) => {
    const pasted = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (pasted) take(pasted).then(() => panel.root.scrollIntoView({ block: "nearest" }));
  });
  accept(panel.root, take);

  panel.begin = () => example(panel.described?.labels?.includes("3") ? "three" : "bird", false);
  return panel;
}

function bar({ label, probability }) {
  const filled = make("i");
  filled.style.setProperty("--part", `${probability * 100}%`);
  return make("li", {}, make("span", {}, label), make("span", {}, percent(probability)),
    make("span", { class: "bar", "aria-hidden": "true" }, filled));
}
