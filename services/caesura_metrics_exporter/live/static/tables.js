// Everything besides the lanes: the rollout, alarms, paused VMs, pauses, the log. Text is inserted as text, never as markup.

import { element, setText } from "./chart.js";
import { STATES, count, domainName, seconds, setName, time } from "./model.js";

const DONE = new Set(["completed", "failed", "cancelled"]);
const WAVE_WORDS = { pending: "waits", verifying: "being verified", soaking: "soaks", completed: "verified" };
const WAVE_LOOK = { scheduled: "scheduled", started: "started", verifying: "resumed", soaking: "resumed", completed: "verified", failed: "failed", cancelled: "cancelled" };
const LEVELS = { quiet: ["·", ""], good: ["✓", "well"], warning: ["!", "warning"], bad: ["✕", "bad"] };
const MOST_ROWS = 60;
const FEW_ROWS = 12; // if there are more than twice as many, only the worst
const MOST_WAVES = 12;
const MOST_STANDING = 24;
const MOST_NAMED = 3;
const MOST_OTHERS = 20; // alarms of one kind, in addition to the first

// Builds a node; strings become text. Null attributes are omitted.
export function h(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) if (value != null) node.setAttribute(key, value);
  node.append(...children.flat().filter((each) => each != null));
  return node;
}

// -- the rollout ----------------------------------------------------------------------------------------

export function drawRollout(root, numbers, model) {
  const [rollout, ...others] = model.rollouts;
  const parts = [];
  if (!rollout) {
    parts.push(h("p", { class: "over" }, "Rollout"), h("h2", { id: "rollout-title", class: "quiet" }, "No rollout yet"));
    parts.push(h("p", { class: "line" }, "When one starts, its update domains appear below."));
  } else {
    const over = DONE.has(rollout.status) || rollout.status === "aborted";
    parts.push(h("p", { class: "over" }, over ? "Last rollout" : rollout.update ? "Rollout" : "Freeze on demand"));
    const title = rollout.update || `hold for ${rollout.hold_s} s`;
    parts.push(h("h2", { id: "rollout-title" }, title, " ", h("span", { class: `chip ${rollout.status}` }, rollout.queued_behind ? "queued" : rollout.status)));
    parts.push(h("p", { class: "line" }, sentence(rollout, model)));
    if (rollout.reason && rollout.status !== "halted") parts.push(h("p", { class: "reason" }, rollout.reason)); // that of a halt is an alarm
    parts.push(...failedUpdates(rollout));
    parts.push(waves(rollout));
    const facts = [`started ${time(rollout.created_at)}`, `budget ${rollout.budget_s} s`, `notice ${rollout.notice_s} s`];
    if (rollout.ended_at) facts.push(`ended ${time(rollout.ended_at)}, after ${seconds(rollout.ended_at - rollout.created_at)}`);
    if (rollout.requested_by) facts.push(`asked for by ${rollout.requested_by}`);
    parts.push(h("p", { class: "facts" }, facts.join(" · ")));
    for (const other of others.slice(0, 5)) {
      const reason = other.reason ? `: ${other.reason}` : "";
      parts.push(h("p", { class: `facts other ${other.status}` }, `Also ${other.queued_behind ? "queued" : other.status}: `, h("bdi", {}, other.update || "freeze on demand"), `, ${count(other.sets, "set")}${reason}`));
    }
  }
  replaceIfChanged(root, parts);
  drawNumbers(numbers, model);
}

function failedUpdates(rollout) {
  return (rollout.failed_updates || []).map((each) => {
    const code = each.exit_code == null ? "" : `, exit code ${each.exit_code}`;
    const line = h("p", { class: "reason" }, h("bdi", {}, rollout.update), " on ", h("bdi", {}, each.host), `: ${each.outcome}${code}`);
    return h("div", { class: "failed-update" }, line, each.output ? h("pre", {}, each.output) : null);
  });
}

