// -- tabs, and what is clicked or pressed -----------------------------------------------------------------------------

const tabs = [["pipeline", "Pipeline", drawPipeline], ["ir", "IR", drawIR], ["layers", "Layers", drawLayers]];
if (Object.keys(data.code).length) tabs.push(["code", "Code", drawCode]);
if (data.roofline) tabs.push(["roofline", "Roofline", drawRoofline]);
const places = {};  // of each tab that was drawn: how far down it was, and what draws its panel again
let current = null;

/** Opens a tab where it was left. */
function open(id) {
  if (id === current) return;
  if (current) places[current] = {down: scrollY, again: panel.again};
  current = id;
  for (const [name] of tabs) {
    const active = name === id, tab = by("tab-" + name);
    by(name).hidden = !active;
    tab.setAttribute("aria-selected", active);
    tab.tabIndex = active ? 0 : -1;
  }
  const place = places[id] || {down: 0};
  if (!places[id]) { places[id] = place; tabs.find(([name]) => name === id)[2](); }
  if (place.again) place.again();
  else hideDetails();
  scrollTo(0, place.down);
}

// -- the address names the tab and what is open in it, so that the browser's Back leads there again --------------------

function address() {
  if (current === "ir") return `ir/${view.stage}`;
  return current === "code" ? `code/${shown.file}${shown.kernel ? ":" + shown.kernel : ""}` : current;
}

function remember() {
  if (location.hash !== "#" + address()) history.pushState(null, "", "#" + address());
}

/** Opens what the address says. */
function follow() {
  const [, id, more, kernel = null] = location.hash.match(/^#(\w+)(?:\/([^:]*)(?::(.*))?)?$/) || [];
  open(tabs.some(([name]) => name === id) ? id : "pipeline");
  if (id === "ir" && irs[Number(more)] && Number(more) !== view.stage) chooseStage(Number(more));
  const isOther = more !== shown.file || kernel !== shown.kernel;
  if (id === "code" && Object.keys(data.code).includes(more) && isOther) showFile(more, kernel);
  const chosen = [...document.querySelectorAll("#lines .picked, #hit a")].find(one => one.getClientRects().length);
  if (chosen) chosen.focus({preventScroll: true});
}
history.scrollRestoration = "manual";
addEventListener("popstate", follow);

function openNode(name) {
  const last = irs[irs.length - 1];
  if (last.index.has(name)) showLine(last.lines[last.index.get(name)]);
}

const CLICKED = "[data-line], [data-weight], [data-kernel], [data-node], [data-step], [data-stage], [data-place], [data-tab], .fold, .close";

document.addEventListener("click", event => {
  const target = event.target.closest(CLICKED);
  if (!target) return;
  const told = target.dataset, link = target.tagName === "A";
  if (link) event.preventDefault();
  if (told.tab) open(told.tab);
  else if (told.weight) showWeight(told.weight);
  else if (told.kernel) openKernel(told.kernel, told.file);
  else if (told.node) openNode(told.node);
  else if (told.place) goToLine(Number(told.place));
  else if (told.line && link) showLine(Number(told.line));
  else if (told.line) { focusLine(target); showLine(Number(told.line)); }
  else if (told.stage) chooseStage(Number(told.stage));
  else if (told.step) openStage(Number(told.step));
  else if (target.classList.contains("fold")) openFold(target);
  else closeDetails();
  if (link && (told.weight || told.node || told.line || target.closest(".source"))) by("details").focus();
  remember();
});

document.addEventListener("change", event => {
  if (event.target.id !== "file") return;
  hideDetails();
  showFile(event.target.value);
  remember();
});

function openStage(stage) {
  open("ir");
  search("");
  chooseStage(stage);
  by("stages").children[stage].focus();
}

/** Opens the line in the focus, and its panel takes the focus; or, of a search, the first line that was found. */
function choose(target) {
  const line = target.closest("#lines [data-line]");
  const chosen = line || (target.id === "search" && view.query && by("lines").querySelector("[data-line]"));
  if (!chosen) return false;
  focusLine(chosen);
  showLine(Number(chosen.dataset.line));
  if (line) by("details").focus();
}

const keys = {
  Escape: () => { if (by("details").hidden) return false; closeDetails(); },
  Enter: choose, " ": target => target.closest("#lines [data-line]") ? choose(target) : false,
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

/** From tab to tab, from stage to stage, and from the line before a pass to the one after it. */
function turn(target, places) {
  const place = tabs.findIndex(([id]) => target.id === "tab-" + id);
  if (place >= 0) {
    const id = tabs[Math.max(0, Math.min(tabs.length - 1, Math.abs(places) === 1 ? (place + places + tabs.length) % tabs.length : place + places))][0];
    open(id);
    by("tab-" + id).focus();
    return;
  }
  const stage = Math.abs(places) === 1 && target.closest("[data-stage]");
  const next = stage && (places > 0 ? stage.nextElementSibling : stage.previousElementSibling);
  if (next) { next.focus(); next.click(); }
  if (stage) return;
  const line = Math.abs(places) === 1 && target.closest("#lines [data-line]"), other = line && (places > 0 ? line.nextElementSibling : line.previousElementSibling);
  if (!other || !other.dataset.line) return false;
  focusLine(other);
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
  if (keys[event.key](event.target) === false) return;
  event.preventDefault();
  remember();
});

const first = data.steps[0], last = data.steps[data.steps.length - 1], size = (last.size || first.size);
by("title").textContent = data.model.replace(/[/\\]+$/, "").split(/[/\\]/).pop() || data.model;
by("title").title = data.model;
by("summary").innerHTML = [data.architecture, `${count(size.parameters)} parameters`,
  size.nbytes === first.size.nbytes ? bytes(size.nbytes) : `${bytes(first.size.nbytes)} to ${bytes(size.nbytes)}`,
  last.drift == null ? "" : `output moved by ${small(last.drift)}`, data.target && `for ${data.target}`].filter(Boolean).map(text => `<span>${escape(text)}</span>`).join("");
by("tabs").innerHTML = tabs.map(([id, title]) => `<button id="tab-${id}" role="tab" data-tab="${id}" aria-controls="${id}">${title}</button>`).join("");
for (const [id] of tabs) by(id).setAttribute("aria-labelledby", "tab-" + id);
follow();
