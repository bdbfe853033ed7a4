// Puts the page together: what the feed tells, what is drawn, and what the reader does.

import { drawLoad, drawWhatIf, percent } from "./charts.js";
import { follow } from "./feed.js";
import { Icicle, Tree } from "./icicle.js";

const LOAD_SAMPLES = 120;
const REDRAW_MS = 5000; // ages go on, if nothing else does
const KEY = "radixkv-key";

const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const tokens = (value) => `${number(value)} token${value === 1 ? "" : "s"}`;
const canvas = byId("icicle");
const icicle = new Icicle(canvas);
const samples = [];
let tree = new Tree();
let state = null;
let skewS = 0; // of the server's clock against this one
let due = false;
let stop = () => {};

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const nowS = () => Date.now() / 1000 + skewS;

function span(seconds) {
  if (seconds < 1) return "0 s";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

// ------------------------------------------------------------------------------------------------------------- the feed

function connect(key) {
  stop();
  let fresh = new Tree(); // shown once the server has told everything
  byId("forget").hidden = !key;
  stop = follow("v1/cache/live", key, {
    opened() {
      fresh = new Tree();
    },
    event({ name, data }) {
      if (name === "nodes") fresh.put(data.nodes);
      if (name !== "state") return;
      fresh.drop(data.gone);
      fresh.settle();
      tree = fresh;
      show(data);
    },
    refused(error) {
      setStatus("lost", error.message);
      if (error.status === 401 || error.status === 403) askForKey(error, key);
    },
    lost(seconds) {
      setStatus("lost", `no connection; trying again in ${seconds} s`);
    },
  });
}

function askForKey(error, key) {
  sessionStorage.removeItem(KEY);
  byId("forget").hidden = true;
  byId("ask-title").textContent = !key ? "This server needs a key" : error.status === 403 ? "This key may not see the page" : "Nobody has this key";
  if (!byId("ask").open) byId("ask").showModal();
  byId("key").value = "";
  byId("key").focus();
}

byId("ask-form").addEventListener("submit", () => {
  const key = byId("key").value;
  byId("key").value = "";
  sessionStorage.setItem(KEY, key);
  connect(key);
});

byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});

function setStatus(kind, text) {
  byId("status").dataset.state = kind;
  byId("status").textContent = text;
}

// ------------------------------------------------------------------------------------------------------- what it holds

function show(data) {
  state = data;
  skewS = data.now - Date.now() / 1000;
  setStatus("live", "live");
  document.title = `radixkv · ${data.model}`;
  byId("model").textContent = data.model;
  const again = (node) => (node === null ? null : tree.nodes.get(node.id) ?? null);
  icicle.focus = again(icicle.focus);
  icicle.selected = again(icicle.selected);
  showPool(data.pool);
  showStates(data.states);
  showTiers(data.tiers);
  byId("hit-rate").textContent = percent(data.hit_rate);
  byId("hit-detail").textContent = `${number(data.hit_tokens)} of ${tokens(data.query_tokens)} were cached; ${number(data.evicted_tokens)} evicted so far`;
  byId("running").textContent = number(data.requests.running);
  byId("waiting").textContent = number(data.requests.waiting);
  const perStep = data.requests.tokens_per_step; // null without drafts
  byId("per-step").textContent = perStep === null ? "" : `${perStep.toFixed(1)} tokens a step`;
  showTreeNote(data.tree);
  showMisses(data.misses);
  showRequests(data.requests);
  drawWhatIf(byId("what-if"), data.what_if);
  filter();
}

function showPool(pool) {
  const cached = pool.evictable_pages + pool.pinned_pages;
  const parts = [
    ["pinned", pool.pinned_pages, "in use"],
    ["cached", pool.evictable_pages, "cached"],
    ["leased", pool.leased_pages, "being written"],
    ["free", pool.free_pages, "free"],
  ];
  byId("pool-used").textContent = percent((cached + pool.leased_pages) / pool.pages);
  byId("pool-size").textContent = `of ${number(pool.pages)} pages of ${tokens(pool.page_size)}, ${(pool.bytes / 2 ** 20).toFixed(0)} MiB`;
  byId("pool-bar").replaceChildren(...parts.map(([kind, pages]) => {
    const part = element("span", kind);
    part.style.flex = `0 0 ${(100 * pages) / pool.pages}%`;
    return part;
  }));
  byId("pool-bar").setAttribute("aria-label", `Pages: ${parts.map(([, pages, name]) => `${pages} ${name}`).join(", ")}`);
  byId("pool-legend").replaceChildren(...parts.map(([kind, pages, name]) => legendItem(kind, `${name} ${number(pages)}`)));
}

function showStates(states) { // of recurrent layers; undefined without such layers
  byId("states").hidden = states === undefined;
  if (states === undefined) return;
  byId("states").replaceChildren(
    legendItem("pinned", `${number(states.leased)} of ${number(states.total)} states in use, ${size(states.bytes)}`),
    legendItem("cached", `cached ${number(states.evictable)}`),
    legendItem("free", `free ${number(states.free)}`),
  );
}

