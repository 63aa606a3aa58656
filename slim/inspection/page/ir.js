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

/** What differs between two texts, word by word: [begin, end] of each, outside of the longest sequence they share. */
function edits(text, other) {
  const [left, right] = [text, other].map(each => each.match(/\w+|\s+|[^\w\s]/g) || []);
  const shared = Array.from({length: left.length + 1}, () => new Uint16Array(right.length + 1));
  for (let i = left.length - 1; i >= 0; i--) for (let j = right.length - 1; j >= 0; j--) {
    shared[i][j] = left[i] === right[j] ? shared[i + 1][j + 1] + 1 : Math.max(shared[i + 1][j], shared[i][j + 1]);
  }
  const found = [[], []], at = [0, 0];
  const add = (side, word, differs) => {
    const last = found[side][found[side].length - 1], begin = at[side], end = at[side] += word.length;
    if (differs && last && last[1] === begin) last[1] = end;
    else if (differs) found[side].push([begin, end]);
  };
  let i = 0, j = 0;
  while (i < left.length || j < right.length) {
    if (i < left.length && left[i] === right[j]) { add(0, left[i++], false); add(1, right[j++], false); }
    else if (j === right.length || (i < left.length && shared[i + 1][j] >= shared[i][j + 1])) add(0, left[i++], true);
    else add(1, right[j++], true);
  }
  return found;
}

/** Text as HTML; of each [begin, end, tag, attributes] what stands there is within that tag. */
function inked(text, spans) {
  const cuts = [...new Set([0, text.length, ...spans.flatMap(([begin, end]) => [begin, end])])].sort((a, b) => a - b);
  const within = (html, [, , tag, more = ""]) => `<${tag}${more}>${html}</${tag}>`;
  return cuts.slice(1).map((end, index) => spans.filter(one => one[0] <= cuts[index] && end <= one[1])
    .reduce(within, escape(text.slice(cuts[index], end)))).join("");
}
const spelled = (text, spans = []) => inked(text, [...spans, [0, Math.max(0, text.indexOf(":")), "b", ' class="name"']]);

const view = {
  stage: Math.min(1, irs.length - 1), query: "", sought: null, whole: false, opened: irs.map(() => new Set()), picked: -1,
};
let rows = [];  // of the stage that is shown: lines beside each other, null where one has none

const hitsIn = text => view.sought ? [...text.matchAll(view.sought)].map(({index, 0: words}) =>
  [index, index + words.length, "mark", ' class="found"']) : [];

function drawIR() {
  const choices = irs.map((ir, index) =>
    `<button data-stage="${index}" title="${escape(ir.name)}">${index ? index + ". " : ""}${escape(ir.name)}</button>`);
  by("ir").innerHTML = `<div class="bar" id="stages" role="group" aria-label="Stages">${choices.join("")}</div>
    <div class="bar">
      <input type="search" id="search" aria-label="Search" placeholder="Search nodes, weights, modules, source (/)">
      <button id="whole">all lines</button>
    </div>
    <p class="dim"><span id="said"></span> <span id="found" role="status"></span>
      Inputs and weights are nodes without a line.</p>
    <div class="rows" id="lines"></div>`;
  by("search").oninput = event => search(event.target.value);
  by("whole").onclick = () => { view.whole = !view.whole; view.opened[view.stage].clear(); drawLines(); };
  chooseStage(view.stage);
}

function chooseStage(stage) {
  view.stage = stage;
  for (const button of by("stages").children) button.setAttribute("aria-pressed", Number(button.dataset.stage) === stage);
  by("whole").hidden = !stage;
  drawLines();
}

function search(query) {
  view.query = by("search").value = query;
  view.sought = query ? new RegExp(query.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "gi") : null;
  drawLines();
}

