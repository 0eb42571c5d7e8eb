// Forecasting: forecast a series that is typed, opened or a sample. Show its chart, intervals and table.

import { readFile } from "../api.js";
import { Chart, intervalsOf } from "../chart.js";
import { byId, createElement, createSvg, csvFile, distinguishingDigits, formatCount, formatNumber } from "../dom.js";
import { parseValues, readTable, timesAfter } from "../series_parser.js";
import { KnownCovariates, withoutMissingEnd } from "./known_covariates.js";
import { acceptDrops, Panel } from "./panel.js";

/** Passengers of airlines in thousands for each month (Box and Jenkins 1976), and a sine like the workshop's. */
const SAMPLES = {
  passengers: { about: "Airline passengers in thousands per month", times: monthsFrom(1949, 144), values: [
    112, 118, 132, 129, 121, 135, 148, 148, 136, 119, 104, 118, 115, 126, 141, 135, 125, 149, 170, 170, 158, 133, 114, 140,
    145, 150, 178, 163, 172, 178, 199, 199, 184, 162, 146, 166, 171, 180, 193, 181, 183, 218, 230, 242, 209, 191, 172, 194,
    196, 196, 236, 235, 229, 243, 264, 272, 237, 211, 180, 201, 204, 188, 235, 227, 234, 264, 302, 293, 259, 229, 203, 229,
    242, 233, 267, 269, 270, 315, 364, 347, 312, 274, 237, 278, 284, 277, 317, 313, 318, 374, 413, 405, 355, 306, 271, 306,
    315, 301, 356, 348, 355, 422, 465, 467, 404, 347, 305, 336, 340, 318, 362, 348, 363, 435, 491, 505, 404, 359, 310, 337,
    360, 342, 406, 396, 420, 472, 548, 559, 463, 407, 362, 405, 417, 391, 419, 461, 472, 535, 622, 606, 508, 461, 390, 432] },
  sine: { about: "A sine with noise", times: null, values: Array.from({ length: 240 }, (_, i) => Number((Math.sin((20 / 999) * (i + 80)) + 0.35 * noise(i)).toFixed(3))) },
};

function monthsFrom(year, count) {
  return Array.from({ length: count }, (_, i) => `${year + Math.floor(i / 12)}-${String((i % 12) + 1).padStart(2, "0")}`);
}

/** Return a reproducible number between -1 and 1 that looks random. */
function noise(i) {
  return (Math.sin((i + 1) * 12.9898) * 43758.5453) % 1;
}

