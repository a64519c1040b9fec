// Users: enrolled, trained, versions, forgotten.
"use strict";
const tell = (text) => { at("progress").textContent = text; };
const doing = (button, work) => busy(button, work, tell);
const pathOf = (user) => `/v1/users/${encodeURIComponent(user)}`;
const STATES = { queued: "waits", running: "is being trained", succeeded: "is trained", failed: "failed", cancelled: "was cancelled" };

function chosenUser() {
  const user = at("chosen").value;
  if (!user) throw new Error("choose a user first");
  return user;
}

// Follows a job to its end.
async function follow(job) {
  for (; !job.finished_at; job = await (await ask(`/v1/jobs/${job.id}`)).json()) {
    tell(`${job.user} ${STATES[job.status]}${job.num_steps ? `: ${job.num_steps} steps` : ""}`);
    await new Promise((done) => setTimeout(done, 700));
  }
  await showUsers(...chosenUsers(), job.user);
  at("chosen").value = job.user;
  await showVersions();
  tell(job.error ? `${job.user}: ${job.error}` : `${job.user} ${STATES[job.status]}, version ${job.version}`);
}

async function showVersions() {
  const user = at("chosen").value, place = at("versions");
  place.replaceChildren();
  if (!user) return;
  const { versions } = await (await ask(pathOf(user))).json();
  const table = document.createElement("table");
  for (const version of versions.toReversed()) {
    const row = table.insertRow();
    row.insertCell().textContent = `version ${version.version}`;
    row.insertCell().textContent = new Date(version.created_at).toLocaleString();
    row.insertCell().textContent = version.current ? "in use" : "";
    const button = Object.assign(document.createElement("button"),
      { className: "quiet", textContent: "Use this one", disabled: version.current });
    button.onclick = (event) => doing(event.target, async () => {
      await ask(`${pathOf(user)}/rollback`, { method: "POST", body: JSON.stringify({ to: version.version }) });
      await showVersions();
      tell(`${user}: version ${version.version} is in use`);
    });
    row.insertCell().append(button);
  }
  place.append(table);
}

at("chosen").addEventListener("input", () => showVersions().catch((error) => tell(error.message)));
at("learn").onclick = (event) => doing(event.target, async () => {
  const answer = await ask(`${pathOf(chosenUser())}/learn`, { method: "POST", body: "{}" });
  await follow(await answer.json());
});
at("forget").onclick = (event) => doing(event.target, async () => {
  const user = chosenUser();
  if (!confirm(`Forget ${user}: every version, text and preference?`)) return;
  await ask(pathOf(user), { method: "DELETE" });
  await showUsers(...chosenUsers().filter((name) => name !== user));
  at("chosen").value = "";
  await showVersions();
  tell(`${user} is forgotten`);
});
at("enroll").onclick = (event) => doing(event.target, async () => {
  const name = at("name").value.trim();
  const texts = at("texts").value.split("\n").filter((line) => line.trim());
  if (!name || !texts.length) throw new Error("give a name and a text");
  const known = [...at("chosen").options].some((option) => option.value === name);
  if (known && !confirm(`${name} has a prefix; make a new version from these ${texts.length} texts?`)) return;
  const train = at("train").checked ? { train: {} } : {};
  const answer = await ask(pathOf(name), { method: "PUT", body: JSON.stringify({ texts, ...train }) });
  if (answer.status === 202) return follow(await answer.json());
  await showUsers(...chosenUsers(), name);
  document.querySelector(".side .user").value = at("chosen").value = name;
  await showVersions();
  tell(`${name} is enrolled from ${texts.length} texts of ${texts.join(" ").split(/\s+/).length} words`);
});
const drop = at("users");
drop.addEventListener("dragover", (event) => event.preventDefault());
drop.addEventListener("drop", async (event) => {
  event.preventDefault();
  const files = await Promise.all([...event.dataTransfer.files].map((file) => file.text()));
  at("texts").value = [at("texts").value, ...files].filter((text) => text.trim()).join("\n");
});