function sentence(rollout, model) {
  const total = rollout.waves.length;
  const done = rollout.counts.completed || 0;
  const verified = `${done} of ${count(total, "wave")} verified`;
  if (rollout.status === "completed") return `All ${count(total, "wave")} verified, ${count(rollout.sets, "set")}.`;
  if (rollout.status === "aborted") return `${verified} before the abort.`;
  const current = rollout.waves.find((wave) => !DONE.has(wave.status)) || rollout.waves.at(-1);
  if (!current) return "No wave is planned.";
  if (rollout.status === "halted") {
    const failed = rollout.waves.find((wave) => wave.status === "failed") || current;
    return `Wave ${failed.wave + 1} stopped the rollout; ${verified}. Nothing more starts until somebody resumes or aborts it.`;
  }
  if (rollout.queued_behind) {
    const at = current.not_before ? `, not before ${time(current.not_before)}` : "";
    return `Queued behind ${rollout.queued_behind}${at}. It starts when that has ended.`;
  }
  const standing = current.standing || 0;
  const seen = model.paused.some((each) => model.blindSince(each) == null);
  let what = `is ${WAVE_WORDS[current.status] || current.status}`;
  if (current.status === "pending") what = "is next";
  if (current.status === "soaking") what = "soaks";
  if (current.status === "started") what = `is under way: ${standing ? (seen ? `${count(standing, "VM is", "VMs are")} paused` : `${count(standing, "VM was", "VMs were")} paused at the last report`) : "no VM is paused"}`;
  if (current.status === "scheduled") {
    const left = current.not_before ? Math.max(0, Math.ceil(current.not_before - model.asOf())) : 0;
    const approved = current.events ? `, ${current.approved || 0} of ${current.events} approved` : "";
    what = `is announced: it starts ${left ? `within ${left} s` : "now"}${approved}`;
  }
  return `Wave ${current.wave + 1} ${what}; ${verified}.`;
}

// If there are many, the completed and the pending ones are merged into one each.
function folded(all) {
  if (all.length <= MOST_WAVES) return { before: [], shown: all, after: [] };
  const current = all.findIndex((wave) => wave.status !== "completed");
  const first = Math.max(0, Math.min((current < 0 ? all.length : current) - 1, all.length - (MOST_WAVES - 2)));
  return { before: all.slice(0, first), shown: all.slice(first, first + MOST_WAVES - 2), after: all.slice(first + MOST_WAVES - 2) };
}

function several(list, look, word) {
  const bar = element("svg", { class: `seg ${look}`, height: 8, width: "100%", "aria-hidden": "true" });
  bar.append(element("rect", { class: "body", x: 0, y: 0, width: "100%", height: 8, rx: 2 }));
  const range = list.length > 1 ? `${list[0].wave + 1} to ${list.at(-1).wave + 1}` : String(list[0].wave + 1);
  return h("li", { class: "several" }, bar, h("b", {}, `${range} `), h("span", {}, word), h("small", {}, count(list.reduce((sum, wave) => sum + wave.vms, 0), "VM")));
}

function waves(rollout) {
  const { before, shown, after } = folded(rollout.waves);
  const reached = rollout.status === "halted" || rollout.status === "aborted" ? "not reached" : "wait";
  return h(
    "ol",
    { class: "waves", "aria-label": "Waves" },
    before.length ? several(before, "verified", "verified") : null,
    shown.map((wave) => {
      const frozen = wave.status === "started" && wave.standing > 0;
      const look = frozen ? "frozen" : WAVE_LOOK[wave.status] || "pending";
      const bar = element("svg", { class: `seg ${look}`, height: 8, width: "100%", "aria-hidden": "true" });
      bar.append(element("rect", { class: "body", x: 0, y: 0, width: "100%", height: 8, rx: 2 }));
      const names = Object.entries(wave.domains).map(([set, domain]) => (set.startsWith("_") ? setName(set) : `${set} ${domain}`));
      const more = wave.sets - names.length;
      const where = names.join(", ") + (more > 0 ? ` and ${more} more` : "");
      return h("li", { title: wave.reason || null }, bar, h("b", {}, `${wave.wave + 1} `), h("span", {}, frozen ? "frozen" : wave.status === "pending" && reached !== "wait" ? reached : WAVE_WORDS[wave.status] || wave.status), h("small", {}, where));
    }),
    after.length ? several(after, "pending", reached) : null,
  );
}

