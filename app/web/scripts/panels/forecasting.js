// Forecasting: forecast a series that is pasted, opened, drawn or synthetic. Show its chart, intervals and table.

import { json, readFile, send } from "../api.js";
import { Chart, intervalsOf } from "../chart.js";
import { byId, createElement, createSvg, distinguishingDigits, formatCount, formatNumber } from "../dom.js";
import { firstTime, parseTable, parseValues, roundValues } from "../series_parser.js";
import { DrawingPad } from "../drawing_pad.js";
import { KnownCovariates, withoutMissingEnd } from "./known_covariates.js";
import { acceptDrops, Panel } from "./panel.js";

/** Synthetic series: a sine at 1,000 points over [0, 20] with noise of 0.2, and a sum of two sines. */
const SYNTHETIC = {
  sine: (i) => Math.sin((20 / 999) * (i + 80)) + 0.2 * noise(i),
  sum: (i) => Math.sin((20 / 999) * i) + 0.4 * Math.sin((60 / 999) * i) + 0.05 * noise(i),
};
const LENGTH = 240;

/** Reproducible, nearly normal noise: the sum of twelve uniform numbers in [0, 1), minus its mean. */
function noise(i) {
  let state = (i + 1) * 2654435761, sum = -6;
  for (let i = 0; i < 12; i += 1) {
    state = (Math.imul(state ^ (state >>> 15), 2246822519) + 374761393) >>> 0;
    sum += state / 2 ** 32;
  }
  return sum;
}

export function forecastingPanel() {
  const text = byId("series-values"), drawing = byId("series-draw"), column = byId("series-column");
  const chart = new Chart(byId("series-chart"));
  const pad = new DrawingPad(byId("series-chart"), (values) => {
    setDrawing(false);
    closeTable();
    fill(roundValues(values));
  });
  const known = new KnownCovariates(), knownOf = new Map(); // by model: the known covariates of its card, or null
  let table = [], time = null, shownModel = null;

  const panel = new Panel("series", "forecast", {
    request() {
      const values = parseValues(text.value);
      byId("series-count").textContent = values.length ? formatNumber(values.length, 6) : "";
      if (pad.on || !showKnown()) return null;
      const levels = [...panel.form.elements.levels].filter((box) => box.checked).map((box) => Number(box.value));
      const horizon = Number(panel.form.elements.horizon.value);
      return { path: "v1/series/forecast", json: { model: panel.model || undefined, values, horizon, levels, ...known.request(values.length, horizon) } };
    },
    show({ results: [forecast] }, { json: { values, horizon } }) {
      chart.show(values, forecast, describe(values, forecast));
      showLegend(forecast);
      showTable(forecast, distinguishingDigits([...values, ...forecast.median], 5));
      const season = forecast.seasonality > 1 ? `, season of ${forecast.seasonality} values` : "";
      return `forecast of ${formatCount(horizon, "step")} after ${formatCount(values.length, "value")}${season}`;
    },
  });

  /** Show the fields of the chosen model's known covariates. Returns false if its card must be loaded first. */
  function showKnown() {
    const { model } = panel;
    if (!model.includes("@")) knownOf.set(model, panel.modelInfo?.card.series?.known ?? null);
    if (!knownOf.has(model)) {
      loadKnown(model);
      return false;
    }
    if (model !== shownModel) {
      shownModel = model;
      known.show(knownOf.get(model));
      known.fill(table, time);
      if (table.length && known.shown) { // the table was opened for another model
        if (known.has(table[column.value].name)) chooseValueColumn();
        chooseColumn(); // sends the request
        return false;
      }
    }
    return true;
  }

  async function loadKnown(model) {
    try {
      const { card } = await json(await send({ path: `v1/models/${model}` }));
      knownOf.set(model, card.series?.known ?? null);
      if (panel.model === model) panel.run();
    } catch (error) {
      if (panel.model === model) panel.showError(error);
    }
  }

  function setDrawing(on) {
    drawing.setAttribute("aria-pressed", String(on));
    drawing.textContent = on ? "Cancel" : "Draw";
    chart.clear();
    pad.toggle(on);
    byId("series-legend").hidden = byId("series-numbers").hidden = on;
  }

  const fill = (values) => fillText(values.map(String).join(", "));

  function fillText(content) {
    if (pad.on) setDrawing(false);
    text.value = content;
    panel.run();
  }

  async function open(file) {
    let content;
    try {
      content = await readFile(file);
    } catch (error) {
      panel.showError(error);
      return;
    }
    closeTable();
    table = parseTable(content);
    time = firstTime(content);
    if (table.length) known.clear(); // the values of another table
    known.fill(table, time);
    if (!table.length) return fillText(content); // no numeric column: the service reports the error
    column.replaceChildren(...table.map(({ name }, i) => createElement("option", { value: i }, name)));
    chooseValueColumn();
    byId("series-column-field").hidden = table.length < 2;
    chooseColumn();
  }

  /** Choose the last column that is not known in advance. */
  function chooseValueColumn() {
    column.value = String(Math.max(0, table.findLastIndex(({ name }) => !known.has(name))));
  }

  /** Read the chosen column. With known covariates, rows after its last value are the horizon. */
  function chooseColumn() {
    const { values } = table[column.value], past = withoutMissingEnd(values);
    if (!known.shown) return fill(values);
    if (past.length < values.length) {
      const horizon = panel.form.elements.horizon;
      horizon.value = String(values.length - past.length);
      horizon.dispatchEvent(new Event("input"));
    }
    return fill(past);
  }

  /** Forget the opened table. */
  function closeTable() {
    [table, time] = [[], null];
    byId("series-column-field").hidden = true;
  }

  drawing.addEventListener("click", () => {
    panel.running?.abort(); // its chart would replace the pad
    setDrawing(!pad.on);
    if (!pad.on) panel.run();
  });
  column.addEventListener("change", chooseColumn);
  byId("series-file").addEventListener("change", (event) => {
    if (event.target.files[0]) open(event.target.files[0]);
    event.target.value = ""; // so that the same file can be opened again
  });
  for (const button of panel.root.querySelectorAll("[data-series]")) {
    button.addEventListener("click", () => {
      panel.announce();
      closeTable();
      fill(syntheticSeries(button.dataset.series));
    });
  }
  acceptDrops(panel.root, (file) => {
    panel.announce();
    open(file);
  });
  text.addEventListener("input", () => {
    closeTable();
    if (pad.on) setDrawing(false);
  });
  panel.start = () => (text.value.trim() ? panel.run() : fill(syntheticSeries("sine")));
  return panel;
}

