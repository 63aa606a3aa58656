"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const escape = text => String(text).replace(/[&<>"]/g, c => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}[c]));
const plural = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
const sum = values => values.reduce((a, b) => a + b, 0);

// -- numbers as people read them ----------------------------------------------------------------------------------

const scaled = (value, units) => {
  for (const [size, unit] of units) if (Math.abs(value) >= size) return (value / size).toFixed(2) + unit;
  return Number.isInteger(value) ? String(value) : value.toPrecision(3);
};
const count = value => scaled(value, [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]);
const bytes = value => scaled(value, [[1e9, " GB"], [1e6, " MB"], [1e3, " kB"]]) + (Math.abs(value) < 1e3 ? " B" : "");
const small = value => value == null ? "" : value === 0 ? "0" : value.toExponential(1);
const briefly = value => value >= 1 ? value.toFixed(2) + " s" : value >= 1e-3 ? (value * 1e3).toPrecision(3) + " ms" : (value * 1e6).toPrecision(3) + " µs";
const time = value => value >= 1 ? value.toFixed(1) + " s" : (value * 1000).toFixed(0) + " ms";

// -- the IR ---------------------------------------------------------------------------------------------------------

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
    `<button data-stage="${index}" aria-pressed="${index === view.stage}">${index ? index + ". " : ""}${escape(ir.name)}</button>`);
  by("ir").innerHTML = `<div class="bar" id="stages">${choices.join("")}</div>
    <div class="bar"><input type="search" id="search" placeholder="Search nodes, weights, modules, lines of source (/)" value="${escape(view.query)}">
    <button id="whole" aria-pressed="${view.whole}">all lines</button><span id="found" class="dim" role="status"></span></div>
    <p class="dim" id="said"></p><div class="rows" id="lines"></div>`;
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
  const changed = differs.filter(Boolean).length;
  const renumbered = new Set(before ? data.steps[view.stage].weights.changed : []);
  const touched = rows.map(([, b], index) => b != null && !differs[index] && weightsIn(lineOf(b)).some(name => renumbered.has(name)));
  by("lines").className = before ? "rows" : "rows single";
  by("said").textContent = before
    ? `before and after ${after.name}: ${changed} of ${rows.length} lines differ` + (touched.some(Boolean) ? `; ${touched.filter(Boolean).length} more read weights of other numbers` : "")
    : `${rows.length} lines as ${after.name === "lift" ? "lifted" : "they are"}`;
  const shown = rows.map((row, index) => query ? row.some(matches) : view.whole || !before || near(differs, index) || touched[index]);
  by("found").textContent = query ? `${shown.filter(Boolean).length} found` : "";
  const parts = [];
  let hidden = 0;
  rows.forEach((row, index) => {
    if (!shown[index]) { hidden++; return; }
    if (hidden && !query) parts.push(fold(hidden));
    hidden = 0;
    parts.push(before ? pair(row, differs[index], touched[index]) : `<div class="row"><div tabindex="0" data-line="${row[1]}">${spelled(lineOf(row[1]))}</div></div>`);
  });
  if (hidden && !query) parts.push(fold(hidden));
  by("lines").innerHTML = parts.join("");
}
const near = (flags, index) => { for (let d = -2; d <= 2; d++) if (flags[index + d]) return true; return false; };
const fold = number => `<button class="fold">${plural(number, "equal line")}</button>`;

function pair([a, b], differs, touched) {
  const kind = a == null ? "made" : b == null ? "gone" : differs ? "changed" : "same";
  const side = (number, other, cls) => number == null ? '<div class="gap"></div>'
    : `<div class="${cls}" tabindex="0" data-line="${number}">${marked(lineOf(number), other == null ? null : lineOf(other))}</div>`;
  const [left, right] = kind === "changed" ? ["changed", "changed"] : kind === "same" ? ["", ""] : ["gone", "made"];
  return `<div class="row ${kind}${touched ? " touched" : ""}">${side(a, b, left)}${side(b, a, right)}</div>`;
}

// -- one node, or one weight ----------------------------------------------------------------------------------------

