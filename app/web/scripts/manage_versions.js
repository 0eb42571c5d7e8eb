// The versions of a model in the store, with the admin key: compare their figures, activate, roll back and retire them.

import { json, send } from "./api.js";
import { byId, createElement, formatNumber } from "./dom.js";

/** Call `onChange` after each change. */
export function manageVersions(onChange) {
  const box = byId("manage"), [key, model, share] = ["key", "model", "share"].map((name) => byId(`manage-${name}`));
  const [form, choices, message, table] = ["form", "div", '[role="status"]', ".scroll"].map((part) => box.querySelector(part));
  const call = async (path, body) => json(await send({ path: `v1/admin/models${path}`, json: body, key: key.value.trim() }));
  const back = choices.querySelector("button");

  let latest; // the last request: answers of earlier ones are not shown
  /** Send a request, and show its answer with `render`, which returns the text of the message. */
  async function run(path, body, render) {
    message.className = message.textContent = "";
    const request = latest = call(path, body);
    try {
      const answer = await request;
      if (body) onChange();
      if (request === latest) message.textContent = render(answer);
    } catch (error) {
      if (request !== latest) return;
      message.className = "error";
      message.textContent = error.message;
    }
  }

  /** Read or change the chosen model, and show its versions. */
  const show = (action = "", body = undefined) => run(`/${model.value}${action}`, body, (row) => {
    table.replaceChildren(comparison(row, () => Number(share.value), show));
    back.textContent = row.canary ? "End the canary" : `Roll back to version ${row.previous}`;
    back.hidden = !row.canary && row.previous === null;
    return `${row.state}.`;
  });

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    choices.hidden = true;
    table.replaceChildren();
    run("", undefined, ({ data }) => {
      model.replaceChildren(...data.map(({ name }) => createElement("option", {}, name)));
      choices.hidden = false;
      show();
      return "";
    });
  });
  model.addEventListener("change", () => {
    table.replaceChildren(); // its buttons belong to the model before
    show();
  });
  back.addEventListener("click", () => show("/rollback", {}));
}

/** Return a table with a column for each version. Its buttons call `change(action, body)`; `share()` is the share of a canary. */
function comparison({ versions, retired }, share, change) {
  const button = (text, version, action, body) => createElement("button",
    { type: "button", class: "secondary small", "aria-label": `${text}: version ${version}`, on: { click: () => change(action, { version, ...body() }) } }, text);
  const actions = ({ version, role, problem }) => {
    if (problem) return [problem];
    if (retired.includes(version)) return [button("Serve again", version, "/retire", () => ({ undo: true }))];
    if (role === "shadow") return [button("Activate", version, "/activate", () => ({})), button("End the shadow", version, "/shadow", () => ({ version: null }))];
    return [button("Activate", version, "/activate", () => ({})), button("Canary", version, "/activate", () => ({ share: share() })),
      button("Shadow", version, "/shadow", () => ({ share: share() })), button("Retire", version, "/retire", () => ({}))];
  };
  const line = (name, cell) => createElement("tr", {}, createElement("th", { scope: "row" }, name),
    ...versions.map((version) => createElement("td", { class: "number" }, ...[cell(version)].flat())));
  const heading = ({ version, role }) => createElement("th", { scope: "col", class: "number" }, `version ${version}${role ? `, ${role}` : ""}`);
  const metrics = [...new Set(versions.flatMap((version) => Object.keys(version.metrics ?? {})))];
  return createElement("table", {},
    createElement("thead", {}, createElement("tr", {}, createElement("th", { scope: "col" }, "figure"), ...versions.map(heading))),
    createElement("tbody", {}, line("change", actions), line("created", ({ created = "" }) => created.slice(0, 10)),
      ...metrics.map((name) => line(name.replaceAll("_", " "), ({ metrics: own = {} }) => (name in own ? formatNumber(own[name], 5) : "–")))));
}
