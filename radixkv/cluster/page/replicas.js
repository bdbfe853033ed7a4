// Shows the replicas side by side: what the router knows of each, and its live page in a frame.

import { asHeader } from "../live/feed.js";

const EVERY_MS = 2000;
const KEY = "radixkv-key"; // the live pages in the frames read it, too: they are of the same origin and tab
const MAX_OPEN = 4; // a live page holds a connection, and a browser has six for a host over HTTP/1.1

const byId = (id) => document.getElementById(id);
const cards = new Map(); // by the names of replicas
let open = []; // names of those whose live page is shown, the oldest first
const met = new Set(); // names that were up once: their pages were opened if there was room

function card(name) {
  if (!cards.has(name)) {
    const made = byId("replica").content.firstElementChild.cloneNode(true);
    made.querySelector(".name").textContent = name;
    made.querySelector(".toggle").addEventListener("click", () => {
      open = open.includes(name) ? open.filter((each) => each !== name) : [...open, name].slice(-MAX_OPEN);
      cards.forEach(showFrame);
    });
    cards.set(name, made);
  }
  return cards.get(name);
}

function showFrame(made, name) {
  const isOpen = open.includes(name);
  const address = made.dataset.address;
  const place = made.querySelector(".live");
  const toggle = made.querySelector(".toggle");
  toggle.textContent = isOpen ? "Hide" : "Show";
  toggle.setAttribute("aria-expanded", String(isOpen));
  if (!isOpen) {
    place.replaceChildren();
  } else if (place.firstElementChild?.getAttribute("src") !== address) {
    const frame = document.createElement("iframe");
    frame.src = address;
    frame.title = `Live page of ${name}`;
    place.replaceChildren(frame);
  }
}

function show({ model, replicas }) {
  byId("model").textContent = model ?? "";
  const names = new Set(replicas.map((row) => row.replica));
  for (const [name, made] of cards) {
    if (!names.has(name)) {
      made.remove();
      cards.delete(name);
      met.delete(name);
    }
  }
  open = open.filter((name) => names.has(name));
  for (const row of replicas) {
    const made = card(row.replica);
    const put = (selector, text) => { made.querySelector(selector).textContent = text; };
    made.dataset.address = `replicas/${row.number}/`;
    made.querySelector(".name").href = made.dataset.address;
    put(".state", row.state);
    made.querySelector(".state").dataset.state = row.state;
    put(".hit-rate", row.hit_rate === null ? "–" : `${(100 * row.hit_rate).toFixed(1)} %`);
    put(".queued", row.queued_s === null ? "–" : `${row.queued_s.toFixed(2)} s`);
    put(".requests", row.requests === null ? "–" : `${row.requests.running} running, ${row.requests.waiting} waiting`);
    put(".trouble", row.trouble ?? "");
    made.querySelector(".trouble").hidden = row.trouble === null;
    if (row.state === "up" && !met.has(row.replica)) {
      met.add(row.replica);
      if (open.length < MAX_OPEN) open.push(row.replica);
    }
    if (!made.isConnected) byId("replicas").append(made);
  }
  cards.forEach(showFrame);
}

function setStatus(kind, text) {
  byId("status").dataset.state = kind;
  byId("status").textContent = text;
}

function askForKey(status, key) {
  sessionStorage.removeItem(KEY);
  byId("ask-title").textContent = !key ? "These servers need a key" : status === 403 ? "This key may not see the page" : "Nobody has this key";
  if (!byId("ask").open) byId("ask").showModal();
  byId("key").value = "";
  byId("key").focus();
}

async function look() {
  const key = sessionStorage.getItem(KEY) ?? "";
  const headers = key ? { Authorization: asHeader(key) } : {};
  byId("forget").hidden = !key;
  try {
    const answer = await fetch("route/replicas", { headers, cache: "no-store", credentials: "same-origin" });
    const body = await answer.json();
    if (answer.status === 401 || answer.status === 403) {
      setStatus("lost", body.error?.message ?? `status ${answer.status}`);
      askForKey(answer.status, key);
      return; // until there is another key
    }
    if (!answer.ok) throw new Error(body.error?.message ?? `status ${answer.status}`);
    const up = body.replicas.filter((row) => row.state === "up").length;
    setStatus(up ? "live" : "lost", `${up} of ${body.replicas.length} up`);
    show(body);
  } catch (error) {
    setStatus("lost", `no connection; trying again: ${error.message}`);
  }
  setTimeout(look, EVERY_MS);
}

byId("ask-form").addEventListener("submit", () => {
  sessionStorage.setItem(KEY, byId("key").value);
  byId("key").value = "";
  look();
});

byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});

look();