function history(name) {
  const found = [];
  irs.forEach((ir, index) => {
    const now = ir.index.has(name), was = index > 0 && irs[index - 1].index.has(name);
    if (now && !was) found.push([ir.name, "made"]);
    else if (!now && was) found.push([ir.name, "removed"]);
    else if (now && was) {
      const text = place => lineOf(place.lines[place.index.get(name)]);
      if (text(ir) !== text(irs[index - 1])) found.push([ir.name, "changed"]);
    }
  });
  return found;
}

function weightHistory(name) {
  const found = data.steps.slice(1).flatMap(step =>
    ["made", "changed", "removed"].filter(verb => step.weights[verb].includes(name)).map(verb => [step.name, verb]));
  return found.some(([, verb]) => verb === "made") ? found : [["lift", "made"], ...found];
}

const weightsIn = text => [...text.matchAll(/weights\["((?:[^"\\]|\\.)*)"\]/g)].map(match => JSON.parse(`"${match[1]}"`));

/** [executable, number, region] of those that compute a node or read a weight. */
const regionsOf = (name, kind) => Object.entries(data.regions).flatMap(([form, made]) =>
  made.map((region, number) => [form, number, region]).filter(([, , region]) => region[kind].includes(name)));

function showLine(number) {
  const text = lineOf(number), [module, where, source] = data.origins[data.lines[number][1]], name = nameOf(text);
  const weights = weightsIn(text);
  details(name, [
    ["IR", `<code>${spelled(text)}</code>`],
    module && ["module", escape(module)],
    where && ["source", `${escape(where)}<pre>${escape(source)}</pre>`],
    weights.length && ["weights", weights.map(weightButton).join("<br>")],
    ["passes", steps(history(name))],
    ["runs", places(regionsOf(name, "nodes"))],
  ]);
}

function showWeight(name) {
  const held = data.weights[name];
  const readers = irs[irs.length - 1].lines.filter(number => weightsIn(lineOf(number)).includes(name));
  details(name, [
    held && ["held as", `${escape(held[0])}, ${held[1].toLocaleString("en")} bytes`],
    !held && ["held as", "a pass took it out"],
    ["passes", steps(weightHistory(name))],
    readers.length && ["read by", readers.map(number => `<a href="#" data-line="${number}">${escape(nameOf(lineOf(number)))}</a>`).join(", ")],
    ["runs", places(regionsOf(name, "weights"))],
  ]);
}

const weightButton = name => `<a href="#" data-weight="${escape(name)}">${escape(name)}</a> <span class="dim">${escape((data.weights[name] || [""])[0])}</span>`;
const steps = found => found.map(([pass, verb]) => `${escape(pass)} ${verb} it`).join("<br>");
function places(found) {
  if (!found.length) return `<span class="dim">${Object.keys(data.code).length ? "no kernel of its own" : "nothing was generated"}</span>`;
  return found.map(([form, number, region]) => {
    const kernels = region.kernels.map(([kernel, file]) =>
      `<a href="#" data-kernel="${escape(kernel)}" data-file="${escape(form + "/" + file)}">${escape(kernel)}</a>`);
    return `${escape(form)}, ${kernels.length ? "region" : "step"} ${number + 1}, ${kernels.join(", ") || "by PyTorch"}<br><code class="dim">${escape(region.text)}</code>`;
  }).join("<br>");
}

function details(title, rows) {
  by("details").innerHTML = `<button class="close">close</button><h2>${escape(title)}</h2><dl>` +
    rows.filter(Boolean).map(([term, html]) => `<dt>${term}</dt><dd>${html}</dd>`).join("") + "</dl>";
  by("details").hidden = false;
}

// -- the pipeline ---------------------------------------------------------------------------------------------------

