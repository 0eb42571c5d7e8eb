// A chart of a series and its forecast: the median, and one band per interval.

import { createElement, createSvg, distinguishingDigits, formatNumber } from "./dom.js";

const MARGIN = { top: 14, right: 12, bottom: 26 };
const LEFT = { least: 52, besideLabel: 18, character: 7 }; // pixels; the left margin fits the longest label
const TICKS = { across: 90, acrossTimes: 60, down: 56 }; // approximate pixels between two ticks

/** Draws a chart into an element, and draws it again when the size of the element changes. Shows the values below the pointer. */
export class Chart {
  constructor(element) {
    this.element = element;
    this.content = null;
    new ResizeObserver(() => this.content && this.render()).observe(element);
    element.addEventListener("pointermove", (event) => this.showReading(event));
    element.addEventListener("pointerleave", () => this.hideReading());
  }

  /**
   * Show a series. `history` has numbers, or null for missing values. `forecast` is { median, intervals: { level: { lower, upper } } }.
   * `times` has the times of both in ISO 8601, or is null.
   */
  show(history, forecast, title, times) {
    this.content = { history, forecast, title, times };
    this.render();
  }

  clear() {
    this.content = null;
    this.element.replaceChildren();
  }

  render() {
    const { history, forecast, title, times } = this.content;
    const { clientWidth: width, clientHeight: height } = this.element;
    const intervals = intervalsOf(forecast);
    const values = [...history, ...forecast.median, ...intervals.flatMap(({ lower, upper }) => [...lower, ...upper])];
    const known = values.filter((value) => typeof value === "number");
    if (!known.length || !width) return;
    const last = Math.max(1, history.length + forecast.median.length - 1);
    const down = ticks(valueRange(known), Math.max(2, (height - 40) / TICKS.down));
    const longest = Math.max(...down.marks.map((mark) => formatNumber(mark, 12).length));
    this.left = Math.max(LEFT.least, LEFT.besideLabel + LEFT.character * longest);
    this.x = scale(0, last, this.left, width - MARGIN.right);
    this.y = scale(down.low, down.high, height - MARGIN.bottom, MARGIN.top);
    this.height = height;
    this.digits = distinguishingDigits(known);

    const svg = createSvg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
    const across = times ? timeMarks(times, width / TICKS.acrossTimes)
      : ticks([0, last], width / TICKS.across).marks.filter((mark) => mark <= last && Number.isInteger(mark)).map((mark) => [mark, formatNumber(mark, 6)]);
    svg.append(...this.axes(down.marks, across, width));
    const edge = lastValue(history);
    for (const { level, lower, upper } of intervals) svg.append(this.band(history.length, lower, upper, edge, level));
    svg.append(createSvg("path", { class: "history", d: this.path(history, 0) }));
    svg.append(createSvg("path", { class: "median", d: this.path([edge, ...forecast.median], history.length - 1) }));
    svg.append(createSvg("path", { class: "now", d: `M${this.x(history.length - 1)},${MARGIN.top}V${height - MARGIN.bottom}` }));
    this.cross = createSvg("g", {});
    svg.append(this.cross);
    this.reading = createElement("div", { class: "reading", hidden: true });
    this.element.replaceChildren(svg, this.reading);
  }

  axes(down, across, width) {
    const lines = down.map((mark) => createSvg("path", { class: "grid", d: `M${this.left},${this.y(mark)}H${width - MARGIN.right}` }));
    const left = down.map((mark) =>
      createSvg("text", { x: this.left - 10, y: this.y(mark) + 4, "text-anchor": "end" }, formatNumber(mark, 12)));
    const below = across.map(([position, label]) =>
      createSvg("text", { x: this.x(position), y: this.height - 6, "text-anchor": "middle" }, label));
    return [...lines, ...left, ...below];
  }

  /** Return the SVG path through `values` from position `start`, with gaps at missing values.
   * `h0` lets the round line caps show a value between two missing values as a dot. */
  path(values, start) {
    let pen = "M";
    return values.map((value, i) => {
      if (typeof value !== "number") {
        pen = "M";
        return "";
      }
      const step = `${pen}${this.x(start + i).toFixed(1)},${this.y(value).toFixed(1)}${pen === "M" ? "h0" : ""}`;
      pen = "L";
      return step;
    }).join("");
  }

