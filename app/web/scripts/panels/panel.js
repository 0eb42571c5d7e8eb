// The common part of the four panels: controls, requests, status line, error messages, code and download.

import { json, RequestError, send } from "../api.js";
import { curl, python } from "../commands.js";
import { byId, createElement, formatDuration } from "../dom.js";
import { knowledge, quality } from "../headline.js";

const DEBOUNCE = 140; // milliseconds between the last change of a control and the request

export class Panel {
  /**
   * `request()` builds a request from the controls, or returns null. `show(answer, request)` shows the answer and may
   * return text for the status line. `clear()` removes the answer when an error is shown. `save()` returns the answer as
   * { name, content }, a file to download. `onEnd()` is called when no request is running any more. With `live`, each
   * change of a control sends a new request.
   */
  constructor(id, task, { request, show, clear, save, live = true, receive = json, onEnd = () => {} }) {
    this.root = byId(id);
    this.task = task;
    Object.assign(this, { request, show, clear, receive, onEnd });
    this.form = this.root.querySelector("form");
    this.answer = this.root.querySelector(".answer");
    this.answer.after(byId("line").content.cloneNode(true));
    this.form.after(byId("code").content.cloneNode(true));
    this.status = this.root.querySelector(".status");
    this.download = this.root.querySelector(".line button");
    this.download.addEventListener("click", () => this.saveFile(save));
    this.code = [...this.root.querySelectorAll(".code code")];
    for (const button of this.root.querySelectorAll(".code button")) button.addEventListener("click", () => copy(button));
    for (const slider of this.root.querySelectorAll('input[type="range"]')) showSliderValue(slider);
    for (const dice of this.root.querySelectorAll("[data-dice]")) dice.addEventListener("click", () => this.newSeed(dice));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.announce();
      this.run();
    });
    this.root.addEventListener("input", () => this.announce());
    this.form.elements.model.addEventListener("change", () => this.run());
    if (live) {
      this.root.addEventListener("input", (event) => this.onChange(event, DEBOUNCE));
      this.root.addEventListener("change", (event) => this.onChange(event, 0));
    }
  }

  /** Announce answers to screen readers from now on. The first answers, sent on page load, are not announced. */
  announce() {
    this.status.setAttribute("aria-live", "polite");
  }

  onChange(event, wait) {
    const control = event.target;
    if (control.form !== this.form || !control.name || control.type === "file" || control.name === "model") return;
    if (event.type === "input" && !["range", "textarea", "number", "text"].includes(control.type)) return; // a change event follows
    if (event.type === "change" && control.type !== "select-one" && !["checkbox", "radio"].includes(control.type)) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.run(), wait);
  }

  newSeed(dice) {
    byId(dice.dataset.dice).value = String(randomSeed());
    this.announce();
    this.run();
  }

  /** Offer the models of this panel's task, the default model first. Returns whether there is a model. */
  setModels(models) {
    const chooser = this.form.elements.model;
    const before = chooser.value;
    const fitting = models.filter((model) => model.task === this.task).sort((a, b) => b.default - a.default);
    chooser.replaceChildren(...fitting.flatMap((model) => [
      createElement("option", { value: model.id }, model.id),
      ...model.versions.filter((version) => model.canary || version !== model.version).reverse()
        .map((version) => createElement("option", { value: `${model.id}@${version}` }, `${model.id}, version ${version}`)),
    ]));
    if ([...chooser.options].some((option) => option.value === before)) chooser.value = before;
    this.models = new Map(fitting.map((model) => [model.id, model])); // and later the chosen versions
    return fitting.length > 0;
  }

  /** Return the error to show when no model serves this task. */
  noModelError() {
    return new RequestError("No served model performs this task. If a model failed to load or is unloaded, its card below says so.");
  }

  get model() {
    return this.form.elements.model.value;
  }

  /** Return the chosen model or version as /v1/models describes it, or undefined until it is loaded. */
  get modelInfo() {
    return this.models?.get(this.model);
  }

  /** Load the description of the chosen version, and show its headline. */
  async loadModelInfo(signal) {
    const { model } = this;
    if (model && !this.models.has(model)) this.models.set(model, await json(await send({ path: `v1/models/${model}` }, signal)));
    if (this.modelInfo) this.root.querySelector(".headline span").textContent = `${quality(this.modelInfo)} ${knowledge(this.modelInfo)}`;
  }

  /** Send the request that the controls describe. Aborts a request that is still running. */
  async run() {
    clearTimeout(this.timer);
    this.running?.abort();
    this.clearError();
    const running = (this.running = new AbortController());
    this.answer.setAttribute("aria-busy", "true");
    try {
      await this.loadModelInfo(running.signal);
      const request = running === this.running && this.request();
      if (!request) return;
      this.showCode(request);
      const startedAt = (this.startedAt = performance.now());
      const response = await send(request, running.signal);
      const answer = await this.receive(response, running.signal);
      const elapsed = performance.now() - startedAt;
      if (running !== this.running) return;
      const details = this.show(answer, request);
      if (this.modelInfo?.canary) this.pinVersion(request, `${answer.model}@${answer.version}`);
      this.showStatus(answer, `${formatDuration(elapsed)}${details ? ` · ${details}` : ""}`);
      this.download.disabled = false;
    } catch (error) {
      if (running === this.running && error.name !== "AbortError") this.showError(error);
    } finally {
      if (running === this.running) {
        this.answer.setAttribute("aria-busy", "false");
        this.onEnd();
      }
    }
  }

  /** Show the model that answered, and the given text. */
  showStatus({ model, version }, text) {
    this.status.replaceChildren(createElement("strong", {}, `${model}, version ${version}`), ` · ${text}`);
  }

  showCode(request) {
    [curl, python].forEach((write, i) => (this.code[i].textContent = write(request)));
  }

  /** Show the code with the seed that the service chose, so that it returns the same answer. */
  pinSeed(request, seed) {
    request.json.seed = seed;
    this.showCode(request);
  }

  /** Show the code with the version that answered, because a canary answers some of the requests without one. */
  pinVersion(request, model) {
    const part = request.json ? "json" : "query";
    this.showCode({ ...request, [part]: { ...request[part], model } });
  }

  /** Show an error message beside the control that caused it, or below the answer. */
  showError(error) {
    if (!(error instanceof RequestError)) {
      console.error(error);
      error = new RequestError("The page cannot show the answer. The browser console contains the error.");
    }
    this.clearError();
    this.clear();
    this.download.disabled = true;
    if (error.status === 401) byId("key").hidden = false; // the key was revoked meanwhile
    const control = error.param && this.control(error.param);
    const container = control?.closest("[data-param], .chooser") ?? this.root.querySelector('[data-param="form"]');
    const id = `${this.root.id}-error`;
    container.append(createElement("p", { class: "error", role: "alert", id }, error.message));
    if (control) {
      control.setAttribute("aria-invalid", "true");
      control.setAttribute("aria-describedby", id);
      if (control.closest("details")) control.closest("details").open = true;
    }
    this.status.replaceChildren();
  }

  /** Return the control for a parameter, such as "covariates.price.0", or the field with the options of a table, or null. */
  control(param) {
    const { elements } = this.form, [name] = param.split("."), field = elements[name] ?? elements.reading;
    const control = field instanceof RadioNodeList
      ? [...field].find(({ dataset }) => param.startsWith(`${name}.${dataset.column}.`)) ?? field[0] : field;
    return control?.closest("[hidden]") ? null : control;
  }

  clearError() {
    this.root.querySelector(`#${this.root.id}-error`)?.remove();
    for (const control of this.root.querySelectorAll("[aria-invalid]")) {
      control.removeAttribute("aria-invalid");
      control.removeAttribute("aria-describedby");
    }
  }

  /** Download the answer as a file. */
  async saveFile(save) {
    try {
      const { name, content } = await save();
      const url = URL.createObjectURL(content);
      createElement("a", { href: url, download: name }).click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser may ask first where to save it
    } catch (error) {
      this.showError(error);
    }
  }
}

async function copy(button) {
  const code = button.parentElement.querySelector("code");
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch { // not permitted, or not HTTPS: select the text instead
    getSelection().selectAllChildren(code);
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 1600);
}

/** Show the value of a slider beside it, now and on every change. Returns the function that does so. */
export function showSliderValue(slider) {
  const output = document.querySelector(`output[for="${slider.id}"]`);
  output?.setAttribute("aria-live", "off"); // the slider itself announces its value
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

/** Call `take(files)` for files dropped on an element. Dragged text is not affected. */
export function acceptDrops(element, take) {
  const over = (on) => element.classList.toggle("dropping", on);
  for (const name of ["dragenter", "dragover", "drop"]) {
    element.addEventListener(name, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      over(name !== "drop");
      if (name === "drop" && event.dataTransfer.files.length) take([...event.dataTransfer.files]);
    });
  }
  element.addEventListener("dragleave", () => over(false));
}

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 10 ** 6;

/** Return the value of a number field, or null if the field is empty. The service checks the range. */
export function fieldNumber(control) {
  if (control.value === "") return control.validity.badInput ? "not a number" : null;
  return Number(control.value);
}
