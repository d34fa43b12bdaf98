// The lanes: one strip per domain, one shape per period. A pause is the tallest shape: the break in the line.

import { STATES, clock, count, domainName, groupName, groupOf, seconds, setName, time } from "./model.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 26;
const SHAPE = {
  // state: [height, corner radius]
  scheduled: [8, 0],
  started: [8, 0],
  frozen: [24, 3],
  resumed: [12, 0],
  verified: [4, 2],
  failed: [20, 2],
  cancelled: [2, 0],
};
const LEAST_W = 3; // px: a swap takes milliseconds and must be visible
const AHEAD = 0.1; // of the span, for announced segments
const MOST_LANES = 60;
const FEW_LANES = 12; // if there are more than twice as many, and more of them are idle

export function legend(list) {
  for (const [state, name] of Object.entries(STATES)) {
    const swatch = element("svg", { class: `swatch seg ${state}`, width: 26, height: HEIGHT, "aria-hidden": "true" });
    swatch.append(shape(state, 0, 26));
    const item = document.createElement("li");
    item.append(swatch, name);
    list.append(item);
  }
}

export class Chart {
  constructor(root, tip, more) {
    this.root = root;
    this.tip = tip;
    this.more = more;
    this.rows = new Map();
    this.groups = new Map();
    this.unfolded = false; // whether idle domains are drawn as well
    this.drawn = null; // the content of the last full drawing
    this.focused = null; // "lane|start|state" of the segment with the keyboard focus
    this.axis = element("svg", { class: "axis", "aria-hidden": "true", focusable: "false" });
    this.body = document.createElement("div");
    root.append(this.axis, this.body);
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("focusin", (event) => this.showFor(event.target.closest("g.seg")));
    root.addEventListener("focusout", () => this.hide());
    root.addEventListener("pointermove", (event) => this.showFor(event.target.closest("g.seg"), true));
    root.addEventListener("pointerleave", () => this.hide());
  }

  // Draws the changes, and everything once the picture has moved by a pixel.
  draw(model, set, spanS) {
    const now = model.now();
    const asked = [set, spanS, this.root.clientWidth, this.unfolded].join("|");
    const same = this.drawn && this.drawn.asked === asked && Math.abs(now - this.drawn.now) * this.drawn.scale < 1;
    if (same && this.drawn.changes === model.changes) {
      for (const row of this.rows.values()) if (row.lane && row.lane.state) this.drawWords(row, row.lane, model);
      return;
    }
    const held = this.body.contains(document.activeElement);
    const all = model.ordered(set);
    const most = this.mostOf(all);
    const lanes = all.length > most ? busiest(all, most, model) : all;
    this.tellMore(lanes.length, all.length);
    const span = spanS || fit(model, lanes, now);
    const view = { now, from: now - span, to: now + span * AHEAD };
    const names = new Set(lanes.map((lane) => lane.lane));
    for (const [name, row] of this.rows) {
      if (!names.has(name)) {
        row.item.remove();
        this.rows.delete(name);
      }
    }
    this.arrange(lanes, all);
    const first = lanes.length ? this.rows.get(lanes[0].lane) : null;
    const width = first ? first.strip.clientWidth : 0;
    if (!width) return;
    view.scale = width / (view.to - view.from);
    view.width = width;
    for (const lane of lanes) {
      const row = this.rows.get(lane.lane);
      this.drawWords(row, lane, model);
      if (!same || row.lane !== lane) this.drawLane(row, lane, view, model);
      row.lane = lane;
    }
    this.drawAxis(first, view, model);
    this.drawn = { asked, now: same ? this.drawn.now : now, scale: view.scale, changes: model.changes };
    const stop = this.keepOneTabStop();
    if (held && stop && !this.body.contains(document.activeElement)) stop.focus({ preventScroll: true });
  }

  // Idle domains are folded if there are many; active ones are drawn up to a limit.
  mostOf(all) {
    if (this.unfolded || all.length <= 2 * FEW_LANES + 1) return MOST_LANES;
    return Math.min(MOST_LANES, Math.max(FEW_LANES, all.filter(happens).length));
  }

  tellMore(drawn, total) {
    const { root, text, button } = this.more;
    root.hidden = drawn === total && !(this.unfolded && total > 2 * FEW_LANES + 1);
    setText(text, `${drawn} of ${total} domains are drawn: those in which something happens, then those that changed last. Choose a set to see all of its own.`);
    button.hidden = !this.unfolded && drawn >= Math.min(total, MOST_LANES);
    button.setAttribute("aria-expanded", String(this.unfolded));
    setText(button, this.unfolded ? "Fold idle domains" : `Draw ${Math.min(total, MOST_LANES)}`);
  }

