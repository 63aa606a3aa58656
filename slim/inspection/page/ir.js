// -- the IR: a stage, or two side by side ----------------------------------------------------------------------------

const nameOf = text => text.slice(0, text.indexOf(":"));
const lineOf = number => data.lines[number][0];
const irs = data.irs.map(ir => {
  const index = new Map(ir.lines.map((number, place) => [nameOf(lineOf(number)), place]));
  return {name: ir.name, lines: ir.lines, index};
});

/** Rows [left, right] of line numbers of two stages, a node beside itself; null where one has nothing. */
function beside(before, after) {
  const rows = [];
  let i = 0, j = 0;
  const [left, right] = [before.lines, after.lines];
  while (i < left.length || j < right.length) {
    const a = i < left.length ? nameOf(lineOf(left[i])) : null, b = j < right.length ? nameOf(lineOf(right[j])) : null;
    if (a !== null && a === b) rows.push([left[i++], right[j++]]);
    else if (a !== null && (b === null || !after.index.has(a) || after.index.get(a) < j)) rows.push([left[i++], null]);
    else if (b !== null && (a === null || !before.index.has(b) || before.index.get(b) < i)) rows.push([null, right[j++]]);
    else rows.push([left[i++], null]);
  }
  return rows;
}

/** The text with the middle marked in which it differs from another. */
function marked(text, other) {
  if (other == null || text === other) return spelled(text);
  let head = 0, tail = 0;
  const most = Math.min(text.length, other.length);
  while (head < most && text[head] === other[head]) head++;
  while (tail < most - head && text[text.length - 1 - tail] === other[other.length - 1 - tail]) tail++;
  const middle = text.slice(head, text.length - tail);
  return spelled(text.slice(0, head)) + (middle ? `<mark>${escape(middle)}</mark>` : "") + escape(text.slice(text.length - tail));
}
const spelled = text => {
  const colon = text.indexOf(":");
  return colon < 0 ? escape(text) : `<b class="name">${escape(text.slice(0, colon))}</b>${escape(text.slice(colon))}`;
};

const view = {stage: Math.min(1, irs.length - 1), query: "", whole: false};

function drawIR() {
  const choices = irs.map((ir, index) =>
    `<button data-stage="${index}" aria-pressed="${index === view.stage}" title="${escape(ir.name)}">${index ? index + ". " : ""}${escape(ir.name)}</button>`);
  by("ir").innerHTML = `<div class="bar" id="stages" role="group" aria-label="Stages">${choices.join("")}</div>
    <div class="bar"><input type="search" id="search" aria-label="Search" placeholder="Search nodes, weights, modules, source (/)" value="${escape(view.query)}">
    <button id="whole" aria-pressed="${view.whole}"${view.stage ? "" : " hidden"}>all lines</button></div>
    <p class="dim"><span id="said"></span> <span id="found" role="status"></span></p><div class="rows" id="lines"></div>`;
  by("search").oninput = event => { view.query = event.target.value; drawLines(); };
  by("whole").onclick = () => { view.whole = !view.whole; by("whole").setAttribute("aria-pressed", view.whole); drawLines(); };
  by("stages").onclick = event => { if (event.target.dataset.stage) { view.stage = Number(event.target.dataset.stage); drawIR(); } };
  drawLines();
}

function drawLines() {
  const after = irs[view.stage], before = view.stage > 0 ? irs[view.stage - 1] : null;
  const rows = before ? beside(before, after) : after.lines.map(number => [null, number]);
  const query = view.query.toLowerCase();
  const matches = number => number != null && (lineOf(number) + " " + data.origins[data.lines[number][1]].join(" ")).toLowerCase().includes(query);
  const differs = rows.map(([a, b]) => before != null && (a == null || b == null || lineOf(a) !== lineOf(b)));
  const renumbered = new Set(before ? data.steps[view.stage].weights.changed : []);
  const touched = rows.map(([, b], index) => b != null && !differs[index] && weightsIn(lineOf(b)).some(name => renumbered.has(name)));
  const shown = rows.map((row, index) => query ? row.some(matches) : view.whole || !before || near(differs, index) || touched[index]);
  by("said").innerHTML = before ? changesInWords(after.name, differs, touched) : `${plural(rows.length, "line")} ${after.name === "lift" ? "as lifted" : after.name}.`;
  by("found").textContent = query ? `${shown.filter(Boolean).length} found.` : "";
  const parts = before ? [`<div class="row heads" aria-hidden="true"><div>before: ${escape(before.name)}</div><div>after: ${escape(after.name)}</div></div>`] : [];
  let hidden = 0;
  rows.forEach((row, index) => {
    if (!shown[index]) { hidden++; return; }
    if (hidden && !query) parts.push(fold(hidden));
    hidden = 0;
    parts.push(before ? pair(row, differs[index], touched[index]) : `<div class="row">${cell(row[1], "", spelled(lineOf(row[1])))}</div>`);
  });
  if (hidden && !query) parts.push(fold(hidden));
  if (query && !shown.some(Boolean)) parts.push(`<p class="none">No line of this stage has "${escape(view.query)}" in it, nor in its module or line of source.</p>`);
  by("lines").className = before ? "rows" : "rows single";
  by("lines").innerHTML = parts.join("");
  const first = by("lines").querySelector("[data-line]");
  if (first) first.tabIndex = 0;
}
const near = (flags, index) => { for (let d = -2; d <= 2; d++) if (flags[index + d]) return true; return false; };
const fold = number => `<button class="fold">${plural(number, "equal line")}</button>`;

function changesInWords(name, differs, touched) {
  const others = touched.filter(Boolean).length;
  return `Before and after ${escape(name)}: ${differs.filter(Boolean).length.toLocaleString("en")} of ${plural(differs.length, "line")} differ (<b>−</b> before, <b>+</b> after)` +
    (others ? `; ${others.toLocaleString("en")} more read weights of other numbers (<b>∗</b>).` : ".");
}

// One line is in the order of the tabulator; the arrows lead on from it.
const cell = (number, kind, html) => `<div class="${kind}" tabindex="-1" data-line="${number}">${html}</div>`;

function pair([a, b], differs, touched) {
  const kind = a == null ? "made" : b == null ? "gone" : differs ? "changed" : "same";
  const side = (number, other, cls) => number == null ? '<div class="gap"></div>' : cell(number, cls, marked(lineOf(number), other == null ? null : lineOf(other)));
  const [left, right] = kind === "changed" ? ["changed old", "changed new"] : kind === "same" ? ["", ""] : ["gone old", "made new"];
  return `<div class="row ${kind}${touched ? " touched" : ""}">${side(a, b, left)}${side(b, a, right)}</div>`;
}

/** The line above or below the one in the focus, on the same side. */
function stepLine(from, down) {
  const column = [...from.parentNode.children].indexOf(from);
  for (let row = from.parentNode; (row = down ? row.nextElementSibling : row.previousElementSibling);) {
    const next = row.classList.contains("row") && [row.children[column], ...row.children].find(one => one && one.dataset.line && one.getClientRects().length);
    if (next) return next;
  }
  return null;
}

function focusLine(line) {
  for (const other of by("lines").querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  line.tabIndex = 0;
  line.focus();
  if (!by("details").hidden) showLine(Number(line.dataset.line));
}
