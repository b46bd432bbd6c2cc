// The page asks the same addresses as any other client.
const $ = (id) => document.getElementById(id);
const EXAMPLES = [
  ["The striker scored twice in the second half.", ""],
  ["Flour prices kept climbing, and forty shops will close.", ""],
  ["A man is playing a guitar.", "Somebody makes music."],
];
let about = { tasks: {} }, asked = null, language = "curl";

async function call(path, body) {
  const headers = { "Content-Type": "application/json" };
  if ($("token").value) headers.Authorization = `Bearer ${$("token").value}`;
  let response;
  try {
    response = await fetch(`../${path}`, body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers });
  } catch {
    throw new Error("The service does not answer; is it still running?");
  }
  const content = await response.json().catch(() => ({}));
  if (response.ok) return content;
  if (response.status === 401) $("access").open = true;
  throw new Error(content.error?.message ?? content.error ?? `The service answered with ${response.status}.`);
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function show(error) {
  $("problem").hidden = !error;
  $("problem").textContent = error ? error.message : "";
}

const percent = (value) => `${(100 * value).toFixed(1)}\u00a0%`;
const input = () => ($("pair").value.trim() ? { text: $("text").value, text_pair: $("pair").value } : $("text").value);

async function answer() {
  show(null);
  $("status").textContent = "Asking …";
  try {
    asked = { path: "v1/predict_all", body: { inputs: input() } };
    const { data } = await call(asked.path, asked.body);
    $("rows").replaceChildren(...Object.entries(data[0]).map(([task, found]) => row(task, found)));
    $("answers").hidden = $("call").hidden = false;
    $("status").textContent = `${Object.keys(data[0]).length} tasks answered.`;
    code();
    await memories();
  } catch (error) {
    $("status").textContent = "";
    show(error);
  }
}

function row(task, found) {
  const made = element("tr");
  made.append(element("th", task, { scope: "row" }));
  if (found.error) {
    made.append(element("td", found.error, { colspan: 3 }));
    return made;
  }
  if (found.entities) {
    const cell = element("td", undefined, { colspan: 3 });
    cell.append(marked(asked.body.inputs, found.entities));
    made.append(cell);
    return made;
  }
  if (found.label === null) {
    made.append(element("td", found.score.toFixed(3)), element("td", "a value"), element("td"));
    return made;
  }
  const shown = found.labels ? found.labels.join(", ") || "none" : found.label;
  const bar = element("div", undefined, { class: "bar" });
  bar.append(
    element("meter", undefined, { min: 0, max: 1, value: found.score, "aria-hidden": "true" }),
    element("span", percent(found.score)),
  );
  const confidence = element("td");
  confidence.append(bar);
  const others = Object.entries(found.scores).filter(([label]) => label !== found.label).sort((a, b) => b[1] - a[1]);
  const rest = others.slice(0, 3).map(([label, score]) => `${label} ${percent(score)}`).join(", ");
  made.append(element("td", shown), confidence, element("td", rest, { class: "quiet" }));
  return made;
}

// The text with what was found in it, each with its label and score. Places are counted in characters, not in UTF-16.
function marked(text, entities) {
  if (!entities.length) return element("span", "nothing found", { class: "quiet" });
  const characters = [...text];
  const piece = (start, end) => characters.slice(start, end).join("");
  const line = element("p", undefined, { class: "marked" });
  let place = 0;
  for (const { label, score, start, end } of entities) {
    const mark = element("mark", piece(start, end));
    mark.append(" ", element("span", `${label} ${percent(score)}`));
    line.append(piece(place, start), mark);
    place = end;
  }
  line.append(piece(place));
  return line;
}

// Encoder and decoder have layers of the same number; layers that share a memory, as ALBERT's do, have its one name.
const keyOf = (each) => `${each.layer} ${each.name}`;

async function memories() {
  const tasks = [$("task").value, $("other").value].filter(Boolean);
  $("memories").hidden = true;
  if (!tasks.length) return;
  let readings;
  try {
    readings = await Promise.all(tasks.map((task) => call("v1/memories", { task, inputs: input() })));
  } catch {
    return; // tasks without a memory, or of another number of texts, have no map
  }
  const layers = readings[0].layers;
  const keys = layers.map(keyOf);
  const before = $("layer").value;
  const isOneStack = new Set(layers.map((each) => each.layer)).size === layers.length;
  const title = (each) => (isOneStack ? each.layer + 1 : each.name);
  $("layer").replaceChildren(...layers.map((each) => element("option", title(each), { value: keyOf(each) })));
  $("layer").value = keys.includes(before) && $("layer").dataset.chosen ? before : keys.at(-1);
  $("memories").hidden = false;
  draw(readings);
  $("layer").onchange = () => {
    $("layer").dataset.chosen = "yes";
    draw(readings);
  };
}