function drawPipeline() {
  const around = Object.entries(data.report.seconds);
  const spent = data.steps.map(step => sum(Object.values(step.seconds)));
  const blocks = [...around.filter(([name]) => name !== "lower").map(([name, seconds]) => [name, seconds, null]),
    ...data.steps.map((step, index) => [step.name, spent[index], index]).slice(1),
    ...around.filter(([name]) => name === "lower").map(([name, seconds]) => [name, seconds, null])];
  const bar = blocks.map(([name, seconds, index]) => `<button style="flex:${Math.max(seconds, 1e-3)}" title="${escape(name)}: ${time(seconds)}"
    ${index == null ? 'class="aside"' : `data-step="${index}"`}>${escape(name)}</button>`).join("");
  const rows = data.steps.map((step, index) => `<tr><td>${index && irs.length > 1 ? `<a href="#" data-step="${index}">${escape(step.name)}</a>` : escape(step.name)}</td>
    <td class="n">${step.matched ? `${step.matched.length} of ${step.matched.length + step.skipped.length}` : ""}</td>
    <td class="n">${step.size ? count(step.size.nodes) : ""}</td><td class="n">${step.size ? count(step.size.parameters) : ""}</td>
    <td class="n">${step.size ? bytes(step.size.nbytes) : ""}</td><td class="n">${small(step.error)}</td><td class="n">${small(step.drift)}</td>
    <td class="n">${index ? time(spent[index]) : ""}</td></tr>`).join("");
  by("pipeline").innerHTML = `<div class="time" aria-label="Time">${bar}</div><div class="scroll"><table><thead><tr><th>pass</th>
    <th class="n">sites</th><th class="n">nodes</th><th class="n">parameters</th><th class="n">bytes</th><th class="n">output moved</th>
    <th class="n">since lift</th><th class="n">time</th></tr></thead><tbody>${rows}</tbody></table></div>
    ${data.report.error == null ? "" : `<p class="dim">${escape(data.target)}: the output is off by ${small(data.report.error)} of its largest</p>`}
    ${data.steps.map(remarks).join("")}${rules("the lift", data.report.rules)}`;
}

function remarks(step) {
  const notes = step.notes.map(note => `<li>${escape(note)}</li>`).join("");
  const skipped = (step.skipped || []).map(([site, reason]) => `<li>left ${escape(site)}: ${escape(reason)}</li>`).join("");
  const charts = (step.charts || []).map(drawChart).join("");
  const counts = rules(step.name, step.rules || []);
  if (!notes && !skipped && !charts && !counts) return "";
  return `<details ${charts || notes ? "open" : ""}><summary>${escape(step.name)}</summary><ul>${notes}</ul>
    ${skipped ? `<details><summary>${plural(step.skipped.length, "site")} left alone</summary><ul>${skipped}</ul></details>` : ""}${counts}<div class="grid">${charts}</div></details>`;
}

function rules(title, counts) {
  const used = counts.filter(([, , matched, misses]) => matched || misses.length);
  if (!used.length) return "";
  const rows = used.map(([name, tried, matched, misses]) => `<tr><td>${escape(name)}${misses.map(miss => `<br><span class="warn">near miss: ${escape(miss)}</span>`).join("")}</td>
    <td class="n">${matched}</td><td class="n">${tried}</td></tr>`).join("");
  return `<details><summary>rules of ${title}</summary><div class="scroll"><table><tr><th>rule</th><th class="n">matched</th><th class="n">tried</th></tr>${rows}</table></div></details>`;
}

// -- pictures -------------------------------------------------------------------------------------------------------

const colours = ["var(--after)", "var(--before)", "#d9822b", "#3f9b5f", "#8f5bd6", "#c0486b"];

function drawBars(title, ticks, series, format) {
  const width = 340, height = 150, top = 8, floor = height - 16, left = 46;
  const largest = Math.max(...series.flatMap(one => one.values.map(value => value || 0)), 0) || 1;
  const step = (width - left) / ticks.length, each = step * 0.8 / series.length;
  const bars = series.flatMap((one, row) => one.values.map((value, index) => value == null ? "" :
    `<rect x="${(left + index * step + step * 0.1 + row * each).toFixed(1)}" y="${(floor - value / largest * (floor - top)).toFixed(1)}" width="${each.toFixed(1)}"
      height="${(value / largest * (floor - top)).toFixed(1)}" fill="${one.colour}"><title>${escape(ticks[index])}, ${escape(one.name)}: ${format(value)}</title></rect>`));
  const every = Math.ceil(ticks.length / 12);
  const marks = ticks.map((tick, index) => index % every ? "" : `<text x="${left + (index + 0.5) * step}" y="${height - 4}" text-anchor="middle">${escape(tick)}</text>`);
  return figure(title, series, `<svg viewBox="0 0 ${width} ${height}" role="img"><text x="0" y="${top + 8}">${format(largest)}</text>
    <line x1="${left}" x2="${width}" y1="${floor}" y2="${floor}" stroke="var(--line)"/>${bars.join("")}${marks.join("")}</svg>`);
}