  arrange(lanes, all) {
    const sets = [...new Set(lanes.map(groupOf))];
    for (const [name, group] of this.groups) {
      if (!sets.includes(name)) {
        group.section.remove();
        this.groups.delete(name);
      }
    }
    for (const name of sets) if (!this.groups.has(name)) this.groups.set(name, newGroup(name));
    keepInOrder(this.body, sets.map((name) => this.groups.get(name).section));
    for (const name of sets) {
      const mine = lanes.filter((lane) => groupOf(lane) === name);
      const group = this.groups.get(name);
      const whole = all.filter((lane) => groupOf(lane) === name);
      const vms = whole.reduce((sum, lane) => sum + (lane.key === mine[0].key ? lane.vms : 0), 0);
      const drawn = mine.length < whole.length ? `${mine.length} of ` : "";
      setText(group.count, name === "_" ? String(vms) : `${drawn}${count(whole.length, "domain")}, ${count(vms, "VM")}`);
      const wanted = mine.map((lane) => {
        if (!this.rows.has(lane.lane)) this.rows.set(lane.lane, newRow());
        return this.rows.get(lane.lane).item;
      });
      keepInOrder(group.list, wanted);
    }
  }

  drawWords(row, lane, model) {
    const [word, detail] = present(lane, model);
    setText(row.word, word);
    setText(row.detail, detail);
    row.now.dataset.state = lane.state || "";
    row.now.dataset.late = model.standingIn(lane).some((each) => model.isLate(each)) ? "yes" : "no";
  }

  drawLane(row, lane, view, model) {
    const alone = lane.set.startsWith("_");
    setText(row.name, alone ? setName(lane.set) : domainName(lane));
    const asOf = model.laneAsOf(lane);
    row.strip.setAttribute("aria-label", `${setName(lane.set)}, ${domainName(lane)}`);
    const seen = new Set();
    for (const segment of lane.segments || []) {
      const end = segment.end ?? asOf;
      if (end < view.from) continue;
      const id = `${lane.lane}|${segment.start}|${segment.state}`;
      seen.add(id);
      let group = row.segments.get(id);
      if (!group) {
        group = newSegment(id, segment);
        row.segments.set(id, group);
        row.strip.append(group);
      }
      const left = Math.max(0, (segment.start - view.from) * view.scale);
      const width = Math.max(LEAST_W, (end - Math.max(segment.start, view.from)) * view.scale);
      place(group, segment.state, left, width);
      notBefore(group, segment, view);
      group.told = () => story(lane, segment, model.laneAsOf(lane));
      if (id === this.focused || !group.hasAttribute("aria-label") || segment.end == null) {
        const label = story(lane, segment, asOf).join(", ");
        if (segment.end != null || group.dataset.said !== "open") group.setAttribute("aria-label", label);
        group.dataset.said = segment.end == null ? "open" : "done";
      } else if (group.dataset.said === "open") {
        group.setAttribute("aria-label", story(lane, segment, asOf).join(", "));
        group.dataset.said = "done";
      }
    }
    for (const [id, group] of row.segments) {
      if (!seen.has(id)) {
        group.remove();
        row.segments.delete(id);
      }
    }
  }

  drawAxis(first, view, model) {
    const box = first.strip.getBoundingClientRect();
    const mine = this.root.getBoundingClientRect();
    const left = box.left - mine.left;
    this.axis.setAttribute("width", mine.width);
    this.axis.setAttribute("height", mine.height);
    this.axis.replaceChildren();
    const x = (at) => left + (at - view.from) * view.scale;
    const nowX = x(view.now);
    this.axis.append(element("rect", { class: "ahead", x: nowX, y: 22, width: Math.max(0, left + view.width - nowX), height: Math.max(0, mine.height - 22) }));
    const step = tickStep((view.to - view.from) / Math.max(2, view.width / 90));
    for (let at = Math.ceil(view.from / step) * step; at < view.to; at += step) {
      this.axis.append(element("line", { class: "tick", x1: x(at), x2: x(at), y1: 22, y2: mine.height }));
      const near = Math.abs(x(at) - nowX) < 62;
      if (!near && x(at) - left > 20 && left + view.width - x(at) > 24) this.axis.append(label(x(at), clock(at), step));
    }
    for (const rollout of model.rollouts) {
      for (const wave of rollout.waves) {
        if (wave.started_at && wave.started_at > view.from) {
          this.axis.append(element("line", { class: "wave", x1: x(wave.started_at), x2: x(wave.started_at), y1: 22, y2: mine.height }));
        }
      }
    }
    this.axis.append(element("line", { class: "now", x1: nowX, x2: nowX, y1: 18, y2: mine.height }));
    const word = element("text", { class: "now", x: nowX, y: 13, "text-anchor": "middle" });
    word.textContent = "now";
    this.axis.append(word);
  }

  // -- keyboard and notes ------------------------------------------------------------------------------

