// -- layers: a picture for each thing that is counted or measured, and what attention sees -----------------------------

function drawLayers() {
  const {names, metrics, masks} = data.layers;
  const pictures = metrics.map(({title, series}) => {
    const found = Object.entries(series), format = formatOf(title);
    const drawn = found.map(([name, values], row) => ({name, values, colour: pairColour(row, found.length)}));
    return drawBars(title, names, drawn, format, inWords(title, drawn, format), "layer");
  });
  by("layers").innerHTML = `<p class="dim">By layer; "rest" is what belongs to none: embeddings, the last norm, the head. Point at a bar to read it, or open the numbers.
    ${metrics.some(({series}) => series.measured) ? "Measured seconds are those of the kernels, run one by one; the roofline has the whole call's." : ""}</p>
    <div class="grid">${pictures.join("")}</div>${masks.length ? `<h2>What attention sees</h2>
    <p class="dim">Queries down, keys across; the stronger the blue, the more of them is kept. What is chosen by looking is shown for random queries and keys.</p>${alike(masks).map(drawMask).join("")}` : ""}`;
  fillPlots(by("layers"));
  for (const canvas of by("layers").querySelectorAll("canvas")) paint(canvas, data.layers.pictures[canvas.dataset.picture]);
}

const formatOf = title => title.includes("bytes") ? bytes : title.startsWith("output") ? small : title.startsWith("seconds") ? briefly : count;

/** A metric in a line: its sum where layers add up, and otherwise its range. */
function inWords(title, series, format) {
  const adds = /bytes|^FLOPs|^seconds/.test(title);
  return series.map(({name, values}) => {
    const known = values.filter(value => value != null), least = Math.min(...known), most = Math.max(...known);
    const text = adds ? format(sum(known)) : least === most ? format(most) : `${format(least)} to ${format(most)}`;
    return isTelling(series, title) ? `${name.split(",")[0]} ${text}` : adds ? `${text} in all` : least === most ? `${text} in every layer` : text;
  }).join(", ") + (adds && isTelling(series, title) ? " in all" : "");
}

/** [layers in words, mask]: those that follow each other and see the same are told once. */
function alike(masks) {
  const groups = [];
  for (const [layer, mask] of masks) {
    const last = groups[groups.length - 1];
    const next = last && !(layer - last.layers[last.layers.length - 1] > 1);  // and not behind a layer that is gone
    if (next && JSON.stringify(last.mask) === JSON.stringify(mask)) last.layers.push(layer);
    else groups.push({layers: [layer], mask});
  }
  return groups.map(({layers, mask}) => [span("layer", layers[0], layers[layers.length - 1]), mask]);
}

function drawMask([layers, mask]) {
  const tiles = mask.heads.map(({first, last, picture, share}) => {
    const words = `${mask.heads.length === 1 ? "all heads" : span("head", first, last)}: ${Math.round(100 * share)}%`;
    return `<figure><canvas width="${data.layers.cells}" height="${data.layers.cells}" data-picture="${picture}" role="img"
      aria-label="${escape(layers)}, ${escape(words)}"></canvas><span class="dim">${escape(words)}</span></figure>`;
  });
  return `<h3>${escape(layers)}</h3><p class="dim">${escape(mask.text)}; ${mask.tokens} tokens</p><div class="masks">${tiles.join("")}</div>`;
}

/** Digits 0 to 9 as shades. */
function paint(canvas, digits) {
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < digits.length; i++) image.data.set([43, 125, 224, Number(digits[i]) / 9 * 255], 4 * i);
  context.putImageData(image, 0, 0);
}
