"use strict";
// What every view needs: the data, text made safe, and numbers as people read them.

const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const escape = text => String(text).replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[c]));
/** Text in which names of options are not broken, and calls of passes where people would break them. */
const worded = text => escape(text)
  .replace(/(^|[^\w-])(--[a-z][\w-]*)/g, '$1<span class="option">$2</span>')
  .replace(/[(,](?!\s)/g, "$&<wbr>");
const plural = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
const sum = values => values.reduce((a, b) => a + b, 0);
const span = (what, first, last) => first === last ? `${what} ${first}` : `${what}s ${first} to ${last}`;

const scaled = (value, units) => {
  for (const [size, unit] of units) if (Math.abs(value) >= size) return (value / size).toFixed(2) + unit;
  return Number.isInteger(value) ? String(value) : value.toPrecision(3);
};
const count = value => scaled(value, [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]);
const rate = value => `${count(value)}${/[A-Za-z]$/.test(count(value)) ? "" : " "}FLOP/s`;
const bytes = value => scaled(value, [[1e9, " GB"], [1e6, " MB"], [1e3, " kB"]]) + (Math.abs(value) < 1e3 ? " B" : "");
const small = value => value == null ? "" : value === 0 ? "0" : value.toExponential(1);
const briefly = value => value === 0 ? "0" : value >= 1 ? value.toFixed(2) + " s" : value >= 1e-3 ? (value * 1e3).toPrecision(3) + " ms" : (value * 1e6).toPrecision(3) + " µs";
const time = value => value >= 1 ? value.toFixed(1) + " s" : (value * 1000).toFixed(0) + " ms";
/** As ``style`` of a chart says: ".1%" or ".3g". */
const styled = style => value => style.endsWith("%") ? (100 * value).toFixed(Number(style.slice(1, -1)) || 0) + "%" : String(Number(value.toPrecision(3)));

/** A table; on a phone each row becomes a block with the heads beside its cells. Heads that start with "#" are of numbers. */
function table(heads, rows) {
  const titles = heads.map(head => head.replace(/^#/, "")), kinds = heads.map(head => head.startsWith("#") ? ' class="n"' : "");
  const head = titles.map((title, column) => `<th scope="col"${kinds[column]}>${escape(title)}</th>`).join("");
  const body = rows.map(cells => `<tr>${cells.map((cell, column) => `<td${kinds[column]} data-label="${escape(titles[column])}">${cell}</td>`).join("")}</tr>`).join("");
  return `<table><thead><tr>${head}</tr></thead><tbody>${body}</tbody></table>`;
}
