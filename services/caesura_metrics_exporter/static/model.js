// What the server has told, merged. Nothing here touches the document.

const LOG_KEPT = 100;

export class Model {
  constructor() {
    this.heard = false;
    this.fleet = null;
    this.rollouts = [];
    this.paused = [];
    this.lanes = new Map();
    this.log = [];
    this.keptS = 3600;
    this.aheadS = 0; // the exporter's clock minus ours: its times are shown against its own now
  }

  // Takes one change or snapshot in; gives what is worth saying aloud.
  apply(change) {
    const before = new Map([...this.lanes].map(([name, lane]) => [name, lane.state || ""]));
    const halted = new Set(this.rollouts.filter((each) => each.status === "halted").map((each) => each.rollout));
    const alarmed = new Set(((this.fleet && this.fleet.alarms) || []).map(alarmId));
    const first = !this.heard;
    this.heard = true;
    this.aheadS = change.now - Date.now() / 1000;
    this.keptS = change.kept_s;
    if (change.whole) {
      this.lanes = new Map();
      this.log = [];
    }
    if (change.fleet) this.fleet = change.fleet;
    if (change.rollouts) this.rollouts = change.rollouts;
    if (change.paused) this.paused = change.paused;
    for (const lane of change.lanes || []) this.lanes.set(lane.lane, lane);
    this.log = [...this.log, ...(change.log || [])].slice(-LOG_KEPT);
    const moved = [];
    for (const [name, lane] of this.lanes) {
      const state = lane.state || "";
      if (!first && before.get(name) !== state) moved.push([lane, state]);
    }
    const news = this.rollouts.filter((each) => each.status === "halted" && !halted.has(each.rollout));
    const alarms = ((this.fleet && this.fleet.alarms) || []).filter((each) => each.level === "bad" && !alarmed.has(alarmId(each)));
    return { moved, halted: news, alarms: first ? [] : alarms };
  }

  now() {
    return Date.now() / 1000 + this.aheadS;
  }

  // Lanes in order of set and domain. What has something to show comes; of a quiet fleet, everything.
  ordered(set) {
    const all = [...this.lanes.values()].filter((lane) => !set || lane.set === set);
    return all.sort((a, b) => compare(a.set, b.set) || compare(a.key, b.key) || a.domain - b.domain);
  }

  sets() {
    return [...new Set([...this.lanes.values()].map((lane) => lane.set))].sort(compare);
  }
}

function alarmId(alarm) {
  return `${alarm.rule}|${alarm.about}|${alarm.at}`;
}

export function compare(a, b) {
  // A VM outside any set is a set of its own, named with a leading underscore: those come last.
  const [one, two] = [a.startsWith("_"), b.startsWith("_")];
  return one !== two ? one - two : a.localeCompare(b, undefined, { numeric: true });
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

export function time(at) {
  return clockTime.format(new Date(at * 1000));
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