function showTiers(tiers) {
  byId("tiers").hidden = tiers.length === 0;
  byId("tiers").replaceChildren(...tiers.map((tier) => {
    const held = tier.capacity_bytes ? `${size(tier.bytes)} of ${size(tier.capacity_bytes)}, ` : "";  // a server does not say
    const speed = tier.is_slow ? ", off: slower than computing" : "";
    return legendItem(tier.is_slow ? "free" : "cached", `${tier.name}: ${held}${tokens(tier.loaded_tokens)} loaded${speed}`);
  }));
}

function size(bytes) {
  const [unit, name] = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]].find(([least]) => bytes >= least) ?? [1, "bytes"];
  return `${(bytes / unit).toFixed(unit > 2 ** 20 ? 1 : 0)} ${name}`;
}

function legendItem(className, text, colour) {
  const item = element("li");
  const sign = element("i", className);
  if (colour) sign.style.background = colour;
  item.append(sign, text);
  return item;
}

function showTreeNote(told) {
  const roots = tree.roots.length;
  const whole = `${number(told.nodes - roots)} prefixes, ${tokens(told.tokens)}`;
  byId("tree-note").textContent = told.is_whole
    ? whole
    : `${whole}; the tree is larger (${tokens(told.total_tokens)}): only the part nearest to its roots is shown`;
}

function showTreeLegend() {
  const items = [];
  if (icicle.colour === "age") {
    items.push(legendItem("ramp", "used now … an hour ago"));
  } else {
    const names = [...new Set(tree.roots.map((root) => root.name))];
    items.push(...names.slice(0, 12).map((name) => legendItem("", name, icicle.tenantColour(name))));
  }
  items.push(legendItem("hatched", "pinned by a running request"));
  byId("tree-legend").replaceChildren(...items);
}

function showMisses(misses) {
  byId("misses").replaceChildren(...misses.map((miss) => {
    const row = element("div");
    const reason = element("span", "reason", miss.reason);
    reason.dataset.reason = miss.reason;
    const why = element("span");
    why.append(`${number(miss.cached_tokens)} of ${tokens(miss.prompt_tokens)} cached`);
    if (miss.reason === "evicted") why.append(`; the next ${number(miss.evicted_tokens)} were evicted ${span(miss.evicted_ago_s)} before`);
    if (miss.asked_text !== null) why.append("; asked ", quoted(miss.asked_text), ", cached ", quoted(miss.cached_text));
    const when = element("span", "soft", `${span(nowS() - miss.at)} ago`);
    const name = element("span", "name", miss.namespace);
    name.title = miss.namespace;
    row.append(when, name, reason, why);
    return row;
  }));
  if (misses.length === 0) byId("misses").append(element("p", "none", "None so far: prompts that are not cached to their end are listed here, with the reason."));
}

function quoted(text) {
  return text === "" ? "(the end)" : element("code", "", text.replace(/\s*\n\s*/g, " ⏎ "));
}

function showRequests(requests) {
  byId("requests").replaceChildren(...requests.first.map((request) => {
    const row = element("div");
    const found = request.cached_tokens === null ? "" : `, ${number(request.cached_tokens)} cached`;
    row.append(
      element("span", "name", `${request.namespace} · ${request.is_running ? "running" : "waiting"} for ${span(nowS() - request.arrived_at)}`),
      element("span", "soft", `${number(request.prompt_tokens)} in${found} · ${number(request.output_tokens)} out`),
    );
    return row;
  }));
  const rest = requests.running + requests.waiting - requests.first.length;
  if (requests.first.length === 0) byId("requests").append(element("p", "none", "No request at the moment."));
  else if (rest > 0) byId("requests").append(element("p", "none", `and ${number(rest)} more`));
}

// --------------------------------------------------------------------------------------------------------- the icicle

function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    icicle.draw(tree, nowS());
    canvas.dataset.nodes = tree.nodes.size;
    byId("empty").hidden = state === null || tree.nodes.size > 0;
    showTreeLegend();
    showCrumbs();
  });
}

function filter() {
  const count = tree.mark(byId("filter").value);
  icicle.filtered = count !== null;
  canvas.dataset.found = count ?? "";
  redraw();
  return count;
}

function filterAnew() {
  const count = filter();
  showDetail(count === null ? "" : `${number(count)} prefix${count === 1 ? "" : "es"} found.`);
}

function title(node) {
  return node.name ?? (node.text === null ? tokens(node.tokens) : node.text.replace(/\s+/g, " ").trim().slice(0, 40) || "␣");
}

function facts(node) {
  const parts = node.up === null
    ? [`all of ${node.name}`, `${tokens(node.width)} in ${number(node.below)} prefixes`, `asked for ${number(node.hits)} times`]
    : [`${tokens(node.tokens)}`, `${number(node.width)} with what follows`, `hit ${number(node.hits)} time${node.hits === 1 ? "" : "s"}`];
  if (node.up !== null && node.usedAt !== null) parts.push(`used ${span(nowS() - node.usedAt)} ago`);
  if (node.pinned) parts.push("pinned");
  if (node.keptUntil !== null && node.keptUntil > nowS()) parts.push(`kept for ${span(node.keptUntil - nowS())}`);
  if (node.hidden > 0) parts.push(`${number(node.hidden)} continuations are not shown`);
  if (tree.roots.length > 1 && node.up !== null) parts.push(node.tenant);
  return parts.join(" · ");
}

