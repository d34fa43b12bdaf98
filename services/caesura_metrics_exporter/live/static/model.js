// The server's messages, merged. Nothing here touches the document.

// Created once: localeCompare creates one for each comparison, and a thousand domains need ten thousand comparisons.
const collator = new Intl.Collator(undefined, { numeric: true });
const LOG_KEPT = 100;
const WRONG_KEPT = 50; // lines about failures, kept separately

export class Model {
  constructor() {
    this.heard = false;
    this.fleet = null;
    this.rollouts = [];
    this.paused = [];
    this.lanes = new Map();
    this.log = [];
    this.changes = 0; // number of changes
    this.lost = null; // since when the exporter is unreachable, by its clock; null while it is reachable
    this.missed = null; // when that was noticed
    this.saidAt = Date.now() / 1000; // the exporter's clock at its last message...
    this.heardMs = performance.now(); // ...and our monotonic clock at that time
    this.drawingAt = null; // the exporter's clock while it stands still for a drawing
  }

  // Applies one change or snapshot; returns the lanes whose state changed.
  apply(change) {
    const before = new Map([...this.lanes].map(([name, lane]) => [name, lane.state || ""]));
    const first = !this.heard;
    this.heard = true;
    this.changes += 1;
    this.hear(change.now);
    if (change.whole) {
      this.lanes = new Map();
      this.log = [];
    }
    if (change.fleet) this.fleet = change.fleet;
    if (change.rollouts) this.rollouts = change.rollouts;
    if (change.paused) this.paused = change.paused;
    for (const lane of change.lanes || []) this.lanes.set(lane.lane, lane);
    if (change.log || change.whole) this.log = lastLines([...this.log, ...(change.log || [])]);
    const moved = [];
    for (const [name, lane] of this.lanes) {
      const state = lane.state || "";
      if (!first && before.get(name) !== state) moved.push([lane, state]);
    }
    return moved;
  }

  // The exporter is reachable, and this is its clock.
  hear(now) {
    this.saidAt = now;
    this.heardMs = performance.now();
    this.lost = this.missed = null;
  }

  // The exporter is unreachable.
  lose() {
    if (!this.heard || this.lost != null) return;
    this.lost = this.saidAt;
    this.missed = this.now();
  }

  now() {
    return this.drawingAt ?? this.saidAt + (performance.now() - this.heardMs) / 1000;
  }

  // Calls ``draw`` while the clock stands still: what one drawing says in several places is of one instant.
  atOneInstant(draw) {
    this.drawingAt = this.now();
    try {
      draw();
    } finally {
      this.drawingAt = null;
    }
  }

  // Since when nothing new can have been received (about this paused VM); null while it can.
  blindSince(paused = null) {
    const fleet = this.fleet || {};
    const since = [this.lost];
    if (fleet.broker) since.push(fleet.broker_since || null);
    if (paused) since.push((fleet.offline_since || {})[paused.host]);
    const known = since.filter((each) => each != null);
    return known.length ? Math.min(...known) : null;
  }

  // The time for which the content is valid.
  asOf(paused = null) {
    return Math.min(this.now(), this.blindSince(paused) ?? Infinity);
  }

  // Seconds for which a VM has been paused, as far as was received; null if not known.
  stood(paused) {
    return paused.since == null ? null : Math.max(0, this.asOf(paused) - paused.since);
  }

  // Whether a VM is paused for longer than its budget, as far as is known.
  isLate(paused) {
    const stood = this.stood(paused);
    return stood != null && paused.budget != null && stood > paused.budget + 0.5;
  }

  standingIn(lane) {
    return lane.state === "frozen" ? this.paused.filter((each) => each.set === lane.set && each.domain === lane.domain) : [];
  }

  laneAsOf(lane) {
    const standing = this.standingIn(lane);
    return standing.length ? Math.max(...standing.map((each) => this.asOf(each))) : this.asOf();
  }

  // Lanes in order of set and domain; for one set, or for all.
  ordered(set) {
    const all = [...this.lanes.values()].filter((lane) => !set || groupOf(lane) === set);
    return all.sort((a, b) => compare(a.set, b.set) || compare(a.key, b.key) || a.domain - b.domain);
  }

  sets() {
    return [...new Set([...this.lanes.values()].map(groupOf))].sort(compare);
  }
}

function lastLines(lines) {
  const room = { wrong: WRONG_KEPT, other: LOG_KEPT };
  const kept = lines.reverse().filter((line) => room[line.level === "bad" || line.level === "warning" ? "wrong" : "other"]-- > 0);
  return kept.reverse();
}

// A VM outside any set is a set of its own, named with a leading underscore: these are shown together.
export function groupOf(lane) {
  return lane.set.startsWith("_") ? "_" : lane.set;
}

export function groupName(group) {
  return group === "_" ? "VMs in no set" : group;
}

export function compare(a, b) {
  // VMs in no set come last.
  const [one, two] = [a.startsWith("_"), b.startsWith("_")];
  return one !== two ? one - two : collator.compare(a, b);
}

export function setName(set) {
  return set.startsWith("_") ? set.slice(1) : set;
}

export function domainName(lane) {
  if (lane.set.startsWith("_")) return "in no set";
  return `${lane.key === "fault_domain" ? "fault domain" : "domain"} ${lane.domain}`;
}

export const STATES = {
  scheduled: "scheduled",
  started: "started",
  frozen: "frozen",
  resumed: "resumed, being verified",
  verified: "verified",
  failed: "failed",
  cancelled: "cancelled",
};

const clockTime = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const day = new Intl.DateTimeFormat(undefined, { dateStyle: "medium" });

export function clock(at) {
  return clockTime.format(new Date(at * 1000));
}

// With the day, unless it is today.
export function time(at) {
  const when = new Date(at * 1000);
  return when.toDateString() === new Date().toDateString() ? clockTime.format(when) : `${day.format(when)}, ${clockTime.format(when)}`;
}

export function seconds(value) {
  const size = Math.abs(value);
  const sign = value < 0 ? "−" : "";
  if (size === 0) return "0 s";
  if (size < 0.001) return `${sign}${(size * 1e6).toFixed(0)} µs`;
  if (size < 0.1) return `${sign}${(size * 1000).toFixed(size < 0.01 ? 2 : 1)} ms`;
  if (size < 10) return `${sign}${size.toFixed(2)} s`;
  if (size < 100) return `${sign}${size.toFixed(1)} s`;
  const minutes = Math.floor(Math.round(size) / 60);
  return `${sign}${minutes} min ${Math.round(size) - minutes * 60} s`;
}

export function count(number, one, many = `${one}s`) {
  return `${number} ${number === 1 ? one : many}`;
}
