// The explorers of the lessons: one source for JupyterLab (anywidget) and for pages without a kernel.
// Each takes {model, el}: `model` keeps the state (get, set, save_changes, on), `el` is the element to fill.

const STYLE = `
.emloc { --blue: #0072b2; --orange: #c27c00; --red: #d55e00; --ink: var(--jp-ui-font-color1, #222); --faint: var(--jp-border-color1, #bbb);
  --paper: var(--jp-layout-color0, #fff); color: var(--ink); background: var(--paper); font: 13px var(--jp-ui-font-family, sans-serif); padding: 6px; max-width: 900px; }
[data-jp-theme-light="false"] .emloc { --blue: #56b4e9; --orange: #e69f00; --red: #ff8a3d; }
.emloc .row { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: center; margin: 4px 0; }
.emloc label { display: inline-flex; gap: 5px; align-items: center; }
.emloc input[type=range] { width: 260px; accent-color: var(--blue); }
.emloc input[type=text], .emloc input[type=number], .emloc select { width: auto; max-width: 9em; color: var(--ink); background: var(--paper); border: 1px solid var(--faint); font: inherit; padding: 1px 3px; }
.emloc select { max-width: 14em; }
.emloc :focus-visible { outline: 2px solid var(--blue); outline-offset: 1px; }
.emloc svg { max-width: 100%; height: auto; display: block; }
.emloc svg text { fill: var(--ink); font-size: 11px; }
.emloc .axis { stroke: var(--faint); fill: none; }
.emloc .plots { display: flex; flex-wrap: wrap; gap: 8px; }
.emloc .plots figure { margin: 0; flex: 1 1 330px; max-width: 430px; }
.emloc output { display: block; min-height: 1.3em; }
.emloc .hover { min-height: 1.3em; opacity: .85; }
.emloc [role=alert]:not(:empty) { color: var(--red); font-weight: bold; padding: 3px 0; }
.emloc fieldset { border: 0; padding: 0; margin: 0; display: inline-flex; gap: 10px; }
.emloc legend { float: left; padding: 0 6px 0 0; }
`;

const SVG = "http://www.w3.org/2000/svg";
const make = (tag, attributes = {}, ...children) => {
  const node = ["svg", "g", "path", "line", "text", "rect", "circle"].includes(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) key.startsWith("on") ? node.addEventListener(key.slice(2), value) : node.setAttribute(key, value);
  node.append(...children);
  return node;
};
const percent = x => `${(100 * x).toFixed(1)}%`;
const whole = x => Math.round(x).toLocaleString("en-US");
const mib = x => `${(x / 2 ** 20).toFixed(1)} MiB`;
let serial = 0;

function frame(el, title) {
  const id = `emloc-${serial++}`;
  const box = make("div", { class: "emloc", role: "group", "aria-label": title });
  // arrow keys move the sliders, and not JupyterLab's cursor from cell to cell
  box.addEventListener("focusin", event => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));
  const problem = make("div", { role: "alert" });
  el.replaceChildren(make("style", {}, STYLE), box);
  const guard = work => (...args) => {
    try { problem.textContent = ""; return work(...args); } catch (error) { problem.textContent = error.message; }
  };
  return { box, problem, guard, id };
}

// a field acts when it is left, and on Enter
const field = (attributes, act) => {
  const input = make("input", { ...attributes, onchange: () => act(input), onkeydown: event => { if (event.key === "Enter") act(input); } });
  return input;
};

function choose(label, options, change) {
  const select = make("select", { "aria-label": label, onchange: () => change(select.value) });
  for (const option of options) select.append(make("option", { value: option }, String(option)));
  return [make("label", {}, label, select), select];
}

function radios(legend, name, options, change) {
  const set = make("fieldset", {}, make("legend", {}, legend)), inputs = {};
  for (const [value, text] of Object.entries(options)) {
    inputs[value] = make("input", { type: "radio", name, value, onchange: () => change(value) });
    set.append(make("label", {}, inputs[value], text));
  }
  return [set, inputs];
}