function drawLines() {
  const after = irs[view.stage], before = view.stage > 0 ? irs[view.stage - 1] : null, opened = view.opened[view.stage];
  const renumbered = new Set(before ? data.steps[view.stage].weights.changed : []);
  rows = (before ? beside(before, after) : after.lines.map(number => [null, number])).map(([left, right]) => {
    const differs = before != null && (left == null || right == null || lineOf(left) !== lineOf(right));
    const touched = right != null && !differs && weightsIn(lineOf(right)).some(name => renumbered.has(name));
    return {left, right, differs, touched};
  });
  const matches = number => number != null && (lineOf(number) + " " + originOf(number)).search(view.sought) >= 0;
  const shown = rows.map((row, index) => view.sought ? matches(row.left) || matches(row.right)
    : view.whole || !before || opened.has(index) || near(index) || row.touched);
  by("whole").setAttribute("aria-pressed", view.whole);
  by("said").innerHTML = before ? changesInWords(after.name)
    : `${plural(rows.length, "line")} ${after.name === "lift" ? "as lifted" : escape(after.name)}.`;
  by("found").textContent = view.sought ? `${shown.filter(Boolean).length} found.` : "";
  const heads = names => `<div class="row heads" aria-hidden="true">${names.map(name => `<div>${escape(name)}</div>`).join("")}</div>`;
  const parts = before ? [heads([`before: ${before.name}`, `after: ${after.name}`])] : [];
  let next = 0;  // the first row behind those that are drawn or folded
  const foldTo = end => { if (end > next && !view.sought) parts.push(fold(next, end)); next = end + 1; };
  rows.forEach((row, index) => { if (shown[index]) { foldTo(index); parts.push(drawRow(row)); } });
  foldTo(rows.length);
  if (view.sought && !shown.some(Boolean)) {
    parts.push(`<p class="none">No line of this stage has "${escape(view.query)}" in it, nor in its module or line of source.</p>`);
  }
  by("lines").className = before ? "rows" : "rows single";
  by("lines").innerHTML = parts.join("");
  const first = by("lines").querySelector(".picked") || by("lines").querySelector("[data-line]");
  if (first) first.tabIndex = 0;
}
const originOf = number => data.origins[data.lines[number][1]].join(" ");
const near = index => rows.slice(Math.max(0, index - 2), index + 3).some(row => row.differs);
const fold = (from, to) =>
  `<button class="fold" data-from="${from}" data-to="${to}">${plural(to - from, "equal line")}</button>`;

/** Opens one fold: its lines come where it stood, and what is above them stays there. */
function openFold(button) {
  const {from, to} = button.dataset, above = button.previousElementSibling;
  for (let index = Number(from); index < to; index++) view.opened[view.stage].add(index);
  hold(above, () => { button.outerHTML = rows.slice(from, to).map(drawRow).join(""); });
  rove(above.nextElementSibling.querySelector("[data-line]"));
}

/** Opens the fold that a line of this stage is in, if one hides it. */
function reveal(number) {
  const place = rows.findIndex(row => row.left === number || row.right === number);
  const hiding = [...by("lines").querySelectorAll(".fold")].find(({dataset}) => dataset.from <= place && place < dataset.to);
  if (hiding) openFold(hiding);
}

/** Goes to a line in the stage that is open, or in the last that has it. */
function goToLine(number) {
  const stages = [...irs.keys()].filter(stage => irs[stage].lines.includes(number));
  open("ir");
  search("");
  chooseStage(stages.includes(view.stage) ? view.stage : stages[stages.length - 1]);
  reveal(number);
  const line = by("lines").querySelector(`[data-line="${number}"]`);
  rove(line);
  line.scrollIntoView({block: "center"});
  showLine(number);
}

function changesInWords(name) {
  const differ = rows.filter(row => row.differs).length, others = rows.filter(row => row.touched).length;
  return `Before and after ${escape(name)}: ${differ.toLocaleString("en")} of ${plural(rows.length, "line")} differ` +
    " (<b>−</b> before, <b>+</b> after)" + (others ? `; ${others.toLocaleString("en")} more read weights of other numbers (<b>∗</b>).` : ".");
}

/**
 * A line, and its origin below where what was searched is there alone.
 * One line is in the order of the tabulator; the arrows lead on from it.
 */
function cell(number, kind, edited = []) {
  const text = lineOf(number), origin = originOf(number), hits = hitsIn(text), elsewhere = hits.length ? [] : hitsIn(origin);
  const line = spelled(text, [...hits, ...edited.map(span => [...span, "mark"])]);
  const below = elsewhere.length ? `<br><span class="dim">${inked(origin, elsewhere)}</span>` : "";
  const classes = number === view.picked ? kind + " picked" : kind;
  return `<div class="${classes}" role="button" tabindex="-1" data-line="${number}">${line}${below}</div>`;
}

function drawRow({left, right, differs, touched}) {
  if (!view.stage) return `<div class="row">${cell(right, "")}</div>`;
  const kind = left == null ? "made" : right == null ? "gone" : differs ? "changed" : "same";
  const [before, after] = kind === "changed" ? edits(lineOf(left), lineOf(right)) : [];
  const [old, now] = {changed: ["changed old", "changed new"], same: ["", ""]}[kind] || ["gone old", "made new"];
  const side = (number, cls, edited) => number == null ? '<div class="gap"></div>' : cell(number, cls, edited);
  return `<div class="row ${kind}${touched ? " touched" : ""}">${side(left, old, before)}${side(right, now, after)}</div>`;
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

/** Gives a line the focus, and its place in the order of the tabulator. */
function rove(line) {
  for (const other of by("lines").querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  line.tabIndex = 0;
  line.focus({preventScroll: true});
}

function focusLine(line) {
  rove(line);
  line.scrollIntoView({block: "nearest"});
  if (!by("details").hidden) showLine(Number(line.dataset.line));
}