function drawNumbers(list, model) {
  const fleet = model.fleet;
  if (!fleet) return;
  const blind = model.blindSince();
  const unseen = model.paused.length > 0 && model.paused.every((each) => model.blindSince(each) != null);
  const offline = fleet.hosts_offline || [];
  const over = overdue(model).length;
  const missing = offline.length > MOST_NAMED ? `${offline.slice(0, MOST_NAMED).join(", ")} and ${offline.length - MOST_NAMED} more` : offline.join(", ");
  const rows = [
    [blind != null ? `Paused at ${time(blind)}` : unseen ? "Last seen paused" : "Paused now", String(fleet.paused), over ? "warn" : fleet.paused ? "ice" : "", over ? `${over} over budget` : ""],
    ["VMs", String(fleet.vms), ""],
    ["Update domains", `${fleet.domains}`, ""],
    ["Hosts", offline.length ? `${fleet.hosts - offline.length} of ${fleet.hosts}` : String(fleet.hosts), offline.length ? "warn" : "", offline.length ? `without ${missing}` : ""],
    ["Coordinator", fleet.coordinator, fleet.coordinator === "online" ? "" : "warn", fleet.standby || ""],
  ];
  replaceIfChanged(
    list,
    rows.map(([name, value, look, more]) => h("div", { class: look || null }, h("dt", {}, name), h("dd", { class: /^[\d]/.test(value) ? null : "word" }, value), more ? h("dd", { class: "sub" }, more) : null)),
  );
}

// -- alarms -----------------------------------------------------------------------------------------------

const TITLES = {
  "two-domains": "Two domains of a set at once",
  overrun: "Pause longer than its budget",
  memory: "Memory changed",
  stopped: "Not running after its pause",
  guard: "The pause guard had to act",
  clock: "Clock not synced",
  attention: "A VM needs attention",
  owner: "A VM has two hosts",
};
const GRACE_S = 3; // s: a shorter outage is not worth an alarm

// The current alarms, the worst first: { key, level, title, text, when; loud: announced although only a warning; over: announced at its end }.
export function alarmRows(model) {
  const fleet = model.fleet || {};
  const rows = [];
  if (model.lost != null && model.now() - model.missed > GRACE_S) {
    const text = `nothing received since ${time(model.lost)}; what is below is as of then${guards(model, model.paused)}`;
    rows.push({ key: "link", level: "warning", loud: true, title: "The exporter is not reached", text, over: "The exporter is reached again" });
  }
  if (fleet.broker) {
    const text = `${fleet.broker}; nothing received since ${time(fleet.broker_since)}, what is below is as of then${model.lost == null ? guards(model, model.paused) : ""}`;
    rows.push({ key: "broker", level: "bad", title: "The exporter is not connected to the broker", text, over: "The exporter is connected to the broker again" });
  }
  for (const each of model.rollouts) {
    if (each.status === "halted") rows.push({ key: `halted ${each.rollout}`, level: "bad", title: "Rollout halted", text: halt(each), pin: `Rollout halted: ${halt(each)}` });
  }
  const alarms = (fleet.alarms || []).map((each) => {
    const when = each.until == null ? `since ${time(each.at)}` : each.until > each.at ? `${time(each.at)} to ${time(each.until)}` : time(each.at);
    return { rule: each.rule, key: `${each.rule} ${each.about} ${each.at}`, level: each.level, title: TITLES[each.rule] || each.rule, text: each.text, when, lasts: each.until == null };
  });
  rows.push(...alarms.filter((each) => each.lasts));
  const late = new Set(overdue(model));
  const silent = new Map();
  for (const each of model.paused) {
    if (late.has(each)) {
      const text = `${each.vm}${each.set.startsWith("_") ? "" : ` (${each.set}, domain ${each.domain})`} on ${each.host}, budget ${each.budget} s`;
      rows.push({ key: `overdue ${each.vm} ${each.since}`, level: "bad", title: "Paused beyond the budget", text });
    } else if (model.blindSince() == null && model.blindSince(each) != null) silent.set(each.host, [...(silent.get(each.host) || []), each]);
  }
  for (const [host, paused] of silent) {
    const text = `its host updater last reported at ${time(fleet.offline_since[host])}${guards(model, paused)}`;
    rows.push({ key: `silent ${host}`, level: "warning", loud: true, title: `${host} is silent`, text });
  }
  if (fleet.full) rows.push({ key: "full", level: "warning", title: "Not everything is shown", text: "there are more update domains than this page keeps" });
  return [...rows, ...alarms.filter((each) => !each.lasts)];
}

// The text of a halted rollout.
function halt(rollout) {
  const failed = rollout.waves.find((wave) => wave.status === "failed");
  const where = `${rollout.update || "freeze on demand"}${failed ? `, wave ${failed.wave + 1}` : ""}`;
  return rollout.reason ? `${where}: ${rollout.reason}` : where;
}

