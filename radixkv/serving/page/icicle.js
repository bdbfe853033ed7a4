// The tree, and its drawing as an icicle: each prefix as wide as the tokens in and below it, its continuations under it.

const ROW = 30; // pixels, and fewer where the tree is deep
const MIN_ROW = 9;
const MAX_HEIGHT = 600;
const MIN_WIDTH = 1; // of a node that is drawn by itself
const LABEL_WIDTH = 34;
const OLDEST_S = 3600; // where the scale of ages ends
const NUM_TENANT_COLOURS = 8;

/** What is cached, as far as the server has told. */
export class Tree {
  nodes = new Map();
  roots = [];
  deepest = 0;

  /** Take note of rows of an event `nodes`. */
  put(rows) {
    for (const [id, parent, tokens, hits, usedAt, pinned, keptUntil, hidden, text] of rows) {
      const node = this.nodes.get(id) ?? { id, children: [], up: null };
      Object.assign(node, { parent, tokens, hits, usedAt, pinned: pinned === 1, keptUntil, hidden });
      node.name = parent === null ? text : null;
      node.text = parent === null ? null : text;
      this.nodes.set(id, node);
    }
  }

  drop(ids) {
    for (const id of ids) this.nodes.delete(id);
  }

  /** Work out who is under whom, and how wide. Call it after changes. O(nodes log nodes). */
  settle() {
    const all = [...this.nodes.values()];
    for (const node of all) node.children = [];
    this.roots = [];
    for (const node of all) {
      node.up = node.parent === null ? null : this.nodes.get(node.parent) ?? null;
      (node.up === null ? this.roots : node.up.children).push(node);
    }
    const order = [];
    const stack = [...this.roots];
    for (const root of this.roots) root.depth = 0;
    while (stack.length > 0) {
      const node = stack.pop();
      order.push(node);
      node.tenant = node.up === null ? node.name : node.up.tenant;
      for (const child of node.children) {
        child.depth = node.depth + 1;
        stack.push(child);
      }
    }
    this.deepest = 0;
    for (let i = order.length - 1; i >= 0; i--) {
      const node = order[i];
      node.children.sort((a, b) => a.id - b.id); // so that nothing jumps about
      node.width = node.tokens;
      node.below = 0;
      for (const child of node.children) {
        node.width += child.width;
        node.below += 1 + child.below;
      }
      this.deepest = Math.max(this.deepest, node.depth);
    }
    this.roots.sort((a, b) => a.id - b.id);
  }

  /** Mark what a filter finds. Returns how many nodes that is; null without a filter. */
  mark(filter) {
    const wanted = filter.trim().toLowerCase();
    const stack = [...this.roots];
    const order = [];
    while (stack.length > 0) {
      const node = stack.pop();
      order.push(node);
      stack.push(...node.children);
    }
    let count = 0;
    for (let i = order.length - 1; i >= 0; i--) {
      const node = order[i];
      node.found = wanted !== "" && (node.text ?? node.name ?? "").toLowerCase().includes(wanted);
      node.leads = node.found || node.children.some((child) => child.leads);
      if (node.found) count += 1;
    }
    for (let i = 0; i < order.length; i++) { // all of a tenant that is found by its name
      const node = order[i];
      node.inside = node.up !== null && (node.up.inside || (node.up.found && node.up.up === null));
    }
    return wanted === "" ? null : count;
  }
}

/** Draws a tree on a canvas, and knows what lies where. */
export class Icicle {
  rects = [];
  focus = null; // the node that fills the width; null for all
  selected = null;
  colour = "age";
  filtered = false;
  #canvas;
  #colours = null;
  #tenants = new Map();

  constructor(canvas) {
    this.#canvas = canvas;
  }

  /** Forget colours: the scheme has changed. */
  restyle() {
    this.#colours = null;
  }

  tenantColour(name) {
    if (!this.#tenants.has(name)) this.#tenants.set(name, this.#tenants.size % NUM_TENANT_COLOURS);
    return this.#style().tenants[this.#tenants.get(name)];
  }

  /** Draw `tree`; ages count from `now_s`. O(nodes that are a pixel wide, and their children). */
  draw(tree, nowS) {
    const began = performance.now();
    const canvas = this.#canvas;
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(canvas.clientWidth, 1);
    const top = this.focus === null ? tree.roots : [this.focus];
    const rows = Math.max(1, (this.focus === null ? tree.deepest : depthBelow(this.focus)) + 1);
    const row = Math.max(MIN_ROW, Math.min(ROW, Math.floor(MAX_HEIGHT / rows)));
    const height = Math.max(120, Math.min(rows * row, MAX_HEIGHT));
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
      canvas.style.height = `${height}px`;
    }
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    this.rects = layout(top, width, height, row);
    this.#paint(context, row, nowS);
    canvas.dataset.rects = this.rects.length;
    canvas.dataset.drawMs = (performance.now() - began).toFixed(1);
  }

  /** What lies at a point of the canvas; null if nothing does. */
  at(x, y) {
    return this.rects.find((rect) => x >= rect.x && x < rect.x + rect.width && y >= rect.y && y < rect.y + rect.height) ?? null;
  }

