// -- generated code: its files, the regions of each, and their kernels ------------------------------------------------

const shown = {file: Object.keys(data.code)[0], kernel: null};

function drawCode() {
  const option = file => `<option value="${escape(file)}">${escape(file.slice(file.indexOf("/") + 1))}</option>`;
  const choices = groups().map(([group, files]) =>
    `<optgroup label="${escape(group)}">${files.map(option).join("")}</optgroup>`);
  by("code").innerHTML = `<div class="bar"><label for="file">file</label><select id="file">${choices.join("")}</select></div>
    <p class="dim">A kernel's name leads to the nodes it computes, a node to its line of IR and of the model's source.</p>
    <div id="listing"></div>`;
  showFile(shown.file, shown.kernel);
}

/** [what it is for and its kind in words, files] of the files that belong together. */
function groups() {
  const found = new Map();
  for (const file of Object.keys(data.code)) {
    const group = `${file.slice(0, file.indexOf("/"))}, ${file.slice(file.lastIndexOf("."))}`;
    found.set(group, [...(found.get(group) || []), file]);
  }
  return [...found].map(([group, files]) => [`${group} (${files.length})`, files]);
}

function showFile(file, kernel = null) {
  shown.file = by("file").value = file;
  shown.kernel = kernel;
  const form = shown.file.slice(0, shown.file.indexOf("/")), regions = data.regions[form] || [];
  const rows = regions.map((region, number) => [number + 1, kernelLinks(region, form) || "PyTorch", `<code>${escape(region.text)}</code><br>${nodeLinks(region)}`]);
  const regionsTable = () => `<details><summary>${plural(rows.length, "region")}, in the order they run</summary>
    ${table(["#region", "kernel", "what it is, and its nodes"], rows)}</details>`;
  by("listing").innerHTML = `${rows.length ? regionsTable() : ""}
    <pre class="source" tabindex="0">${source(data.code[shown.file].split("\n"), form).join("")}</pre>`;
  if (by("hit")) by("hit").scrollIntoView({block: "center"});
}

/** Lines of code as HTML: definitions of kernels are links, and the one that was chosen is marked to its end. */
function source(lines, form) {
  const inFile = shown.file.slice(form.length + 1);
  const kernels = new Set((data.regions[form] || []).flatMap(region => region.kernels.filter(([, file]) => file === inFile).map(([kernel]) => kernel)));
  let inside = false;
  return lines.map(line => {
    const [, before, kernel, after] = line.match(/^(.*?(?:void|def) )(\w+)(\(.*)$/) || [], begins = kernels.has(kernel);
    const text = begins ? `${escape(before)}<a href="#" data-kernel="${escape(kernel)}" data-file="${escape(shown.file)}">${escape(kernel)}</a>${escape(after)}` : escape(line);
    if (begins && kernel === shown.kernel) { inside = true; return `<span class="hit" id="hit">${text}</span>`; }
    const within = inside && (/^(\s|\}|\)|$)/.test(line));
    inside = within && !/^\}/.test(line);
    return within ? `<span class="hit">${text || " "}</span>` : text + "\n";
  });
}

function openKernel(kernel, file) {
  open("code");
  showFile(file, kernel);
  if (by("hit")) by("hit").querySelector("a").focus({preventScroll: true});
  showKernel(kernel, file);
  if (by("hit")) by("hit").scrollIntoView({block: "center"});
}
