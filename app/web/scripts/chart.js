// A chart of a history and the forecast after it: the median, and a band for each interval, widest behind.

import { draw, make, number } from "./dom.js";

const MARGIN = { top: 14, right: 12, bottom: 26, left: 52 };
const TICKS = { across: 90, down: 56 }; // pixels between two of them, about

/** Draws into an element, and again whenever its size changes; under the pointer it reads out the values. */
export class Chart {
  constructor(element) {
    this.element = element;
    this.content = null;
    new ResizeObserver(() => this.content && this.render()).observe(element);
    element.addEventListener("pointermove", (event) => this.read(event));
    element.addEventListener("pointerleave", () => this.forget());
  }

  /** `history`: values or null; `forecast`: { median, intervals: { level: { lower, upper } } }, or null for none yet. */
  show(history, forecast, title) {
    this.content = { history, forecast, title };
    this.render();
  }

  clear() {
    this.content = null;
    this.element.replaceChildren();
  }

  render() {
    const { history, forecast, title } = this.content;
    const { clientWidth: width, clientHeight: height } = this.element;
    const intervals = bands(forecast);
    const values = [...history, ...(forecast?.median ?? []), ...intervals.flatMap(({ lower, upper }) => [...lower, ...upper])];
    const known = values.filter((value) => typeof value === "number");
    if (!known.length || !width) return;
    const last = Math.max(1, history.length + (forecast?.median.length ?? 0) - 1);
    this.x = scale(0, last, MARGIN.left, width - MARGIN.right);
    const down = ticks(extent(known), Math.max(2, (height - 40) / TICKS.down));
    this.y = scale(down.low, down.high, height - MARGIN.bottom, MARGIN.top);
    this.height = height;

    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
    svg.append(...this.axes(down.marks, ticks([0, last], width / TICKS.across).marks.filter((mark) => mark <= last), width));
    const edge = joint(history);
    for (const { level, lower, upper } of intervals) svg.append(this.band(history.length, lower, upper, edge, level));
    svg.append(draw("path", { class: "history", d: this.path(history, 0) }));
    if (forecast) svg.append(draw("path", { class: "median", d: this.path([edge, ...forecast.median], history.length - 1) }));
    if (forecast) svg.append(draw("path", { class: "now", d: `M${this.x(history.length - 1)},${MARGIN.top}V${height - MARGIN.bottom}` }));
    this.cross = draw("g", {});
    svg.append(this.cross);
    this.reading = make("div", { class: "reading", hidden: true });
    this.element.replaceChildren(svg, this.reading);
  }

  axes(down, across, width) {
    const lines = down.map((mark) => draw("path", { class: "grid", d: `M${MARGIN.left},${this.y(mark)}H${width - MARGIN.right}` }));
    const left = down.map((mark) =>
      draw("text", { x: MARGIN.left - 10, y: this.y(mark) + 4, "text-anchor": "end" }, number(mark, 6)));
    const below = across.map((mark) =>
      draw("text", { x: this.x(mark), y: this.height - 6, "text-anchor": "middle" }, number(mark, 6)));
    return [...lines, ...left, ...below];
  }

  /** A line through values from position `start` on; it breaks where one is missing. */
  path(values, start) {
    let pen = "M";
    return values.map((value, i) => {
      if (typeof value !== "number") {
        pen = "M";
        return "";
      }
      const step = `${pen}${this.x(start + i).toFixed(1)},${this.y(value).toFixed(1)}`;
      pen = "L";
      return step;
    }).join("");
  }

  band(start, lower, upper, edge, level) {
    const from = typeof edge === "number" ? [edge] : [];
    const there = this.path([...from, ...upper], start - from.length);
    const back = lower.map((value, i) => `L${this.x(start + i).toFixed(1)},${this.y(value).toFixed(1)}`).reverse().join("");
    return draw("path", { class: "fan", d: `${there}${back}Z`, "data-level": level });
  }

  read(event) {
    if (!this.content || !this.cross) return;
    const { history, forecast } = this.content;
    const place = event.clientX - this.element.getBoundingClientRect().left;
    const position = Math.round(this.x.inverse(place));
    const ahead = position - history.length;
    const value = ahead < 0 ? history[position] : forecast?.median[ahead];
    if (typeof value !== "number") return this.forget();
    const x = this.x(position);
    this.cross.replaceChildren(
      draw("path", { class: "cross", d: `M${x},${MARGIN.top}V${this.height - MARGIN.bottom}` }),
      draw("circle", { class: "dot", cx: x, cy: this.y(value), r: 4.5 }),
    );
    const lines = ahead < 0 ? [`value ${position}: ${number(value)}`] : [`${ahead + 1} ahead: ${number(value)}`,
      ...bands(forecast).reverse().map(({ level, lower, upper }) => `${level} %: ${number(lower[ahead])} to ${number(upper[ahead])}`)];
    this.reading.textContent = lines.join("\n");
    this.reading.hidden = false;
    const right = x + 14 + this.reading.offsetWidth > this.element.clientWidth;
    this.reading.style.setProperty("left", `${right ? x - 14 - this.reading.offsetWidth : x + 14}px`);
  }

  forget() {
    this.cross?.replaceChildren();
    if (this.reading) this.reading.hidden = true;
  }
}

/** The intervals of a forecast, widest first. */
export function bands(forecast) {
  return Object.entries(forecast?.intervals ?? {})
    .map(([level, bounds]) => ({ level, ...bounds }))
    .sort((a, b) => b.level - a.level);
}

/** The last value of a history, from which the forecast leads on; null where it is missing. */
const joint = (history) => history.at(-1) ?? null;

function scale(from, to, start, end) {
  const slope = (end - start) / (to - from);
  const forward = (value) => start + (value - from) * slope;
  forward.inverse = (place) => from + (place - start) / slope;
  return forward;
}

function extent(values) {
  const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  return low === high ? [low - 1, high + 1] : [low, high];
}

/** Round marks about so many of which span an extent: steps of 1, 2 or 5 times a power of ten. */
function ticks([low, high], count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  const marks = Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)));
  return { low: marks[0], high: marks.at(-1), marks };
}
