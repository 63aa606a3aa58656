// -- tabs, and what is clicked or pressed -----------------------------------------------------------------------------

const tabs = [["pipeline", "Pipeline", drawPipeline], ["ir", "IR", drawIR], ["layers", "Layers", drawLayers]];
if (Object.keys(data.code).length) tabs.push(["code", "Code", drawCode]);
if (data.roofline) tabs.push(["roofline", "Roofline", drawRoofline]);
const drawn = new Set();

function open(id, again = false) {
  for (const [name, , draw] of tabs) {
    const active = name === id, tab = by("tab-" + name);
    by(name).hidden = !active;
    tab.setAttribute("aria-selected", active);
    tab.tabIndex = active ? 0 : -1;
    if (active && (again || !drawn.has(name))) { draw(); drawn.add(name); }
  }
}

function openNode(name) {
  const last = irs[irs.length - 1];
  if (last.index.has(name)) showLine(last.lines[last.index.get(name)]);
}

document.addEventListener("click", event => {
  const target = event.target.closest("[data-line], [data-weight], [data-kernel], [data-node], [data-step], [data-open], .fold, .close, [data-tab]");
  if (!target) return;
  if (target.tagName === "A") event.preventDefault();
  const told = target.dataset;
  if (told.tab) { closeDetails(); open(told.tab); }
  else if (told.weight) showWeight(told.weight);
  else if (told.kernel) openKernel(told.kernel, told.file);
  else if (told.node) openNode(told.node);
  else if (told.line && target.tagName === "A") showLine(Number(told.line));
  else if (told.line) { focusLine(target); showLine(Number(told.line)); }
  else if (told.step) { view.stage = Number(told.step); view.query = ""; open("ir", true); }
  else if (told.open) { shown.file = told.open; shown.kernel = null; closeDetails(); drawCode(); }
  else if (target.classList.contains("fold")) { view.whole = true; by("whole").setAttribute("aria-pressed", true); drawLines(); }
  else closeDetails();
});

const keys = {
  Escape: () => { if (by("details").hidden) return false; closeDetails(); },
  Enter: target => {
    const found = target.id === "search" && view.query ? document.querySelector("#lines [data-line]") : target.closest("#lines [data-line]");
    if (!found) return false;
    focusLine(found);
    showLine(Number(found.dataset.line));
  },
  "/": target => {
    if (target.tagName === "INPUT") return false;
    open("ir");
    by("search").focus();
    by("search").select();
  },
  ArrowDown: target => along(target, true), ArrowUp: target => along(target, false),
  ArrowRight: target => turn(target, 1), ArrowLeft: target => turn(target, -1),
  Home: target => turn(target, -tabs.length), End: target => turn(target, tabs.length),
};

/** From line to line of the IR, and from the search to the first. */
function along(target, down) {
  const line = target.closest("#lines [data-line]");
  const next = line ? stepLine(line, down) : target.id === "search" && down ? document.querySelector("#lines [data-line]") : null;
  if (!next) return false;
  focusLine(next);
}

/** From tab to tab, and from the line before a pass to the one after it. */
function turn(target, places) {
  const place = tabs.findIndex(([id]) => target.id === "tab-" + id);
  if (place >= 0) {
    const id = tabs[Math.max(0, Math.min(tabs.length - 1, Math.abs(places) === 1 ? (place + places + tabs.length) % tabs.length : place + places))][0];
    open(id);
    by("tab-" + id).focus();
    return;
  }
  const line = Math.abs(places) === 1 && target.closest("#lines [data-line]"), other = line && (places > 0 ? line.nextElementSibling : line.previousElementSibling);
  if (!other || !other.dataset.line) return false;
  focusLine(other);
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  if (keys[event.key](event.target) !== false) event.preventDefault();
});

const first = data.steps[0], last = data.steps[data.steps.length - 1], size = (last.size || first.size);
by("title").textContent = data.model.replace(/[/\\]+$/, "").split(/[/\\]/).pop() || data.model;
by("title").title = data.model;
by("summary").innerHTML = [data.architecture, `${count(size.parameters)} parameters`,
  size.nbytes === first.size.nbytes ? bytes(size.nbytes) : `${bytes(first.size.nbytes)} to ${bytes(size.nbytes)}`,
  last.drift == null ? "" : `output moved by ${small(last.drift)}`, data.target && `for ${data.target}`].filter(Boolean).map(text => `<span>${escape(text)}</span>`).join("");
by("tabs").innerHTML = tabs.map(([id, title]) => `<button id="tab-${id}" role="tab" data-tab="${id}" aria-controls="${id}">${title}</button>`).join("");
for (const [id] of tabs) by(id).setAttribute("aria-labelledby", "tab-" + id);
open("pipeline");
