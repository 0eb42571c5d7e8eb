// The page: which models there are, a panel for each task, and a first answer in each.

import { send } from "./api.js";
import { digitsPanel } from "./digits.js";
import { find } from "./dom.js";
import { imagePanel } from "./images.js";
import { showModels } from "./models.js";
import { seriesPanel } from "./series.js";
import { textPanel } from "./text.js";

const panels = [imagePanel(), textPanel(), seriesPanel(), digitsPanel()];

async function begin() {
  const { data } = await (await send({ path: "v1/models" })).json();
  showModels(data);
  const served = data.filter((model) => model.state === "ready");
  const offered = panels.filter((panel) => panel.offer(served));
  for (const panel of panels) {
    if (!offered.includes(panel)) panel.fail(panel.missing());
  }
  for (const panel of offered) await panel.begin();
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

mark();
try {
  await begin();
} catch (error) {
  find("trouble").textContent = error.message;
  find("trouble").hidden = false;
}
