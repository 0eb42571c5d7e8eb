// The common part of the four panels: controls, requests, status line, error messages and curl command.

import { curl, json, RequestError, send } from "../api.js";
import { byId, createElement, formatDuration } from "../dom.js";

const DEBOUNCE = 140; // milliseconds between the last change of a control and the request

export class Panel {
  /**
   * `request()` builds a request from the controls, or returns null. `show(answer, request)` shows the answer and may
   * return text for the status line. `onEnd()` is called when no request is running any more. With `live`, each change
   * of a control sends a new request.
   */
  constructor(id, task, { request, show, live = true, receive = json, onEnd = () => {} }) {
    this.root = byId(id);
    this.task = task;
    Object.assign(this, { request, show, receive, onEnd });
    this.form = this.root.querySelector("form");
    this.answer = this.root.querySelector(".answer");
    const foot = this.root.querySelector("footer");
    foot.append(byId("foot").content.cloneNode(true));
    this.status = foot.querySelector(".status");
    this.curlLine = foot.querySelector("code");
    foot.querySelector("button").addEventListener("click", (event) => this.copy(event.currentTarget));
    for (const slider of this.root.querySelectorAll('input[type="range"]')) showSliderValue(slider);
    for (const dice of this.root.querySelectorAll("[data-dice]")) dice.addEventListener("click", () => this.newSeed(dice));
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.announce();
      this.run();
    });
    this.root.addEventListener("input", () => this.announce());
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
    if (control.form !== this.form || !control.name || control.type === "file") return;
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
    this.models = fitting;
    return fitting.length > 0;
  }

  /** Return the error to show when no model serves this task. */
  noModelError() {
    return new RequestError("No served model performs this task. If a model failed to load or is unloaded, its card below says so.");
  }

  get model() {
    return this.form.elements.model.value;
  }

  /** Return the chosen model as /v1/models describes it. */
  get modelInfo() {
    return this.models?.find((model) => model.id === this.model.split("@")[0]);
  }

  /** Send the request that the controls describe. Aborts a request that is still running. */
  async run() {
    clearTimeout(this.timer);
    this.running?.abort();
    this.clearError();
    const request = this.request();
    if (!request) return;
    const running = (this.running = new AbortController());
    this.curlLine.textContent = curl(request);
    this.answer.setAttribute("aria-busy", "true");
    const startedAt = (this.startedAt = performance.now());
    try {
      const response = await send(request, running.signal);
      const answer = await this.receive(response, running.signal);
      const elapsed = performance.now() - startedAt;
      if (running !== this.running) return;
      const details = this.show(answer, request);
      if (this.modelInfo?.canary) this.pinVersion(request, `${answer.model}@${answer.version}`);
      this.showStatus(answer, `${formatDuration(elapsed)}${details ? ` · ${details}` : ""}`);
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
    this.status.replaceChildren(createElement("strong", {}, `${model}, version ${version}`), text);
  }

  /** Show the curl command with the seed that the service chose, so that it returns the same answer. */
  pinSeed(request, seed) {
    request.json.seed = seed;
    this.curlLine.textContent = curl(request);
  }

  /** Show the curl command with the version that answered, because a canary answers some of the requests without one. */
  pinVersion(request, model) {
    const part = request.json ? "json" : "query";
    this.curlLine.textContent = curl({ ...request, [part]: { ...request[part], model } });
  }

  /** Show an error message beside the control that caused it. */
  showError(error) {
    if (!(error instanceof RequestError)) {
      console.error(error);
      error = new RequestError("The page cannot show the answer. The browser console contains the error.");
    }
    this.clearError();
    if (error.status === 401) byId("key").hidden = false; // the key was revoked meanwhile
    const control = error.param && this.control(error.param);
    const container = control?.closest("[data-param], .chooser") ?? this.root.querySelector('[data-param="form"]');
    const id = `${this.root.id}-error`;
    container.append(createElement("p", { class: "error", role: "alert", id }, error.message));
    if (control) {
      control.setAttribute("aria-invalid", "true");
      control.setAttribute("aria-describedby", id);
    }
    this.status.replaceChildren();
  }

  /** Return the control for a parameter, such as "covariates.price.0", or null. */
  control(param) {
    const [name] = param.split("."), field = this.form.elements[name];
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

  async copy(button) {
    try {
      await navigator.clipboard.writeText(this.curlLine.textContent);
      button.textContent = "Copied";
    } catch { // not permitted, or not HTTPS: select the text instead
      getSelection().selectAllChildren(this.curlLine);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1600);
  }
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

/** Call `take(file)` for a file dropped on an element. Dragged text is not affected. */
export function acceptDrops(element, take) {
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

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % 10 ** 6;

/** Return the value of a number field, or null if the field is empty. The service checks the range. */
export function fieldNumber(control) {
  if (control.value === "") return control.validity.badInput ? "not a number" : null;
  return Number(control.value);
}
