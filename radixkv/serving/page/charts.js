// The two small charts, as SVG.

const SVG = "http://www.w3.org/2000/svg";
const FACTOR_NAMES = new Map([[0.125, "⅛×"], [0.25, "¼×"], [0.5, "½×"], [1, "now"], [2, "2×"], [4, "4×"]]);

function add(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function begin(svg) {
  const { width, height } = svg.getBoundingClientRect();
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${Math.max(width, 1)} ${Math.max(height, 1)}`);
  return { width, height };
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

/** Hit rate over the size of the pool, which is drawn in powers of two. */
export function drawWhatIf(svg, estimates) {
  const { width, height } = begin(svg);
  if (estimates.length === 0) {
    add(svg, "text", { x: 0, y: 14 }, "no estimates: diagnostics are off");
    return;
  }
  const [left, right, top, bottom] = [34, width - 14, 8, height - 18];
  const x = (factor) => left + ((Math.log2(factor) + 3) / 5) * (right - left);
  const y = (rate) => bottom - rate * (bottom - top);
  for (const rate of [0, 0.5, 1]) {
    add(svg, "line", { class: "grid", x1: left, x2: right, y1: y(rate), y2: y(rate) });
    add(svg, "text", { x: left - 6, y: y(rate) + 4, "text-anchor": "end" }, `${rate * 100} %`);
  }
  const points = estimates.map(({ factor, hit_rate: rate }) => [x(factor), y(rate)]);
  const [first, last] = [points[0], points[points.length - 1]];
  add(svg, "path", { class: "area", d: `${path(points)}L${last[0]} ${bottom}L${first[0]} ${bottom}Z` });
  add(svg, "path", { class: "curve", d: path(points) });
  for (const { factor, capacity_tokens: tokens, hit_rate: rate } of estimates) {
    const label = FACTOR_NAMES.get(factor);
    if (!label) continue;
    const dot = add(svg, "circle", { class: factor === 1 ? "dot here" : "dot", cx: x(factor), cy: y(rate), r: factor === 1 ? 4.5 : 3.5 });
    add(dot, "title", {}, `${percent(rate)} with ${tokens.toLocaleString("en")} tokens`);
    add(svg, "text", { x: x(factor), y: height - 3, "text-anchor": "middle", class: factor === 1 ? "now" : "" }, label);
  }
  const said = estimates.filter(({ factor }) => FACTOR_NAMES.has(factor));
  svg.setAttribute("aria-label", "Estimated hit rate by size of the pool: "
    + said.map(({ factor, hit_rate: rate }) => `${percent(rate)} at ${factor} times`).join(", "));
}

/** Running (filled) and waiting requests over time; one sample a second. */
export function drawLoad(svg, samples, most) {
  const { width, height } = begin(svg);
  const peak = Math.max(1, ...samples.map((sample) => Math.max(sample.running, sample.waiting)));
  const x = (i) => width - ((samples.length - 1 - i) / (most - 1)) * width;
  const y = (value) => height - 2 - (value / peak) * (height - 14);
  add(svg, "line", { class: "grid", x1: 0, x2: width, y1: height - 2, y2: height - 2 });
  if (samples.length < 2) return;
  const running = samples.map((sample, i) => [x(i), y(sample.running)]);
  add(svg, "path", { class: "area", d: `${path(running)}L${width} ${height - 2}L${x(0)} ${height - 2}Z` });
  add(svg, "path", { class: "curve", d: path(running) });
  add(svg, "path", { class: "waiting", d: path(samples.map((sample, i) => [x(i), y(sample.waiting)])) });
  add(svg, "text", { x: width, y: 9, "text-anchor": "end" }, `most ${peak}`);
}

export function percent(share) {
  return `${(share * 100).toFixed(share < 0.0995 && share > 0 ? 1 : 0)} %`;
}