  #paint(context, row, nowS) {
    const style = this.#style();
    context.font = `${row >= 22 ? 12.5 : 10}px ui-monospace, "DejaVu Sans Mono", monospace`;
    context.textBaseline = "middle";
    const hatch = hatching(context, style.hatch);
    for (const rect of this.rects) {
      const { node, x, y } = rect;
      const gap = rect.width > 3 ? 1 : 0;
      const [width, height] = [rect.width - gap, rect.height - (rect.height > 4 ? 1 : 0)];
      context.globalAlpha = this.filtered && !rect.nodes.some((each) => each.leads || each.inside) ? 0.16 : 1;
      const fill = this.#fill(rect, nowS, style);
      context.fillStyle = fill;
      context.fillRect(x, y, width, height);
      if (node.pinned) {
        context.fillStyle = hatch;
        context.fillRect(x, y, width, height);
      }
      if (rect.nodes.length === 1 && rect.width > LABEL_WIDTH && rect.height > 12) {
        label(context, node, x, y, width, height, isDark(fill) ? "#fff" : "#10202c", node.pinned ? fill : null);
      }
      if (this.filtered && rect.nodes.some((each) => each.found)) outline(context, rect, style.mark, 1.5);
    }
    context.globalAlpha = 1;
    const selected = this.rects.find((rect) => rect.nodes.includes(this.selected));
    if (selected) outline(context, selected, style.focus, 2.5);
  }

  #fill(rect, nowS, style) {
    const { node } = rect;
    if (this.colour === "tenant") return this.tenantColour(node.tenant);
    if (node.up === null) return style.root;
    const ages = rect.nodes.filter((each) => each.usedAt !== null).map((each) => nowS - each.usedAt);
    if (ages.length === 0) return style.scale[style.scale.length - 1];
    const share = Math.log1p(Math.max(0, Math.min(...ages))) / Math.log1p(OLDEST_S);
    return style.scale[Math.min(style.scale.length - 1, Math.floor(share * style.scale.length))];
  }

  #style() {
    if (this.#colours === null) {
      const css = getComputedStyle(document.documentElement);
      const read = (name) => css.getPropertyValue(name).trim();
      const [young, old] = [channels(read("--new")), channels(read("--old"))];
      const mix = (share) => rgb(young.map((value, i) => value + (old[i] - value) * share));
      this.#colours = {
        scale: Array.from({ length: 24 }, (_, i) => mix(i / 23)),
        root: read("--free"), hatch: read("--hatch"), mark: read("--mark"), focus: read("--focus"),
        tenants: Array.from({ length: NUM_TENANT_COLOURS }, (_, i) => rgb(channels(read(`--t${i}`)))),
      };
    }
    return this.#colours;
  }
}

/** Where nodes lie: neighbours that are less than a pixel wide are one rectangle together, and nothing below them is drawn. */
export function layout(top, width, height, row) {
  const total = top.reduce((sum, node) => sum + node.width, 0);
  const scale = total > 0 ? width / total : 0;
  const rects = [];
  let level = [{ x: 0, nodes: top }];
  for (let y = 0; level.length > 0 && y + row <= height + 0.5; y += row) {
    const next = [];
    for (const group of level) {
      let { x } = group;
      let small = null;
      for (const node of group.nodes) {
        const wide = node.width * scale;
        if (wide >= MIN_WIDTH) {
          small = null;
          rects.push({ node, nodes: [node], x, y, width: wide, height: row });
          if (node.children.length > 0) next.push({ x, nodes: node.children });
        } else if (small === null || small.width >= MIN_WIDTH) {
          small = { node, nodes: [node], x, y, width: wide, height: row };
          rects.push(small);
        } else {
          small.nodes.push(node);
          small.width += wide;
        }
        x += wide;
      }
    }
    level = next;
  }
  return rects;
}

function depthBelow(top) {
  let deepest = top.depth;
  const stack = [top];
  while (stack.length > 0) {
    const node = stack.pop();
    deepest = Math.max(deepest, node.depth);
    stack.push(...node.children);
  }
  return deepest - top.depth;
}

function label(context, node, x, y, width, height, colour, under) {
  const text = (node.name ?? node.text ?? `${node.tokens.toLocaleString("en")} tokens`).replace(/\s+/g, " ").trim();
  context.save();
  context.beginPath();
  context.rect(x, y, width - 3, height);
  context.clip();
  if (under !== null) { // so that hatching does not run through the text
    context.fillStyle = under;
    context.fillRect(x + 3, y + 3, Math.min(width - 6, context.measureText(text).width + 6), height - 6);
  }
  context.fillStyle = colour;
  context.fillText(text, x + 6, y + height / 2 + 0.5);
  context.restore();
}

function outline(context, rect, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.strokeRect(rect.x + width / 2, rect.y + width / 2, Math.max(rect.width - width - 1, 1), rect.height - width - 1);
}

function hatching(context, colour) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 7;
  const pen = tile.getContext("2d");
  pen.strokeStyle = colour;
  pen.lineWidth = 1.5;
  for (const shift of [-7, 0, 7]) {
    pen.moveTo(shift, 7);
    pen.lineTo(shift + 7, 0);
  }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

function channels(hex) {
  return [1, 3, 5].map((start) => Number.parseInt(hex.slice(start, start + 2), 16));
}

function rgb(values) {
  return `rgb(${values.map(Math.round).join(" ")})`;
}

function isDark(colour) {
  const [red, green, blue] = colour.startsWith("#") ? channels(colour) : colour.match(/\d+/g).map(Number);
  return 0.299 * red + 0.587 * green + 0.114 * blue < 122;
}