// VMs that are paused for longer than their budget, as far as is known.
export function overdue(model) {
  return model.paused.filter((each) => model.isLate(each));
}

// The text that must stay visible while scrolling; empty if there is none.
export function pinned(rows, model) {
  const halted = rows.find((row) => row.pin);
  const late = overdue(model).length;
  return [late ? `${count(late, "VM")} paused beyond the budget` : "", halted ? halted.pin : ""].filter(Boolean).join(" · ");
}

// The latest end of pauses about which nothing more is received.
function guards(model, paused) {
  if (!paused.length) return "";
  const names = paused.length > 3 ? `${paused.length} VMs` : paused.map((each) => each.vm).join(", ");
  const known = paused.filter((each) => each.since != null && each.budget != null);
  const by = Math.max(...known.map((each) => each.since + each.budget));
  const last = known.length ? `; the pause guard ${by > model.now() ? "has" : "had"} to end that by ${time(by)}` : "";
  return `. ${names} ${paused.length > 1 ? "were" : "was"} paused then${last}`;
}

// Groups alarms by kind: the first one in full, the others folded.
export function drawAlarms(section, list, rows, model) {
  const groups = new Map();
  for (const row of rows) groups.set(row.title, [...(groups.get(row.title) || []), row]);
  const counts = (model.fleet && model.fleet.alarms_by_rule) || {};
  for (const rule of Object.keys(counts)) {
    const title = TITLES[rule] || rule;
    if (!groups.has(title)) groups.set(title, [{ rule, level: "warning", title, text: "" }]);
  }
  section.hidden = groups.size === 0;
  const worst = (group) => (group.some((row) => row.level === "bad") ? "bad" : "warning");
  replaceIfChanged(
    list,
    [...groups].map(([title, group]) => {
      const [first, ...others] = group;
      const total = Math.max(group.length, counts[first.rule] || 0);
      const level = worst(group);
      const more = total - 1 - Math.min(others.length, MOST_OTHERS);
      const rest = total > 1 ? h("details", {}, h("summary", {}, `and ${count(total - 1, "more of the same", "more of the same")}`), h("ul", {}, others.slice(0, MOST_OTHERS).map((row) => h("li", {}, row.text, row.when ? `, ${row.when}` : ""))), more > 0 ? h("p", { class: "note" }, `and ${more} more`) : null) : null;
      return h("li", { class: level }, h("span", { class: "sign", "aria-hidden": "true" }, LEVELS[level][0]), h("div", {}, h("p", {}, h("b", {}, title), total > 1 ? ` (${total}) ` : " ", first.text), rest), first.when ? h("small", {}, first.when) : null);
    }),
  );
}

// -- paused VMs ------------------------------------------------------------------------------------------

export function drawStanding(root, counter, model) {
  const total = model.fleet ? model.fleet.paused : model.paused.length;
  const late = overdue(model).length;
  setText(counter, total ? `${count(total, "VM")}${late ? `, ${late} over budget` : ""}` : "");
  counter.classList.toggle("bad", late > 0);
  root.closest("section").classList.toggle("calm", !model.paused.length);
  if (!model.paused.length) {
    replaceIfChanged(root, [h("p", { class: "empty" }, "No VM is paused.")]);
    return;
  }
  const names = model.paused.map((each) => each.vm).join("\n");
  if (root.dataset.names !== names || !root.querySelector("li")) {
    root.dataset.names = names;
    delete root.dataset.hash;
    const rows = model.paused.slice(0, MOST_STANDING).map((each) => {
      const bar = element("svg", { class: "meter", height: 6, width: "100%", "aria-hidden": "true" });
      bar.append(element("rect", { class: "rail", width: "100%", height: 6, rx: 3 }), element("rect", { class: "fill", width: 0, height: 6, rx: 3 }));
      const where = each.set.startsWith("_") ? each.host : `${each.set} ${each.domain} · ${each.host}`;
      return h("li", {}, h("b", {}, each.vm), h("span", { class: "where" }, where), h("span", { class: "secs" }), bar);
    });
    const more = total - rows.length;
    root.replaceChildren(h("ul", { class: "standing" }, rows), ...(more > 0 ? [h("p", { class: "note" }, `and ${more} more`)] : []));
  }
  [...root.querySelectorAll("li")].forEach((item, index) => {
    const each = model.paused[index];
    const passed = model.stood(each);
    const budget = each.budget;
    const blind = model.blindSince(each);
    const known = passed == null ? "paused, since when is not known" : `${each.or_earlier ? "≥ " : ""}${passed.toFixed(1)} s of ${budget} s`;
    setText(item.querySelector(".secs"), blind == null ? known : `${known} at ${time(blind)}`);
    item.classList.toggle("unseen-now", blind != null);
    item.classList.toggle("over", passed != null && passed > budget);
    item.querySelector(".fill").setAttribute("width", `${passed == null ? 0 : Math.min(100, (passed / budget) * 100).toFixed(1)}%`);
  });
}

