// Read a series from pasted text, and the numeric columns of a CSV file.

const MISSING = new Set(["", "null", "na", "n/a", "nan", "none", "-", "?"]);

/** Return a word as a number, null for a missing value, or undefined for any other word. */
function parseValue(word) {
  const text = word.trim().replace(/^"(.*)"$/, "$1").trim();
  if (MISSING.has(text.toLowerCase())) return null;
  const result = Number(text.replace(/^\+/, ""));
  return Number.isFinite(result) ? result : undefined;
}

/**
 * Return the values of a text, separated by commas, semicolons, spaces, tabs or lines. Other words are kept, so that the
 * service rejects them.
 */
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

/** Return the first date or time in ISO 8601 in a CSV file, or null. */
export function firstTime(text) {
  return /^"?(\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:Z|[+-]\d\d:?\d\d)?)?)"?[,;\t\r]/m.exec(text)?.[1] ?? null;
}

/** Return the numeric columns of a CSV file in order, as [{ name, values }]. */
export function parseTable(text) {
  const all = text.replace(/^\uFEFF/, "").split(/\r?\n/), hasText = (line) => line.trim() !== "";
  if (!all.some(hasText)) return [];
  const inner = all.slice(all.findIndex(hasText), all.findLastIndex(hasText) + 1);
  const found = ["\t", ";", ","].find((each) => splitCells(inner[0], each).length > 1), separator = found ?? ",";
  // In a file with one column, an empty line is a missing value.
  const lines = inner.filter((line) => !found || line.includes(separator) || hasText(line));
  const decimal = separator === ";" ? (word) => word.replace(/^(\s*"?[-+]?\d*),(\d+"?\s*)$/, "$1.$2") : (word) => word;
  const rows = lines.map((line) => splitCells(line, separator).map(decimal));
  const hasHeader = rows[0].some((word, column) => isTitle(word) && (!rows[0].some(isNumber) || !isTitle(rows[1]?.[column] ?? word)));
  const titles = hasHeader ? rows.shift() : [];
  return rows[0] === undefined ? [] : rows[0].map((_, column) => ({
    name: titles[column]?.trim() || `Column ${column + 1}`,
    values: rows.map((row) => parseValue(row[column] ?? "")),
  })).filter(({ values }) => values.some((each) => typeof each === "number") && !values.includes(undefined));
}

const isNumber = (word) => typeof parseValue(word) === "number";

/** Return whether a cell may be a column title: it is neither a value nor a date. */
const isTitle = (word) => parseValue(word) === undefined && !/^\s*"?\d/.test(word);

/** Return the cells of a line. Separators within quotes do not count. */
function splitCells(line, separator) {
  const cells = [""];
  let inside = false;
  for (const character of line) {
    if (character === '"') inside = !inside;
    else if (character === separator && !inside) cells.push("");
    else cells[cells.length - 1] += character;
  }
  return cells;
}

/** Round values to the digits that distinguish them. */
export function roundValues(values) {
  const known = values.filter((each) => each !== null);
  const digits = Math.max(0, Math.min(12, 3 - Math.floor(Math.log10(Math.max(...known) - Math.min(...known) || 1))));
  return values.map((each) => (each === null ? null : Number(each.toFixed(digits))));
}
