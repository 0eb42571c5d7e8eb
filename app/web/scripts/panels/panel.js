// What the four panels share: their controls, who answers, how long it took, what went wrong and where, and the shell line.

import { curl, json, Refused, send } from "../api.js";
import { duration, find, make } from "../dom.js";

const WAIT = 140; // milliseconds between the last move of a control and the question

export class Panel {
  /**
   * `request()` makes the request of the controls, or null while there is nothing to ask; `show(answer, request)` shows
   * what came and may give a sentence to add; `ended()` is told when nothing is under way any more. With `live` each
   * change of a control asks anew.
   */
  constructor(id, task, { request, show, live = true, receive = json, ended = () => {} }) {
    this.root = find(id);
    this.task = task;
    Object.assign(this, { request, show, receive, ended });
    this.form = this.root.querySelector("form");
    this.answer = this.root.querySelector(".answer");
    const foot = this.root.querySelector("footer");
    foot.append(find("foot").content.cloneNode(true));
    this.told = foot.querySelector(".told");
    this.line = foot.querySelector("code");
    foot.querySelector("button").addEventListener("click", (event) => this.copy(event.currentTarget));
    for (const slider of this.root.querySelectorAll('input[type="range"]')) follow(slider);
    for (const dice of this.root.querySelectorAll("[data-dice]")) dice.addEventListener("click", () => this.roll(dice));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    this.root.addEventListener("input", () => this.speak());
    if (live) {
      this.root.addEventListener("input", (event) => this.changed(event, WAIT));
      this.root.addEventListener("change", (event) => this.changed(event, 0));
    }
  }

  /** From now on answers are announced: somebody is here. The first ones came by themselves. */
  speak() {
    this.told.setAttribute("aria-live", "polite");
  }

  changed(event, wait) {
    const control = event.target;
    if (control.form !== this.form || !control.name || control.type === "file") return;
    if (event.type === "input" && !["range", "textarea", "number"].includes(control.type)) return; // its change comes too
    if (event.type === "change" && control.type !== "select-one" && !["checkbox", "radio"].includes(control.type)) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.run(), wait);
  }

  roll(dice) {
    find(dice.dataset.dice).value = String(crypto.getRandomValues(new Uint32Array(1))[0] % 10 ** 6);
    this.speak();
    this.run();
  }

  /** The models of this panel's task, the one that answers by default first. */
  offer(models) {
    const chooser = this.form.elements.model;
    const before = chooser.value;
    const fitting = models.filter((model) => model.task === this.task).sort((a, b) => b.default - a.default);
    chooser.replaceChildren(...fitting.flatMap((model) => [
      make("option", { value: model.id }, model.id),
      ...model.versions.filter((version) => version !== model.version).reverse()
        .map((version) => make("option", { value: `${model.id}@${version}` }, `${model.id}, version ${version}`)),
    ]));
    if ([...chooser.options].some((option) => option.value === before)) chooser.value = before;
    this.models = fitting;
    return fitting.length > 0;
  }

  /** What to say when `offer` found none. */
  missing() {
    return new Refused("None of the models that are served does this; see below for what is wrong, if one should.");
  }

  get model() {
    return this.form.elements.model.value;
  }

  /** The chosen model as /v1/models describes it. */
  get described() {
    return this.models?.find((model) => model.id === this.model.split("@")[0]);
  }

  /** Ask; what was asked before and is not answered yet is given up. */
  async run() {
    clearTimeout(this.timer);
    this.running?.abort();
    this.clear();
    const request = this.request();
    if (!request) return;
    const running = (this.running = new AbortController());
    this.line.textContent = curl(request);
    this.answer.setAttribute("aria-busy", "true");
    const begun = (this.begun = performance.now());
    try {
      const response = await send(request, running.signal);
      const answer = await this.receive(response, running.signal);
      const took = performance.now() - begun;
      if (running !== this.running) return;
      const more = this.show(answer, request);
      this.name(answer, `${duration(took)}${more ? ` · ${more}` : ""}`);
    } catch (error) {
      if (running === this.running && error.name !== "AbortError") this.fail(error);
    } finally {
      if (running === this.running) {
        this.answer.setAttribute("aria-busy", "false");
        this.ended();
      }
    }
  }

  /** Who answered, and what else there is to tell. */
  name({ model, version }, rest) {
    this.told.replaceChildren(make("strong", {}, `${model}, version ${version}`), rest);
  }

  /** The request as it must be sent to get this answer again: with the seed that was drawn for it. */
  pin(request, seed) {
    this.line.textContent = curl({ ...request, json: { ...request.json, seed } });
  }

  /** A sentence beside the control that caused it. */
  fail(error) {
    if (!(error instanceof Refused)) {
      console.error(error);
      error = new Refused("The page could not show the answer; its console tells more.");
    }
    if (error.status === 401) find("key").hidden = false; // it was taken back in the meantime
    const control = error.param && this.control(error.param.split(".")[0]);
    const place = control?.closest("[data-param], .chooser") ?? this.root.querySelector('[data-param="form"]');
    const id = `${this.root.id}-error`;
    place.append(make("p", { class: "error", role: "alert", id }, error.message));
    if (control) {
      control.setAttribute("aria-invalid", "true");
      control.setAttribute("aria-describedby", id);
    }
    this.told.replaceChildren();
  }

  control(param) {
    const named = this.form.elements[param];
    const control = named instanceof RadioNodeList ? named[0] : named;
    return control?.closest("[hidden]") ? null : control;
  }

  clear() {
    this.root.querySelector(`#${this.root.id}-error`)?.remove();
    for (const control of this.root.querySelectorAll("[aria-invalid]")) {
      control.removeAttribute("aria-invalid");
      control.removeAttribute("aria-describedby");
    }
  }

  async copy(button) {
    try {
      await navigator.clipboard.writeText(this.line.textContent);
      button.textContent = "Copied";
    } catch { // not allowed, or not over https: then it is at least selected
      getSelection().selectAllChildren(this.line);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1600);
  }
}

/** A slider's value in words beside it, and its filled part. */
export function follow(slider) {
  const output = document.querySelector(`output[for="${slider.id}"]`);
  const show = () => {
    const { min, max, value, dataset } = slider;
    slider.style.setProperty("--fill", `${((value - (min || 0)) / ((max || 100) - (min || 0) || 1)) * 100}%`);
    const text = value === dataset.off ? "off" : `${Number(value).toLocaleString("en")}${dataset.unit ?? ""}`;
    if (output) output.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  };
  slider.addEventListener("input", show);
  show();
  return show;
}

/** Take a file that is dropped anywhere on an element; text that is dragged goes where it went before. */
export function accept(element, take) {
  const over = (on) => element.classList.toggle("dropping", on);
  for (const name of ["dragenter", "dragover", "drop"]) {
    element.addEventListener(name, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      over(name !== "drop");
      if (name === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
    });
  }
  element.addEventListener("dragleave", () => over(false));
}

/** A number field as it is sent: null when empty; whether it is one that is allowed, the service judges. */
export function numeric(control) {
  if (control.value === "") return control.validity.badInput ? "no number" : null;
  return Number(control.value);
}
