// Connects, keeps connected, and draws. Reads only.

import { Chart, legend, setText } from "./chart.js";
import { Model, domainName, setName, time } from "./model.js";
import { drawAlarms, drawLog, drawPauses, drawRollout, drawSegments, drawStanding } from "./tables.js";

const POLL_MS = 5000; // where no stream is to be had
const SAY_MS = 3000; // between two announcements
const find = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");

const model = new Model();
const chart = new Chart(find("chart"), find("tip"), find("more"));
legend(find("legend"));

// -- the connection --------------------------------------------------------------------------------------

let source = null;
let polling = 0;
let trying = 0;

function link(look, text) {
  find("link").className = `link ${look}`;
  setText(find("link-text"), text);
}

function connected() {
  if (model.fleet && model.fleet.broker) link("bad", "no broker");
  else link("good", polling ? "polling" : "live");
}

function take(change) {
  const news = model.apply(change);
  connected();
  announce(news);
  drawChanged();
}

function open() {
  source = new EventSource("live/events");
  const receive = (event) => {
    stopPolling();
    take(JSON.parse(event.data));
  };
  source.addEventListener("snapshot", receive);
  source.addEventListener("change", receive);
  source.addEventListener("error", () => {
    link("wait", "exporter not reached, trying again");
    if (source.readyState === EventSource.CLOSED) {
      source.close();
      poll(); // refused: perhaps too many streams
      clearTimeout(trying);
      trying = setTimeout(open, POLL_MS);
    }
  });
}

async function poll() {
  clearTimeout(polling);
  polling = setTimeout(poll, POLL_MS);
  try {
    const answer = await fetch("live/state", { cache: "no-store" });
    if (answer.ok) take(await answer.json());
    else link("bad", `exporter answers ${answer.status}`);
  } catch {
    link("wait", "exporter not reached, trying again");
  }
}

function stopPolling() {
  clearTimeout(polling);
  clearTimeout(trying);
  polling = trying = 0;
}

// -- saying aloud, sparingly -----------------------------------------------------------------------------

const waiting = new Map();
let saidAt = 0;
let saying = 0;

function announce({ moved, halted, alarms }) {
  const loud = [...halted.map((each) => `Rollout of ${each.update || "a freeze"} halted: ${each.reason}`), ...alarms.map((each) => each.text)];
  if (loud.length) find("shout").textContent = loud.slice(0, 3).join(". ");
  for (const [lane, state] of moved) if (["frozen", "resumed", "verified", "failed"].includes(state)) waiting.set(lane.lane, [state, lane]);
  if (!waiting.size || saying) return;
  saying = setTimeout(say, Math.max(0, saidAt + SAY_MS - Date.now()));
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

function drawChanged() {
  offerSets();
  drawLog(find("log-body"), model);
  drawPauses(find("pauses-body"), find("pauses-note"), model, set);
  if (find("as-table").open) drawSegments(find("segment-table"), model, set);
  drawMoving();
}

function drawMoving() {
  setText(find("clock"), time(model.now()));
  if (!model.heard || document.hidden) return;
  drawRollout(find("rollout-body"), find("numbers"), model);
  drawAlarms(find("alarms"), find("alarm-list"), model);
  drawStanding(find("standing-body"), find("standing-count"), model);
  chart.draw(model, set, span);
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
    option.textContent = name ? setName(name) : `all (${sets.length})`;
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
