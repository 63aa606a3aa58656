// -- the panel: a node, a weight or a kernel -------------------------------------------------------------------------

/** [pass, what it did] to a node or a weight; what no pass made was there at the start. */
function history(name, kind) {
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
    ["IR", `<code>${spelled(text)}</code>`],
    module && ["module", escape(module)],
    where && ["source", `${escape(where)}<pre>${escape(source)}</pre>`],
    weights.length && ["weights", weights.map(weightButton).join("<br>")],
    name !== "return" && ["passes", steps(history(name, "nodes"))],
    name !== "return" && ["runs", places(regionsOf(name, "nodes"))],
  ]);
}

function showWeight(name) {
  const held = data.weights[name];
  const readers = irs[irs.length - 1].lines.filter(number => weightsIn(lineOf(number)).includes(name));
  details(name, [
    held && ["held as", `${escape(held[0])}, ${held[1].toLocaleString("en")} bytes`],
    !held && ["held as", "a pass took it out"],
    ["passes", steps(history(name, "weights"))],
    readers.length && ["read by", readers.map(number => `<a href="#" data-line="${number}">${escape(nameOf(lineOf(number)))}</a>`).join(", ")],
    ["runs", places(regionsOf(name, "weights"))],
  ]);
}

/** A kernel of the generated code: the regions that it runs, and the nodes of each. */
function showKernel(kernel, file) {
  const form = file.slice(0, file.indexOf("/")), inFile = file.slice(form.length + 1), all = data.regions[form] || [];
  const its = all.map((region, number) => [number, region]).filter(([, region]) => region.kernels.some(([name, where]) => name === kernel && where === inFile));
  details(kernel, [
    ["in", escape(file)],
    [`runs ${plural(its.length, "region")} of ${all.length}`, its.map(([number, region]) =>
      `<p>${number + 1}. <code>${escape(region.text)}</code><br>${nodeLinks(region)}</p>`).join("") || '<span class="dim">none of its own: other kernels call it</span>'],
  ]);
}

const nodeLinks = region => region.nodes.map(node => irs[irs.length - 1].index.has(node) ? `<a href="#" data-node="${escape(node)}">${escape(node)}</a>` : escape(node)).join(" ");
const kernelLinks = (region, form) => region.kernels.map(([kernel, file]) =>
  `<a href="#" data-kernel="${escape(kernel)}" data-file="${escape(form + "/" + file)}">${escape(kernel)}</a>`).join(", ");
const weightButton = name => `<a href="#" data-weight="${escape(name)}">${escape(name)}</a> <span class="dim">${escape((data.weights[name] || [""])[0])}</span>`;
const steps = found => found.map(([pass, verb]) => `${escape(pass)} ${verb} it`).join("<br>");
function places(found) {
  if (!found.length) return `<span class="dim">${Object.keys(data.code).length ? "no kernel of its own" : "nothing was generated"}</span>`;
  return found.map(([form, number, region]) => `${escape(form)}, ${region.kernels.length ? "region" : "step"} ${number + 1}, ${kernelLinks(region, form) || "by PyTorch"}<br><code class="dim">${escape(region.text)}</code>`).join("<br>");
}

/** Marks the lines of the IR that the panel is about. */
function mark(number) {
  for (const line of document.querySelectorAll("#lines .picked")) line.classList.remove("picked");
  for (const line of document.querySelectorAll(`#lines [data-line="${number}"]`)) line.classList.add("picked");
}

/** Opens the panel beside what is shown, or below it on a narrow screen; what was clicked stays where it was. */
function details(title, rows) {
  const anchor = document.activeElement && document.activeElement.closest("#lines [data-line]"), was = anchor && anchor.getBoundingClientRect().top;
  by("details").innerHTML = `<button class="close" aria-label="Close (Escape)">close</button><h2>${escape(title)}</h2><dl>` +
    rows.filter(Boolean).map(([term, html]) => `<dt>${term}</dt><dd>${html}</dd>`).join("") + "</dl>";
  by("details").hidden = false;
  by("details").scrollTop = 0;
  document.body.classList.add("told");
  if (!anchor) return;
  scrollBy(0, anchor.getBoundingClientRect().top - was);
  anchor.scrollIntoView({block: "nearest"});
}

function closeDetails() {
  by("details").hidden = true;
  document.body.classList.remove("told");
  const line = document.querySelector("#lines .picked");
  if (line && line.getClientRects().length) line.focus();
  mark(-1);
}
