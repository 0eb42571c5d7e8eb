// Read a series from typed text, and the columns of a CSV file. A file that is not surely understood is refused.

import { RequestError } from "./api.js";

const MISSING = new Set(["", "null", "na", "n/a", "nan", "none", "-", "?"]);
const TIME = /^\d{4}-\d\d(-\d\d([T ]\d\d:\d\d(:\d\d)?(Z|[+-]\d\d:?\d\d)?)?)?$/; // ISO 8601

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

/** Return a CSV file as { times, columns: [{ name, values }] }. Throws RequestError if a cell could be read in another way, or is no number. */
export function readTable(bytes, file) {
  const refuse = (problem) => {
    throw new RequestError(`${file}: ${problem}. The page reads UTF-8 files with one row for each time, numbers such as 1234.5, and at most one column ` +
      `of times such as 2024-01-31. For other files, run “quartet train lstm --csv FILE --preview”.`);
  };
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    refuse("it is not in UTF-8");
  }
  const lines = text.replace(/\s+$/, "").split(/\r?\n/);
  const separator = ["\t", ";", ","].find((each) => splitCells(lines[0], each).length > 1) ?? ",";
  const rows = lines.map((line) => splitCells(line, separator));
  const isTitle = (word) => parseValue(word) === undefined && !TIME.test(word);
  const titles = rows[0].every((word) => isTitle(word) || /^\d{4}$/.test(word)) && rows[0].some(isTitle) ? rows.shift() : rows[0].map((_, i) => `Column ${i + 1}`);
  if (!rows.length || !text.trim()) refuse("it has no rows of numbers");
  const first = lines.length - rows.length + 1; // number of the line
  rows.forEach((row, i) => row.length === titles.length || refuse(`line ${first + i} has ${row.length} cells instead of ${titles.length}`));
  const isTimes = titles.map((_, j) => rows.every((row) => TIME.test(row[j])));
  if (isTimes.filter(Boolean).length > 1) refuse("it has several columns of times");
  const times = isTimes.includes(true) ? rows.map((row) => row[isTimes.indexOf(true)]) : null;
  times?.forEach((time, i) => i && time <= times[i - 1] && refuse(`the time ${time} in line ${first + i} is not after the one before, so it may have several series`));
  const columns = titles.map((name, j) => ({ name: name || `Column ${j + 1}`, values: rows.map((row, i) => {
    if (isTimes[j]) return null;
    const value = parseValue(row[j]);
    return value === undefined ? refuse(`“${row[j]}” in line ${first + i}, column “${name}” is not a number`) : value;
  }) })).filter(({ values }) => values.some((value) => value !== null));
  return columns.length ? { times, columns } : refuse("it has no column of numbers");
}

/** Return the cells of a line. Separators within quotes do not count. */
function splitCells(line, separator) {
  const cells = [""];
  let inside = false;
  for (const character of line) {
    if (character === '"') inside = !inside;
    else if (character === separator && !inside) cells.push("");
    else cells[cells.length - 1] += character;
  }
  return cells.map((cell) => cell.trim());
}

/** Return the `count` times after `times`, or null if the times have no constant step. A step is a number of months, or a duration. */
export function timesAfter(times, count) {
  const hasZone = /:.*(Z|[+-]\d\d:?\d\d)$/.test(times[0]);
  const dates = times.map((time) => new Date(/:/.test(time) && !hasZone ? `${time.replace(" ", "T")}Z` : time));
  const last = dates.at(-1), text = (date) => date.toISOString().slice(0, Math.min(times[0].length, 16)).replace("T", times[0][10] ?? "T") + (hasZone ? "Z" : "");
  const months = (date) => date.getUTCFullYear() * 12 + date.getUTCMonth();
  for (const [position, after] of [
    [months, (step) => new Date(Date.UTC(last.getUTCFullYear(), last.getUTCMonth() + step, last.getUTCDate(), last.getUTCHours(), last.getUTCMinutes()))],
    [Number, (step) => new Date(Number(last) + step)],
  ]) {
    const step = position(dates[1] ?? last) - position(dates[0]);
    const isConstant = step > 0 && dates.every((date, i) => !i || position(date) - position(dates[i - 1]) === step);
    if (isConstant && (position !== months || dates.every((date) => date.getUTCDate() === last.getUTCDate()))) {
      return Array.from({ length: count }, (_, i) => text(after(step * (i + 1))));
    }
  }
  return null;
}
