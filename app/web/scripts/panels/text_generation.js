// The text: written while it comes, and stopped when somebody says so.

import { events } from "../api.js";
import { duration, find, number } from "../dom.js";
import { numeric, Panel } from "./panel.js";

export function textPanel() {
  const begun = find("text-begun"), written = find("text-written"), stop = find("text-stop");
  let asked = null;

  const panel = new Panel("text", "continue", {
    live: false,
    request() {
      const { elements } = panel.form;
      const off = (control) => (control.value === control.dataset.off ? undefined : Number(control.value));
      asked = {
        path: "v1/text/continue",
        stream: true,
        json: {
          model: panel.model,
          prompt: elements.prompt.value,
          max_characters: Number(elements.max_characters.value),
          temperature: Number(elements.temperature.value),
          top_k: off(elements.top_k),
          top_p: off(elements.top_p),
          seed: numeric(elements.seed) ?? undefined,
          stream: true,
        },
      };
      stop.disabled = false;
      return asked;
    },
    receive,
    ended: () => (stop.disabled = true),
    show({ ended, first, count, seconds }) {
      const parts = [`first character after ${duration(first)}`, `${number(count / seconds, 3)} characters/s`];
      if (ended.unknown_characters.length) parts.push(`read as unknown: ${ended.unknown_characters.join(" ")}`);
      return parts.join(" · ");
    },
  });

  /** Follow the stream to its end, or to where it is stopped. */
  async function receive(response, signal) {
    const [model, version] = response.headers.get("x-model").split("@");
    const start = performance.now();
    let first = null, count = 0, ended = null;
    begun.textContent = asked.json.prompt;
    written.textContent = "";
    panel.told.replaceChildren("Writing …");
    try {
      for await (const event of events(response)) {
        first ??= performance.now() - panel.begun;
        count += [...event.text].length;
        const atEnd = panel.answer.scrollTop + panel.answer.clientHeight > panel.answer.scrollHeight - 40;
        written.append(event.text);
        if (atEnd) panel.answer.scrollTop = panel.answer.scrollHeight;
        if (event.finish_reason) ended = event;
      }
    } catch (error) {
      if (error.name === "AbortError" && signal === panel.running.signal) {
        panel.name({ model, version }, `stopped after ${number(count)} characters`);
      }
      throw error;
    }
    panel.pin(asked, ended.seed);
    return { model, version, ended, first, count, seconds: (performance.now() - start) / 1000 };
  }

  stop.addEventListener("click", () => {
    panel.speak();
    panel.told.replaceChildren("Stopped before the first character.");
    panel.running.abort(); // hangs up: the service gives the text's place to another
  });
  panel.form.elements.prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) panel.run();
  });
  panel.begin = () => panel.run();
  return panel;
}