function drawCurves(chart) {
  const width = 340, height = 150, left = 46, names = Object.keys(chart.series);
  const level = value => chart.log ? Math.log(Math.max(value, 1e-12)) : value;
  const all = names.flatMap(name => chart.series[name].map(level));
  const low = chart.log ? Math.min(...all) : Math.min(0, ...all), high = Math.max(...all), span = high - low || 1;
  const lines = names.map((name, row) => {
    const values = chart.series[name];
    const at = (value, index) => `${(left + index / Math.max(1, values.length - 1) * (width - left)).toFixed(1)},${(height - 8 - (level(value) - low) / span * (height - 20)).toFixed(1)}`;
    return `<polyline fill="none" stroke-width="1.5" stroke="${colours[row % colours.length]}" points="${values.map(at).join(" ")}"><title>${escape(name)}</title></polyline>`;
  });
  const shown = value => (chart.log ? Math.exp(value) : value).toPrecision(2);
  return figure(`${chart.title} (${chart.y_label} by ${chart.x_label})`, names.slice(0, 8).map((name, row) => ({name, colour: colours[row % colours.length]})),
    `<svg viewBox="0 0 ${width} ${height}" role="img"><text x="0" y="14">${shown(high)}</text><text x="0" y="${height - 8}">${shown(low)}</text>${lines.join("")}</svg>`);
}

const drawChart = chart => chart.kind === "lines" ? drawCurves(chart)
  : drawBars(`${chart.title} (${chart.y_label} by ${chart.x_label})`, chart.ticks,
    Object.keys(chart.series).map((name, row) => ({name, values: chart.series[name], colour: colours[row % colours.length]})), value => value.toPrecision(3));

const figure = (title, series, picture) => `<figure><figcaption>${escape(title)}${series.length > 1
  ? "<br>" + series.map(one => `<span style="color:${one.colour}">■</span> <span class="dim">${escape(one.name)}</span>`).join(" ") : ""}</figcaption>${picture}</figure>`;

function drawLayers() {
  const {names, metrics, masks} = data.layers;
  const pictures = metrics.map(({title, series}) => {
    const told = Object.entries(series);
    return drawBars(title, names, told.map(([name, values], row) =>
      ({name: told.length > 1 ? name : title, values, colour: colours[told.length > 1 ? 1 - row : 0]})),
    title.includes("bytes") ? bytes : title.startsWith("output") ? small : title.startsWith("seconds") ? briefly : count);
  });
  by("layers").innerHTML = `<p class="dim">By layer; "rest" is what belongs to none: embeddings, the last norm, the head.</p><div class="grid">${pictures.join("")}</div>
    ${masks.length ? `<h2>What attention sees</h2><p class="dim">Queries down, keys across; the darker, the more of them is kept. What is chosen by looking is shown for random queries and keys.</p>${alike(masks).map(drawMask).join("")}` : ""}`;
  for (const canvas of by("layers").querySelectorAll("canvas")) paint(canvas, data.layers.pictures[canvas.dataset.picture]);
}

/** [layers in words, mask]: those that follow each other and see the same are told once. */
function alike(masks) {
  const groups = [];
  for (const [layer, mask] of masks) {
    const last = groups[groups.length - 1];
    if (last && JSON.stringify(last.mask) === JSON.stringify(mask)) last.layers.push(layer);
    else groups.push({layers: [layer], mask});
  }
  return groups.map(({layers, mask}) => [span("layer", layers[0], layers[layers.length - 1]), mask]);
}
const span = (what, first, last) => first === last ? `${what} ${first}` : `${what}s ${first} to ${last}`;

function drawMask([layers, mask]) {
  const tiles = mask.heads.map(({first, last, picture, share}) => {
    const words = `${mask.heads.length === 1 ? "all heads" : span("head", first, last)}: ${Math.round(100 * share)}%`;
    return `<figure title="${escape(words)}"><canvas width="${data.layers.cells}" height="${data.layers.cells}" data-picture="${picture}" role="img"
      aria-label="${escape(layers)}, ${escape(words)}"></canvas><span class="dim">${escape(words)}</span></figure>`;
  });
  return `<h3>${escape(layers)} <span class="dim">${escape(mask.text)}; ${mask.tokens} tokens</span></h3><div class="masks">${tiles.join("")}</div>`;
}

