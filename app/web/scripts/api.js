// How the page speaks with the service: what is sent, the shell line that sends the same, and what came back.
//
// A request is { path, query?, json?, file?, stream? }; its path is relative, so that the page works below a prefix too.

/** A failure in the service's own words; `param` names the control that caused it, where one did. */
export class Refused extends Error {
  constructor(message, param = null, status = 0) {
    super(message);
    this.param = param;
    this.status = status;
  }
}

let key = null; // of a service that asks for one; forgotten with the tab
try {
  key = sessionStorage.getItem("quartet-key");
} catch { /* a browser that keeps nothing */ }

/** Send this key from now on. Throws Refused for what could be none: a browser would not send it at all. */
export function useKey(given) {
  if (!/^[\x21-\x7e]+$/.test(given)) throw new Refused("A key has only letters, digits and signs of ASCII; this has another, or none at all.", null, 401);
  key = given;
  try {
    sessionStorage.setItem("quartet-key", key);
  } catch { /* then it lasts as long as the page */ }
}

function address({ path, query = {} }) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query)) if (value !== "" && value != null) url.searchParams.set(name, value);
  return url;
}

/** The answer once its head is there. Throws Refused, and AbortError when the signal says so. */
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
    response = await fetch(address(request), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(`The service at ${location.host} does not answer; try again when it runs.`);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** What comes of an answer, as `read()` gives it. Throws Refused when the connection ends before it is whole. */
async function whole(read) {
  try {
    return await read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The connection ended before the answer was whole; try again.");
  }
}

export const json = (response) => whole(() => response.json());
export const blob = (response) => whole(() => response.blob());

async function refusal(response) {
  try {
    const { error } = await response.json();
    return told(error, response.status);
  } catch { // not the service but something before it
    return new Refused(`The answer was ${response.status} ${response.statusText}.`, null, response.status);
  }
}

function told(error, status = 0) {
  return new Refused(`${error.message[0].toUpperCase()}${error.message.slice(1)}.`, error.param, status);
}

/** The events of a stream, up to its [DONE]. Throws Refused for one that tells of a failure or just ends. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await whole(() => reader.read());
    if (done) throw new Refused("The connection ended before the text was whole.");
    const ended = (held + value).split("\n\n");
    held = ended.pop();
    for (const event of ended) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const content = JSON.parse(data);
      if (content.error) throw told(content.error);
      yield content;
    }
  }
}

/** A file's name as curl's -F wants it: in quotes where it has what would end it. */
const named = (name) => (/[,;"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name);

/** Have an image show a picture of the service. */
export async function show(image, path) {
  if (!key) image.src = path;
  else image.src = URL.createObjectURL(await blob(await send({ path }))); // an image by itself sends no key
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The line that sends the same request from a shell. */
export function curl(request) {
  const url = address(request).href;
  const parts = [request.stream ? "curl -sN" : "curl -s", /[?&;$ ]/.test(url) ? quoted(url) : url];
  if (key) parts.push('-H "Authorization: Bearer $QUARTET_KEY"'); // the key itself is not for copying
  if (request.json) parts.push("-d", quoted(JSON.stringify(request.json)));
  if (request.file) parts.push("-F", quoted(`file=@${named(request.file.name)}`));
  return parts.join(" ");
}
