// -- pictures: drawn in pixels of the screen, and anew where the room for them changes, so that their words stay as large

const colours = ["var(--after)", "var(--before)", "var(--third)", "var(--fourth)", "var(--fifth)", "var(--sixth)"];
const colour = row => colours[row % colours.length];
const pairColour = (row, all) => colour(all === 2 ? 1 - row : row);  // what was there first, or foretold, is grey
const LINE = 16;  // pixels of a line of labels
const pen = document.createElement("canvas").getContext("2d");
pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;  // as page.css has labels
const widthOf = text => pen.measureText(text).width;
const widest = texts => Math.max(...texts.map(widthOf));

const plots = [];  // functions of a width that give an SVG
const plot = draw => `<div class="plot" data-plot="${plots.push(draw) - 1}"></div>`;
const watcher = new ResizeObserver(entries => entries.forEach(entry => fillPlot(entry.target)));

function fillPlots(root) {
  for (const place of root.querySelectorAll(".plot")) { fillPlot(place); watcher.observe(place); }
}
function fillPlot(place) {
  const width = Math.floor(place.clientWidth);
  if (width > 0 && Number(place.dataset.width) !== width) {
    place.dataset.width = width;
    place.innerHTML = plots[place.dataset.plot](width);
  }
}

const sheets = [];  // functions that give a table of what a picture shows, drawn where it is opened
document.addEventListener("toggle", ({target}) => {
  if (target.dataset.sheet && target.open) target.lastElementChild.innerHTML = sheets[target.dataset.sheet]();
}, true);

/** Whether the names of series say more than the title: one that is called "now" does not. */
const isTelling = (series, title) => series.length > 1 || series.some(({name}) => name !== title && name !== "now");

/** What is seen: a title, a key, the picture, a line in which a place that is touched is read, and all numbers. */
const figure = (title, key, picture, note, sheet) => `<figure><figcaption><b>${escape(title)}</b>${isTelling(key, title)
  ? `<span class="keys">${key.map(one => `<span><i class="key" style="background:${one.colour}"></i> ${escape(one.name)}</span>`).join("")}</span>` : ""}</figcaption>${picture}
  <p class="read" data-note="${escape(note)}">${escape(note) || "&nbsp;"}</p>
  <details class="numbers" data-sheet="${sheets.push(sheet) - 1}"><summary aria-label="numbers: ${escape(title)}">numbers</summary>
  <div tabindex="0"></div></details></figure>`;

const svg = (width, height, title, inside) => `<svg width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" role="img" aria-label="${escape(title)}">${inside}</svg>`;
const label = (x, y, text, anchor = "start", more = "") => `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" text-anchor="${anchor}"${more}>${escape(text)}</text>`;
const rule = (x1, y1, x2, y2) => `<line class="rule" x1="${x1.toFixed(1)}" y1="${y1.toFixed(1)}" x2="${x2.toFixed(1)}" y2="${y2.toFixed(1)}"/>`;

/** Round numbers from 0 up to the first that is not below the largest. */
function roundTicks(largest, whole) {
  const rough = largest / 3, power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(whole ? 1 : 0, [1, 2, 4, 5, 10].find(one => one * power >= rough * 0.999) * power);
  return Array.from({length: Math.ceil(largest / step - 1e-9) + 1}, (_, index) => index * step);
}
const short = text => text.replace(/\.(\d*?)0+(?=\D|$)/, (_, kept) => kept ? "." + kept : "");

/** Bars of each series side by side. ``series``: [{name, values, colour}], a number or null for each tick; ``where``: what ticks number. */
function drawBars(title, ticks, series, format, note, where) {
  const values = series.flatMap(one => one.values).filter(value => value != null);
  const levels = roundTicks(Math.max(...values, 0) || 1, values.every(Number.isInteger)), words = levels.map(level => short(format(level)));
  const least = Math.min(0, ...values), top = levels[levels.length - 1], height = 168, floor = height - LINE - 4;
  const left = Math.ceil(widest(words)) + 8;
  const y = value => floor - (value - least) / (top - least) * (floor - 10);
  return figure(title, series, plot(width => {
    const step = (width - left) / ticks.length, each = step * (step > 6 ? 0.8 : 1) / series.length;
    const grid = levels.map((level, index) => rule(left, y(level), width, y(level)) + label(left - 6, y(level) + 4, words[index], "end"));
    const bars = series.flatMap((one, row) => one.values.map((value, index) => value == null ? "" :
      `<rect x="${(left + (index + 0.5) * step + (row - series.length / 2) * each).toFixed(2)}" y="${y(Math.max(value, 0)).toFixed(2)}" width="${each.toFixed(2)}" height="${Math.abs(y(value) - y(0)).toFixed(2)}" fill="${one.colour}"/>`));
    const read = ticks.map((tick, index) => `<rect class="touch" x="${(left + index * step).toFixed(2)}" y="0" width="${step.toFixed(2)}" height="${floor}"
      data-read="${escape(told(title, /^\d+$/.test(tick) ? `${where} ${tick}` : tick, series, index, format))}"/>`);
    return svg(width, height, `${title}. ${note || ""}`, grid.join("") + bars.join("") + read.join("") + names(ticks, left, step, height - 4));
  }), note, () => table([where, ...series.map(one => "#" + one.name)], ticks.map((tick, index) =>
    [escape(tick), ...series.map(one => one.values[index] == null ? "" : format(one.values[index]))])));
}
const told = (title, place, series, index, format) => `${place}: ` +
  (series.filter(one => one.values[index] != null).map(one =>
  (isTelling(series, title) ? one.name + " " : "") + format(one.values[index])).join(", ") || "none");

