// Connects, stays connected, and draws. Read-only.

import { Chart, legend, setText } from "./chart.js";
import { Model, clock, domainName, groupName, setName, time } from "./model.js";
import { alarmRows, drawAlarms, drawLog, drawPauses, drawRollout, drawSegments, drawStanding, pinned } from "./tables.js";

const POLL_MS = 5000; // if no stream is available
const SILENT_MS = 15000; // three beats of the stream were missed
const SAY_MS = 3000; // between two announcements
const find = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");

const model = new Model();
const chart = new Chart(find("chart"), find("tip"), { root: find("more"), text: find("more-text"), button: find("unfold") });
legend(find("legend"));

// -- the connection --------------------------------------------------------------------------------------

let source = null;
let contactMs = 0;
let polling = 0;
let trying = 0;

function link(look, text) {
  find("link").className = `link ${look}`;
  setText(find("link-text"), text);
}

function connected() {
  contactMs = performance.now();
  if (model.fleet && model.fleet.broker) link("bad", "no broker");
  else link("good", polling ? "polling" : "live");
}

function lose(how) {
  model.lose();
  link("wait", `${how}${model.lost == null ? "" : ` since ${time(model.lost)}`}, trying again`);
}

function take(change) {
  announce(model.apply(change));
  connected();
  drawChanged();
}

function open() {
  source = new EventSource("live/events");
  contactMs = performance.now();
  const receive = (event) => {
    stopPolling();
    take(JSON.parse(event.data));
  };
  source.addEventListener("snapshot", receive);
  source.addEventListener("change", receive);
  source.addEventListener("beat", (event) => {
    model.hear(JSON.parse(event.data).now);
    connected();
  });
  source.addEventListener("again", reopen);
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CONNECTING) return lose("exporter not reached");
    if (!polling) poll(); // refused: perhaps too many streams
    clearTimeout(trying);
    trying = setTimeout(open, POLL_MS);
  });
}

function reopen() {
  source.close();
  open();
}

// A connection may be dead without any notification.
function watch() {
  if (polling || performance.now() - contactMs < SILENT_MS) return;
  lose("silent");
  reopen();
}

async function poll() {
  clearTimeout(polling);
  polling = setTimeout(poll, POLL_MS);
  try {
    const answer = await fetch("live/state", { cache: "no-store", signal: AbortSignal.timeout(SILENT_MS) });
    const state = answer.ok ? await answer.json() : null;
    if (!polling) return; // the stream was faster, and is newer
    if (state) take(state);
    else lose(`exporter answers ${answer.status}`);
  } catch {
    if (polling) lose("exporter not reached");
  }
}

function stopPolling() {
  clearTimeout(polling);
  clearTimeout(trying);
  polling = trying = 0;
}

// -- announcements for screen readers, sparingly ---------------------------------------------------------

const waiting = new Map();
let saidAt = 0;
let saying = 0;

function announce(moved) {
  for (const [lane, state] of moved) if (["frozen", "resumed", "verified", "failed"].includes(state)) waiting.set(lane.lane, [state, lane]);
  if (!waiting.size || saying) return;
  saying = setTimeout(say, Math.max(0, saidAt + SAY_MS - Date.now()));
}

let known = null; // alarms on the page, by their key

// Announces each new alarm once, and the end of those that have an end text.
function shout(rows) {
  const now = new Map(rows.map((row) => [row.key, row]));
  const before = known;
  known = now;
  if (!before) return;
  const over = [...before.values()].filter((row) => row.over && !now.has(row.key)).map((row) => row.over);
  const news = rows.filter((row) => !before.has(row.key) && (row.loud || row.level === "bad")).map((row) => `${row.title}: ${row.text}`);
  if (over.length || news.length) find("shout").textContent = [...over, ...news].slice(0, 3).join(". ");
}

