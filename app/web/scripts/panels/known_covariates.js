// Covariates of a forecaster, such as price or promotion: one field for each column, and the time of the first value.

import { byId, createElement, formatCount, formatNumber } from "../dom.js";
import { parseValues } from "../series_parser.js";

export class KnownCovariates {
  constructor() {
    this.box = byId("series-known");
    this.start = byId("series-start");
    this.columns = [];
  }

  /** Show the fields of a model. `known` is from its card, or null. Fields of columns that both models have keep their text. */
  show(known) {
    const holidays = Boolean(known?.calendar);
    this.columns = known ? known.columns.slice(0, holidays ? -1 : undefined) : []; // the last one counts the holidays
    this.start.closest(".field").hidden = !holidays;
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

  get shown() {
    return this.columns.length > 0 || !this.start.closest(".field").hidden;
  }

  has(name) {
    return this.columns.some((column) => column.name === name);
  }

  /** Fill the fields from an opened table: its columns, and the time of its first row. */
  fill({ columns, times }) {
    for (const field of this.box.querySelectorAll("textarea")) {
      const column = columns.find(({ name }) => name === field.dataset.column);
      if (column) field.value = withoutMissingEnd(column.values).join(", ");
    }
    if (times) this.start.value = times[0];
  }

  /** Empty all fields. */
  clear() {
    for (const field of this.box.querySelectorAll("textarea")) field.value = "";
    this.start.value = "";
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

/** Return the values up to the last value that is not missing. */
export function withoutMissingEnd(values) {
  return values.slice(0, values.findLastIndex((value) => value !== null) + 1);
}
