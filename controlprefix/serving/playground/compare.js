// Settings beside each other: their dials, their texts, their code.
"use strict";
const at = (id) => document.getElementById(id);
const say = (text) => { at("status").textContent = text; };
let model = "", attributes = {}, chats = true;

const headers = () => {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: headers() });
  if (answer.status === 401) at("keyed").hidden = false;
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.error ? body.error.message : `the server answered ${answer.status}`);
  }
  return answer;
}

function fill(select, values, kept) {
  select.replaceChildren(...values.map((value) => new Option(value || "—", value)));
  if (values.includes(kept)) select.value = kept;
}

const STRENGTHS = [[-0.05, "avoided"], [0.05, "none"], [0.75, "weak"], [1.25, "as learned"], [4, "strong"]];
const inWords = (value) => STRENGTHS.find(([limit]) => value <= limit)[1];

function linked(range, output, words = inWords) {
  const show = () => {
    output.textContent = `${range.value} ${words(Number(range.value))}`;
    range.setAttribute("aria-valuetext", output.textContent);
  };
  range.addEventListener("input", show);
  show();
}

function addSide(state = {}) {
  const side = at("side").content.cloneNode(true).firstElementChild;
  linked(side.querySelector(".much"), side.querySelector("output"));
  side.querySelector(".copy").onclick = () =>
    navigator.clipboard.writeText(side.querySelector(".text").textContent).then(() => note(side, "copied"));
  side.querySelector(".prefer").onclick = () => prefer(side).catch((error) => note(side, error.message, true));
  side.querySelector(".code").onclick = (event) => {
    const snippet = side.querySelector(".snippet");
    snippet.hidden = !snippet.hidden;
    event.target.setAttribute("aria-expanded", String(!snippet.hidden));
    showCode(side);
  };
  side.querySelector(".close").onclick = () => { side.remove(); changed(); };
  side.addEventListener("input", () => { side.querySelector(".text").classList.add("old"); changed(); });
  side.state = state;
  at("sides").append(side);
  return side;
}

const sides = () => [...document.querySelectorAll(".side")];

function note(side, text, wrong = false) {
  const place = side.querySelector(".note");
  place.textContent = text;
  place.classList.toggle("error", wrong);
}

// What is set is in the address, so that it can be sent to someone. Safari refuses more than a
// hundred changes of it in half a minute.
let saving, savedAt = 0;
function changed() {
  clearTimeout(saving);
  const rest = savedAt + 350 - Date.now();
  if (rest > 0) saving = setTimeout(save, rest);
  else save();
  sides().forEach(showCode);
}