  keepOneTabStop() {
    const groups = [...this.body.querySelectorAll("g.seg")];
    const lane = this.focused && this.focused.slice(0, this.focused.indexOf("|") + 1);
    const stop = groups.find((group) => group.dataset.id === this.focused) || groups.findLast((group) => lane && group.dataset.id.startsWith(lane)) || groups.at(-1);
    for (const group of groups) group.setAttribute("tabindex", group === stop ? "0" : "-1");
    return stop;
  }

  key(event) {
    const at = event.target.closest("g.seg");
    if (!at) return;
    const strips = [...this.body.querySelectorAll("svg.strip")].filter((strip) => strip.querySelector("g.seg"));
    const strip = at.closest("svg.strip");
    const mine = ordered(strip);
    const index = mine.indexOf(at);
    const up = strips.indexOf(strip);
    const nearest = (other) => {
      const x = Number(at.dataset.x);
      return ordered(other).reduce((best, each) => (Math.abs(each.dataset.x - x) < Math.abs(best.dataset.x - x) ? each : best));
    };
    let next = null;
    if (event.key === "ArrowRight") next = mine[index + 1];
    else if (event.key === "ArrowLeft") next = mine[index - 1];
    else if (event.key === "ArrowDown") next = strips[up + 1] && nearest(strips[up + 1]);
    else if (event.key === "ArrowUp") next = strips[up - 1] && nearest(strips[up - 1]);
    else if (event.key === "Home") next = mine[0];
    else if (event.key === "End") next = mine[mine.length - 1];
    else if (event.key === "Escape") return void this.hide();
    else return;
    event.preventDefault();
    if (next) next.focus();
  }

  showFor(group, byPointer = false) {
    if (!group || !group.told) return byPointer ? this.hide() : undefined;
    if (!byPointer) {
      this.focused = group.dataset.id;
      this.keepOneTabStop();
    }
    const lines = group.told();
    this.tip.replaceChildren(
      ...lines.map((line, index) => {
        const part = document.createElement(index ? "span" : "b");
        part.textContent = line;
        return part;
      }),
    );
    this.tip.hidden = false;
    const box = group.getBoundingClientRect();
    const own = this.tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), document.documentElement.clientWidth - own.width - 8);
    const above = box.top - own.height - 8;
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  }

  hide() {
    this.tip.hidden = true;
  }
}

// Whether a domain is active, or its last segment failed.
function happens(lane) {
  const last = (lane.segments || []).at(-1);
  return Boolean(lane.state || lane.standing || (last && last.state === "failed"));
}

// Whether the rollout shown ended, or halted, before a wave reached this domain.
function unreached(lane, model) {
  if (lane.waits != null && model.rollouts.some((each) => each.status === "halted" && (each.key || "update_domain") === lane.key)) return true;
  const last = model.rollouts[0];
  if (!last || last.status !== "aborted" || (last.key || "update_domain") !== lane.key) return false;
  const mine = last.waves.filter((wave) => wave.domains[lane.set] === lane.domain);
  return mine.length > 0 && mine.every((wave) => wave.status === "pending");
}

function present(lane, model) {
  const last = (lane.segments || []).at(-1);
  if (!lane.state && lane.waits != null && model.rollouts.some((each) => each.status === "running" && (each.key || "update_domain") === lane.key)) return ["", `waits for wave ${lane.waits + 1}`];
  if (!lane.state && unreached(lane, model)) return ["", lane.waits == null ? "not reached" : `not reached (wave ${lane.waits + 1})`];
  if (!last) return ["", ""];
  if (lane.state === "frozen") return ["frozen", stillness(lane, last, model)];
  if (lane.state === "scheduled" && last.not_before) {
    const left = last.not_before - model.asOf();
    return ["scheduled", left > 0 ? `starts within ${Math.ceil(left)} s` : "starts now"];
  }
  if (lane.state === "resumed") return ["resumed", "being verified"];
  if (lane.state) return [lane.state, last.note || ""];
  return [last.state, `at ${time(last.state === "verified" ? last.start : (last.end ?? last.start))}`];
}

function stillness(lane, last, model) {
  const vms = count(lane.standing, "VM");
  const standing = model.standingIn(lane);
  const longest = Math.max(...standing.map((each) => model.stood(each) ?? -1));
  if (standing.length ? longest < 0 : last.since_unknown) return `since when is not known, ${vms}`;
  const least = standing.some((each) => each.or_earlier) ? "≥ " : "";
  const passed = least + seconds(standing.length ? longest : Math.max(0, model.asOf() - last.start));
  const seen = standing.length ? standing.some((each) => model.blindSince(each) == null) : model.blindSince() == null;
  return seen ? `${passed}, ${vms}` : `${passed} at ${time(model.laneAsOf(lane))}`;
}

