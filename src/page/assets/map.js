/**
 * The picture of nodes, pods and tunnels. A few nodes are all drawn, and scaled to fit. Of many only those
 * in sight are, with their tunnels, and an update changes only what is another.
 */
import { draw, inNextFrame, rate, set, write } from "./make.js";

/** More nodes than these do not fit at once. */
const FEW = 30;
const SHOWN_PODS = 12;
const WIDTH = 190;
const GAP = 90;
/** More rates than these would be written over each other. */
const RATES = 60;

const order = new Intl.Collator("en", { numeric: true });

/** All nodes that are known: those of this machine, and those that are their peers only. */
export function everyone(view) {
  const all = new Map();
  for (const node of view.nodes) {
    const address = node.public_ip ?? node.node;
    all.set(address, { address, name: node.node, subnet: node.subnet ?? "", pods: node.pods, trouble: node.trouble,
      here: true });
  }
  for (const node of view.nodes) {
    for (const peer of node.peers) {
      if (!all.has(peer.public_ip)) {
        all.set(peer.public_ip, { address: peer.public_ip, name: peer.node ?? peer.public_ip,
          subnet: peer.subnet, pods: [], trouble: null, here: false });
      }
    }
  }
  return [...all.values()].sort((a, b) => b.here - a.here || order.compare(a.name, b.name));
}

/** The tunnel between two addresses, whichever is the first. */
function between(one, other) {
  return one < other ? `${one} ${other}` : `${other} ${one}`;
}

export class Picture {
  /** In this element, which scrolls; `choose` is called with the address of a pod. */
  constructor(holder, choose) {
    this.holder = holder;
    this.choose = choose;
    this.nodes = [];
    this.links = new Map();
    /** Bytes that had passed a tunnel when it was looked at last. */
    this.passed = new Map();
    this.rows = [];
    this.places = new Map();
    /** What is drawn: by the address of a node and by the two of a tunnel. */
    this.drawn = new Map();
    this.lines = new Map();
    this.chosen = [];
    this.path = new Set();
    this.tunnels = draw("g");
    this.boxes = draw("g");
    this.svg = draw("svg", { role: "group", "aria-label": "nodes with their pods, and the tunnels between them" },
      this.tunnels, this.boxes);
    holder.replaceChildren(this.svg);
    const refresh = inNextFrame(() => this.refresh());
    holder.addEventListener("scroll", refresh, { passive: true });
    new ResizeObserver(inNextFrame(() => {
      this.place();
      this.refresh();
    })).observe(holder);
  }

  show(view, nodes) {
    this.nodes = nodes;
    this.links = this.tunnelsOf(view);
    this.place();
    this.refresh();
  }

  /** Marks the pods at these addresses, and the tunnels between these nodes, one after the other. */
  mark(chosen, hops) {
    this.chosen = chosen;
    this.path = new Set(hops.slice(1).map((hop, at) => between(hops[at], hop)));
    this.refresh();
  }

  /** The tunnels, each with what passes it. */
  tunnelsOf(view) {
    const now = performance.now();
    const passed = new Map();
    const all = new Map();
    for (const node of view.nodes) {
      const here = node.public_ip;
      if (!here) continue;
      for (const peer of node.peers) {
        const way = `${here} ${peer.public_ip}`;
        const { bytes } = peer;
        const last = this.passed.get(way);
        passed.set(way, { bytes, now });
        const bits = last && bytes >= last.bytes ? (8000 * (bytes - last.bytes)) / Math.max(now - last.now, 1) : 0;
        const key = between(here, peer.public_ip);
        const known = all.get(key);
        if (known && bits <= known.bits) continue;
        all.set(key, { key, ends: [here, peer.public_ip], bits, state: peer.state, path: peer.path ?? "none" });
      }
    }
    this.passed = passed;
    return all;
  }

  /** Gives each node its place: a few in a square, many in as many columns as are in sight. */
  place() {
    const { nodes } = this;
    const few = nodes.length <= FEW;
    const columns = Math.max(1, few ? Math.ceil(Math.sqrt(nodes.length))
      : Math.floor((this.holder.clientWidth - 20) / (WIDTH + GAP)));
    let top = 20;
    this.rows = [];
    this.places = new Map();
    for (let start = 0; start < nodes.length; start += columns) {
      const row = { top, height: 0, nodes: nodes.slice(start, start + columns) };
      row.nodes.forEach((node, column) => {
        const height = 46 + 22 * Math.min(node.pods.length, SHOWN_PODS + 1);
        row.height = Math.max(row.height, height);
        this.places.set(node.address, { x: 20 + column * (WIDTH + GAP), y: top, height });
      });
      this.rows.push(row);
      top += row.height + 60;
    }
    const [width, height] = [columns * (WIDTH + GAP), Math.max(top, 120)];
    set(this.svg, "viewBox", `0 0 ${width} ${height}`);
    this.svg.classList.toggle("many", !few);
    this.svg.style.width = few ? "" : `${width}px`;
    this.svg.style.height = few ? "" : `${height}px`;
  }

