// The curl command and the Python code that send a request. Neither contains the API key.

import { hasKey, requestUrl } from "./api.js";

const MAX_ARGUMENT = 100_000; // bytes; Linux limits an argument of a command to 128 KiB

const shellQuote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

const jsonArgument = (text) => (new TextEncoder().encode(text).length > MAX_ARGUMENT ? `@- <<'EOF'\n${text}\nEOF` : shellQuote(text));

/** Return a file name for curl's -F option, quoted if it contains a separator. */
const curlFileName = (name) => (/[,;"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name);

const sampleUrl = ({ sample }) => requestUrl({ path: sample }).href;

export function curl(request) {
  const url = requestUrl(request).href;
  const parts = [request.stream ? "curl -sN" : "curl -s", /[?&;$ ]/.test(url) ? shellQuote(url) : url];
  if (request.sample) parts.unshift(`curl -s ${sampleUrl(request)} |`);
  if (hasKey()) parts.push('-H "Authorization: Bearer $KEY"');
  if (request.json) parts.push("-d", jsonArgument(JSON.stringify(request.json)));
  for (const { name } of request.files ?? []) parts.push("-F", shellQuote(`file=@${request.sample ? "-;filename=" : ""}${curlFileName(name)}`));
  return parts.join(" ");
}

/** Return Python code for the package requests. It prints the results as soon as all of them are complete. */
export function python(request) {
  const { stream, ...json } = request.json ?? {};
  const { origin, pathname, searchParams } = requestUrl(request);
  const parameters = Object.fromEntries([...searchParams.keys()].map((name) => {
    const values = searchParams.getAll(name);
    return [name, values.length > 1 ? values : values[0]];
  }));
  const opened = ({ name }) => (request.sample ? `("file", (${literal(name)}, sample))` : `("file", open(${literal(name)}, "rb"))`);
  const options = [
    searchParams.size ? `params=${literal(parameters)}` : null,
    request.json ? `json=${literal(json)}` : null,
    request.files ? `files=[${request.files.map(opened).join(", ")}]` : null,
    hasKey() ? 'headers={"Authorization": "Bearer " + os.environ["KEY"]}' : null,
  ].filter(Boolean);
  return [
    hasKey() ? "import os" : null,
    "import requests  # pip install requests",
    "",
    request.sample ? `sample = requests.get(${literal(sampleUrl(request))}).content` : null,
    "answer = requests.post(",
    ...[literal(origin + pathname), ...options].map((line) => `    ${line},`),
    ")",
    "answer.raise_for_status()",
    'print(answer.json()["results"])',
  ].filter((line) => line !== null).join("\n");
}

/** Return a value of JSON as a literal of Python. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).filter(([, each]) => each !== undefined).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}