function story(lane, segment, now) {
  const lines = [`${setName(lane.set)}, ${domainName(lane)}: ${STATES[segment.state]}`];
  const end = segment.end ?? now;
  if (segment.since_unknown) lines.push("began earlier; when is not known");
  lines.push(segment.end == null ? `since ${time(segment.start)}` : `${time(segment.start)} to ${time(end)}, ${seconds(end - segment.start)}`);
  if (segment.state === "frozen") {
    const pauses = (lane.marks || []).filter((mark) => mark.at >= segment.start - 0.5 && mark.at <= end + 0.5);
    if (pauses.length) {
      const longest = pauses.reduce((one, two) => (two.seconds > one.seconds ? two : one));
      lines.push(`${count(pauses.length, "pause")}, longest ${seconds(longest.seconds)} of ${longest.budget} s (${longest.vm})`);
    }
  }
  if (segment.not_before) lines.push(`starts at ${time(segment.not_before)} at the latest`);
  if (segment.note) lines.push(segment.note);
  return lines;
}

function fit(model, lanes, now) {
  const open = model.rollouts.filter((each) => each.status !== "completed" && each.status !== "aborted");
  const shown = open.length ? open : model.rollouts;
  const starts = shown.map((each) => each.created_at);
  const earliest = starts.length ? Math.min(...starts) : now - 120;
  const ended = open.length ? now : Math.max(earliest, ...shown.map((each) => each.ended_at || 0));
  return Math.min(3600, Math.max(20, (now - earliest) * 1.06 + (open.length ? 0 : Math.max(0, Math.min(20, now - ended)))));
}

function busiest(lanes, most, model) {
  const when = (lane) => {
    const last = (lane.segments || []).at(-1);
    return last ? (last.end ?? model.now() + 1) : 0;
  };
  const chosen = new Set([...lanes].sort((a, b) => happens(b) - happens(a) || when(b) - when(a)).slice(0, most));
  return lanes.filter((lane) => chosen.has(lane));
}

// Moving a node that is already in place would take the keyboard focus away.
function keepInOrder(parent, wanted) {
  wanted.forEach((node, index) => {
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] || null);
  });
}

function newGroup(name) {
  const section = document.createElement("section");
  section.className = "set";
  const title = document.createElement("h3");
  title.textContent = groupName(name);
  const about = document.createElement("span");
  title.append(" ", about);
  const list = document.createElement("ol");
  list.className = "lanes";
  section.append(title, list);
  return { section, list, count: about };
}

function newRow() {
  const item = document.createElement("li");
  item.className = "lane";
  const name = document.createElement("span");
  name.className = "name";
  const strip = element("svg", { class: "strip", height: HEIGHT, role: "group" });
  strip.append(element("line", { class: "thread", x1: "0", x2: "100%", y1: HEIGHT / 2, y2: HEIGHT / 2 }));
  const now = document.createElement("span");
  now.className = "now";
  const word = document.createElement("b");
  const detail = document.createElement("span");
  now.append(word, " ", detail);
  item.append(name, strip, now);
  return { item, name, strip, now, word, detail, lane: null, segments: new Map() };
}

function newSegment(id, segment) {
  const group = element("g", { class: `seg ${segment.state}`, role: "img", tabindex: "-1" });
  group.dataset.id = id;
  group.dataset.state = segment.state;
  group.append(element("rect", { class: "hit", y: 0, height: HEIGHT }), shape(segment.state, 0, LEAST_W));
  return group;
}

function shape(state, x, width) {
  const [height, radius] = SHAPE[state];
  return element("rect", { class: "body", x, y: (HEIGHT - height) / 2, width, height, rx: radius });
}

function place(group, state, left, width) {
  group.dataset.x = left.toFixed(1);
  const [hit, body] = group.children;
  hit.setAttribute("x", left);
  hit.setAttribute("width", Math.max(width, 8));
  body.setAttribute("x", left);
  body.setAttribute("width", width);
}

function notBefore(group, segment, view) {
  let mark = group.querySelector(".not-before");
  const at = segment.not_before;
  const wanted = segment.end == null && at && at > view.from && at < view.to;
  if (!wanted) return void (mark && mark.remove());
  if (!mark) group.append((mark = element("path", { class: "not-before" })));
  const x = (at - view.from) * view.scale;
  mark.setAttribute("d", `M${x} 4V22M${x} 4h5l-2 3 2 3h-5`);
}

function ordered(strip) {
  return [...strip.querySelectorAll("g.seg")].sort((a, b) => a.dataset.x - b.dataset.x);
}

function tickStep(least) {
  return [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800].find((step) => step >= least) || 3600;
}

function label(x, text, step) {
  const word = element("text", { class: "hour", x, y: 13, "text-anchor": "middle" });
  word.textContent = step >= 60 ? text.slice(0, 5) : text;
  return word;
}

export function element(name, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