function draw(readings) {
  $("maps").replaceChildren(
    ...readings.map((reading) => {
      const found = reading.layers.find((each) => keyOf(each) === $("layer").value);
      const box = element("div", undefined, { class: "wide", tabindex: 0, role: "region", "aria-label": `Map of ${reading.task}` });
      if (found) box.append(map(reading, found));
      return box;
    }),
  );
}

function map(reading, found) {
  const table = element("table", undefined, { class: "map" });
  table.append(element("caption", `${reading.task}, layer ${$("layer").selectedOptions[0].text}, ${found.num_parents} parents`, { class: "quiet" }));
  const head = element("tr");
  head.append(element("th", "parent", { scope: "col" }), ...reading.tokens.map((token) => element("th", token, { scope: "col" })));
  table.append(head);
  const weights = new Map();
  found.parents.forEach((parents, token) =>
    parents.forEach((parent, k) => weights.set(`${parent},${token}`, [found.gates[token][k], found.shares[token][k]])),
  );
  const total = new Map();
  for (const [key, [gate]] of weights) total.set(key.split(",")[0], (total.get(key.split(",")[0]) ?? 0) + gate);
  for (const [parent] of [...total].sort((a, b) => b[1] - a[1]).slice(0, 24)) {
    const line = element("tr");
    line.append(element("th", parent, { scope: "row" }));
    reading.tokens.forEach((_, token) => {
      const [gate, share] = weights.get(`${parent},${token}`) ?? [0, 0];
      const cell = element("td", gate ? (100 * share).toFixed(1) : "");
      if (gate) {
        cell.style.background = `color-mix(in srgb, var(--heat) ${Math.round(70 * gate)}%, transparent)`;
        cell.title = `weight ${percent(gate)}, adds ${percent(share)}`;
      }
      line.append(cell);
    });
    table.append(line);
  }
  return table;
}

function code() {
  const address = new URL("../", location.href).href + asked.path;
  const body = JSON.stringify(asked.body);
  const quoted = body.replaceAll("'", "'\\''");
  const token = $("token").value ? ["-H 'Authorization: Bearer TOKEN' ", ', headers={"Authorization": "Bearer TOKEN"}'] : ["", ""];
  $("code").textContent =
    language === "curl"
      ? `curl ${address} ${token[0]}-H 'Content-Type: application/json' -d '${quoted}'`
      : `import json, requests\n\nbody = json.loads(${JSON.stringify(body)})\nprint(requests.post("${address}", json=body${token[1]}).json())`;
  $("as-curl").setAttribute("aria-pressed", language === "curl");
  $("as-python").setAttribute("aria-pressed", language === "python");
}

async function begin() {
  $("examples").replaceChildren(
    ...EXAMPLES.map(([text, pair], index) => {
      const button = element("button", `Example ${index + 1}`, { type: "button" });
      button.onclick = () => {
        [$("text").value, $("pair").value] = [text, pair];
        $("second").open = Boolean(pair);
        answer();
      };
      return button;
    }),
  );
  $("ask").onsubmit = (event) => {
    event.preventDefault();
    answer();
  };
  $("task").onchange = $("other").onchange = memories;
  for (const name of ["curl", "python"]) {
    $(`as-${name}`).onclick = () => {
      language = name;
      code();
    };
  }
  $("copy").onclick = async () => {
    await navigator.clipboard.writeText($("code").textContent);
    $("copied").textContent = "Copied.";
  };
  $("token").onchange = describe;
  await describe();
}

async function describe() {
  try {
    about = await call("info");
  } catch (error) {
    show(error);
    return;
  }
  show(null);
  const names = Object.keys(about.tasks);
  $("about").textContent = `${about.model_id}, ${about.model_dtype}: ${names.length} task${names.length === 1 ? "" : "s"}.`;
  $("task").replaceChildren(...names.map((name) => element("option", name)));
  $("other").replaceChildren(element("option", "nothing", { value: "" }), ...names.map((name) => element("option", name)));
}

begin();