// A line plot that keeps its scales: x from 1 to n, y as given.
function plot(title, xLabel, yLabel, hover) {
  const W = 420, H = 240, L = 46, R = 10, T = 22, B = 36;
  const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
  const marks = make("g"), lines = make("g"), cursor = make("g");
  svg.append(make("text", { x: L, y: 14, "font-weight": "bold" }, title), make("text", { x: (L + W - R) / 2, y: H - 4, "text-anchor": "middle" }, xLabel),
    make("text", { transform: `translate(11 ${(T + H - B) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel),
    make("rect", { x: L, y: T, width: W - L - R, height: H - T - B, class: "axis" }), marks, lines, cursor);
  let n = 1, low = 0, log = false;
  const x = k => L + (k - 1) / Math.max(1, n - 1) * (W - L - R);
  const share = v => log ? 1 - Math.log10(Math.max(v, low)) / Math.log10(low) : v;
  const y = v => T + (1 - Math.min(1, share(v))) * (H - T - B);
  svg.addEventListener("mousemove", event => {
    const at = event.offsetX / svg.clientWidth * W;
    const k = 1 + (at - L) / (W - L - R) * (n - 1);
    hover(Math.max(1, Math.min(n, k)));
  });
  svg.addEventListener("mouseleave", () => hover(null));
  return {
    node: make("figure", {}, svg), x, y,
    scale(count, logarithmic) {
      n = count; log = logarithmic; low = log ? 1e-3 : 0; marks.replaceChildren();
      for (const v of log ? [1e-3, 1e-2, 0.1, 1] : [0, 0.25, 0.5, 0.75, 1])
        marks.append(make("line", { x1: L - 4, x2: L, y1: y(v), y2: y(v), class: "axis" }), make("text", { x: L - 6, y: y(v) + 4, "text-anchor": "end" }, String(v)));
      for (const k of [1, ...[0.25, 0.5, 0.75, 1].map(f => Math.round(f * n))])
        marks.append(make("text", { x: x(k), y: H - B + 14, "text-anchor": "middle" }, String(k)));
    },
    draw(curves) {
      lines.replaceChildren(...curves.map(c => make("path", { fill: "none", stroke: c.colour, "stroke-width": c.wide ? 2.2 : 1.2, "stroke-dasharray": c.dash ?? "none",
        d: c.values.map((v, i) => `${i ? "L" : "M"}${x(c.at[i]).toFixed(1)} ${y(v).toFixed(1)}`).join("") })));
      curves.forEach((c, i) => lines.append(make("line", { x1: W - 190, x2: W - 168, y1: T + 12 + 14 * i, y2: T + 12 + 14 * i, stroke: c.colour, "stroke-width": 2, "stroke-dasharray": c.dash ?? "none" }),
        make("text", { x: W - 163, y: T + 16 + 14 * i }, c.name)));
    },
    point(k, values) {
      cursor.replaceChildren(make("line", { x1: x(k), x2: x(k), y1: T, y2: H - B, stroke: "var(--red)" }),
        ...values.map(v => make("circle", { cx: x(k), cy: y(v), r: 4, fill: "var(--red)" })));
    },
  };
}

function spectrum({ model, el }) {
  const { box, problem, guard, id } = frame(el, "spectrum explorer");
  const table = model.get("table"), change = (name, value) => { model.set(name, value); model.save_changes(); };
  const blocks = [...new Set(table.weights.map(w => w.block))];
  const [blockLabel, block] = choose("block", blocks, v => change("block", Number(v)));
  const [weightLabel, weight] = choose("weight", [...new Set(table.weights.map(w => w.weight))], v => change("weight", v));
  const [kindSet, kinds] = radios("directions of", `${id}-kind`, { aware: "the weight on its inputs", plain: "the weight alone" }, v => change("aware", v === "aware"));
  const log = make("input", { type: "checkbox", onchange: () => change("log", log.checked) });
  const slider = make("input", { type: "range", min: 0, step: 1, "aria-label": "rank", oninput: () => change("rank", current().ranks[Number(slider.value)]) });
  const shown = make("b"), reading = make("output", { "aria-live": "polite" }), hovered = make("div", { class: "hover" });
  const current = () => {
    const found = table.weights.find(w => w.block === model.get("block") && w.weight === model.get("weight"));
    if (!found) throw Error(`block ${model.get("block")}, weight ${model.get("weight")}: not in this table; it has the blocks ${blocks.join(", ")}`);
    return found;
  };
  const nearest = (w, k) => w.ranks.reduce((best, r, i) => Math.abs(r - k) < Math.abs(w.ranks[best] - k) ? i : best, 0);
  const kind = () => model.get("aware") ? "aware" : "plain";
  const over = guard(k => {
    if (k === null) { hovered.textContent = ""; return; }
    const w = current(), i = nearest(w, k), one = w[kind()];
    hovered.textContent = `direction ${w.ranks[i]}: σ ${one.sigma[i]} of the largest; rank ${w.ranks[i]}: predicted error ${percent(one.predicted[i])}, actual ${percent(one.actual[i])}`;
  });
  const left = plot("singular values", "direction", "σ / largest σ", over), right = plot("relative output error", "rank", "error", over);
  const redraw = () => {
    const w = current(), i = nearest(w, model.get("rank")), k = w.ranks[i], n = w.ranks.at(-1), one = w[kind()];
    block.value = w.block; weight.value = w.weight; kinds[kind()].checked = true; log.checked = model.get("log");
    slider.max = w.ranks.length - 1; slider.value = i;
    slider.setAttribute("aria-valuetext", `rank ${k}`);
    shown.textContent = k;
    left.point(k, [one.sigma[i]]); right.point(k, [one.predicted[i], one.actual[i]]);
    const used = k * (w.out + w.in);
    reading.textContent = `rank ${k} of ${n}: keeps ${percent(1 - one.predicted[i] ** 2)} of the energy; predicted error ${percent(one.predicted[i])}, actual error ${percent(one.actual[i])} on held-out rows; ${whole(used)} parameters, ${percent(used / (w.out * w.in))} of the weight's ${whole(w.out * w.in)}`;
  };
  const all = guard(() => {
    const w = current(), n = w.ranks.at(-1), one = w[kind()], other = w[model.get("aware") ? "plain" : "aware"];
    const names = { aware: "on its inputs", plain: "of the weight alone" }, colours = { aware: "var(--blue)", plain: "var(--orange)" };
    const rest = kind() === "aware" ? "plain" : "aware";
    left.scale(n, model.get("log")); right.scale(n, false);
    left.draw([{ at: w.ranks, values: one.sigma, colour: colours[kind()], name: names[kind()], wide: true }, { at: w.ranks, values: other.sigma, colour: colours[rest], name: names[rest], dash: "6 2" }]);
    right.draw([{ at: w.ranks, values: one.actual, colour: colours[kind()], name: "actual, held-out rows", wide: true }, { at: w.ranks, values: one.predicted, colour: "var(--ink)", name: "predicted from σ", dash: "3 3" },
      { at: w.ranks, values: other.actual, colour: colours[rest], name: `actual, ${names[rest]}`, dash: "6 2" }]);
    redraw();
  });
  box.append(make("div", { class: "row" }, blockLabel, weightLabel, kindSet, make("label", {}, log, "logarithmic")),
    make("div", { class: "row" }, make("label", {}, "rank", slider), shown), make("div", { class: "plots" }, left.node, right.node), reading, hovered, problem);
  for (const name of ["block", "weight", "aware", "log"]) model.on(`change:${name}`, all);
  model.on("change:rank", guard(redraw));
  all();
}

const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
function viridis(share) {
  const at = Math.max(0, Math.min(1, share)) * (VIRIDIS.length - 1), i = Math.min(VIRIDIS.length - 2, Math.floor(at));
  return `rgb(${VIRIDIS[i].map((c, j) => Math.round(c + (at - i) * (VIRIDIS[i + 1][j] - c))).join(",")})`;
}

// A budget such as 24GiB in bytes, as plan.parse_bytes reads it.
function bytes(text) {
  const units = { "": 1, KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, KIB: 2 ** 10, MIB: 2 ** 20, GIB: 2 ** 30, TIB: 2 ** 40 };
  const found = /^\s*([0-9.]+)\s*([A-Za-z]*)\s*$/.exec(text), size = found ? Number(found[1]) * units[found[2].toUpperCase()] : NaN;
  if (!(size > 0)) throw Error(`budget ${text}: not a size; write it like 24GiB, 24GB or 800MiB`);
  return size;
}

function ranks({ model, el }) {
  const { box, problem, guard, id } = frame(el, "rank explorer");
  const change = (name, value) => { model.set(name, value); model.save_changes(); };
  const together = (mode, value) => { model.set("mode", mode); model.set(mode, value); model.save_changes(); };
  const table = model.get("table"), names = table.names, choices = Object.keys(table.choices);
  const titles = { uniform: "one ratio for all", spectrum: "as the spectra ask" };
  const blocks = 1 + Math.max(...table.places.map(p => p[1])), rows = [...new Set(table.places.map(p => p[0]))];
  const size = list => table.model_bytes - table.item * list.reduce((sum, k, i) => sum + (k ? table.shapes[i][0] * table.shapes[i][1] - k * (table.shapes[i][0] + table.shapes[i][1]) : 0), 0);
  // the peak of stage 2 is the emulator's bytes and what is nearly the same for every emulator: simulated at some sizes, a line between them
  const peak = b => {
    const knots = model.get("knots")[model.get("form")];
    let i = 0;
    while (i < knots.length - 2 && b > knots[i + 1][0]) i++;
    const [x0, y0] = knots[i], [x1, y1] = knots[i + 1];
    return y0 + (b - x0) * (y1 - y0) / (x1 - x0);
  };
  const packed = () => model.get("form") === "quantized";
  const [formSet, forms] = radios("form", `${id}-form`, { lowrank: "low-rank factors", quantized: "whole weights in few bits" }, v => change("form", v));
  const [modeSet, modes] = radios("choose by", `${id}-mode`, { ratio: "ratio", budget: "memory budget" }, v => change("mode", v));
  const slider = make("input", { type: "range", min: 0, max: table.ratios.length - 1, step: 1, "aria-label": "ratio",
    oninput: () => together("ratio", table.ratios[Number(slider.value)]) });
  const shown = make("b");
  const budget = field({ type: "text", size: 8, "aria-label": "memory budget" }, input => together("budget", input.value));
  const number = (label, name) => field({ type: "number", min: 1, step: 1, "aria-label": label, style: "width: 5.5em" }, guard(input => {
    const value = Number(input.value);
    if (!Number.isInteger(value) || value < 1) throw Error(`${label}: must be a whole number, at least 1`);
    change(name, value);
  }));
  const tokens = number("tokens of a row", "seq_len"), batch = number("rows of a batch", "batch_size");
  const [useSet, uses] = radios("chosen ranks", `${id}-use`, Object.fromEntries(choices.map(c => [c, titles[c] ?? c])), v => change("choice", v));
  const reading = make("output", { "aria-live": "polite" }), hovered = make("div", { class: "hover" }), least = make("span"), scale = make("span");
  let pointed = null; // at a cell: {map, say}
  const tell = () => { hovered.textContent = pointed && pointed.map.style.display !== "none" ? pointed.say() : ""; };
  const cell = Math.max(6, Math.min(24, 330 / blocks)), W = Math.max(300, 86 + blocks * cell + 4), H = 24 + rows.length * 16 + 18;
  const heat = (label, say) => {
    const svg = make("svg", { viewBox: `0 0 ${W} ${H}`, width: W, role: "img", "aria-label": label });
    const title = make("text", { x: 86, y: 13, "font-weight": "bold" }), cells = names.map((name, i) => {
      const [row, block] = table.places[i];
      return make("rect", { x: 86 + block * cell, y: 20 + rows.indexOf(row) * 16, width: cell - 1, height: 15, onmouseenter: () => { pointed = { map: svg.parentNode, say: () => say(name, i) }; tell(); } });
    });
    rows.forEach((row, i) => svg.append(make("text", { x: 82, y: 31 + i * 16, "text-anchor": "end" }, row.split(".").at(-1))));
    for (let b = 0; b < blocks; b += Math.max(1, Math.ceil(blocks / 6))) svg.append(make("text", { x: 86 + (b + 0.5) * cell, y: H - 4, "text-anchor": "middle" }, String(b)));
    svg.append(make("text", { x: 82, y: H - 4, "text-anchor": "end" }, "block"), title, ...cells);
    return { node: make("figure", {}, svg), title, cells };
  };
  const fill = (map, list, share) => map.cells.forEach((rect, j) => { rect.setAttribute("fill", list[j] ? viridis(share(list[j])) : "none"); rect.setAttribute("stroke", list[j] ? "none" : "var(--faint)"); });
  const maps = Object.fromEntries(choices.map(c => [c, heat(`ranks, ${titles[c] ?? c}`, (name, i) => {
    const k = current(c)[i], [out, inside] = table.shapes[i];
    return k ? `${name}: rank ${k}, ${percent(k * (out + inside) / (out * inside))} of ${out} × ${inside}` : `${name}: stays dense, ${out} × ${inside}`;
  })]));
  // columns of one weight and their levels, the finer first
  const layout = (j, i) => table.bits.layouts[table.shapes[j].join(" x ")][i];
  const mean = (j, i) => layout(j, i).reduce((sum, [columns, levels]) => sum + columns * 8 / table.bits.per_byte[levels], 0) / table.shapes[j][1];
  const bitMap = heat("bits of a number", (name, j) => {
    const i = index(), parts = layout(j, i);
    return parts ? `${name}: ${mean(j, i).toFixed(2)} bits; ${parts.map(([columns, levels]) => `${columns} columns of ${levels} levels`).join(", ")}` : "";
  });
  const index = () => table.ratios.reduce((best, r, i) => Math.abs(r - model.get("ratio")) < Math.abs(table.ratios[best] - model.get("ratio")) ? i : best, 0);
  const current = c => table.choices[c][index()];
  const fit = () => {
    const limit = bytes(model.get("budget"));
    const sizes = packed() ? table.bits.bytes : table.choices.uniform.map(size);
    const fitting = table.ratios.filter((_, i) => sizes[i] && peak(sizes[i]) <= limit), first = sizes.findIndex(b => b);
    if (!fitting.length) throw Error(`budget ${model.get("budget")}: even the emulator of ratio ${table.ratios[first]} needs ${mib(peak(sizes[first]))} in stage 2; fewer tokens or rows in a batch need less`);
    if (model.get("ratio") !== fitting.at(-1)) { model.set("ratio", fitting.at(-1)); model.save_changes(); }
  };
  const all = guard(() => {
    forms[model.get("form")].checked = modes[model.get("mode")].checked = true; uses[model.get("choice")].checked = true;
    budget.value = model.get("budget"); tokens.value = model.get("seq_len"); batch.value = model.get("batch_size");
    tokens.disabled = batch.disabled = !model.get("alive");
    // what is wrong is said at the end: everything else is drawn
    let wrong = model.get("problem");
    try { if (model.get("mode") === "budget") fit(); } catch (error) { wrong = error.message; }
    const i = index();
    slider.value = i; slider.setAttribute("aria-valuetext", `ratio ${table.ratios[i]}`); shown.textContent = table.ratios[i];
    const show = (node, yes) => { node.style.display = yes ? "" : "none"; };
    choices.forEach(c => show(maps[c].node, !packed()));
    show(bitMap.node, packed()); show(useSet, !packed());
    tell();
    least.textContent = packed() ? "1 bit" : "rank 1";
    const b = table.bits.bytes[i];
    if (packed()) {
      const bits = b ? names.map((_, j) => mean(j, i)) : [];
      fill(bitMap, bits, k => (k - 1) / 7);
      scale.textContent = "8 bits of a number, scales not counted";
      bitMap.title.textContent = reading.textContent = "";
      if (!b) throw Error(`ratio ${table.ratios[i]}: less than one bit for each number; the least is ${table.ratios[table.bits.bytes.findIndex(b => b)]}`);
      bitMap.title.textContent = `whole weights: ${Math.min(...bits).toFixed(2)} to ${Math.max(...bits).toFixed(2)} bits of a number`;
      reading.textContent = `in few bits: emulator ${mib(b)} of the model's ${mib(table.model_bytes)}, stage 2 peaks at ${mib(peak(b))}`;
      if (wrong) throw Error(wrong);
      return;
    }
    const top = Math.max(...choices.flatMap(c => current(c)));
    scale.textContent = `${top}; an empty cell stays dense`;
    const said = choices.map(c => {
      const list = current(c), b = size(list);
      const chosen = c === model.get("choice");
      maps[c].title.textContent = `${titles[c] ?? c}: ranks ${Math.min(...list.filter(k => k))} to ${Math.max(...list)}${chosen ? " (chosen)" : ""}`;
      maps[c].node.style.outline = chosen ? "2px solid var(--blue)" : "";
      fill(maps[c], list, k => k / top);
      return `${titles[c] ?? c}: emulator ${mib(b)} of the model's ${mib(table.model_bytes)}, stage 2 peaks at ${mib(peak(b))}`;
    });
    reading.replaceChildren(...said.map(line => make("div", {}, line)));
    if (wrong) throw Error(wrong);
  });
  box.append(make("div", { class: "row" }, formSet), make("div", { class: "row" }, modeSet, make("label", {}, "ratio", slider), shown),
    make("div", { class: "row" }, make("label", {}, "budget", budget), make("label", {}, "tokens", tokens), make("label", {}, "batch", batch), useSet),
    make("div", { class: "plots" }, ...choices.map(c => maps[c].node), bitMap.node),
    make("div", { class: "row" }, least, make("span", { style: `display:inline-block;width:120px;height:10px;background:linear-gradient(90deg,${[0, 0.25, 0.5, 0.75, 1].map(viridis).join(",")})` }), scale),
    reading, hovered, problem);
  for (const name of ["form", "mode", "ratio", "budget", "choice", "knots", "problem", "alive", "seq_len", "batch_size"]) model.on(`change:${name}`, all);
  all();
}

const explorers = { spectrum, ranks };
const render = ({ model, el }) => explorers[model.get("kind")]({ model, el });

// On a page without a kernel the state lives here.
function standAlone(state, el) {
  const ears = {};
  render({ el, model: {
    get: name => state[name],
    set: (name, value) => { if (state[name] === value) return; state[name] = value; (ears[`change:${name}`] ?? []).forEach(hear => hear()); },
    on: (event, hear) => (ears[event] ??= []).push(hear),
    save_changes() {},
  } });
}

export default { render };
