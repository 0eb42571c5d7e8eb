// Start the page: load the list of models, fill the panels and send a first request in each.

import { json, send, setKey } from "./api.js";
import { byId } from "./dom.js";
import { manageVersions } from "./manage_versions.js";
import { showModelCards } from "./model_cards.js";
import { forecastingPanel } from "./panels/forecasting.js";
import { imageClassificationPanel } from "./panels/image_classification.js";
import { imageGenerationPanel } from "./panels/image_generation.js";
import { textGenerationPanel } from "./panels/text_generation.js";

const panels = [imageClassificationPanel(), textGenerationPanel(), forecastingPanel(), imageGenerationPanel()];

async function loadModels() {
  const { data } = await json(await send({ path: "v1/models" }));
  showModelCards(data);
  return data;
}

async function start() {
  const data = await loadModels();
  const served = data.filter((model) => model.state === "ready");
  const available = panels.filter((panel) => panel.setModels(served));
  for (const panel of panels) {
    if (!available.includes(panel)) panel.showError(panel.noModelError());
  }
  await Promise.all(available.map((panel) => panel.start()));
}

/** Start the page with an API key, if given. On an error, show the message, and the key field if a key is missing. */
async function startWithKey(key = null) {
  const startError = byId("start-error");
  startError.hidden = byId("key").hidden = true;
  try {
    if (key !== null) setKey(key);
    await start();
  } catch (error) {
    startError.textContent = error.message;
    startError.hidden = false;
    byId("key").hidden = error.status !== 401;
    if (key !== null && error.status === 401) {
      byId("key-value").focus(); // the focus was lost when the form was hidden
      byId("key-value").select();
    }
  }
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  startWithKey(byId("key-value").value.trim());
});
for (const name of ["dragover", "drop"]) { // a file dropped beside a panel must not replace the page
  document.addEventListener(name, (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
}
manageVersions(() => setTimeout(loadModels, 2000)); // by default, the service reads the store every second
startWithKey();