const syntheticSeries = (name) => roundValues(Array.from({ length: LENGTH }, (_, i) => SYNTHETIC[name](i)));

/** Return a description of the chart for screen readers. */
function describe(values, { median }) {
  const known = values.filter((value) => value !== null), digits = distinguishingDigits([...known, ...median]);
  return `A series of ${formatCount(values.length, "value")}, and its forecast of ${formatCount(median.length, "step")}. The last value is ` +
    `${formatNumber(known.at(-1), digits)}, and the last median is ${formatNumber(median.at(-1), digits)}. The table below lists the forecast.`;
}

function showLegend(forecast) {
  const line = (kind) => createSvg("svg", { viewBox: "0 0 22 12", "aria-hidden": "true" }, createSvg("path", { class: kind, d: "M0,6H22" }));
  const levels = intervalsOf(forecast);
  const swatch = (i) => createSvg("svg", { viewBox: "0 0 22 12", "aria-hidden": "true" },
    createSvg("rect", { class: "fan", width: 22, height: 12, rx: 2, "fill-opacity": 1 - (1 - 0.16) ** (i + 1) }));
  byId("series-legend").replaceChildren(
    createElement("li", {}, line("history"), "history"),
    createElement("li", {}, line("median"), "median"),
    ...levels.map(({ level }, i) => createElement("li", {}, swatch(i), `${level} % interval`)).reverse(),
  );
}

function showTable(forecast, digits) {
  const levels = intervalsOf(forecast).reverse();
  const cell = (value) => createElement("td", { class: "number" }, formatNumber(value, digits));
  const head = ["step", "median", ...levels.flatMap(({ level }) => [`${level} % lower`, `${level} % upper`])];
  const rows = forecast.median.map((value, i) => createElement("tr", {}, createElement("th", { scope: "row" }, String(i + 1)), cell(value),
    ...levels.flatMap(({ lower, upper }) => [cell(lower[i]), cell(upper[i])])));
  byId("series-numbers").querySelector(".scroll").replaceChildren(createElement("table", {},
    createElement("thead", {}, createElement("tr", {}, ...head.map((name, i) => createElement("th", { scope: "col", class: i ? "number" : null }, name)))),
    createElement("tbody", {}, ...rows)));
}