// -- pauses -----------------------------------------------------------------------------------------------

export function drawPauses(root, note, model, set) {
  const lanes = model.ordered(set).filter((lane) => lane.pauses);
  if (!lanes.length) {
    setText(note, "");
    replaceIfChanged(root, [h("p", { class: "empty" }, "No pause has ended within the last hour.")]);
    return;
  }
  const many = lanes.length > 2 * FEW_ROWS && !set;
  const wrong = (lane) => (lane.pauses.over ? 2 : 0) + (lane.unsynced ? 1 : 0);
  const shown = many ? [...lanes].sort((a, b) => wrong(b) - wrong(a) || b.pauses.most - a.pauses.most).slice(0, FEW_ROWS) : lanes.slice(0, MOST_ROWS);
  const most = Math.max(...shown.map((lane) => Math.max(lane.budget || 0, lane.pauses.most)));
  const cut = shown.some((lane) => lane.pauses.count > lane.marks.length);
  setText(note, `scale 0 to ${seconds(most)}${cut ? "; of many, the worst are drawn" : ""}`);
  const rows = shown.map((lane) =>
    h(
      "tr",
      { role: "row" },
      h("th", { scope: "row", role: "rowheader" }, setName(lane.set), " ", h("span", {}, domainName(lane))),
      h("td", { role: "cell", class: "plot" }, strip(lane, most)),
      h("td", { role: "cell", class: "num" }, h("small", {}, "n "), String(lane.pauses.count)),
      h("td", { role: "cell", class: "num wide" }, seconds(lane.pauses.least)),
      h("td", { role: "cell", class: "num" }, h("small", {}, "median "), seconds(lane.pauses.median)),
      h("td", { role: "cell", class: "num" }, h("small", {}, "max "), h("b", {}, seconds(lane.pauses.most))),
      h("td", { role: "cell", class: "num" }, h("small", {}, "of "), lane.budget ? `${lane.budget} s` : ""),
      h("td", { role: "cell", class: lane.unsynced ? "num clock bad" : "num clock" }, h("small", {}, "clock "), clock(lane)),
    ),
  );
  const heads = ["Domain", "Each pause, up to the budget line", "Pauses", "Shortest", "Median", "Longest", "Budget", "Clock after"];
  const simulated = lanes.some((lane) => lane.clock && lane.clock.simulated);
  replaceIfChanged(root, [
    h(
      "table",
      { role: "table", class: "pauses", "aria-labelledby": "pauses-title" },
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads.map((head, index) => h("th", { scope: "col", role: "columnheader", class: index === 3 ? "wide" : null }, head)))),
      h("tbody", { role: "rowgroup" }, rows),
    ),
    lanes.length > shown.length ? h("p", { class: "note" }, `${many ? "the worst first; " : ""}and ${lanes.length - shown.length} more domains: choose a set above`) : null,
    simulated ? h("p", { class: "note" }, "Guest clocks of process VMs are simulated: a frozen process still sees host time pass.") : null,
  ].filter(Boolean));
}

function clock(lane) {
  const off = lane.clock && lane.clock.after != null ? `${lane.clock.after >= 0 ? "+" : "−"}${seconds(Math.abs(lane.clock.after))}` : "";
  return lane.unsynced ? `${lane.unsynced} not synced ${off}` : off;
}

