"use strict";

const POLL = 2000;
const SHOWN_PODS = 12;
const TABLES = ["pods", "peers", "leases", "routes", "neighbours", "flows", "drops", "events"];
const token = location.hash.slice(1);
const get = (id) => document.getElementById(id);

/** The nodes as they were told of last, and the counters before that. */
let view = { nodes: [] };
let before = new Map();
/** Addresses of the pods that are chosen, and the way of the packet that was traced last. */
let chosen = [];
let way = null;
let shape = "";
let table = TABLES[0];

async function ask(path) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const answer = await fetch(path, { headers, cache: "no-store" });
  if (!answer.ok) throw new Error((await answer.text()).trim() || answer.statusText);
  return answer.json();
}

/** An element with attributes and children; text is text, whatever is in it. */
function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** A number of bits in a second. */
function rate(bits) {
  for (const unit of ["bit/s", "kbit/s", "Mbit/s"]) {
    if (bits < 1000) return `${bits < 10 ? bits.toFixed(1) : Math.round(bits)} ${unit}`;
    bits /= 1000;
  }
  return `${bits.toFixed(1)} Gbit/s`;
}

/** What came since the last look, in bits a second. */
function since(key, bytes, now) {
  const last = before.get(key);
  before.set(key, { bytes, now });
  return last && bytes >= last.bytes ? (8000 * (bytes - last.bytes)) / Math.max(now - last.now, 1) : 0;
}

/** All nodes that are known: those of this machine, and those that are their peers only. */
function everyone() {
  const all = new Map();
  for (const node of view.nodes) {
    const address = node.status ? node.status.public_ip : node.node;
    all.set(address, { address, name: node.node, subnet: node.status?.subnet ?? "",
      pods: node.pods, trouble: node.trouble ?? node.status?.trouble, here: true });
  }
  for (const node of view.nodes) {
    for (const peer of node.peers) {
      if (!all.has(peer.public_ip)) {
        all.set(peer.public_ip, { address: peer.public_ip, name: peer.node ?? peer.public_ip,
          subnet: peer.subnet, pods: [], trouble: null, here: false });
      }
    }
  }
  return [...all.values()].sort((a, b) => b.here - a.here || a.name.localeCompare(b.name, "en", { numeric: true }));
}

/** The tunnels between them, each with what passes it. */
function tunnels(now) {
  const all = new Map();
  for (const node of view.nodes) {
    if (!node.status) continue;
    for (const peer of node.peers) {
      const ends = [node.status.public_ip, peer.public_ip];
      const key = [...ends].sort().join(" ");
      const bits = since(`${ends.join(" ")}`, peer.sent.bytes + peer.received.bytes, now);
      const known = all.get(key);
      const state = peer.usable ? peer.state : "unusable";
      if (!known || bits > known.bits) all.set(key, { key, ends, bits, state, path: peer.path ?? "none" });
    }
  }
  return [...all.values()];
}

const WIDTH = 190;

function place(nodes) {
  const heights = nodes.map((node) => 46 + 22 * Math.min(node.pods.length, SHOWN_PODS + 1));
  const columns = Math.max(1, Math.ceil(Math.sqrt(nodes.length * (nodes.length > 30 ? 1.6 : 1))));
  let top = 20;
  const places = new Map();
  for (let row = 0; row < nodes.length; row += columns) {
    const line = nodes.slice(row, row + columns);
    line.forEach((node, column) => {
      places.set(node.address, { x: 20 + column * (WIDTH + 90), y: top, height: heights[row + column] });
    });
    top += Math.max(...heights.slice(row, row + columns)) + 60;
  }
  return { places, width: columns * (WIDTH + 90), height: Math.max(top, 120) };
}

function podButton(pod, node, x, y) {
  const circle = draw("circle", { cx: x, cy: y, r: 8 });
  const label = draw("text", { x: x + 14, y: y + 4 }, `${pod.pod} ${pod.address}`);
  const button = draw("g", { class: "pod", role: "button", tabindex: 0, "data-address": pod.address,
    "aria-label": `pod ${pod.pod} of node ${node.name}, ${pod.address}`, "aria-pressed": "false" }, circle, label);
  button.addEventListener("click", () => choose(pod.address));
  button.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      choose(pod.address);
    }
  });
  return button;
}

