/** A table of any number of rows, of which only those in sight are in the document. */
import { inNextFrame, make, set, text, write } from "./make.js";

/** Rows above and below those in sight. */
const SPARE = 20;

export class Table {
  /** In this element, which scrolls. */
  constructor(holder) {
    this.holder = holder;
    this.lines = [];
    this.columns = [];
    this.rowHeight = 0;
    this.head = make("tr");
    this.body = make("tbody");
    this.more = make("p");
    this.table = make("table", {}, make("thead", {}, this.head), this.body);
    holder.addEventListener("scroll", inNextFrame(() => this.refresh()), { passive: true });
    new ResizeObserver(inNextFrame(() => this.refresh())).observe(holder);
  }

  /** Shows a sentence in place of rows. */
  say(words, kind = "") {
    this.lines = [];
    this.holder.replaceChildren(make("p", { class: kind }, words));
  }

  /** Shows rows, each with its node, and `more` behind them. */
  show(rows, more) {
    const columns = new Set();
    for (const [, row] of rows) for (const column in row) columns.add(column);
    this.lines = rows;
    if (String([...columns]) !== String(this.columns)) {
      this.columns = [...columns];
      const names = ["on", ...columns].map((name) => make("th", { scope: "col" }, name.replaceAll("_", " ")));
      this.head.replaceChildren(...names);
      this.body.replaceChildren();
      this.holder.scrollTop = 0;
    }
    write(this.more, more);
    if (this.table.parentNode !== this.holder) this.holder.replaceChildren(this.table, this.more);
    this.refresh();
  }

  refresh() {
    const { length } = this.lines;
    if (length === 0 || this.table.parentNode !== this.holder) return;
    if (this.body.childElementCount === 0) this.row(0);
    this.rowHeight = this.body.firstElementChild.offsetHeight || this.rowHeight || 24;
    const { scrollTop, clientHeight } = this.holder;
    const count = Math.min(length, Math.ceil(clientHeight / this.rowHeight) + 2 * SPARE);
    const first = Math.max(0, Math.min(Math.floor(scrollTop / this.rowHeight) - SPARE, length - count));
    while (this.body.childElementCount > count) this.body.lastElementChild.remove();
    for (let at = 0; at < count; at += 1) this.write(this.row(at), first + at);
    set(this.table, "aria-rowcount", String(length + 1));
    this.table.style.marginTop = `${first * this.rowHeight}px`;
    this.table.style.marginBottom = `${(length - first - count) * this.rowHeight}px`;
    // Columns do not become narrower while somebody scrolls.
    const widths = [...this.head.children].map((cell) => `${cell.offsetWidth}px`);
    widths.forEach((width, at) => { this.head.children[at].style.minWidth = width; });
  }

  /** The row with this number in the document. */
  row(at) {
    if (at >= this.body.childElementCount) {
      this.body.append(make("tr", {}, ...["on", ...this.columns].map(() => make("td"))));
    }
    return this.body.children[at];
  }

  write(row, number) {
    const [node, values] = this.lines[number];
    set(row, "aria-rowindex", String(number + 2));
    write(row.children[0], node);
    this.columns.forEach((column, at) => write(row.children[at + 1], text(values[column])));
  }
}
