"use strict";
// One page, no dependency, nothing fetched. Text of the profile reaches the document through textContent only.
(() => {
  const D = JSON.parse(document.getElementById("data").textContent);
  const comparison = Boolean(D.oldName);
  const $ = (id) => document.getElementById(id);
  let figure = 3; // index into the four values; 3 is bytes in use
  let wanted = "";
  let widths; // of what is drawn to measure; asking for them amid the drawing would make the browser lay out each time
  const measure = () => { widths = { chart: $("chart").clientWidth, boxes: $("boxes").clientWidth }; };

  // --- text ---
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  function bytes(n) {
    let v = Math.abs(n), u = 0;
    while (v >= 1023.95 && u < units.length - 1) { v /= 1024; u++; }
    const text = u === 0 || v >= 99.95 ? v.toFixed(0) : v.toFixed(1).replace(/\.0$/, "");
    return (n < 0 ? "-" : "") + text + " " + units[u];
  }
  const signed = (n) => (n > 0 ? "+" : "") + bytes(n);
  const count = (n) => String(Math.round(n)).replace(/\B(?=(\d{3})+$)/g, ","); // toLocaleString loads tables at its first call
  const show = (n) => (figure % 2 ? bytes(n) : count(n));
  const showSigned = (n) => (n > 0 ? "+" : "") + show(n);
  const percent = (part, whole) => (whole ? (100 * part / whole).toFixed(1).replace(/\.0$/, "") + " %" : "-");
  const frameName = (id) => D.frames[id][0];
  const frameText = (id) => D.frames[id].filter(Boolean).join("  ");

  function el(tag, attributes, ...children) {
    const e = document.createElementNS(tag === "svg" || attributes?.svg ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml", tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "svg") continue;
      if (name === "on") { for (const [event, call] of Object.entries(value)) e.addEventListener(event, call); }
      else if (name === "style") Object.assign(e.style, value);
      else if (value !== undefined && value !== false) e.setAttribute(name, value);
    }
    e.append(...children.filter((c) => c !== undefined && c !== null));
    return e;
  }

  const code = (s) => el("code", {}, s);

  // --- header ---
  function header() {
    const who = (D.processes || []).map((p) => `${p.comm} (${p.pid})`);
    $("title").textContent = comparison ? `${D.oldName} → ${D.name}` : `${who.slice(0, 4).join(", ") || D.name}${who.length > 4 ? ` and ${who.length - 4} more` : ""}`;
    document.title = `allocsnoop: ${$("title").textContent}`;
    const facts = $("facts");
    const put = (label, value) => facts.append(facts.childNodes.length ? " · " : "", el("strong", {}, value), label ? ` ${label}` : "");
    for (const t of D.totals || []) put(`${t.error ? `± ${bytes(t.error)} ` : ""}in ${count(t.values[2])} blocks of ${t.kind} in use`, bytes(t.values[3]));
    if (D.seconds > 0) put("traced", `${+D.seconds.toFixed(1)} s`);
    put("", D.sampled ? `sampled, one block per ${bytes(D.sampled)}` : "every block counted");
    if (comparison) put(`times the work of ${D.oldName}`, String(+D.scale.toPrecision(3)));
    for (const l of D.libraries) {
      if (l.oldBuild) facts.append(el("br"), el("span", { class: "changed" }, `another build of ${l.name}: `), code(l.oldBuild.slice(0, 12)), " → ", code(l.build.slice(0, 12)));
    }
    for (const q of D.quality || []) facts.append(el("br"), q);
    if (D.command) facts.append(el("br"), el("code", {}, D.command));
    for (const l of D.losses || []) $("warnings").append(el("li", {}, `lost: ${l}`));
    for (const p of D.processes || []) if (p.exit) $("warnings").append(el("li", {}, `${p.comm} (${p.pid}) ended: ${p.exit}`));
    $("elsewhere").hidden = !D.served;
  }

  // --- tables ---
  const tables = [], firstRows = 40;
  const waiting = new Map(); // table body -> makers of the rows that it still lacks
  // columns: title, key(row) to sort by, cell(row), num. A row opens its stack; the first sort is the given one.
  function table(section, columns, rows, open, empty) {
    const host = $(section).querySelector(".table");
    const state = { column: -1, descending: true };
    const body = el("tbody");
    const heads = columns.map((c, i) => el("th", { scope: "col", class: c.num ? "num" : "" },
      el("button", { type: "button", on: { click: () => sort(i) } }, c.title)));
    host.append(el("table", { "aria-labelledby": `${section}-h` }, el("thead", {}, el("tr", {}, ...heads)), body));
    function sort(i) {
      state.descending = state.column === i ? !state.descending : Boolean(columns[i].num);
      state.column = i;
      heads.forEach((h, k) => (k === i ? h.setAttribute("aria-sort", state.descending ? "descending" : "ascending") : h.removeAttribute("aria-sort")));
      draw();
    }
    function draw() {
      let list = rows.filter((r) => !wanted || r.text.includes(wanted));
      if (state.column >= 0) {
        const key = columns[state.column].key, sign = state.descending ? -1 : 1;
        list = list.slice().sort((a, b) => { const x = key(a), y = key(b); return sign * (x < y ? -1 : x > y ? 1 : 0); });
      }
      const line = (r) => el("tr", open ? { tabindex: 0, on: {
        click: () => open(r), keydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); open(r); } },
      } } : {}, ...columns.map((c) => el("td", { class: c.num ? "num" : c.tight ? "tight" : "" }, c.cell(r))));
      const first = drawn ? list.length : firstRows;
      body.replaceChildren(...list.slice(0, first).map(line));
      waiting.set(body, list.slice(first).map((r) => () => line(r)));
      if (!list.length) body.append(el("tr", {}, el("td", { colspan: columns.length, class: "dim" }, wanted ? "nothing found" : empty)));
    }
    let drawn = false; // the rest of the first rows waits until the page is ready
    tables.push(draw);
    draw();
    drawn = true;
  }
  const searchable = (rows, of) => (rows || []).map((r) => Object.assign(r, { text: of(r).toLowerCase() }));

  function detail(title, frames) {
    $("detail-h").textContent = title;
    $("detail-frames").replaceChildren(...frames.map((f) => el("li", {}, code(D.frames[f][0]), " ", el("span", { class: "dim" }, `${D.frames[f][1]} ${D.frames[f][2]}`))));
    $("detail").showModal();
  }

  function allTables() {
    if (comparison) {
      $("changes").hidden = false;
      table("changes", [
        { title: "difference", num: true, key: (r) => r.difference, cell: (r) => el("span", { class: r.difference > 0 ? "more" : "less" }, signed(r.difference)) },
        { title: "chance", num: true, key: (r) => r.noise, cell: (r) => "± " + bytes(r.noise) },
        { title: "OLD", num: true, key: (r) => r.old, cell: (r) => bytes(r.old) },
        { title: "NEW", num: true, key: (r) => r.new, cell: (r) => bytes(r.new) },
        { title: "function", key: (r) => r.function, cell: (r) => code(r.function) },
        { title: "library", key: (r) => r.library, cell: (r) => el("span", {}, r.library, r.rebuilt ? el("span", { class: "changed" }, " another build") : "") },
        { title: "kind", tight: true, key: (r) => r.kind, cell: (r) => r.kind },
      ], searchable(D.differences, (r) => `${r.function} ${r.library}`), (r) => detail(r.function, r.frames),
      `No difference beyond noise in ${D.compared} functions.`);
    }
    const order = ["churn", "steady cache", "growing", "leaking"];
    table("verdict", [
      { title: "verdict", tight: true, key: (r) => order.indexOf(r.class), cell: (r) => el("span", { class: r.class.replace(" ", "-") }, r.class) },
      { title: "function", key: (r) => r.function, cell: (r) => code(r.function) },
      { title: "library", key: (r) => r.library, cell: (r) => el("span", {}, r.library, " ", el("span", { class: "dim" }, r.build)) },
      { title: "growth per minute", num: true, key: (r) => r.growth, cell: (r) => (r.growth ? signed(r.growth) : "") },
      { title: "in use", num: true, key: (r) => r.inuse, cell: (r) => bytes(r.inuse) },
      { title: "blocks", num: true, key: (r) => r.blocks, cell: (r) => count(r.blocks) },
      { title: "evidence", key: (r) => r.evidence, cell: (r) => el("span", {}, r.evidence, r.kind === "malloc" ? "" : `, ${r.kind}`,
        el("span", { class: "dim" }, ` (confidence ${r.sure}${r.advice ? "; " + r.advice : ""})`)) },
    ], searchable(D.verdicts, (r) => `${r.function} ${r.library} ${r.class}`), (r) => { chart([r]); detail(`${r.library} ${r.function}`, r.frames); }, "Nothing was allocated.");
    table("stacks", [
      { title: "bytes in use", num: true, key: (r) => r.values[3], cell: (r) => bytes(r.values[3]) + (r.error ? ` ± ${bytes(r.error)}` : "") },
      { title: "blocks in use", num: true, key: (r) => r.values[2], cell: (r) => count(r.values[2]) },
      { title: "bytes allocated", num: true, key: (r) => r.values[1], cell: (r) => bytes(r.values[1]) },
      { title: "blocks allocated", num: true, key: (r) => r.values[0], cell: (r) => count(r.values[0]) },
      { title: "kind", tight: true, key: (r) => r.kind, cell: (r) => r.kind },
      { title: "owner", key: (r) => r.owner, cell: (r) => code(r.owner) },
      { title: "called from", key: (r) => r.path, cell: (r) => el("span", { class: "dim" }, r.path) },
    ], searchable((D.stacks || []).map((r) => Object.assign(r, { path: r.frames.slice(1, 5).map(frameName).join(" ← ") })), (r) => `${r.owner} ${r.frames.map(frameText).join(" ")}`),
    (r) => { chart([{ function: r.owner, library: "", course: r.course }]); detail(r.owner, r.frames); }, "No call stacks.");
    if (D.stackCount > (D.stacks || []).length) $("stacks-h").textContent = `Call stacks (the largest ${D.stacks.length} of ${count(D.stackCount)}; the flame graph has all)`;
    const states = comparison || D.libraries.some((r) => r.state);
    table("libraries", [
      { title: "name", key: (r) => r.name, cell: (r) => code(r.name) },
      ...(states ? [{ title: "state", tight: true, key: (r) => r.state || "~", cell: (r) => el("span", { class: r.state ? "changed" : "" }, r.state || "") }] : []),
      { title: "build-id", key: (r) => r.build, cell: (r) => el("span", {}, code(r.build || "-"), r.oldBuild ? el("span", { class: "dim" }, ` (OLD ${r.oldBuild})`) : "") },
      { title: "version", key: (r) => r.version || "", cell: (r) => r.version || "" },
      { title: "changed", tight: true, key: (r) => r.changed || "", cell: (r) => r.changed || "" },
      { title: "path", key: (r) => r.file, cell: (r) => r.file },
    ], searchable(D.libraries, (r) => `${r.name} ${r.file} ${r.build}`), null, "The profile has no inventory.");
  }

  // --- chart ---
  let charted = [];
  function chart(series) {
    charted = series;
    const lines = series.filter((s) => s.course && s.course.length > 1).slice(0, 6);
    if (!lines.length) { $("chart").replaceChildren(el("p", {}, "The profile has no course over time; allocsnoop keeps one while it traces.")); return; }
    const W = Math.max(widths.chart, 320), H = 240, left = 70, bottom = 24;
    const end = Math.max(...lines.map((s) => s.course.at(-1)[0])) || 1;
    const top = Math.max(1, ...lines.flatMap((s) => s.course.map((p) => p[1]))) * 1.05;
    const x = (t) => left + (W - left - 8) * t / end, y = (v) => 6 + (H - bottom - 6) * (1 - v / top);
    const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": lines.map((s) => `${s.function}: ${bytes(s.course[0][1])} to ${bytes(s.course.at(-1)[1])}`).join("; ") });
    for (let i = 0; i <= 4; i++) {
      const v = top / 1.05 * i / 4, t = end * i / 4;
      svg.append(el("line", { svg: 1, class: "grid", x1: left, x2: W - 8, y1: y(v), y2: y(v) }),
        el("text", { svg: 1, x: left - 6, y: y(v) + 4, "text-anchor": "end" }, bytes(v)),
        el("text", { svg: 1, x: x(t), y: H - 6, "text-anchor": i === 4 ? "end" : "middle" }, `${+t.toFixed(1)} s`));
    }
    lines.forEach((s, i) => {
      svg.append(el("path", { svg: 1, style: { stroke: `var(--s${i})` }, d: s.course.map((p, k) => (k ? "L" : "M") + x(p[0]).toFixed(1) + " " + y(p[1]).toFixed(1)).join("") }));
    });
    const keys = lines.map((s, i) => el("li", {}, el("span", { class: "key", style: { background: `var(--s${i})` } }), `${s.library} ${s.function}`));
    const all = el("button", { type: "button", on: { click: () => chart(D.verdicts) } }, "show the largest again");
    $("chart").replaceChildren(svg, el("ul", { class: "keys" }, ...keys, ...(lines.length === 1 && D.verdicts.length > 1 ? [el("li", {}, all)] : [])));
  }

  // --- flame graph ---
  const T = D.tree, size = T.frame.length;
  const children = Array.from({ length: size }, () => []);
  const depth = new Int32Array(size);
  for (let i = 1; i < size; i++) { children[T.parent[i]].push(i); depth[i] = depth[T.parent[i]] + 1; }
  // In a comparison a box is as wide as the mean of both profiles, so that what is gone shows too; its colour is the change.
  const value = (i) => (comparison ? (T.values[i][figure] + T.old[i][figure]) / 2 : T.values[i][figure]);
  let zoomed = 0, focused = 0;
  const boxOf = new Map();

  function hue(text) {
    let h = 0;
    for (const c of text) h = (h * 31 + c.codePointAt(0)) >>> 0;
    return h % 360;
  }
  function color(i) {
    if (i === 0) return "var(--line)";
    if (!comparison) return `hsl(${hue(D.frames[T.frame[i]][1] || "?")} var(--sat) var(--light))`;
    const change = T.values[i][figure] - T.old[i][figure], whole = Math.max(T.values[i][figure], T.old[i][figure]);
    const share = whole ? change / whole : 0;
    if (Math.abs(share) < 0.02) return "hsl(0 0% var(--light))";
    return `hsl(${share > 0 ? 4 : 212} ${Math.round(20 + 70 * Math.abs(share))}% var(--light))`;
  }
  // Kinds may be the same bytes seen twice: the root has no figure, and shares are those of a kind.
  const kindOf = (i) => { while (depth[i] > 1) i = T.parent[i]; return i; };
  function describe(i) {
    if (i === 0) return "all kinds of memory; they are not added up";
    const base = `${frameText(T.frame[i])}: ${show(T.values[i][figure])}`;
    return comparison ? `${base}, OLD ${show(T.old[i][figure])}, difference ${showSigned(T.values[i][figure] - T.old[i][figure])}`
      : `${base}, ${percent(T.values[i][figure], T.values[kindOf(i)][figure])} of ${frameName(T.frame[kindOf(i)])}`;
  }

  function drawFlame() {
    const host = $("boxes"), width = widths.boxes || 1200, row = 20;
    const found = wanted ? (i) => frameText(T.frame[i]).toLowerCase().includes(wanted) : null;
    boxOf.clear();
    const boxes = [];
    let deepest = 0, matches = 0;
    const put = (i, left, w, above) => {
      const match = !found || found(i);
      if (found && match) matches += 1;
      deepest = Math.max(deepest, depth[i]);
      const box = el("button", { type: "button", class: `box${above ? " above" : ""}${match ? "" : " faded"}`, tabindex: -1, "data-node": i, title: describe(i), "aria-label": describe(i),
        style: { left: `${left}px`, width: `${Math.max(w - 1, 1)}px`, top: `${depth[i] * row}px`, background: color(i) } }, w > 24 ? frameName(T.frame[i]) : "");
      boxOf.set(i, box);
      boxes.push(box);
    };
    for (let up = T.parent[zoomed]; up >= 0; up = T.parent[up]) put(up, 0, width, true);
    const stack = [[zoomed, 0, width]];
    while (stack.length) {
      const [i, left, w] = stack.pop();
      put(i, left, w, false);
      const whole = value(i);
      let at = left;
      for (const c of children[i].slice().sort((a, b) => value(b) - value(a))) {
        const cw = whole ? w * value(c) / whole : 0;
        if (cw >= 1.5) stack.push([c, at, cw]);
        at += cw;
      }
    }
    host.replaceChildren(...boxes);
    host.style.height = `${Math.min((deepest + 1) * row + 2, 760)}px`;
    if (!boxOf.has(focused)) focused = zoomed;
    boxOf.get(focused).tabIndex = 0;
    $("found").textContent = found ? `${count(matches)} boxes` : "";
  }
  function zoom(i) { zoomed = focused = i; drawFlame(); $("flame-info").textContent = describe(i); boxOf.get(i).focus({ preventScroll: true }); }
  function focusBox(i) {
    if (i === undefined || !boxOf.has(i)) return;
    boxOf.get(focused).tabIndex = -1;
    focused = i;
    boxOf.get(i).tabIndex = 0;
    boxOf.get(i).focus();
  }
  function flameEvents() {
    const host = $("boxes");
    const nodeOf = (e) => { const b = e.target.closest?.(".box"); return b ? Number(b.dataset.node) : -1; };
    host.addEventListener("click", (e) => { const i = nodeOf(e); if (i >= 0) zoom(i); });
    for (const event of ["mouseover", "focusin"]) host.addEventListener(event, (e) => { const i = nodeOf(e); if (i >= 0) $("flame-info").textContent = describe(i); });
    host.addEventListener("keydown", (e) => {
      const i = focused, left = (n) => parseFloat(boxOf.get(n).style.left);
      const row = () => [...boxOf.keys()].filter((n) => depth[n] === depth[i]).sort((a, b) => left(a) - left(b));
      const move = {
        ArrowUp: () => focusBox(T.parent[i]),
        ArrowDown: () => focusBox(children[i].filter((c) => boxOf.has(c)).sort((a, b) => value(b) - value(a))[0]),
        ArrowLeft: () => { const r = row(); focusBox(r[r.indexOf(i) - 1]); },
        ArrowRight: () => { const r = row(); focusBox(r[r.indexOf(i) + 1]); },
        Escape: () => zoom(0),
      }[e.key];
      if (move) { e.preventDefault(); move(); }
    });
    const key = (background, text) => [el("span", { class: "key", style: { background } }), text];
    if (comparison) $("legend").append(...key("hsl(4 90% var(--light))", "more than OLD"), ...key("hsl(212 90% var(--light))", "less than OLD"), ...key("hsl(0 0% var(--light))", "the same. A box is as wide as the mean of both."));
    else $("legend").append(" Colours tell libraries apart.");
    if (T.left) $("legend").append(` ${count(T.left)} boxes are too small to be drawn.`);
  }

  // --- all together ---
  measure();
  header();
  allTables();
  chart(D.verdicts || []);
  flameEvents();
  drawFlame();
  $("figure").addEventListener("change", (e) => { figure = Number(e.target.value); drawFlame(); });
  $("find").addEventListener("input", (e) => { wanted = e.target.value.trim().toLowerCase(); tables.forEach((draw) => draw()); drawFlame(); });
  let resize;
  addEventListener("resize", () => { clearTimeout(resize); resize = setTimeout(() => { measure(); drawFlame(); chart(charted); }, 100); });
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
  const idle = (call) => (window.requestIdleCallback ? requestIdleCallback(call, { timeout: 1000 }) : setTimeout(call, 20));
  function fill(deadline) {
    for (const [body, rows] of waiting) {
      do body.append(...rows.splice(0, 10).map((make) => make()));
      while (rows.length && deadline?.timeRemaining() > 10);
      if (rows.length) break;
      waiting.delete(body);
    }
    if (waiting.size) idle(fill);
    else document.documentElement.dataset.whole = "";
  }
  addEventListener("load", () => idle(fill));
})();
