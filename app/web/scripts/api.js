// Requests to the service.
//
// A request is { path, query?, json?, files?, sample?, stream?, accept?, key? }. `key` replaces the API key. Paths are relative,
// so the page also works below a prefix. `sample` is the path of the file if this service serves the file, too.

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

export const hasKey = () => Boolean(key);

/** Send this API key from now on. Throws RequestError for characters that a browser does not send in a header. */
export function setKey(value) {
  if (!/^[\x21-\x7e]+$/.test(value)) throw new RequestError("An API key consists of printable ASCII characters without spaces.", null, 401);
  key = value;
  try {
    sessionStorage.setItem("quartet-key", key);
  } catch { /* storage is disabled: the key lasts as long as the page */ }
}

/** Return the URL of a request. Parameters without a value are left out. A list is a repeated parameter. */
export function requestUrl({ path, query = {} }) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query)) {
    for (const each of [value].flat()) if (each !== "" && each != null) url.searchParams.append(name, each);
  }
  return url;
}

/** Send a request, and return the response as soon as its headers have arrived. Throws RequestError, or AbortError when aborted by `signal`. */
export async function send(request, signal) {
  const bearer = request.key ?? key, options = { signal, headers: bearer ? { authorization: `Bearer ${bearer}` } : {} };
  if (request.accept) options.headers.accept = request.accept;
  if (request.json) {
    options.method = "POST";
    options.body = JSON.stringify(request.json);
    options.headers["content-type"] = "application/json";
  } else if (request.files) {
    options.method = "POST";
    options.body = new FormData();
    for (const file of request.files) options.body.append("file", file);
  }
  let response;
  try {
    response = await fetch(requestUrl(request), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    for (const file of request.files ?? []) await readFile(file.slice(0, 1), file.name); // a file may be the cause
    throw new RequestError(`The service at ${location.host} does not answer. Try again later.`);
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

/** Return the bytes of a file. Throws RequestError if the file was changed or deleted, or if it is a folder. */
export async function readFile(file, name = file.name) {
  try {
    return await file.arrayBuffer();
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
