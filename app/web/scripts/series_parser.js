// Numbers as people paste and save them: one series from a text, and the columns of a CSV file.

const MISSING = new Set(["", "null", "na", "n/a", "nan", "none", "-", "?"]);

/** A word as a number, null where a value is missing, undefined where it is neither. */
function value(word) {
  const text = word.trim().replace(/^"(.*)"$/, "$1").trim();
  if (MISSING.has(text.toLowerCase())) return null;
  const found = Number(text.replace(/^\+/, ""));
  return Number.isFinite(found) ? found : undefined;
}

/** The values of a pasted text: apart by commas, semicolons, blanks or lines. Words that are none stay, to be refused. */
export function parseValues(text) {
  const inside = text.trim().replace(/^\[|\]$/g, "");
  if (!inside.trim()) return [];
  const words = inside.replace(/[ \t]*(?:[,;]|\r?\n)[ \t]*/g, ",").split(/,|[ \t]+/);
  while (words.at(-1) === "") words.pop();
  return words.map((word) => (value(word) === undefined ? word : value(word)));
}

/** The columns of a CSV file that hold numbers: [{ name, values }], in its order. */
export function parseTable(text) {
  const lines = text.replace(/^\uFEFF/, "").split(/\r?\n/).filter((line) => line.trim());
  if (!lines.length) return [];
  const mark = ["\t", ";", ","].find((each) => lines[0].includes(each)) ?? ",";
  const decimal = mark === ";" ? (word) => word.replace(/^(\s*"?[-+]?\d*),(\d+"?\s*)$/, "$1.$2") : (word) => word;
  const rows = lines.map((line) => split(line, mark).map(decimal));
  const titled = rows[0].every((word) => typeof value(word) !== "number");
  const titles = titled ? rows.shift() : [];
  return rows[0] === undefined ? [] : rows[0].map((_, column) => ({
    name: titles[column]?.trim() || `Column ${column + 1}`,
    values: rows.map((row) => value(row[column] ?? "")),
  })).filter(({ values }) => values.some((each) => typeof each === "number") && !values.includes(undefined));
}

/** A line's cells; a mark between quotes is no mark. */
function split(line, mark) {
  const cells = [""];
  let inside = false;
  for (const character of line) {
    if (character === '"') inside = !inside;
    else if (character === mark && !inside) cells.push("");
    else cells[cells.length - 1] += character;
  }
  return cells;
}

/** As many digits as a series needs to be told apart, and no more. */
export function rounded(values) {
  const known = values.filter((each) => each !== null);
  const digits = Math.max(0, Math.min(12, 3 - Math.floor(Math.log10(Math.max(...known) - Math.min(...known) || 1))));
  return values.map((each) => (each === null ? null : Number(each.toFixed(digits))));
}
