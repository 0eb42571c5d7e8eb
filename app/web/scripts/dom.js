// Making elements: text stays text, and nothing is ever parsed as HTML.

export const find = (id) => document.getElementById(id);

/** An element with attributes and children; `on` holds listeners. A false or null attribute is left out. */
export function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, { on = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  for (const [event, listener] of Object.entries(on)) element.addEventListener(event, listener);
  element.append(...children.filter((child) => child != null));
  return element;
}

/** A value as it is read: so many digits as say something, with thousands apart. */
export function number(value, digits = 4) {
  return value.toLocaleString("en", { maximumSignificantDigits: digits });
}

export function percent(part) {
  const hundred = part * 100;
  if (hundred > 0 && hundred < 0.1) return "< 0.1 %";
  return `${hundred.toFixed(hundred > 99.9 && hundred < 100 ? 2 : 1)} %`;
}

export function duration(milliseconds) {
  return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(2)} s`;
}
