// Draw a series by hand with a mouse, a pen or a finger, from left to right.

import { createElement, createSvg } from "./dom.js";

const COUNT = 120; // values of a stroke over the full width

/** Lets the user draw over an element, and calls `done(values)` at the end of a stroke that is long enough. */
export class DrawingPad {
  constructor(element, done) {
    this.element = element;
    this.done = done;
    this.points = null;
    this.line = createSvg("path", { class: "stroke" });
    element.addEventListener("pointerdown", (event) => this.begin(event));
    element.addEventListener("pointermove", (event) => this.on && this.points && this.add(event));
    element.addEventListener("pointerup", () => this.end());
    element.addEventListener("pointercancel", () => (this.points = null));
  }

  /** Show or hide the empty pad. */
  toggle(on) {
    this.on = on;
    this.points = null;
    this.element.classList.toggle("drawing", on);
    if (!on) return;
    this.line.removeAttribute("d");
    this.element.replaceChildren(createSvg("svg", { "aria-hidden": "true" }, this.line),
      createElement("p", { class: "invite" }, "Draw a line here, from left to right"));
  }

  begin(event) {
    if (!this.on || event.button !== 0) return;
    event.preventDefault();
    this.element.setPointerCapture(event.pointerId);
    this.element.querySelector(".invite")?.remove();
    this.points = [];
    this.add(event);
  }

  /** Add a point. A stroke back to the left replaces the points it passes. */
  add(event) {
    const frame = this.element.getBoundingClientRect();
    const x = Math.min(Math.max(event.clientX - frame.left, 0), frame.width);
    const y = Math.min(Math.max(event.clientY - frame.top, 0), frame.height);
    this.points = [...this.points.filter((point) => point.x < x), { x, y: y }];
    this.line.setAttribute("d", `M${this.points.map((point) => `${point.x},${point.y}`).join("L")}`);
  }

  end() {
    const points = this.points;
    this.points = null;
    const { clientWidth: width, clientHeight: height } = this.element;
    const length = points?.length > 1 ? points.at(-1).x - points[0].x : 0;
    const count = Math.round((COUNT * length) / width);
    if (count < 2) return;
    const positions = Array.from({ length: count }, (_, i) => points[0].x + (length * i) / (count - 1));
    this.done(positions.map((position) => 1 - (2 * heightAt(points, position)) / height)); // the middle is 0, the edges are 1 and -1
  }
}

/** Return the height of the line through `points` at a horizontal position. */
function heightAt(points, position) {
  const right = Math.max(1, points.findIndex((point) => point.x >= position));
  const a = points[right - 1], b = points[right];
  return a.y + ((b.y - a.y) * (position - a.x)) / (b.x - a.x);
}