/** Digits 0 to 9 as shades. */
function paint(canvas, digits) {
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < digits.length; i++) image.data.set([43, 125, 224, Number(digits[i]) / 9 * 255], 4 * i);
  context.putImageData(image, 0, 0);
}

function drawRoofline() {
  const {machine, points} = data.roofline;
  const width = 640, height = 300, left = 60, base = height - 34;
  const placed = points.map(([name, flops, moved, measured]) => {
    const intensity = flops / moved;
    return {name, intensity, measured, bound: machine ? Math.min(machine.flops_rate, intensity * machine.bandwidth) : null, flops, moved};
  });
  let picture = '<p class="dim">No machine was measured: slim inspect --measure draws the roof, and how far below it the model runs.</p>';
  if (machine) {
    const xs = placed.map(p => p.intensity).concat(machine.flops_rate / machine.bandwidth), ys = placed.flatMap(p => [p.bound, p.measured]).filter(Boolean).concat(machine.flops_rate);
    const lx = Math.log10(Math.min(...xs) / 4), hx = Math.log10(Math.max(...xs) * 4), ly = Math.log10(Math.min(...ys) / 4), hy = Math.log10(Math.max(...ys) * 2);
    const x = value => left + (Math.log10(value) - lx) / (hx - lx) * (width - left - 10), y = value => base - (Math.log10(value) - ly) / (hy - ly) * (base - 10);
    const ridge = machine.flops_rate / machine.bandwidth, begin = 10 ** lx, end = 10 ** hx;
    const line = `<polyline fill="none" stroke="var(--dim)" stroke-width="2" points="${x(begin)},${y(begin * machine.bandwidth)} ${x(ridge)},${y(machine.flops_rate)} ${x(end)},${y(machine.flops_rate)}"/>`;
    const dots = placed.map((p, row) => `<circle cx="${x(p.intensity)}" cy="${y(p.bound)}" r="4" fill="none" stroke="${colours[row % colours.length]}" stroke-width="2"><title>${escape(p.name)}: the roof</title></circle>` +
      (p.measured ? `<circle class="measured" cx="${x(p.intensity)}" cy="${y(p.measured)}" r="5" fill="${colours[row % colours.length]}"><title>${escape(p.name)}: measured, ${count(p.measured)}FLOP/s</title></circle>` : ""));
    picture = figure("Roofline: rings are the roof at each intensity, dots what was measured", placed.map((p, row) => ({name: p.name, colour: colours[row % colours.length]})),
      `<svg viewBox="0 0 ${width} ${height}" role="img">${line}${dots.join("")}<text x="${width / 2}" y="${height - 6}" text-anchor="middle">FLOPs a byte moved</text>
       <text x="0" y="14">${count(10 ** hy)}FLOP/s</text><text x="0" y="${base}">${count(10 ** ly)}FLOP/s</text><text x="${left}" y="${base + 14}">${count(10 ** lx)}</text><text x="${width}" y="${base + 14}" text-anchor="end">${count(10 ** hx)}</text></svg>`) +
      `<p class="dim">Measured here: ${bytes(machine.bandwidth)} a second read, ${count(machine.flops_rate)}FLOP/s of float32 products, ${plural(machine.threads, "thread")}. Integer kernels may pass that roof.</p>`;
  }
  by("roofline").innerHTML = picture + `<div class="scroll"><table><tr><th></th><th class="n">FLOPs</th><th class="n">bytes moved</th><th class="n">FLOPs a byte</th><th class="n">measured</th><th class="n">of the roof</th></tr>` +
    placed.map(p => `<tr><td>${escape(p.name)}</td><td class="n">${count(p.flops)}</td><td class="n">${bytes(p.moved)}</td><td class="n">${p.intensity.toPrecision(3)}</td>
      <td class="n">${p.measured ? count(p.measured) + "FLOP/s" : ""}</td><td class="n">${p.measured && p.bound ? Math.round(100 * p.measured / p.bound) + "%" : ""}</td></tr>`).join("") +
    `</table></div><p class="dim">For one row: prefill reads ${data.tokens} tokens, decode writes the last of as many; both make the logits of the last token alone.</p>`;
}

// -- generated code -------------------------------------------------------------------------------------------------

const shown = {file: Object.keys(data.code)[0], kernel: null};