function say() {
  saying = 0;
  saidAt = Date.now();
  const byState = new Map();
  for (const [state, lane] of waiting.values()) byState.set(state, [...(byState.get(state) || []), `${setName(lane.set)} ${domainName(lane)}`]);
  waiting.clear();
  const parts = [...byState].map(([state, names]) => `${state}: ${names.length > 4 ? `${names.length} domains` : names.join(", ")}`);
  find("say").textContent = parts.join("; ");
}

// -- drawing ---------------------------------------------------------------------------------------------

let set = "";
let span = 0;
let setsShown = null;

// Alarms and paused VMs at once, the rest piece by piece: drawing a large fleet in one go would block the page.
const pieces = new Set();

function soon(piece) {
  if (pieces.has(piece)) return;
  pieces.add(piece);
  setTimeout(() => {
    pieces.delete(piece);
    piece();
  });
}

function drawChanged() {
  offerSets();
  drawMoving();
  soon(drawLines);
  soon(drawTables);
}

function drawChart() {
  if (!document.hidden) chart.draw(model, set, span);
}

function drawLines() {
  drawLog(find("log-body"), model);
}

function drawTables() {
  drawPauses(find("pauses-body"), find("pauses-note"), model, set);
  if (find("as-table").open) drawSegments(find("segment-table"), model, set);
}

function drawMoving() {
  watch();
  model.atOneInstant(drawInstant);
}

function drawInstant() {
  setText(find("clock"), clock(model.now()));
  if (!model.heard) return;
  const rows = alarmRows(model);
  shout(rows);
  if (document.hidden) return;
  drawRollout(find("rollout-body"), find("numbers"), model);
  drawAlarms(find("alarms"), find("alarm-list"), rows, model);
  drawPin(rows);
  drawStanding(find("standing-body"), find("standing-count"), model);
  soon(drawChart);
}

// The worst alarm, visible when the alarms are scrolled out of view.
function drawPin(rows) {
  const pin = pinned(rows, model);
  find("pin").hidden = !pin || find("alarms").getBoundingClientRect().bottom > 0;
  setText(find("pin-text"), pin);
}

function offerSets() {
  const sets = model.sets();
  const key = sets.join("\n");
  if (key === setsShown) return;
  setsShown = key;
  const choose = find("set");
  const options = ["", ...sets].map((name) => {
    const option = document.createElement("option");
    option.value = name;
    option.textContent = name ? groupName(name) : `all (${sets.length})`;
    return option;
  });
  choose.replaceChildren(...options);
  if (!sets.includes(set)) set = "";
  choose.value = set;
}

find("set").addEventListener("change", (event) => {
  set = event.target.value;
  drawChanged();
});
find("unfold").addEventListener("click", () => {
  chart.unfolded = !chart.unfolded;
  drawChanged();
});
find("view").addEventListener("submit", (event) => event.preventDefault());
for (const each of document.querySelectorAll("input[name=span]")) {
  each.addEventListener("change", () => {
    span = Number(each.value);
    drawMoving();
  });
}
find("as-table").addEventListener("toggle", () => {
  if (find("as-table").open) drawSegments(find("segment-table"), model, set);
});
addEventListener("resize", drawMoving);
addEventListener("scroll", () => model.heard && drawPin(alarmRows(model)), { passive: true });
document.addEventListener("visibilitychange", drawMoving);

const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
const minutes = -new Date().getTimezoneOffset();
const sign = minutes < 0 ? "−" : "+";
const offset = minutes ? `UTC${sign}${Math.floor(Math.abs(minutes) / 60)}${minutes % 60 ? `:${String(Math.abs(minutes) % 60).padStart(2, "0")}` : ""}` : "UTC";
setText(find("zone"), zone && zone !== "UTC" ? `${zone} (${offset})` : offset);

let timer = 0;
function pace() {
  clearInterval(timer);
  timer = setInterval(drawMoving, calm.matches ? 1000 : 250);
}
calm.addEventListener("change", pace);
pace();
open();