function save() {
  savedAt = Date.now();
  const state = { prompt: at("prompt").value, task: at("task").value, seed: at("seed").value,
    tokens: at("tokens").value, temperature: at("temperature").value, sides: sides().map(settings) };
  try {
    history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(state))}`);
  } catch { /* the address stays as it was */ }
}

function settings(side) {
  const labels = {};
  for (const row of dials(side)) {
    const [pick, range, fade] = parts(row);
    (labels[pick.dataset.attribute] ??= []).push([pick.value, range.value, fade.value]);
  }
  return { user: side.querySelector(".user").value, much: side.querySelector(".much").value, labels,
    calibrated: side.querySelector(".calibrated input").checked };
}

function restore(side) {
  const { user = "", much = "1", labels = {}, calibrated = false } = side.state;
  side.querySelector(".calibrated input").checked = calibrated;
  const select = side.querySelector(".user"), range = side.querySelector(".much");
  if ([...select.options].some((option) => option.value === user)) select.value = user;
  range.value = much;
  range.dispatchEvent(new Event("input"));
  for (const [name, values] of Object.entries(labels)) {
    let row = side.querySelector(`.dial[data-attribute=${CSS.escape(name)}]`);
    for (const [i, [label, strength, fading]] of values.entries()) {
      if (row && i) row.after(row = dial(name));
      const [pick, range, fade] = row ? parts(row) : [];
      if (!pick || ![...pick.options].some((option) => option.value === label)) continue;
      pick.value = label;
      pick.dispatchEvent(new Event("input"));
      range.value = strength;
      range.dispatchEvent(new Event("input"));
      fade.value = fading;
    }
  }
  side.querySelector(".text").classList.remove("old");
}

function showCode(side) {
  const snippet = side.querySelector(".snippet");
  if (snippet.hidden) return;
  const { stream, ...body } = asked(side);
  const { model: name, messages, prompt, max_tokens, temperature, seed, ...steering } = body;
  // As Python writes it; `true` stands at the end, and null nowhere.
  const extra = JSON.stringify(steering).replace(/"calibrated":true}$/, '"calibrated":True}');
  const sampling = (temperature === null ? "" : ` temperature=${temperature},`) + (seed === undefined ? "" : ` seed=${seed},`);
  const json = JSON.stringify(body, null, 2), read = chats ? "message.content" : "text";
  snippet.textContent = `curl ${location.origin}${route()} -H 'Content-Type: application/json' \\\n` +
    `  -d '${json.replaceAll("'", "'\\''")}'\n\n` +
    `from openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key="none")\n` +
    `answer = client.${chats ? "chat." : ""}completions.create(\n    model=${JSON.stringify(name)},\n` +
    (chats ? `    messages=[{"role": "user", "content": ${JSON.stringify(messages[0].content)}}],\n`
      : `    prompt=${JSON.stringify(prompt)},\n`) +
    `    max_tokens=${max_tokens},${sampling}\n    extra_body=${extra},\n)\nprint(answer.choices[0].${read})\n\n` +
    `const answer = await fetch("${location.origin}${route()}", {\n  method: "POST",\n` +
    `  headers: { "Content-Type": "application/json" },\n  body: JSON.stringify(${json.replaceAll("\n", "\n  ")}),\n});\n` +
    `console.log((await answer.json()).choices[0].${read});\n`;
}

async function prefer(side) {
  const better = side.querySelector(".text").textContent;
  const others = sides().filter((other) => other !== side)
    .map((other) => other.querySelector(".text").textContent).filter((text) => text && text !== better);
  const user = side.querySelector(".user").value || sides().map((s) => s.querySelector(".user").value).find(Boolean);
  if (!better || !others.length) throw new Error("write two different texts first");
  if (!user) throw new Error("choose the user whose preference this is");
  const { task, prompt } = written;
  let count = 0;
  for (const rejected of others)
    count = (await (await ask("/v1/feedback", { method: "POST", body: JSON.stringify(
      { user, prompt, chosen: better, rejected, ...(task ? { task } : {}) }) })).json()).num_kept;
  note(side, `kept for ${user}: ${count} preferences to learn from`);
}

const BETWEEN = "\u2194";  // no label: a position between two opposites, or between numbers

const NUMBER = /^-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?$/;  // as the server has it: 007 is a name

// The labels at the ends of an attribute with opposites, or with numbers, and the values there.
function endsOf(name) {
  const labels = attributes[name].labels;
  const numbers = Object.keys(labels).filter((label) => NUMBER.test(label)).sort((a, b) => a - b);
  if (numbers.length > 1) return { labels: [numbers[0], numbers.at(-1)], values: [numbers[0], numbers.at(-1)] };
  const { opposites } = attributes[name];
  return opposites && { labels: opposites, values: [-1, 1] };
}

// What a value between the ends is called.
function inWordsBetween(ends, value) {
  if (ends.values[0] !== -1) return "";  // a number is a label itself
  return Math.abs(value) < 0.05 ? "neither" : ends.labels[value < 0 ? 0 : 1];
}

// Strengths over the tokens of a text, as [share of the tokens, multiplier].
const FADES = { "throughout": null, "fading out": [[0, 1], [0.5, 0]], "growing": [[0, 0], [0.5, 1]] };

const parts = (row) => [row.querySelector("select"), row.querySelector("input"), row.querySelector(".fade")];
const dials = (side) => [...side.querySelectorAll(".dials .dial")].filter((row) => parts(row)[0].value);

function dial(name) {
  const row = document.createElement("div");
  row.className = "dial";
  row.dataset.attribute = name;
  const pick = document.createElement("select");
  pick.dataset.attribute = name;
  pick.setAttribute("aria-label", `label of ${name}`);
  pick.append(new Option(`${name}: —`, ""));
  for (const label of Object.keys(attributes[name].labels).sort())
    pick.append(new Option(`${name}: ${label}`, label));
  const ends = endsOf(name);
  if (ends) pick.append(new Option(`${name}: ${ends.labels.join(" … ")}`, BETWEEN));
  const range = Object.assign(document.createElement("input"),
    { type: "range", min: -1, max: 3, step: 0.1, value: 1 });
  range.setAttribute("aria-label", `strength of ${name}`);
  const output = document.createElement("output");
  linked(range, output, (value) => pick.value === BETWEEN ? inWordsBetween(ends, value) : inWords(value));
  const fade = document.createElement("select");
  fade.className = "fade";
  fade.setAttribute("aria-label", `${name} over the text`);
  fade.append(...Object.keys(FADES).map((words) => new Option(words)));
  const mix = Object.assign(document.createElement("button"), { className: "quiet", textContent: "and …" });
  mix.title = `Mix with another label of ${name}`;
  mix.onclick = () => { row.after(dial(name)); changed(); };
  const more = document.createElement("div");
  more.className = "more";
  more.append(fade, mix);
  more.hidden = true;
  pick.addEventListener("input", () => {
    more.hidden = !pick.value;
    mix.hidden = pick.value === BETWEEN;
    const wasBetween = row.dataset.between === "yes";
    row.dataset.between = pick.value === BETWEEN ? "yes" : "no";
    [range.min, range.max] = pick.value === BETWEEN ? ends.values : [-1, 3];
    range.step = (range.max - range.min) / (pick.value === BETWEEN ? 20 : 40);
    if (wasBetween && pick.value !== BETWEEN) range.value = 1;  // a number is no strength
    range.dispatchEvent(new Event("input"));
  });
  row.append(pick, range, output, more);
  return row;
}

function showDials(side) {
  side.querySelector(".dials").replaceChildren(...Object.keys(attributes).sort().map(dial));
  const labels = Object.values(attributes).flatMap((attribute) => Object.values(attribute.labels));
  side.querySelector(".calibrated").hidden = !labels.some((label) => label.has_dial);
}

const chosenUsers = () => [...document.querySelectorAll("select.user")].map((select) => select.value);

// The first thousand users, and others that may come after them.
async function showUsers(...others) {
  const users = (await (await ask("/v1/users")).json()).users;
  for (const name of others) if (name && !users.includes(name)) users.push(name);
  for (const select of document.querySelectorAll("select.user")) fill(select, ["", ...users], select.value);
}

async function begin() {
  try {
    if (model) {  // another key: what is set stays
      for (const side of sides()) side.state = settings(side);
      saved.task = at("task").value;
    }
    const entries = (await (await ask("/v1/models")).json()).data, models = entries.map((one) => one.id);
    chats = entries[0].has_chat_template;
    model = models[0];
    fill(at("task"), ["", ...models.slice(1).map((id) => id.slice(model.length + 1))]);
    attributes = (await (await ask("/v1/attributes")).json()).attributes;
    if (saved.task) at("task").value = saved.task;
    sides().forEach(showDials);
    await showUsers();
    sides().forEach(restore);
    const isEmpty = models.length === 1 && !Object.keys(attributes).length && !document.querySelector(".user").value
      && document.querySelector(".user").options.length === 1;
    say(isEmpty ? "Nothing is learned yet: texts are the plain model's. Enrol a user below, or train a task." : "");
  } catch (error) {
    say(at("keyed").hidden ? error.message : `${error.message}. Type the API key of your tenant.`);
  }
}

function route() {
  return chats ? "/v1/chat/completions" : "/v1/completions";  // without a chat template, prompts
}

function asked(side) {
  const chosen = {}, strengths = {}, schedules = {}, tokens = Number(at("tokens").value);
  for (const row of dials(side)) {
    const [pick, range, fade] = parts(row), name = pick.dataset.attribute, amount = Number(range.value);
    if (pick.value === BETWEEN) chosen[name] = amount;
    else if (typeof chosen[name] !== "number") chosen[name] = { ...chosen[name], [pick.value]: amount };
    const points = FADES[fade.value];
    if (points) schedules[name] = points.map(([share, multiplier]) => [Math.round(share * tokens), multiplier]);
  }
  const user = side.querySelector(".user").value;
  if (user) strengths.user = Number(side.querySelector(".much").value);
  const task = at("task").value;
  const seed = at("seed").value.trim() ? Number(at("seed").value) : undefined;
  return {
    model: task ? `${model}/${task}` : model,
    ...(chats ? { messages: [{ role: "user", content: at("prompt").value }] } : { prompt: at("prompt").value }),
    max_tokens: tokens,
    temperature: at("temperature").value === "" ? null : Number(at("temperature").value),
    ...(Number.isSafeInteger(seed) ? { seed } : {}),
    stream: true, attributes: chosen, strengths,
    ...(Object.keys(schedules).length ? { schedules } : {}), ...(user ? { user } : {}),
    ...(side.querySelector(".calibrated input").checked ? { calibrated: true } : {}),
  };
}

async function write(side, signal) {
  const text = side.querySelector(".text"), classified = side.querySelector(".classified");
  text.textContent = "";
  text.classList.remove("old");
  note(side, "");
  classified.replaceChildren();
  const answer = await ask(route(), { method: "POST", signal, body: JSON.stringify(asked(side)) });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = "", next; !(next = await reader.read()).done;) {
    const lines = (held + next.value).split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]" || line.startsWith(":")) continue;  // the end, or a comment
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) text.textContent += (chats ? choice.delta.content : choice.text) || "";
    }
  }
  if (!text.textContent.trim()) return note(side, "an empty text");
  const found = await (await ask("/v1/classify",
    { method: "POST", signal, body: JSON.stringify({ texts: [text.textContent] }) })).json();
  for (const [attribute, labels] of Object.entries(found.results[0]))
    for (const [label, chance] of Object.entries(labels)) {
      const row = document.createElement("div");
      row.className = "bar";
      const name = document.createElement("span"), bar = document.createElement("i"),
        share = document.createElement("span");
      name.textContent = `${attribute}: ${label}`;
      bar.style.width = `${100 * chance}%`;
      share.textContent = `${Math.round(100 * chance)} %`;
      row.append(name, bar, share);
      classified.append(row);
    }
}

async function busy(button, work, report = say) {
  button.disabled = true;
  report("");
  try { await work(); } catch (error) { report(error.message); } finally { button.disabled = false; }
}

let running = new AbortController(), written = {};

async function generate() {
  running.abort();  // one run at a time: streams never mix
  const run = running = new AbortController();
  written = { prompt: at("prompt").value, task: at("task").value };
  at("stop").disabled = false;
  changed();
  await Promise.all(sides().map((side) => write(side, run.signal).catch((error) =>
    note(side, error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError"))));
  if (run === running) at("stop").disabled = true;
}

at("generate").onclick = generate;
at("stop").onclick = () => running.abort();
at("add").onclick = () => {
  const side = addSide(sides().length ? settings(sides().at(-1)) : {});
  showDials(side);
  showUsers(...chosenUsers(), side.state.user).then(() => { restore(side); changed(); });
};
for (const id of ["prompt", "task", "seed", "tokens", "temperature"])
  at(id).addEventListener("input", () => {
    sides().forEach((side) => side.querySelector(".text").classList.add("old"));
    changed();
  });
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
});
at("key").onchange = begin;
let saved = {};
try { saved = JSON.parse(decodeURIComponent(location.hash.slice(1))); } catch { /* no state in the address */ }
for (const id of ["prompt", "seed", "tokens", "temperature"]) if (saved[id] !== undefined) at(id).value = saved[id];
for (const state of saved.sides?.length ? saved.sides : [{}, {}]) addSide(state);
begin();
