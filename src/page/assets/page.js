/** The page: asks the nodes again and again, and shows what they tell. */
import { get, make, write } from "./make.js";
import { Picture, everyone } from "./map.js";
import { Table } from "./table.js";

const POLL = 2000;
const TABLES = ["pods", "peers", "leases", "routes", "neighbours", "flows", "drops", "events"];
/** Pods that are suggested at once. */
const SUGGESTED = 50;
const token = location.hash.slice(1);

/** The nodes as they were told of last. */
let view = { nodes: [] };
/** Addresses of the pods that are chosen, and the way of the packet that was traced last. */
let chosen = [];
let way = null;
let shown = TABLES[0];
const picture = new Picture(get("picture"), choose);
const table = new Table(get("table"));

async function ask(path) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const answer = await fetch(path, { headers, cache: "no-store" });
  if (!answer.ok) throw new Error((await answer.text()).trim() || answer.statusText);
  return answer.json();
}

/** Marks the pods that are chosen and the way of the packet. */
function mark() {
  const names = new Map(view.nodes.map((it) => [it.node, it.public_ip ?? undefined]));
  const hops = (way?.parts ?? []).map((part) => names.get(part.node));
  if (way?.unknown) hops.push(way.unknown.public_ip);
  picture.mark(chosen, hops.filter((hop) => hop !== undefined));
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
      ...(part.more_own > 0 ? [make("p", {}, `and ${part.more_own} more`)] : []),
    ];
  });
  if (way.unknown) {
    const name = way.unknown.node ? `${way.unknown.node} at ${way.unknown.public_ip}` : way.unknown.public_ip;
    parts.push(make("p", {}, `The rest is for the node ${name} to tell: ${way.unknown.why}.`));
  }
  get("answer").replaceChildren(...parts);
}

/** Suggests ends of a trace that begin with, or else have, what is written so far. */
function suggest(field) {
  const written = field.value;
  const found = [];
  for (const node of view.nodes) {
    for (const pod of node.pods) {
      if (found.length < SUGGESTED && pod.some((word) => word.includes(written))) found.push(pod);
    }
  }
  get("ends").replaceChildren(...found.map(([name, address]) => make("option", { value: address }, name)),
    make("option", { value: "outside" }), make("option", { value: "gateway" }));
}

async function drawTable() {
  const wanted = () => `${shown}?${new URLSearchParams({ search: get("search").value.trim() })}`;
  const asked = wanted();
  let told;
  try {
    told = await ask(`/api/${asked}`);
  } catch (error) {
    if (wanted() === asked) table.say(error.message, "outcome lost");
    return;
  }
  if (wanted() !== asked) return;
  const needle = get("search").value.trim();
  if (told.rows.length === 0) table.say(needle === "" ? `There are no ${shown} now.` : `None of the ${shown} has “${needle}”.`);
  else table.show(told.rows, told.more ? "There are more rows than are shown: search for those that you want." : "");
}

function select(name) {
  shown = name;
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
    const nodes = everyone(view);
    const here = view.nodes.length;
    const pods = view.nodes.reduce((sum, node) => sum + node.pods.length, 0);
    const amiss = view.nodes.filter((node) => node.trouble).map((node) => `${node.node}: ${node.trouble}`);
    const known = nodes.length - here;
    write(get("summary"), here === 0 ? "No node runs on this machine: start one with “muslin node”."
      : [`${here} node${here === 1 ? "" : "s"} here, ${pods} pod${pods === 1 ? "" : "s"}, ${known} more known`, ...amiss].join("; "));
    picture.show(view, nodes);
    if (!document.hidden) await drawTable();
  } catch (error) {
    write(get("summary"), `The page cannot be reached (${error.message}); it is tried again.`);
  }
  setTimeout(poll, POLL);
}

makeTabs();
select(shown);
for (const name of ["from", "to"]) {
  const field = get("question").elements[name];
  for (const event of ["focus", "input"]) field.addEventListener(event, () => suggest(field));
}
get("question").addEventListener("submit", (event) => {
  event.preventDefault();
  chosen = [event.target.elements.from.value, event.target.elements.to.value];
  trace();
});
get("search").addEventListener("input", drawTable);
poll();