function describe(node, others) {
  const made = [];
  if (others > 0) made.push(element("span", "", `${number(others + 1)} narrow prefixes; the first: `));
  if (node.text !== null) made.push(element("b", "", node.text + (node.tokens > 32 ? " …" : "")));
  made.push(element("span", "", facts(node)));
  return made;
}

function showDetail(text) {
  byId("detail").textContent = text;
}

function select(node) {
  icicle.selected = node;
  canvas.dataset.selected = node === null ? "" : node.id;
  if (node === null) {
    showDetail("");
  } else {
    const text = node.text === null ? [] : [element("code", "", node.text), " "];
    byId("detail").replaceChildren(...text, facts(node));
  }
  redraw();
}

function zoom(node) {
  icicle.focus = node;
  byId("tip").hidden = true;
  canvas.dataset.focus = node === null ? "" : node.id;
  redraw();
}

function showCrumbs() {
  const path = [];
  for (let node = icicle.focus; node !== null; node = node.up) path.unshift(node);
  const made = [];
  if (path.length > 0) {
    const all = element("button", "", "everything");
    all.type = "button";
    all.addEventListener("click", () => zoom(null));
    made.push(all);
  }
  for (const node of path.slice(-6)) {
    const button = element("button", "", title(node));
    button.type = "button";
    button.addEventListener("click", () => zoom(node));
    made.push("›", button);
  }
  if (!byId("crumbs").contains(document.activeElement)) byId("crumbs").replaceChildren(...made);
}

function under(event) {
  const box = canvas.getBoundingClientRect();
  return icicle.at(event.clientX - box.left, event.clientY - box.top);
}

canvas.addEventListener("pointermove", (event) => {
  const rect = under(event);
  const tip = byId("tip");
  tip.hidden = rect === null;
  canvas.style.cursor = rect === null ? "default" : "pointer";
  if (rect === null) return;
  tip.replaceChildren(...describe(rect.node, rect.nodes.length - 1));
  const stage = byId("stage").getBoundingClientRect();
  const left = Math.min(event.clientX - stage.left + 14, stage.width - tip.offsetWidth - 4);
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${event.clientY - stage.top + 18}px`;
});
canvas.addEventListener("pointerleave", () => { byId("tip").hidden = true; });
canvas.addEventListener("click", (event) => {
  const rect = under(event);
  if (rect === null) return;
  select(rect.node);
  zoom(rect.node === icicle.focus ? rect.node.up : rect.node);
});

const widest = (nodes) => nodes.reduce((best, node) => (best === null || node.width > best.width ? node : best), null);

function beside(node, step) {
  const siblings = node.up === null ? tree.roots : node.up.children;
  return siblings[siblings.indexOf(node) + step] ?? node;
}

const MOVES = {
  ArrowUp: (node) => node.up ?? node,
  ArrowDown: (node) => widest(node.children) ?? node,
  ArrowLeft: (node) => beside(node, -1),
  ArrowRight: (node) => beside(node, 1),
  Home: () => icicle.focus ?? widest(tree.roots),
};

canvas.addEventListener("keydown", (event) => {
  const first = icicle.focus ?? widest(tree.roots);
  if (event.key in MOVES && first !== null) {
    const next = icicle.selected === null ? first : MOVES[event.key](icicle.selected);
    if (icicle.focus !== null && !isWithin(next, icicle.focus)) zoom(next.up);
    select(next);
  } else if (event.key === "Enter" && icicle.selected !== null) {
    zoom(icicle.selected);
  } else if ((event.key === "Escape" || event.key === "Backspace") && icicle.focus !== null) {
    zoom(icicle.focus.up);
  } else {
    return;
  }
  event.preventDefault();
});

function isWithin(node, top) {
  for (let each = node; each !== null; each = each.up) if (each === top) return true;
  return false;
}

byId("filter").addEventListener("input", filterAnew);
byId("filter").addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    byId("filter").value = "";
    filterAnew();
    canvas.focus();
  }
});
byId("colour").addEventListener("change", () => {
  icicle.colour = byId("colour").value;
  redraw();
});
document.addEventListener("keydown", (event) => {
  const typing = event.target instanceof HTMLElement && event.target.matches("input, select, textarea");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    byId("filter").focus();
  }
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  icicle.restyle();
  redraw();
});
new ResizeObserver(() => {
  redraw();
  if (state !== null) drawWhatIf(byId("what-if"), state.what_if);
}).observe(byId("stage"));
setInterval(() => {
  if (state === null) return;
  samples.push({ running: state.requests.running, waiting: state.requests.waiting });
  if (samples.length > LOAD_SAMPLES) samples.shift();
  drawLoad(byId("load-chart"), samples, LOAD_SAMPLES);
}, 1000);
setInterval(() => {
  if (state === null) return;
  showMisses(state.misses);
  showRequests(state.requests);
  redraw();
}, REDRAW_MS);

connect(sessionStorage.getItem(KEY) ?? "");