  band(start, lower, upper, edge, level) {
    const from = typeof edge === "number" ? [edge] : [];
    const there = this.path([...from, ...upper], start - from.length);
    const back = lower.map((value, i) => `L${this.x(start + i).toFixed(1)},${this.y(value).toFixed(1)}`).reverse().join("");
    return createSvg("path", { class: "fan", d: `${there}${back}Z`, "data-level": level });
  }

  showReading(event) {
    if (!this.content || !this.cross) return;
    const { history, forecast, times } = this.content;
    const place = event.clientX - this.element.getBoundingClientRect().left;
    const position = Math.round(this.x.inverse(place));
    const ahead = position - history.length;
    const value = ahead < 0 ? history[position] : forecast.median[ahead];
    if (typeof value !== "number") return this.hideReading();
    const x = this.x(position);
    this.cross.replaceChildren(
      createSvg("path", { class: "cross", d: `M${x},${MARGIN.top}V${this.height - MARGIN.bottom}` }),
      createSvg("circle", { class: "dot", cx: x, cy: this.y(value), r: 4.5 }),
    );
    const format = (number) => formatNumber(number, this.digits);
    const name = times?.[position] ?? (ahead < 0 ? `value ${position}` : `step ${ahead + 1}`);
    const lines = ahead < 0 ? [`${name}: ${format(value)}`] : [`forecast for ${name}: ${format(value)}`,
      ...intervalsOf(forecast).reverse().map(({ level, lower, upper }) => `${level} %: ${format(lower[ahead])} to ${format(upper[ahead])}`)];
    this.reading.textContent = lines.join("\n");
    this.reading.hidden = false;
    const right = x + 14 + this.reading.offsetWidth > this.element.clientWidth;
    this.reading.style.setProperty("left", `${right ? x - 14 - this.reading.offsetWidth : x + 14}px`);
  }

  hideReading() {
    this.cross?.replaceChildren();
    if (this.reading) this.reading.hidden = true;
  }
}

/** Return the intervals of a forecast, widest first. */
export function intervalsOf(forecast) {
  return Object.entries(forecast.intervals)
    .map(([level, bounds]) => ({ level, ...bounds }))
    .sort((a, b) => b.level - a.level);
}

/** Return the last value of the history, or null if it is missing. */
const lastValue = (history) => history.at(-1) ?? null;

function scale(from, to, start, end) {
  const slope = (end - start) / (to - from);
  const forward = (value) => start + (value - from) * slope;
  forward.inverse = (place) => from + (place - start) / slope;
  return forward;
}

function valueRange(values) {
  const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  const size = Math.max(Math.abs(low), Math.abs(high));
  let margin = high - low < size * 1e-14 ? size * 1e-13 : 0; // so that axis marks differ
  if (low === high) margin = Math.max(1, size / 1e6);
  return [low - margin, high + margin];
}

/** Return at most `count` axis marks as [position, label], where a new year, month, day or hour begins. */
function timeMarks(times, count) {
  const starts = (length) => times.map((time, i) => [i, time.slice(0, length)]).filter(([i, label]) => !i || label !== times[i - 1].slice(0, length));
  const lengths = [4, 7, 10, 16];
  const all = starts(lengths.find((length) => starts(length).length > 3) ?? 16);
  if (all.length > 2 && all[1][0] < all[2][0] - all[1][0]) all.shift(); // the first year, month or day is incomplete
  return all.filter((_, i) => i % Math.ceil(all.length / count) === 0);
}

/** Return about `count` axis marks over a range, in steps of 1, 2 or 5 times a power of ten. */
function ticks([low, high], count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  const digits = Math.min(17, Math.max(12, Math.ceil(Math.log10(Math.max(Math.abs(low), Math.abs(high)) / step)) + 2));
  const marks = Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(digits)));
  return { low: marks[0], high: marks.at(-1), marks };
}
