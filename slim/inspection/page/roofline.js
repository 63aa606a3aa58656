// -- the roofline -----------------------------------------------------------------------------------------------------

/** What is done to a byte, the roof there, and what was measured, of each point. */
function placed() {
  const {machine, points} = data.roofline;
  return points.map(([name, flops, moved, measured]) => {
    const intensity = flops / moved, [call, version] = name.split(", ");
    return {name, flops, moved, measured, intensity, call, colour: version === "compiled" ? "var(--after)" : "var(--before)",
      bound: machine ? Math.min(machine.flops_rate, intensity * machine.bandwidth) : null};
  });
}

function drawRoofline() {
  const {machine} = data.roofline, found = placed();
  const rows = found.map(point => [escape(point.name), count(point.flops), bytes(point.moved), point.intensity.toPrecision(3),
    ...(machine ? [rate(point.bound), point.measured ? rate(point.measured) : "", point.measured ? Math.round(100 * point.measured / point.bound) + "%" : ""] : [])]);
  const heads = ["call", "#FLOPs", "#bytes moved", "#FLOPs a byte", ...(machine ? ["#roof", "#measured", "#of the roof"] : [])];
  by("roofline").innerHTML = (machine ? picture(machine, found)
    : `<p class="note">${data.roofline.writes ? "No machine was measured: with <code class='option'>--measure</code> the roof is drawn, and how far below it the model runs."
      : "No machine was measured, which is done for language models alone."}</p>`) +
    `${table(heads, rows)}<p class="dim caption">${data.roofline.writes
      ? `For one row: prefill reads ${data.tokens} tokens, decode writes the last of as many; both make the logits of the last token alone. Measured is the time of generate, with all that it prepares.`
      : `For one row, of ${data.tokens} tokens where it takes any.`}</p>`;
  fillPlots(by("roofline"));
}

function picture(machine, found) {
  const key = [...new Set(found.map(point => point.name))].map(name => found.find(point => point.name === name));
  const keys = key.map(point => `<span><svg width="14" height="14" aria-hidden="true">${symbol(point.call, 7, 7, 4.5, point.colour, true)}</svg> ${escape(point.name)}</span>`).join("");
  return `<figure class="wide"><figcaption><b>Roofline of this machine</b><span class="keys">${keys}</span></figcaption>${plot(width => roof(machine, found, width))}
    <p class="read">Hollow: the roof for that call; filled: measured. The roof rises with ${bytes(machine.bandwidth)} a second read, and is flat at ${rate(machine.flops_rate)} of float32 products,
    ${plural(machine.threads, "thread")}, both measured here. Integer kernels, and weights that stay in a cache, may pass it.</p></figure>`;
}

/** Prefill is round and decode square; hollow is the roof, filled is measured. */
function symbol(call, x, y, size, fill, filled, more = "") {
  const paintOf = filled ? `fill="${fill}"` : `fill="var(--paper)" stroke="${fill}" stroke-width="2"`;
  return call === "prefill" ? `<circle cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="${size}" ${paintOf}${more}/>`
    : `<rect x="${(x - size).toFixed(1)}" y="${(y - size).toFixed(1)}" width="${2 * size}" height="${2 * size}" ${paintOf}${more}/>`;
}

function roof(machine, found, width) {
  const ridge = machine.flops_rate / machine.bandwidth, wide = width > 560;
  const across = decades([ridge, ...found.map(point => point.intensity)], 2), up = decades([machine.flops_rate, ...found.flatMap(point => [point.bound, point.measured]).filter(Boolean)], 1.6);
  const words = up.marks.map(mark => short(rate(mark))), left = Math.ceil(widest(words)) + 10;
  const height = Math.round(Math.min(380, Math.max(280, width * 0.5))), base = height - 2 * LINE - 8, right = width - 8;
  const x = value => left + across.at(value) * (right - left), y = value => base - up.at(value) * (base - 8);
  const grid = up.marks.map((mark, row) => rule(left, y(mark), right, y(mark)) + label(left - 6, y(mark) + 4, words[row], "end")).join("") +
    across.marks.map(mark => rule(x(mark), 8, x(mark), base) + label(Math.min(x(mark), width - widthOf(short(count(mark))) / 2), base + LINE, short(count(mark)), "middle")).join("");
  const begin = Math.max(across.low, up.low / machine.bandwidth);
  const line = `<polyline fill="none" stroke="var(--dim)" stroke-width="2" points="${[[begin, begin * machine.bandwidth], [ridge, machine.flops_rate], [across.high, machine.flops_rate]].map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ")}"/>`;
  const dots = found.map(point => symbol(point.call, x(point.intensity), y(point.bound), 4, point.colour, false)).join("") +
    found.filter(point => point.measured).map(point => measuredDot(point, x(point.intensity), y(point.measured), left, right, base, wide)).join("");
  return svg(width, height, "Roofline: FLOPs a second over FLOPs a byte moved", grid + line + dots + label((left + right) / 2, height - 6, "FLOPs a byte moved", "middle"));
}

/** A dot, and how fast that is: above it where it stands above the roof or at the bottom, or else below, and to the side where the roof is not. */
function measuredDot(point, x, y, left, right, base, wide) {
  const words = (wide ? point.call + " " : "") + rate(point.measured), length = widthOf(words), above = point.measured > point.bound;
  const place = Math.max(left, Math.min(right - length, above ? x + 8 - length : x - 8));
  return symbol(point.call, x, y, 5, point.colour, true, ' class="measured"') + label(place, y + (above || y + 24 > base ? -10 : 20), words, "start", ' class="halo"');
}

/** A logarithmic axis around values: its ends, round numbers on it, and where a value stands, from 0 to 1. */
function decades(values, room) {
  const low = Math.min(...values) / room, high = Math.max(...values) * room, from = Math.log10(low), range = Math.log10(high) - from;
  const steps = range < 2 ? [1, 2, 5] : [1], marks = [];
  for (let power = Math.floor(from); power <= from + range; power++) marks.push(...steps.map(step => step * 10 ** power));
  return {low, high, marks: marks.filter(mark => mark >= low && mark <= high), at: value => (Math.log10(value) - from) / range};
}