export function forecastingPanel() {
  const text = byId("series-values"), column = byId("series-column"), about = byId("series-about");
  const chart = new Chart(byId("series-chart"));
  const known = new KnownCovariates();
  let table = null; // the opened file as { name, times, columns }
  let times = null; // of the values, or null
  let shownModel = null, rows = []; // rows of the forecast, for the table and the download

  const panel = new Panel("series", "forecast", {
    request() {
      const values = parseValues(text.value);
      byId("series-count").textContent = values.length ? formatNumber(values.length, 6) : "";
      if (showKnown()) return null;
      const levels = [...panel.form.elements.levels].filter((box) => box.checked).map((box) => Number(box.value));
      const horizon = Number(panel.form.elements.horizon.value);
      return { path: "v1/series/forecast", json: { model: panel.model || undefined, values, horizon, levels, ...known.request(values.length, horizon) } };
    },
    show({ results: [forecast] }, { json: { values, horizon } }) {
      const future = times && timesAfter(times, horizon);
      rows = forecastRows(forecast, future);
      chart.show(values, forecast, describe(values, forecast), future && [...times, ...future]);
      showLegend(forecast);
      showTable(rows, distinguishingDigits([...values, ...forecast.median], 5));
      setVisible(true);
      const season = forecast.seasonality > 1 ? `, season of ${forecast.seasonality}` : "";
      return `${formatCount(horizon, "step")} after ${formatCount(values.length, "value")}${season}`;
    },
    clear() {
      chart.clear();
      setVisible(false);
    },
    save: () => ({ name: "forecast.csv", content: csvFile(rows) }),
  });

  const setVisible = (on) => (byId("series-legend").hidden = byId("series-numbers").hidden = !on);

  /** Show the fields of the chosen model's known covariates. Returns whether this changed the series and sent a request. */
  function showKnown() {
    if (panel.model === shownModel) return false;
    shownModel = panel.model;
    known.show(panel.modelInfo?.card.series?.known ?? null);
    if (!table) return false;
    known.fill(table);
    if (!known.shown) return false;
    if (known.has(table.columns[column.value].name)) chooseValueColumn();
    chooseColumn();
    return true;
  }

  /** Forecast a series. Without `keepTable`, the opened file is closed. */
  function useSeries(values, title, valueTimes = null, keepTable = false) {
    if (!keepTable) closeTable();
    times = valueTimes;
    about.textContent = title;
    text.value = values.map(String).join(", ");
    panel.run();
  }

  async function open([file]) {
    panel.running?.abort(); // its answer would replace the error
    closeTable();
    times = null;
    text.value = about.textContent = "";
    try {
      table = { name: file.name, ...readTable(await readFile(file), file.name) };
    } catch (error) {
      panel.showError(error);
      return;
    }
    known.clear(); // the values of another table
    known.fill(table);
    column.replaceChildren(...table.columns.map(({ name }, i) => createElement("option", { value: i }, name)));
    chooseValueColumn();
    byId("series-column-field").hidden = table.columns.length < 2;
    chooseColumn();
  }

  /** Choose the first column that is not known in advance. */
  function chooseValueColumn() {
    column.value = String(Math.max(0, table.columns.findIndex(({ name }) => !known.has(name))));
  }

  /** Forecast the chosen column. With known covariates, rows after its last value are the horizon. */
  function chooseColumn() {
    const { name, values } = table.columns[column.value], past = known.shown ? withoutMissingEnd(values) : values;
    if (past.length < values.length) {
      const horizon = panel.form.elements.horizon;
      horizon.value = String(values.length - past.length);
      horizon.dispatchEvent(new Event("input"));
    }
    const missing = past.filter((value) => value === null).length;
    const facts = [formatCount(past.length, "row"), table.times && `${table.times[0]} to ${table.times[past.length - 1]}`, missing && `${missing} missing`,
      table.times && !timesAfter(table.times, 1) && "no constant step"];
    useSeries(past, `${name} in ${table.name}: ${facts.filter(Boolean).join(", ")}`, table.times?.slice(0, past.length), true);
  }

  /** Forget the opened table. */
  function closeTable() {
    table = null;
    byId("series-column-field").hidden = true;
  }

  column.addEventListener("change", chooseColumn);
  byId("series-file").addEventListener("change", (event) => {
    const files = [...event.target.files];
    event.target.value = ""; // so that the same file can be opened again
    if (files.length) open(files);
  });
  for (const button of panel.root.querySelectorAll("[data-series]")) {
    button.addEventListener("click", () => {
      panel.announce();
      showSample(button.dataset.series);
    });
  }
  acceptDrops(panel.root, (files) => {
    panel.announce();
    open(files);
  });
  text.addEventListener("input", () => {
    closeTable();
    [times, about.textContent] = [null, "Your values"];
  });
  const showSample = (name) => useSeries(SAMPLES[name].values, SAMPLES[name].about, SAMPLES[name].times);
  panel.start = () => (text.value.trim() ? panel.run() : showSample("passengers"));
  return panel;
}

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
    createElement("li", {}, line("median"), "forecast (median)"),
    ...levels.map(({ level }, i) => createElement("li", {}, swatch(i), `${level} % interval`)).reverse(),
  );
}

/** Return a forecast as rows of a table. The first row has the names of the columns. */
function forecastRows(forecast, times) {
  const levels = intervalsOf(forecast).reverse();
  return [[times ? "time" : "step", "mean", "median", ...levels.flatMap(({ level }) => [`lower_${level}`, `upper_${level}`])],
    ...forecast.median.map((median, i) => [times?.[i] ?? i + 1, forecast.mean[i], median, ...levels.flatMap(({ lower, upper }) => [lower[i], upper[i]])])];
}

function showTable([names, ...rows], digits) {
  const cells = ([first, ...values]) => createElement("tr", {}, createElement("th", { scope: "row" }, String(first)),
    ...values.map((value) => createElement("td", { class: "number" }, formatNumber(value, digits))));
  byId("series-numbers").querySelector(".scroll").replaceChildren(createElement("table", {},
    createElement("thead", {}, createElement("tr", {}, ...names.map((name, i) => createElement("th", { scope: "col", class: i ? "number" : null }, name.replace("_", " "))))),
    createElement("tbody", {}, ...rows.map(cells))));
}
