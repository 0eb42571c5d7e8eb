// Forecasting: forecast typed values, a sample, or the series of a table, which the service reads. Show a chart, intervals and rows.

import { blob, send } from "../api.js";
import { Chart, intervalsOf } from "../chart.js";
import { byId, createElement, createSvg, csvFile, distinguishingDigits, formatCount, formatNumber } from "../dom.js";
import { columnsOf, KnownCovariates, parseValues } from "./known_covariates.js";
import { acceptDrops, Panel } from "./panel.js";

/** Passengers of airlines in thousands for each month (Box and Jenkins 1976), and a sine like the workshop's. */
const SAMPLES = {
  passengers: { about: "Airline passengers in thousands per month", year: 1949, values: [
    112, 118, 132, 129, 121, 135, 148, 148, 136, 119, 104, 118, 115, 126, 141, 135, 125, 149, 170, 170, 158, 133, 114, 140,
    145, 150, 178, 163, 172, 178, 199, 199, 184, 162, 146, 166, 171, 180, 193, 181, 183, 218, 230, 242, 209, 191, 172, 194,
    196, 196, 236, 235, 229, 243, 264, 272, 237, 211, 180, 201, 204, 188, 235, 227, 234, 264, 302, 293, 259, 229, 203, 229,
    242, 233, 267, 269, 270, 315, 364, 347, 312, 274, 237, 278, 284, 277, 317, 313, 318, 374, 413, 405, 355, 306, 271, 306,
    315, 301, 356, 348, 355, 422, 465, 467, 404, 347, 305, 336, 340, 318, 362, 348, 363, 435, 491, 505, 404, 359, 310, 337,
    360, 342, 406, 396, 420, 472, 548, 559, 463, 407, 362, 405, 417, 391, 419, 461, 472, 535, 622, 606, 508, 461, 390, 432] },
  sine: { about: "A sine with noise", values: Array.from({ length: 240 }, (_, i) => Number((Math.sin((20 / 999) * (i + 80)) + 0.35 * noise(i)).toFixed(3))) },
};

/** Return the `count` months from January of a year. */
function monthsFrom(year, count) {
  return Array.from({ length: count }, (_, i) => `${year + Math.floor(i / 12)}-${String((i % 12) + 1).padStart(2, "0")}`);
}

/** Return a reproducible number between -1 and 1 that looks random. */
function noise(i) {
  return (Math.sin((i + 1) * 12.9898) * 43758.5453) % 1;
}

export function forecastingPanel() {
  const text = byId("series-values"), choice = byId("series-choice"), about = byId("series-about"), remarks = byId("series-remarks");
  const chart = new Chart(byId("series-chart"));
  const known = new KnownCovariates();
  let file = null; // the opened table
  let sample = {}; // the shown sample
  let fieldsOf = null; // the model whose covariates have fields
  let shown = null, rows = []; // the answer with its request; the rows of the shown forecast

  const panel = new Panel("series", "forecast", {
    request() {
      const values = parseValues(text.value), covariates = panel.modelInfo?.card.series?.known;
      byId("series-count").textContent = values.length ? formatNumber(values.length, 6) : "";
      if (fieldsOf !== (fieldsOf = file ? null : panel.model)) known.show(file ? null : covariates);
      const levels = [...panel.form.elements.levels].filter((box) => box.checked).map((box) => Number(box.value));
      const horizon = Number(panel.form.elements.horizon.value), model = panel.model || undefined;
      const path = "v1/series/forecast";
      if (!file) return { path, json: { model, values, horizon, levels, ...known.request(values.length, horizon) } };
      const query = { model, horizon: columnsOf(covariates).length ? null : horizon, levels, history: true };
      const options = new URLSearchParams(byId("series-reading").value);
      for (const name of options.keys()) query[name] = options.getAll(name);
      return { path, query, files: [file] };
    },
    show(answer, request) {
      shown = { answer, request };
      const before = choice.value, names = answer.results.map(({ series }) => series ?? "");
      choice.replaceChildren(...names.map((name) => createElement("option", { value: name }, name)));
      if (names.includes(before)) choice.value = before;
      choice.parentElement.hidden = names.length < 2;
      remarks.querySelector("ul").replaceChildren(...(answer.table?.remarks ?? []).map((remark) => createElement("li", {}, remark)));
      return showSeries();
    },
    clear() {
      chart.clear();
      setVisible(false);
      choice.parentElement.hidden = true;
      about.textContent = file?.name ?? "";
    },
    save: async () => ({ name: "forecast.csv", content: file ? await blob(await send({ ...shown.request, accept: "text/csv" })) : csvFile(rows) }),
  });

  function setVisible(on) {
    byId("series-legend").hidden = byId("series-numbers").hidden = !on;
    remarks.hidden = !on || !file;
  }

  /** Show the forecast of the chosen series. Returns text for the status line. */
  function showSeries() {
    const { answer: { results, table }, request } = shown, forecast = results[choice.selectedIndex];
    const values = forecast.history?.values ?? request.json.values, steps = forecast.median.length;
    const times = table ? [...forecast.history.times, ...forecast.times] : sample.year ? monthsFrom(sample.year, values.length + steps) : null;
    rows = forecastRows(forecast, times?.slice(values.length));
    chart.show(values, forecast, describe(values, forecast), table?.step === "step" ? null : times);
    about.textContent = table ? describeReading(forecast, table, file.name) : sample.about ?? "Your values";
    showLegend(forecast);
    showTable(rows, distinguishingDigits([...values, ...forecast.median], 5));
    setVisible(true);
    const season = forecast.seasonality > 1 ? `, season of ${forecast.seasonality}` : "";
    return `${formatCount(steps, "step")} after ${formatCount(values.length, "value")}${season}`;
  }

  /** Forecast a table, or without one the values in the field. */
  function use(table) {
    file = table;
    byId("series-reading").value = "";
    byId("series-reading").parentElement.hidden = !file;
    if (file) [text.value, sample] = ["", {}];
    panel.run();
  }

  function showSample(name) {
    sample = SAMPLES[name];
    text.value = sample.values.join(", ");
    use(null);
  }

  choice.addEventListener("change", showSeries);
  byId("series-file").addEventListener("change", (event) => {
    const files = [...event.target.files];
    event.target.value = ""; // so that the same file can be opened again
    if (files.length) use(files[0]);
  });
  for (const button of panel.root.querySelectorAll("[data-series]")) {
    button.addEventListener("click", () => {
      panel.announce();
      showSample(button.dataset.series);
    });
  }
  acceptDrops(panel.root, ([table]) => {
    panel.announce();
    use(table);
  });
  text.addEventListener("input", () => {
    [file, sample] = [null, {}];
    byId("series-reading").parentElement.hidden = true;
  });
  panel.start = () => (text.value.trim() ? panel.run() : showSample("passengers"));
  return panel;
}

/** Return how the service read a series of a table. */
function describeReading({ series, read: { start, end, length, missing } }, { step }, name) {
  const span = step === "step" ? "" : `, one per ${step}, ${start} to ${end}`;
  return `${series} in ${name}: ${formatCount(length, "value")}${span}${missing ? `, ${formatNumber(missing, 6)} missing` : ""}`;
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
