// Requests to the service, and the curl commands that send the same requests.
//
// A request is { path, query?, json?, file?, sample?, stream? }. Paths are relative, so the page also works below a prefix.
// `sample` is the path of the file if this service serves the file, too.

/** An error with a message for the user. `param` is the field that caused the error, or null. */
export class RequestError extends Error {
  constructor(message, param = null, status = 0) {
    super(message);
    this.param = param;
    this.status = status;
  }
}

let key = null; // API key, kept until the tab is closed
try {
  key = sessionStorage.getItem("quartet-key");
} catch { /* storage is disabled */ }

/** Send this API key from now on. Throws RequestError for characters that a browser does not send in a header. */
export function setKey(value) {
  if (!/^[\x21-\x7e]+$/.test(value)) throw new RequestError("An API key consists of printable ASCII characters without spaces.", null, 401);
  key = value;
  try {
    sessionStorage.setItem("quartet-key", key);
  } catch { /* storage is disabled: the key lasts as long as the page */ }
}

function requestUrl({ path, query = {} }) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query)) if (value !== "" && value != null) url.searchParams.set(name, value);
  return url;
}

/** Send a request, and return the response as soon as its headers have arrived. Throws RequestError, or AbortError when aborted by `signal`. */
export async function send(request, signal) {
  const options = { signal, headers: key ? { authorization: `Bearer ${key}` } : {} };
  if (request.json) {
    options.method = "POST";
    options.body = JSON.stringify(request.json);
    options.headers["content-type"] = "application/json";
  } else if (request.file) {
    options.method = "POST";
    options.body = new FormData();
    options.body.append("file", request.file);
  }
  let response;
  try {
    response = await fetch(requestUrl(request), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (request.file) await readFile(request.file.slice(0, 1), request.file.name); // the file may be the cause
    throw new RequestError(`The service at ${location.host} does not answer. Try again later.`);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

/** Return the text of a file. Throws RequestError if the file was changed or deleted, or if it is a folder. */
export async function readFile(file, name = file.name) {
  try {
    return await file.text();
  } catch {
    throw new RequestError(`${name} cannot be read. Choose the file again.`);
  }
}

/** Return the result of `read()`. Throws RequestError when the connection ends before the answer is complete. */
async function readComplete(read) {
  try {
    return await read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("The connection ended before the answer was complete. Try again.");
  }
}

export const json = (response) => readComplete(() => response.json());
export const blob = (response) => readComplete(() => response.blob());

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return requestError(error, response.status);
  } catch { // not from the service, but from a proxy
    return new RequestError(`The request failed with status ${`${response.status} ${response.statusText}`.trim()}.`, null, response.status);
  }
}

function requestError(error, status = 0) {
  return new RequestError(`${error.message[0].toUpperCase()}${error.message.slice(1)}.`, error.param, status);
}

/** Yield the events of a stream up to [DONE]. Throws RequestError for an error event, or when the stream ends early. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await readComplete(() => reader.read());
    if (done) throw new RequestError("The connection ended before the text was complete.");
    const parts = (buffer + value).split("\n\n");
    buffer = parts.pop();
    for (const event of parts) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      let content;
      try {
        content = JSON.parse(data);
      } catch { // an empty or incomplete event; the event of an error follows
        continue;
      }
      if (content.error) throw requestError(content.error);
      yield content;
    }
  }
}

/** Return a file name for curl's -F option, quoted if it contains a separator. */
const curlFileName = (name) => (/[,;"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name);

/** Load a picture of the service into an <img> element. With a key, load it only when the element is near the visible part of the page. */
export async function showPicture(image, path) {
  if (!key) {
    image.src = path; // loading="lazy" delays the request
    return;
  }
  await nearViewport(image);
  image.src = await dataUrl(await blob(await send({ path }))); // <img src> sends no key
}

/** Return a URL that contains the data. Unlike an object URL, it needs no memory after the last element that shows it is removed. */
function dataUrl(data) {
  return new Promise((resolve) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.readAsDataURL(data);
  });
}

function nearViewport(element) {
  return new Promise((resolve) => {
    const observer = new IntersectionObserver((entries) => {
      if (!entries.some(({ isIntersecting }) => isIntersecting)) return;
      observer.disconnect();
      resolve();
    }, { rootMargin: "50%" });
    observer.observe(element);
  });
}

const MAX_ARGUMENT = 100_000; // bytes; Linux limits an argument of a command to 128 KiB

const shellQuote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

const jsonArgument = (text) => (new TextEncoder().encode(text).length > MAX_ARGUMENT ? `@- <<'EOF'\n${text}\nEOF` : shellQuote(text));

/** Return the curl command that sends the same request. */
export function curl(request) {
  const url = requestUrl(request).href;
  const parts = [request.stream ? "curl -sN" : "curl -s", /[?&;$ ]/.test(url) ? shellQuote(url) : url];
  if (request.sample) parts.unshift(`curl -s ${requestUrl({ path: request.sample }).href} |`);
  if (key) parts.push('-H "Authorization: Bearer $KEY"'); // never the key itself
  if (request.json) parts.push("-d", jsonArgument(JSON.stringify(request.json)));
  if (request.file) parts.push("-F", shellQuote(`file=@${request.sample ? "-;filename=" : ""}${curlFileName(request.file.name)}`));
  return parts.join(" ");
}
