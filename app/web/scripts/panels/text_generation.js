// Text generation: show the text while it streams, and stop it on request.

import { events } from "../api.js";
import { byId, formatCount, formatDuration, formatNumber } from "../dom.js";
import { fieldNumber, Panel } from "./panel.js";

export function textGenerationPanel() {
  const prefix = byId("text-prefix"), generated = byId("text-generated"), stop = byId("text-stop");
  let request = null;

  const panel = new Panel("text", "continue", {
    live: false,
    request() {
      const { elements } = panel.form;
      const optional = (control) => (control.value === control.dataset.off ? undefined : Number(control.value));
      request = {
        path: "v1/text/continue",
        stream: true,
        json: {
          model: panel.model || undefined, // no model is chosen until the list of models has arrived
          prompt: elements.prompt.value,
          max_characters: Number(elements.max_characters.value),
          temperature: Number(elements.temperature.value),
          top_k: optional(elements.top_k),
          top_p: optional(elements.top_p),
          seed: fieldNumber(elements.seed) ?? undefined,
          stream: true,
        },
      };
      stop.disabled = false;
      return request;
    },
    receive,
    clear() {}, // the text up to an error stays visible
    save: () => ({ name: "text.txt", content: new Blob([prefix.textContent, generated.textContent], { type: "text/plain" }) }),
    onEnd() {
      // A disabled button loses the keyboard focus.
      if (document.activeElement === stop) panel.form.querySelector("[type=submit]").focus();
      stop.disabled = true;
    },
    show({ last, first, count, seconds }) {
      const parts = [`first character after ${formatDuration(first)}`, `${formatNumber(count / seconds, 3)} characters/s`];
      if (last.unknown_characters.length) parts.push(`unknown characters: ${JSON.stringify(last.unknown_characters.join(""))}`);
      return parts.join(" · ");
    },
  });

  /** Show the events of a stream until it ends or is stopped. */
  async function receive(response, signal) {
    const [model, version] = response.headers.get("x-model").split("@");
    const start = performance.now();
    let first = null, count = 0, last = null;
    prefix.textContent = request.json.prompt;
    generated.textContent = "";
    panel.status.replaceChildren("Generating …");
    try {
      for await (const event of events(response)) {
        first ??= performance.now() - panel.startedAt;
        count += [...event.text].length;
        generated.append(event.text);
        if (event.finish_reason) last = event;
      }
    } catch (error) {
      if (error.name === "AbortError" && signal === panel.running.signal) {
        panel.showStatus({ model, version }, `stopped after ${formatCount(count, "character")}`);
        panel.download.disabled = false;
      }
      throw error;
    }
    panel.pinSeed(request, last.seed);
    return { model, version, last, first, count, seconds: (performance.now() - start) / 1000 };
  }

  stop.addEventListener("click", () => {
    panel.announce();
    panel.status.replaceChildren("Stopped before the first character.");
    panel.running.abort(); // closes the connection, and the service stops generating
  });
  panel.form.elements.prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    panel.announce();
    panel.run();
  });
  panel.start = () => panel.run();
  return panel;
}
