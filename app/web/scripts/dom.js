// Create elements and format values. Text is never parsed as HTML.

export const byId = (id) => document.getElementById(id);

/** Return a new element with attributes and children. `on` maps events to listeners. False and null attributes are left out. */
export function createElement(tag, attributes = {}, ...children) {
  return withAttributes(document.createElement(tag), attributes, children);
}

/** Return a new SVG element, with the same arguments as createElement. */
export function createSvg(tag, attributes = {}, ...children) {
  return withAttributes(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function withAttributes(element, { on = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  for (const [event, listener] of Object.entries(on)) element.addEventListener(event, listener);
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Return a number as text, with at most `digits` significant digits and thousands separators. */
export function formatNumber(value, digits = 4) {
  const notation = value && (Math.abs(value) >= 1e15 || Math.abs(value) < 1e-6) ? "scientific" : "standard";
  return value.toLocaleString("en", { maximumSignificantDigits: digits, notation });
}

/** Return a count with its noun in the singular or plural, such as "1 image" or "1,200 images". */
export const formatCount = (count, noun) => `${formatNumber(count, 6)} ${noun}${count === 1 ? "" : "s"}`;

/** Return how many significant digits, `least` to 10, distinguish values that differ by a thousandth of their range. */
export function distinguishingDigits(values, least = 4) {
  const known = values.filter((value) => typeof value === "number");
  const low = known.reduce((a, b) => Math.min(a, b), Infinity), high = known.reduce((a, b) => Math.max(a, b), -Infinity);
  const largest = Math.max(Math.abs(low), Math.abs(high));
  return high > low ? Math.min(10, least + Math.max(0, Math.ceil(Math.log10(largest / (high - low))))) : 10;
}

export function formatPercent(fraction) {
  const percentage = fraction * 100;
  if (percentage > 0 && percentage < 0.1) return "< 0.1 %";
  return `${percentage.toFixed(percentage > 99.9 && percentage < 100 ? 2 : 1)} %`;
}

export function formatDuration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(2)} s`;
}

/** Show a picture as large as the window allows. */
export function enlarge(src, description) {
  byId("large-title").textContent = description[0].toUpperCase() + description.slice(1);
  byId("large-picture").src = src;
  byId("large-picture").alt = description;
  byId("large").showModal();
}

/** Return rows of cells as a CSV file. */
export function csvFile(rows) {
  const cell = (value) => (/[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value ?? "");
  return new Blob([rows.map((row) => `${row.map(cell).join(",")}\n`).join("")], { type: "text/csv" });
}
