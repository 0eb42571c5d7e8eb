// The series: pasted, opened, drawn or made; its chart, its intervals, its numbers.

import { bands, Chart } from "../chart.js";
import { draw, find, make, number } from "../dom.js";
import { parseTable, parseValues, rounded } from "../series_parser.js";
import { Pad } from "../drawing_pad.js";
import { accept, Panel } from "./panel.js";

/** The workshop's series: a sine at 1,000 points over [0, 20], and noise of 0.2; and two sines. */
const MADE = {
  sine: (i) => Math.sin((20 / 999) * (i + 80)) + 0.2 * noise(i),
  sum: (i) => Math.sin((20 / 999) * i) + 0.4 * Math.sin((60 / 999) * i) + 0.05 * noise(i),
};
const LENGTH = 240;

/** Noise that is the same each time, nearly normal: the sum of twelve draws from [0, 1), less their mean. */
function noise(i) {
  let state = (i + 1) * 2654435761, sum = -6;
  for (let draws = 0; draws < 12; draws += 1) {
    state = (Math.imul(state ^ (state >>> 15), 2246822519) + 374761393) >>> 0;
    sum += state / 2 ** 32;
  }
  return sum;
}

export function seriesPanel() {
  const text = find("series-values"), drawing = find("series-draw"), column = find("series-column");
  const chart = new Chart(find("series-chart"));
  const pad = new Pad(find("series-chart"), (values) => {
    draws(false);
    fill(values);
  });
  let table = [];

  const panel = new Panel("series", "forecast", {
    request() {
      const values = parseValues(text.value);
      find("series-count").textContent = values.length ? number(values.length, 6) : "";
      if (pad.on) return null;
      const levels = [...panel.form.elements.levels].filter((box) => box.checked).map((box) => Number(box.value));
      return { path: "v1/series/forecast", json: { model: panel.model, values, horizon: Number(panel.form.elements.horizon.value), levels } };
    },
    show({ results: [forecast] }, { json: { values, horizon } }) {
      chart.show(values, forecast, describe(values, forecast));
      explain(forecast);
      tabulate(forecast);
      const season = forecast.seasonality ? `, seasonality ${forecast.seasonality}` : "";
      return `${number(horizon)} steps after ${number(values.length, 6)} values${season}`;
    },
  });

  function draws(on) {
    drawing.setAttribute("aria-pressed", String(on));
    drawing.textContent = on ? "Cancel" : "Draw";
    chart.clear();
    pad.toggle(on);
    find("series-legend").hidden = find("series-numbers").hidden = on;
  }

  function fill(values) {
    if (pad.on) draws(false);
    text.value = rounded(values).map(String).join(", ");
    panel.run();
  }

  async function open(file) {
    table = parseTable(await file.text());
    if (!table.length) {
      text.value = await file.text(); // not a table of numbers: the service says what is wrong with it
      panel.run();
      return;
    }
    column.replaceChildren(...table.map(({ name }, i) => make("option", { value: i }, name)));
    column.value = String(table.length - 1);
    find("series-column-field").hidden = table.length < 2;
    fill(table.at(-1).values);
  }

  drawing.addEventListener("click", () => {
    draws(!pad.on);
    if (!pad.on) panel.run();
  });
  column.addEventListener("change", () => fill(table[column.value].values));
  find("series-file").addEventListener("change", (event) => {
    if (event.target.files[0]) open(event.target.files[0]);
    event.target.value = ""; // so that the same file can be opened again
  });
  for (const button of panel.root.querySelectorAll("[data-series]")) {
    button.addEventListener("click", () => {
      panel.speak();
      find("series-column-field").hidden = true;
      fill(made(button.dataset.series));
    });
  }
  accept(panel.root, open);
  text.addEventListener("input", () => {
    find("series-column-field").hidden = true;
    if (pad.on) draws(false);
  });
  panel.begin = () => fill(made("sine"));
  return panel;
}

const made = (name) => Array.from({ length: LENGTH }, (_, i) => MADE[name](i));

/** The chart in a sentence, for who does not see it. */
function describe(values, { median }) {
  const known = values.filter((value) => value !== null);
  return `${values.length} values, the last of them ${number(known.at(-1))}, and a forecast of ${median.length} steps, ` +
    `the median of which ends at ${number(median.at(-1))}. The numbers stand in the table below.`;
}

function explain(forecast) {
  const line = (kind) => draw("svg", { viewBox: "0 0 22 12", "aria-hidden": "true" }, draw("path", { class: kind, d: "M0,6H22" }));
  const levels = bands(forecast);
  const swatch = (i) => draw("svg", { viewBox: "0 0 22 12", "aria-hidden": "true" },
    draw("rect", { class: "fan", width: 22, height: 12, rx: 2, "fill-opacity": 1 - (1 - 0.16) ** (i + 1) }));
  find("series-legend").replaceChildren(
    make("li", {}, line("history"), "history"),
    make("li", {}, line("median"), "median"),
    ...levels.map(({ level }, i) => make("li", {}, swatch(i), `${level} % interval`)).reverse(),
  );
}

function tabulate(forecast) {
  const levels = bands(forecast).reverse();
  const cell = (value) => make("td", { class: "number" }, number(value, 5));
  const head = ["step", "median", ...levels.flatMap(({ level }) => [`${level} % from`, `to`])];
  const rows = forecast.median.map((value, i) => make("tr", {}, make("th", { scope: "row" }, String(i + 1)), cell(value),
    ...levels.flatMap(({ lower, upper }) => [cell(lower[i]), cell(upper[i])])));
  find("series-numbers").querySelector(".scroll").replaceChildren(make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((name, i) => make("th", { scope: "col", class: i ? "number" : null }, name)))),
    make("tbody", {}, ...rows)));
}
