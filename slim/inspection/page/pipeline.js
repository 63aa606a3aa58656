// -- the pipeline: what ran when, what it changed, and what it said --------------------------------------------------

/** [name, step or null, {stage: seconds}] of everything that took time, in order. */
function timeline() {
  const {lift, lower, check, ...between} = data.report.seconds, [start, ...passes] = data.steps;
  return [[start.name, start, lift == null ? {} : {run: lift}], ...Object.entries(between).map(([name, seconds]) => [name, null, {probe: seconds}]),
    ...passes.map(step => [step.name, step, step.seconds]), ...(lower == null ? [] : [["lower", null, {run: lower, ...(check == null ? {} : {probe: check})}]])];
}

function drawPipeline() {
  const rows = timeline(), total = sum(rows.map(([, , seconds]) => sum(Object.values(seconds))));
  let begin = 0;
  const cells = rows.map(([name, step, seconds]) => {
    const number = data.steps.indexOf(step), took = sum(Object.values(seconds)), from = begin;
    begin += took;
    const title = number > 0 && irs.length > 1 ? `<a href="#" data-step="${number}">${worded(name)}</a>` : worded(name), size = step && step.size;
    return [title, took ? `${gantt(from, seconds, total)}` : "", took ? time(took) : "",
      step && step.matched ? `${step.matched.length} of ${step.matched.length + step.skipped.length}` : "",
      size ? size.nodes.toLocaleString("en") : "", size ? count(size.parameters) : "", size ? bytes(size.nbytes) : "",
      step ? small(step.error) : "", step ? small(step.drift) : ""];
  });
  const heads = ["stage", "when", "#time", "#sites", "#nodes", "#parameters", "#bytes", "#output moved", "#since the start"];
  by("pipeline").innerHTML = `${table(heads, cells)}
    <p class="dim caption">${total ? `Bars run from left to right over ${time(total)}: <i class="key run"></i> the work itself, <i class="key check"></i> verifying and probing it. ` : ""}
    ${data.steps.length > 1 ? "How far the output moved is relative, on a probe of random inputs; sites are the places that a pass changed, of those it looked at." : ""}</p>
    ${data.whole ? "" : notKept()}
    ${data.report.error == null ? "" : `<p>Code for ${escape(data.target)}: the output is off by ${small(data.report.error)} of its largest.</p>`}
    ${data.steps.map((step, number) => remarks(step, number ? step.rules : data.report.rules)).join("")}`;
  fillPlots(by("pipeline"));
}

const gantt = (from, seconds, total) => `<div class="when" aria-hidden="true"><span style="width:${100 * from / total}%"></span>${Object.entries(seconds).map(([stage, spent]) =>
  `<i class="key ${stage === "run" ? "run" : "check"}" style="width:${Math.max(100 * spent / total, 0.2)}%" title="${escape(stage)}: ${time(spent)}"></i>`).join("")}</div>`;

/** Why passes of a compiled directory cannot be opened, and what to do instead. */
function notKept() {
  const passes = data.steps.slice(1).map(step => step.name).join(", ");
  return `<p class="note" id="not-kept">A compiled directory keeps the IR after all passes, and what each pass reported; the IR between them is not in it.
    To see what each did, run on the model that this was compiled from: <code>${worded(`slim inspect MODEL -p '${passes}' --html FILE`)}</code></p>`;
}

function remarks(step, counts) {
  const notes = step.notes.map(note => `<li>${worded(note)}</li>`).join("");
  const skipped = (step.skipped || []).map(([site, reason]) => `<li><b>${escape(site)}</b>: ${worded(reason)}</li>`).join("");
  const charts = (step.charts || []).map(drawChart).join(""), matching = rules(counts);
  if (!notes && !skipped && !charts && !matching) return "";
  const said = !notes ? "" : step.notes.length > 6 ? `<details><summary>${plural(step.notes.length, "note")}</summary><ul>${notes}</ul></details>` : `<ul>${notes}</ul>`;
  return `<section class="step"><h2>${worded(step.name)}</h2>${charts ? `<div class="grid">${charts}</div>` : ""}${said}
    ${skipped ? `<details><summary>${plural(step.skipped.length, "site")} left alone</summary><ul>${skipped}</ul></details>` : ""}${matching}</section>`;
}

function rules(counts) {
  const used = counts.filter(([, , matched, misses]) => matched || misses.length);
  if (!used.length) return "";
  const rows = used.map(([name, tried, matched, misses]) =>
    [escape(name) + misses.map(miss => `<br><span class="warn">near miss: ${escape(miss)}</span>`).join(""), matched, tried]);
  return `<details><summary>${plural(used.length, "rule")} that matched, or nearly did</summary>${table(["rule", "#matched", "#tried"], rows)}</details>`;
}