  /** The nodes in sight, or a screen above or below it. */
  inSight() {
    if (this.nodes.length <= FEW) return this.nodes;
    const { scrollTop, clientHeight } = this.holder;
    const rows = this.rows.filter((row) => row.top + row.height > scrollTop - clientHeight
      && row.top < scrollTop + 2 * clientHeight);
    return rows.flatMap((row) => row.nodes);
  }

  refresh() {
    const wanted = new Map(this.inSight().map((node) => [node.address, node]));
    const focused = document.activeElement?.getAttribute("data-address");
    for (const [address, box] of this.drawn) {
      // Who is at a pod with the keyboard stays there.
      if (wanted.has(address) || (this.places.has(address) && box.element.contains(document.activeElement))) continue;
      box.element.remove();
      this.drawn.delete(address);
    }
    let before = null;
    for (const node of [...wanted.values()].reverse()) {
      const box = this.box(node);
      if (box.element.nextSibling !== before || !box.element.parentNode) this.boxes.insertBefore(box.element, before);
      before = box.element;
    }
    for (const pod of this.boxes.querySelectorAll(".pod")) {
      set(pod, "aria-pressed", String(this.chosen.includes(pod.dataset.address)));
    }
    if (focused && document.activeElement === document.body) {
      this.boxes.querySelector(`[data-address="${CSS.escape(focused)}"]`)?.focus();
    }
    this.refreshTunnels(wanted);
  }

  refreshTunnels(wanted) {
    const shown = new Map();
    for (const link of this.links.values()) {
      const isWanted = wanted.has(link.ends[0]) || wanted.has(link.ends[1]) || this.path.has(link.key);
      if (isWanted && link.ends.every((end) => this.places.has(end))) shown.set(link.key, link);
    }
    for (const [key, line] of this.lines) {
      if (shown.has(key)) continue;
      line.element.remove();
      this.lines.delete(key);
    }
    for (const link of shown.values()) this.line(link, shown.size <= RATES);
  }

  /** Draws a tunnel, or changes what is another of it. */
  line(link, hasRate) {
    let line = this.lines.get(link.key);
    if (!line) {
      const parts = { title: draw("title"), label: draw("text", { class: "faint", "text-anchor": "middle" }) };
      parts.line = draw("line", {}, parts.title);
      line = { ...parts, element: draw("g", {}, parts.line, parts.label) };
      this.lines.set(link.key, line);
      this.tunnels.append(line.element);
    }
    const [from, to] = link.ends.map((end) => middle(this.places.get(end)));
    for (const [key, value] of Object.entries({ x1: from.x, y1: from.y, x2: to.x, y2: to.y })) {
      set(line.line, key, String(value));
    }
    const isAlive = link.state === "alive";
    set(line.line, "class", `tunnel${isAlive ? "" : " silent"}${this.path.has(link.key) ? " path" : ""}`);
    write(line.title, `${link.path}, ${link.state}, ${rate(link.bits)}`);
    set(line.label, "x", String((from.x + to.x) / 2));
    set(line.label, "y", String((from.y + to.y) / 2 - 6));
    write(line.label, hasRate ? `${link.path}, ${isAlive ? rate(link.bits) : link.state}` : "");
  }

  /** A node with its pods, drawn anew only if something is another. */
  box(node) {
    const place = this.places.get(node.address);
    const pods = node.pods.slice(0, SHOWN_PODS);
    const shape = JSON.stringify([place, node.name, node.subnet, node.here, node.trouble, node.pods.length, pods]);
    const known = this.drawn.get(node.address);
    if (known?.shape === shape) return known;
    const box = { shape, element: this.drawNode(node, pods, place) };
    known?.element.replaceWith(box.element);
    this.drawn.set(node.address, box);
    return box;
  }

  drawNode(node, pods, { x, y, height }) {
    const amiss = node.trouble ? " amiss" : "";
    const group = draw("g", { class: `node${node.here ? "" : " elsewhere"}${amiss}` },
      draw("title", {}, node.trouble ?? (node.here ? `node ${node.name}` : `node ${node.name}, on another machine`)),
      draw("rect", { x, y, width: WIDTH, height, rx: 6 }),
      draw("text", { x: x + 10, y: y + 18, "font-weight": 600 }, node.name),
      draw("text", { x: x + 10, y: y + 34, class: "faint" }, node.subnet));
    pods.forEach((pod, index) => group.append(this.podButton(pod, node, x + 18, y + 52 + 22 * index)));
    if (node.pods.length > pods.length) {
      const more = `and ${node.pods.length - pods.length} more: see the tables`;
      group.append(draw("text", { x: x + 10, y: y + 56 + 22 * pods.length, class: "faint" }, more));
    }
    return group;
  }

  podButton([name, address], node, x, y) {
    const circle = draw("circle", { cx: x, cy: y, r: 8 });
    const label = draw("text", { x: x + 14, y: y + 4 }, `${name} ${address}`);
    const button = draw("g", { class: "pod", role: "button", tabindex: 0, "data-address": address,
      "aria-label": `pod ${name} of node ${node.name}, ${address}`, "aria-pressed": "false" }, circle, label);
    button.addEventListener("click", () => this.choose(address));
    button.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        this.choose(address);
      }
    });
    return button;
  }
}

function middle({ x, y, height }) {
  return { x: x + WIDTH / 2, y: y + height / 2 };
}