function strip(lane, most) {
  const x = (value) => `${(2 + (value / most) * 94).toFixed(2)}%`;
  const figure = lane.pauses;
  const label = `${count(figure.count, "pause")}: ${seconds(figure.least)} to ${seconds(figure.most)}, median ${seconds(figure.median)}, budget ${lane.budget} s${figure.over ? `, ${figure.over} longer than that` : ""}`;
  const svg = element("svg", { class: "dots", height: 22, width: "100%", role: "img", "aria-label": label });
  svg.append(element("line", { class: "rail", x1: x(0), x2: x(most), y1: 11, y2: 11 }));
  svg.append(element("line", { class: "range", x1: x(figure.least), x2: x(figure.most), y1: 11, y2: 11 }));
  for (const mark of lane.marks || []) {
    // Within: a circle. By the guard: a square. Over the budget: a cross.
    const cx = x(mark.seconds);
    if (mark.over) {
      const cross = element("svg", { x: cx, y: 11, overflow: "visible" });
      cross.append(element("path", { class: "over", d: "M-5-5 5 5M5-5-5 5" }));
      svg.append(cross);
    } else if (mark.guard) {
      const box = element("svg", { x: cx, y: 11, overflow: "visible" });
      box.append(element("rect", { class: "guard", x: -4, y: -4, width: 8, height: 8 }));
      svg.append(box);
    } else svg.append(element("circle", { class: "mark", cx, cy: 11, r: 4 }));
  }
  svg.append(element("line", { class: "median", x1: x(figure.median), x2: x(figure.median), y1: 3, y2: 19 }));
  if (lane.budget) svg.append(element("line", { class: "budget", x1: x(lane.budget), x2: x(lane.budget), y1: 1, y2: 21 }));
  return svg;
}

// -- the log and the table of segments --------------------------------------------------------------------

export function drawLog(root, model) {
  if (!model.log.length) {
    replaceIfChanged(root, [h("p", { class: "empty" }, "Nothing yet.")]);
    return;
  }
  const rows = [...model.log].reverse().map((line) => {
    const level = line.level || "quiet";
    const [sign, word] = LEVELS[level];
    const where = [line.set ? (line.set.startsWith("_") ? (line.vm ? "" : setName(line.set)) : line.domain == null ? line.set : `${line.set} ${line.domain}`) : "", line.vm || "", line.host || ""].filter(Boolean).join(" · ");
    return h(
      "tr",
      { role: "row", class: level },
      h("td", { role: "cell", class: "at" }, time(line.at)),
      h("td", { role: "cell", class: "what" }, h("span", { class: "sign", "aria-hidden": "true" }, sign), word ? h("span", { class: "unseen" }, `${word}: `) : null, line.what),
      h("td", { role: "cell", class: "where" }, where),
      h("td", { role: "cell", class: "num" }, line.seconds == null ? "" : seconds(line.seconds)),
      h("td", { role: "cell", class: "detail" }, line.detail || ""),
    );
  });
  const heads = ["Time", "What", "Where", "Seconds", "Detail"];
  replaceIfChanged(root, [h("table", { role: "table", class: "log", "aria-labelledby": "log-title" }, h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads.map((head) => h("th", { scope: "col", role: "columnheader" }, head)))), h("tbody", { role: "rowgroup" }, rows))]);
}

export function drawSegments(root, model, set) {
  const rows = [];
  for (const lane of model.ordered(set)) {
    for (const each of (lane.segments || []).slice(-12)) rows.push([lane, each]);
  }
  rows.sort((a, b) => b[1].start - a[1].start);
  const body = rows.slice(0, 200).map(([lane, each]) => h("tr", {}, h("th", { scope: "row" }, `${setName(lane.set)} ${domainName(lane)}`), h("td", {}, STATES[each.state]), h("td", { class: "num" }, time(each.start)), h("td", { class: "num" }, each.end == null ? "lasts" : time(each.end)), h("td", { class: "num" }, each.end == null ? "" : seconds(each.end - each.start))));
  replaceIfChanged(root, [h("table", { class: "segments", "aria-label": "Stretches of time by update domain" }, h("thead", {}, h("tr", {}, ["Domain", "State", "From", "To", "Lasted"].map((head) => h("th", { scope: "col" }, head)))), h("tbody", {}, body))]);
}

// Redrawing unchanged content would lose the reader's position and selection.
function replaceIfChanged(root, nodes) {
  const holder = document.createElement("div");
  holder.append(...nodes);
  const text = holder.innerHTML; // compared only
  if (root.dataset.hash === undefined || root.drawn !== text) {
    root.drawn = text;
    root.dataset.hash = "";
    root.replaceChildren(...holder.childNodes);
  }
}