function drawNode(node, { x, y, height }) {
  const amiss = node.trouble ? " amiss" : "";
  const group = draw("g", { class: `node${node.here ? "" : " elsewhere"}${amiss}` },
    draw("title", {}, node.trouble ?? (node.here ? `node ${node.name}` : `node ${node.name}, on another machine`)),
    draw("rect", { x, y, width: WIDTH, height, rx: 6 }),
    draw("text", { x: x + 10, y: y + 18, "font-weight": 600 }, node.name),
    draw("text", { x: x + 10, y: y + 34, class: "faint" }, node.subnet));
  node.pods.slice(0, SHOWN_PODS).forEach((pod, index) => {
    group.append(podButton(pod, node, x + 18, y + 52 + 22 * index));
  });
  if (node.pods.length > SHOWN_PODS) {
    const more = `and ${node.pods.length - SHOWN_PODS} more: see the tables`;
    group.append(draw("text", { x: x + 10, y: y + 56 + 22 * SHOWN_PODS, class: "faint" }, more));
  }
  return group;
}

function middle({ x, y, height }) {
  return { x: x + WIDTH / 2, y: y + height / 2 };
}

/** Draws everything anew if there are other nodes, pods or tunnels, and else only what changes. */
function drawMap() {
  const now = performance.now();
  const nodes = everyone();
  const links = tunnels(now);
  const next = JSON.stringify([nodes.map((it) => [it.address, it.name, it.subnet, it.here, Boolean(it.trouble),
    it.pods.map((pod) => [pod.pod, pod.address])]), links.map((it) => it.key)]);
  if (next !== shape) {
    shape = next;
    const focused = document.activeElement?.getAttribute?.("data-address");
    const { places, width, height } = place(nodes);
    const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "group",
      "aria-label": "nodes with their pods, and the tunnels between them" });
    for (const link of links) {
      const [from, to] = link.ends.map((end) => places.get(end)).map((it) => it && middle(it));
      if (!from || !to) continue;
      picture.append(draw("line", { class: "tunnel", "data-link": link.key, x1: from.x, y1: from.y, x2: to.x, y2: to.y },
        draw("title")));
      if (links.length <= 60) {
        picture.append(draw("text", { class: "faint", "data-rate": link.key, "text-anchor": "middle",
          x: (from.x + to.x) / 2, y: (from.y + to.y) / 2 - 6 }));
      }
    }
    for (const node of nodes) picture.append(drawNode(node, places.get(node.address)));
    get("picture").replaceChildren(picture);
    const ends = nodes.flatMap((node) => node.pods.map((pod) => make("option", { value: pod.address }, pod.pod)));
    get("ends").replaceChildren(...ends, make("option", { value: "outside" }), make("option", { value: "gateway" }));
    if (focused) get("picture").querySelector(`[data-address="${CSS.escape(focused)}"]`)?.focus();
  }
  for (const link of links) {
    const line = get("picture").querySelector(`[data-link="${CSS.escape(link.key)}"]`);
    if (!line) continue;
    line.setAttribute("class", `tunnel${link.state === "alive" ? "" : " silent"}`);
    line.firstChild.textContent = `${link.path}, ${link.state}, ${rate(link.bits)}`;
    const label = get("picture").querySelector(`[data-rate="${CSS.escape(link.key)}"]`);
    if (label) label.textContent = `${link.path}, ${link.state === "alive" ? rate(link.bits) : link.state}`;
  }
  mark();
}

/** Marks the pods that are chosen and the way of the packet. */
function mark() {
  for (const pod of get("picture").querySelectorAll(".pod")) {
    pod.setAttribute("aria-pressed", String(chosen.includes(pod.dataset.address)));
  }
  for (const line of get("picture").querySelectorAll(".tunnel")) line.classList.remove("path");
  const names = new Map(view.nodes.filter((it) => it.status).map((it) => [it.node, it.status.public_ip]));
  const hops = (way?.parts ?? []).map((part) => names.get(part.node));
  if (way?.unknown) hops.push(way.unknown.public_ip);
  for (let at = 1; at < hops.length; at += 1) {
    const key = [hops[at - 1], hops[at]].sort().join(" ");
    get("picture").querySelector(`[data-link="${CSS.escape(key)}"]`)?.classList.add("path");
  }
}

function choose(address) {
  chosen = chosen.length === 1 && chosen[0] !== address ? [chosen[0], address] : [address];
  const form = get("question");
  form.elements.from.value = chosen[0];
  form.elements.to.value = chosen[1] ?? "";
  way = null;
  mark();
  if (chosen.length === 2) trace();
}

async function trace() {
  const form = get("question");
  const query = new URLSearchParams();
  for (const [name, value] of new FormData(form)) if (value !== "") query.set(name, value);
  try {
    way = await ask(`/api/trace?${query}`);
    showWay();
  } catch (error) {
    way = null;
    get("answer").replaceChildren(make("p", { class: "outcome lost" }, error.message));
  }
  mark();
}