function drawCode() {
  const files = Object.keys(data.code).map(file => `<button data-open="${escape(file)}" aria-pressed="${file === shown.file}">${escape(file)}</button>`).join("");
  const form = shown.file.slice(0, shown.file.indexOf("/"));
  const regions = (data.regions[form] || []).map((region, number) => [number, region]).filter(([, region]) =>
    !shown.kernel || region.kernels.some(([kernel, file]) => kernel === shown.kernel && form + "/" + file === shown.file));
  const list = regions.map(([number, region]) => `<tr><td class="n">${number + 1}</td><td>${region.kernels.map(([kernel, file]) =>
    `<a href="#" data-kernel="${escape(kernel)}" data-file="${escape(form + "/" + file)}">${escape(kernel)}</a>`).join(", ") || "PyTorch"}</td>
    <td><code>${escape(region.text)}</code><br>${region.nodes.map(node => `<a href="#" data-node="${escape(node)}">${escape(node)}</a>`).join(" ")}</td></tr>`).join("");
  const lines = data.code[shown.file].split("\n");
  const hit = shown.kernel ? lines.findIndex(line => new RegExp(`(void|def) ${shown.kernel}\\(`).test(line)) : -1;
  by("code").innerHTML = `<div class="bar">${files}</div>
    <details ${shown.kernel ? "open" : ""}><summary>${plural(regions.length, "region")}${shown.kernel ? ` by ${escape(shown.kernel)}` : ""}</summary><div class="scroll"><table><tr><th class="n">#</th><th>kernel</th><th>what it is, and its nodes</th></tr>${list}</table></div></details>
    <pre class="source">${lines.map((line, index) => index === hit ? `<span class="hit" id="hit">${escape(line)}</span>` : escape(line) + "\n").join("")}</pre>`;
  if (hit >= 0) by("hit").scrollIntoView({block: "center"});
}

// -- tabs, and what is clicked --------------------------------------------------------------------------------------

const tabs = [["pipeline", "Pipeline", drawPipeline], ["ir", "IR", drawIR], ["layers", "Layers", drawLayers]];
if (Object.keys(data.code).length) tabs.push(["code", "Code", drawCode]);
if (data.roofline) tabs.push(["roofline", "Roofline", drawRoofline]);
const drawn = new Set();

function open(id, again = false) {
  for (const [name, , draw] of tabs) {
    const active = name === id;
    by(name).hidden = !active;
    by("tab-" + name).setAttribute("aria-selected", active);
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
  if (told.tab) open(told.tab);
  else if (told.weight) showWeight(told.weight);
  else if (told.kernel) { shown.file = told.file; shown.kernel = told.kernel; by("details").hidden = true; open("code", true); }
  else if (told.node) openNode(told.node);
  else if (told.line) showLine(Number(told.line));
  else if (told.step) { if (irs.length > 1) { view.stage = Number(told.step); view.query = ""; open("ir", true); } }
  else if (told.open) { shown.file = told.open; shown.kernel = null; drawCode(); }
  else if (target.classList.contains("fold")) { view.whole = true; by("whole").setAttribute("aria-pressed", true); drawLines(); }
  else by("details").hidden = true;
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") by("details").hidden = true;
  if (event.key === "Enter" && event.target.dataset.line) showLine(Number(event.target.dataset.line));
  if (event.key === "Enter" && event.target.id === "search") {  // the first that was found
    const found = view.query && document.querySelector("#lines [data-line]");
    if (found) { found.focus(); showLine(Number(found.dataset.line)); }
  }
  if (event.key === "/" && event.target.tagName !== "INPUT") { event.preventDefault(); open("ir"); by("search").focus(); by("search").select(); }
});

const first = data.steps[0], last = data.steps[data.steps.length - 1];
by("title").textContent = data.model;
by("summary").textContent = [data.architecture, `${count((last.size || first.size).parameters)} parameters`,
  last.size && last !== first && last.size.nbytes !== first.size.nbytes ? `${bytes(first.size.nbytes)} to ${bytes(last.size.nbytes)}` : bytes(first.size.nbytes),
  last.drift == null ? "" : `output moved by ${small(last.drift)}`, data.target].filter(Boolean).join(" · ");
by("tabs").innerHTML = tabs.map(([id, title]) => `<button id="tab-${id}" role="tab" data-tab="${id}">${title}</button>`).join("");
open("pipeline");
