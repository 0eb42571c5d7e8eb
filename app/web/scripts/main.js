// The page: which models there are, a panel for each task, and a first answer in each.

import { json, send, useKey } from "./api.js";
import { digitsPanel } from "./panels/image_generation.js";
import { find } from "./dom.js";
import { imagePanel } from "./panels/image_classification.js";
import { showModels } from "./model_cards.js";
import { seriesPanel } from "./panels/forecasting.js";
import { textPanel } from "./panels/text_generation.js";

const panels = [imagePanel(), textPanel(), seriesPanel(), digitsPanel()];

async function begin() {
  const { data } = await json(await send({ path: "v1/models" }));
  showModels(data);
  const served = data.filter((model) => model.state === "ready");
  const offered = panels.filter((panel) => panel.offer(served));
  for (const panel of panels) {
    if (!offered.includes(panel)) panel.fail(panel.missing());
  }
  await Promise.all(offered.map((panel) => panel.begin()));
}

/** Which section is in view, for the bar at the top. */
function mark() {
  const links = [...document.querySelectorAll('nav a[href^="#"]')];
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const link = links.find((each) => each.hash === `#${target.id}`);
      if (isIntersecting) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-45% 0px -54% 0px" });
  for (const link of links) watcher.observe(find(link.hash.slice(1)));
}

/** Begin, with another key if there is one, or say why not: most often because the service asks for a key first. */
async function attempt(key = null) {
  const trouble = find("trouble");
  trouble.hidden = find("key").hidden = true;
  try {
    if (key !== null) useKey(key);
    await begin();
  } catch (error) {
    trouble.textContent = error.message;
    trouble.hidden = false;
    find("key").hidden = error.status !== 401;
  }
}

find("key").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(find("key-value").value.trim());
});
for (const name of ["dragover", "drop"]) { // beside a panel a file is not opened in place of the page
  document.addEventListener(name, (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
}
mark();
attempt();
