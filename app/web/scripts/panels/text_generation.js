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
    onEnd() {
      // A disabled button loses the keyboard focus.
      if (document.activeElement === stop) panel.form.querySelector("[type=submit]").focus();
      stop.disabled = true;
    },
    show({ last, first, count, seconds }) {
      const parts = [`first character after ${formatDuration(first)}`, `${formatNumber(count / seconds, 3)} characters/s`];
      if (last.unknown_characters.length) parts.push(`unknown characters: ${last.unknown_characters.map(visibleCharacter).join(" ")}`);
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
        const atEnd = panel.answer.scrollTop + panel.answer.clientHeight > panel.answer.scrollHeight - 40;
        generated.append(event.text);
        if (atEnd) panel.answer.scrollTop = panel.answer.scrollHeight;
        if (event.finish_reason) last = event;
      }
    } catch (error) {
      if (error.name === "AbortError" && signal === panel.running.signal) {
        panel.showStatus({ model, version }, `stopped after ${formatCount(count, "character")}`);
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

/** Return a character, or its code point if it is invisible by itself, such as U+0009 for a tab. */
function visibleCharacter(character) {
  const code = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  return /[\p{C}\p{M}\p{Z}]/u.test(character) ? `U+${code}` : character;
}