/** Names under the bars: as many as there is room for, the last always. Of long ones, which stand in what is read, the layer where it begins. */
function names(ticks, left, step, y) {
  if (areLong(ticks)) ticks = layersOf(ticks);
  const last = ticks.length - 1, end = left + step * ticks.length, drawn = [];
  let free = 0;
  const put = index => {
    const half = widthOf(ticks[index]) / 2, place = Math.min(left + (index + 0.5) * step, end - half);
    return {begin: place - half, end: place + half, text: label(place, y, ticks[index], "middle")};
  };
  const final = put(last), every = Math.ceil((widest(ticks) + 8) / step);
  for (let index = 0; index < last; index++) {
    const one = put(index);
    if (!ticks[index] || one.begin < free || (ticks[index - 1] && index % every) || (ticks[last] && one.end + 8 > final.begin)) continue;
    drawn.push(one.text);
    free = one.end + 8;
  }
  return drawn.join("") + (ticks[last] ? final.text : "");
}
const areLong = ticks => ticks.some(tick => tick.length > 12);
const layersOf = ticks => ticks.map(tick => (tick.match(/(?:^|\.)(\d+)\./) || ["", ""])[1]).map((layer, index, all) => layer === all[index - 1] ? "" : layer);

function drawCurves(chart) {
  const series = Object.entries(chart.series), format = styled(chart.style), level = value => chart.log ? Math.log10(Math.max(value, 1e-12)) : value;
  const all = series.flatMap(([, values]) => values.map(level)), longest = Math.max(...series.map(([, values]) => values.length));
  const low = chart.log ? Math.min(...all) : Math.min(0, ...all), high = Math.max(...all), range = high - low || 1;
  const shown = value => short(format(chart.log ? 10 ** value : value)), levels = [low, low + range / 2, low + range], words = levels.map(shown);
  const height = 180, floor = height - LINE - 4, left = Math.ceil(widest(words)) + 8;
  const many = series.length > colours.length, ink = row => many ? `color-mix(in oklab, var(--third) ${Math.round(100 * row / (series.length - 1))}%, var(--after))` : colour(row);
  const key = many ? [] : series.map(([name], row) => ({name, colour: ink(row)}));
  const more = many ? `; ${series.length} curves, from the first in blue to the last in orange: point at one to read its name` : "";
  return figure(chart.title, key, plot(width => {
    const x = index => left + index / Math.max(1, longest - 1) * (width - left - 4), y = value => floor - (level(value) - low) / range * (floor - 10);
    const grid = levels.map((value, index) => rule(left, floor - index / 2 * (floor - 10), width, floor - index / 2 * (floor - 10)) + label(left - 6, floor - index / 2 * (floor - 10) + 4, words[index], "end"));
    const lines = series.map(([name, values], row) => {
      const points = values.map((value, index) => `${x(index).toFixed(1)},${y(value).toFixed(1)}`).join(" "), mark = chart.marks[name];
      const marked = mark == null || mark >= values.length ? "" : `: ${format(values[mark])} at ${mark}`;
      return `<g data-read="${escape(name + marked)}"><polyline class="reach" points="${points}"/><polyline class="curve" stroke="${ink(row)}" points="${points}"/>` +
        (marked && `<circle r="4" cx="${x(mark).toFixed(1)}" cy="${y(values[mark]).toFixed(1)}" fill="${ink(row)}"/>`) + "</g>";
    });
    return svg(width, height, chart.title, grid.join("") + lines.join("") + label(left, height - 4, "0") + label(width, height - 4, String(longest - 1), "end"));
  }), `${chart.y_label} by ${chart.x_label}${chart.log ? ", logarithmic" : ""}${more}`, () => curvesInNumbers(chart, format));
}

/** Of each curve where it begins, what is marked on it, and where it ends. */
function curvesInNumbers(chart, format) {
  const rows = Object.entries(chart.series).map(([name, values]) => {
    const mark = chart.marks[name], marked = mark == null || mark >= values.length ? "" : `${format(values[mark])} at ${mark}`;
    return [escape(name), format(values[0]), marked, format(values[values.length - 1])];
  });
  return table([chart.y_label, "#first", "#marked", "#last"], rows);
}

function drawChart(chart) {
  if (chart.kind === "lines") return drawCurves(chart);
  const series = Object.entries(chart.series).map(([name, values], row, all) => ({name, values, colour: pairColour(row, all.length)}));
  const numbered = areLong(chart.ticks) ? ", numbered by layer" : "";
  return drawBars(chart.title, chart.ticks, series, styled(chart.style), `${chart.y_label} by ${chart.x_label}${numbered}`, chart.x_label);
}

/** Says in the line below a picture what stands at the place that was touched; its own note again elsewhere. */
function read(event) {
  const touched = event.target.closest("[data-read]"), within = event.target.closest("figure");
  for (const line of document.querySelectorAll(".read.now")) if (!within || !within.contains(line) || !touched) { line.textContent = line.dataset.note || "\u00a0"; line.classList.remove("now"); }
  if (!touched) return;
  const line = within.querySelector(".read");
  line.textContent = touched.dataset.read;
  line.classList.add("now");
}
document.addEventListener("pointerover", read);
document.addEventListener("pointerdown", read);
