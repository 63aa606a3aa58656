// -- the panel: a node, a weight or a kernel -------------------------------------------------------------------------

/** [pass, what it did] to a node or a weight; what no pass made was there at the start. */
function historyOf(name, kind) {
  const found = data.steps.slice(1).flatMap(step => ["made", "changed", "removed"].filter(verb => step[kind][verb].includes(name)).map(verb => [step.name, verb]));
  return found.some(([, verb]) => verb === "made") ? found : [[data.steps[0].name, data.steps[0].name === "lift" ? "made" : "had"], ...found];
}

const weightsIn = text => [...text.matchAll(/weights\["((?:[^"\\]|\\.)*)"\]/g)].map(match => JSON.parse(`"${match[1]}"`));

/** [executable, number, region] of those that compute a node or read a weight. */
const regionsOf = (name, kind) => Object.entries(data.regions).flatMap(([form, made]) =>
  made.map((region, number) => [form, number, region]).filter(([, , region]) => region[kind].includes(name)));

function showLine(number) {
  const text = lineOf(number), [module, where, source] = data.origins[data.lines[number][1]], name = nameOf(text);
  const weights = weightsIn(text);
  mark(number);
  details(name, [
    ["IR", `<code>${spelled(text)}</code><br><a href="#" data-place="${number}">among the lines of the IR</a>`],
    module && ["module", escape(module)],
    where && ["source", `${escape(where)}<pre>${escape(source)}</pre>`],
    weights.length && ["weights", weights.map(weightButton).join("<br>")],
    name !== "return" && ["passes", steps(historyOf(name, "nodes"))],
    name !== "return" && ["runs", placesOf(regionsOf(name, "nodes"))],
  ], () => showLine(number));
}

function showWeight(name) {
  const held = data.weights[name];
  const readers = irs[irs.length - 1].lines.filter(number => weightsIn(lineOf(number)).includes(name));
  details(name, [
    held && ["held as", `${escape(held[0])}, ${held[1].toLocaleString("en")} bytes`],
    !held && ["held as", "a pass took it out"],
    ["passes", steps(historyOf(name, "weights"))],
    readers.length && ["read by", readers.map(number => `<a href="#" data-line="${number}">${escape(nameOf(lineOf(number)))}</a>`).join(", ")],
    ["runs", placesOf(regionsOf(name, "weights"))],
  ], () => showWeight(name));
}

/** A kernel of the generated code: the regions that it runs, and the nodes of each. */
function showKernel(kernel, file) {
  const form = file.slice(0, file.indexOf("/")), inFile = file.slice(form.length + 1), all = data.regions[form] || [];
  const its = all.map((region, number) => [number, region]).filter(([, region]) => region.kernels.some(([name, where]) => name === kernel && where === inFile));
  details(kernel, [
    ["in", escape(file)],
    [`runs ${plural(its.length, "region")} of ${all.length}`, its.map(([number, region]) =>
      `<p>${number + 1}. <code>${escape(region.text)}</code><br>${nodeLinks(region)}</p>`).join("") || '<span class="dim">none of its own: other kernels call it</span>'],
  ], () => showKernel(kernel, file));
}

const nodeLinks = region => region.nodes.map(node => irs[irs.length - 1].index.has(node) ? `<a href="#" data-node="${escape(node)}">${escape(node)}</a>` : escape(node)).join(" ");
const kernelLinks = (region, form) => region.kernels.map(([kernel, file]) =>
  `<a href="#" data-kernel="${escape(kernel)}" data-file="${escape(form + "/" + file)}">${escape(kernel)}</a>`).join(", ");
const weightButton = name => `<a href="#" data-weight="${escape(name)}">${escape(name)}</a> <span class="dim">${escape((data.weights[name] || [""])[0])}</span>`;
const steps = found => found.map(([pass, verb]) => `${escape(pass)} ${verb} it`).join("<br>");
function placesOf(found) {
  if (!found.length) return `<span class="dim">${Object.keys(data.code).length ? "no kernel of its own" : "nothing was generated"}</span>`;
  return found.map(([form, number, region]) => `${escape(form)}, ${region.kernels.length ? "region" : "step"} ${number + 1}, ${kernelLinks(region, form) || "by PyTorch"}<br><code class="dim">${escape(region.text)}</code>`).join("<br>");
}

/** Marks the lines of the IR that the panel is about. */
function mark(number) {
  view.picked = number;
  for (const line of document.querySelectorAll("#lines .picked")) line.classList.remove("picked");
  for (const line of document.querySelectorAll(`#lines [data-line="${number}"]`)) line.classList.add("picked");
}

const panel = {again: null, opener: null};  // draws once more what it tells; what had the focus before it

/** Opens the panel beside what is shown, or below it on a narrow screen; what was clicked stays where it was. */
function details(title, rows, again) {
  const active = document.activeElement, anchor = active.closest("#lines [data-line]");
  if (!by("details").contains(active)) panel.opener = active;
  panel.again = again;
  hold(anchor, () => document.body.classList.add("told"));
  by("details").innerHTML = `<button class="close" aria-label="Close (Escape)">close</button>
    <h2 id="told">${escape(title)}</h2><dl>` + rows.filter(Boolean).map(([term, html]) => `<dt>${term}</dt><dd>${html}</dd>`).join("") + "</dl>";
  by("details").hidden = false;
  by("details").scrollTop = 0;
  if (anchor) anchor.scrollIntoView({block: "nearest"});
}

/** Changes the page around an element, if there is one, that stays where it is on the screen. */
function hold(element, change) {
  const was = element && element.getBoundingClientRect().top;
  change();
  if (element) scrollBy(0, element.getBoundingClientRect().top - was);
}

function hideDetails() {
  panel.again = null;
  by("details").hidden = true;
  document.body.classList.remove("told");
}

/** Closes the panel, and leads back to the line that it was about, or to what opened it. */
function closeDetails() {
  const back = [document.querySelector("#lines .picked"), panel.opener].find(one => one && one.getClientRects().length);
  hold(back, hideDetails);
  if (back) back.focus();
  mark(-1);
}
