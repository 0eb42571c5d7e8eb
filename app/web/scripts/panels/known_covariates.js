// Covariates of a forecaster, such as price or promotion: one field for each column, and the time of the first value.

import { byId, createElement, formatCount, formatNumber } from "../dom.js";

const MISSING = new Set(["", "null", "na", "n/a", "nan", "none", "-", "?"]);

/** Return a word as a number, null for a missing value, or undefined for any other word. */
function parseValue(word) {
  const text = word.trim();
  if (MISSING.has(text.toLowerCase())) return null;
  const result = Number(text.replace(/^\+/, ""));
  return Number.isFinite(result) ? result : undefined;
}

/** Return the values of a text, separated by commas, semicolons, spaces, tabs or lines. Other words are kept, so that the service rejects them. */
export function parseValues(text) {
  const trimmed = text.replace(/^[^\S\t]+|\s+$/g, ""); // a tab at the start follows an empty cell of a spreadsheet
  const inside = trimmed.replace(/^\s*\[\s*|\s*\]$/g, "");
  if (!inside) return [];
  // A line break after a comma does not separate two values, because lists of numbers are often wrapped.
  // Each tab separates two cells of a spreadsheet, except beside a comma. An empty cell is a missing value.
  const words = inside.replace(/[ \t]*[,;](?:[ \t]*\r?\n)?[ \t]*| *(?:\r?\n|\t) */g, ",").split(/,| +/);
  while (words.at(-1) === "") words.pop();
  return words.map((word) => (parseValue(word) === undefined ? word : parseValue(word)));
}

/** Return the columns that a request gives, from the covariates on a card. The last column may count the holidays. */
export const columnsOf = (known) => (known ? known.columns.slice(0, known.calendar ? -1 : undefined) : []);

export class KnownCovariates {
  constructor() {
    this.box = byId("series-known");
    this.start = byId("series-start");
    this.columns = [];
  }

  /** Show the fields of a model. `known` is from its card, or null or undefined. Fields of columns that both models have keep their text. */
  show(known) {
    this.columns = columnsOf(known);
    this.start.closest(".field").hidden = !known?.calendar;
    this.box.hidden = !this.columns.length;
    const before = new Map([...this.box.querySelectorAll("textarea")].map((field) => [field.dataset.column, field.value]));
    this.box.replaceChildren(createElement("legend", {}, "Known covariates ", createElement("span", { class: "hint" }, "past values, then future values")),
      ...this.columns.map(({ name }, i) => {
        const field = createElement("textarea", { id: `series-known-${i}`, name: "covariates", rows: 2, spellcheck: "false", "data-column": name });
        field.value = before.get(name) ?? "";
        return createElement("div", { class: "field" },
          createElement("label", { for: field.id }, `${name} `, createElement("span", { class: "hint" })), field);
      }));
  }

  /** Return the fields of a request for `count` values and a horizon. A column that is too short repeats its last value. */
  request(count, horizon) {
    const result = {};
    if (this.columns.length) {
      const fields = [...this.box.querySelectorAll("textarea")];
      result.covariates = Object.fromEntries(this.columns.map((column, i) => [column.name, extended(fields[i], column, count + horizon)]));
    }
    if (!this.start.closest(".field").hidden && this.start.value.trim()) result.start = this.start.value.trim();
    return result;
  }
}

/** Return the values of a field, cut or extended to `count` values. Shows this change beside the label of the field. */
function extended(field, { mean }, count) {
  const values = parseValues(field.value), last = values.length ? values.at(-1) : Number(mean.toPrecision(4));
  const shown = formatNumber(values.length, 6);
  let hint = shown;
  if (values.length > count) hint = `the first ${formatNumber(count, 6)} of ${shown} values are used`;
  else if (!values.length) hint = `empty: ${last}, the mean of the training data, is used for all values`;
  else if (values.length < count) hint = `${formatCount(values.length, "value")}; the last value ${last} is repeated up to ${formatNumber(count, 6)} values`;
  field.closest(".field").querySelector(".hint").textContent = hint;
  return [...values.slice(0, count), ...Array(Math.max(0, count - values.length)).fill(last)];
}
