/** Elements, and values as text. */

export const get = (id) => document.getElementById(id);

/** An element with attributes and children; text is text, whatever is in it. */
export function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Writes text only where it is another, so that nothing is laid out anew for nothing. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function set(element, attribute, value) {
  if (element.getAttribute(attribute) !== value) element.setAttribute(attribute, value);
}

/** Calls `then` once before the next frame, however often it is asked to. */
export function inNextFrame(then) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      then();
    });
  };
}

/** A number of bits in a second. */
export function rate(bits) {
  for (const unit of ["bit/s", "kbit/s", "Mbit/s"]) {
    if (bits < 1000) return `${bits < 10 ? bits.toFixed(1) : Math.round(bits)} ${unit}`;
    bits /= 1000;
  }
  return `${bits.toFixed(1)} Gbit/s`;
}

/** A value of a row as text. */
export function text(value) {
  if (value === null || value === undefined) return "";
  if (Array.isArray(value)) return value.map(text).join(", ");
  if (typeof value === "object") return Object.entries(value).map(([key, it]) => `${key} ${text(it)}`).join(", ");
  return String(value);
}