function showWay() {
  const parts = way.parts.flatMap((part, index) => {
    const steps = part.steps.flatMap((step) => [make("dt", {}, step.kind), make("dd", {}, step.text)]);
    const lost = part.outcome.verdict === "dropped";
    const reason = part.outcome.reason ? `Lost, ${part.outcome.reason}: ` : "";
    return [
      ...(index === 0 ? [make("p", {}, `${part.packet.source} to ${part.packet.destination}: ${part.packet.text}`)] : []),
      make("h3", {}, `node ${part.node}`),
      make("dl", {}, ...steps),
      make("p", { class: `outcome${lost ? " lost" : ""}` }, reason + part.outcome.text),
      ...part.own.map((own) => make("p", {}, `also, ${own}`)),
    ];
  });
  if (way.unknown) {
    const name = way.unknown.node ? `${way.unknown.node} at ${way.unknown.public_ip}` : way.unknown.public_ip;
    parts.push(make("p", {}, `The rest is for the node ${name} to tell, which does not run here or does not answer.`));
  }
  get("answer").replaceChildren(...parts);
}

/** A value of a row as text. */
function text(value) {
  if (value === null || value === undefined) return "";
  if (Array.isArray(value)) return value.map(text).join(", ");
  if (typeof value === "object") return Object.entries(value).map(([key, it]) => `${key} ${text(it)}`).join(", ");
  return String(value);
}

async function rows() {
  if (table === "pods" || table === "peers") {
    return { more: false, rows: view.nodes.flatMap((node) => node[table].map((row) => [node.node, row])) };
  }
  return ask(`/api/${table}`);
}

async function drawTable() {
  const wanted = table;
  let told;
  try {
    told = await rows();
  } catch (error) {
    if (wanted === table) get("table").replaceChildren(make("p", { class: "outcome lost" }, error.message));
    return;
  }
  if (wanted !== table) return;
  const columns = [...new Set(told.rows.flatMap(([, row]) => Object.keys(row)))];
  const needle = get("search").value.trim().toLowerCase();
  const lines = told.rows.map(([node, row]) => [node, ...columns.map((column) => text(row[column]))])
    .filter((line) => line.some((cell) => cell.toLowerCase().includes(needle)));
  if (lines.length === 0) {
    const why = told.rows.length === 0 ? `There are no ${table} now.` : `None of ${told.rows.length} ${table} has “${needle}”.`;
    get("table").replaceChildren(make("p", {}, why));
    return;
  }
  const head = ["on", ...columns].map((name) => make("th", { scope: "col" }, name.replaceAll("_", " ")));
  const body = lines.slice(0, 1000).map((line) => make("tr", {}, ...line.map((cell) => make("td", {}, cell))));
  const more = told.more || lines.length > 1000 ? [make("p", {}, "There are more rows than are shown.")] : [];
  get("table").replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...body)), ...more);
}

function select(name) {
  table = name;
  for (const tab of get("tabs").children) {
    const is = tab.dataset.table === name;
    tab.setAttribute("aria-selected", String(is));
    tab.tabIndex = is ? 0 : -1;
    if (is) get("table").setAttribute("aria-labelledby", tab.id);
  }
  drawTable();
}

function makeTabs() {
  const tabs = TABLES.map((name) => make("button", { role: "tab", type: "button", id: `tab-${name}`,
    "aria-controls": "table", "data-table": name }, name));
  for (const [at, tab] of tabs.entries()) {
    tab.addEventListener("click", () => select(tab.dataset.table));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(at + step + tabs.length) % tabs.length];
      next.focus();
      select(next.dataset.table);
    });
  }
  get("tabs").replaceChildren(...tabs);
}

async function poll() {
  try {
    view = await ask("/api/view");
    const here = view.nodes.length;
    const pods = view.nodes.reduce((sum, node) => sum + node.pods.length, 0);
    const amiss = view.nodes.filter((node) => node.trouble).map((node) => `${node.node}: ${node.trouble}`);
    const known = everyone().length - here;
    const summary = here === 0 ? "No node runs on this machine: start one with “muslin node”."
      : [`${here} node${here === 1 ? "" : "s"} here, ${pods} pod${pods === 1 ? "" : "s"}, ${known} more known`, ...amiss].join("; ");
    if (get("summary").textContent !== summary) get("summary").textContent = summary;
    drawMap();
    if (!document.hidden) await drawTable();
  } catch (error) {
    get("summary").textContent = `The page cannot be reached (${error.message}); it is tried again.`;
  }
  setTimeout(poll, POLL);
}

makeTabs();
select(table);
get("question").addEventListener("submit", (event) => {
  event.preventDefault();
  chosen = [event.target.elements.from.value, event.target.elements.to.value];
  trace();
});
get("search").addEventListener("input", drawTable);
poll();
