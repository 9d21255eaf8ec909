"use strict";
// Everything on the page of a sweep is drawn here from its rows: profiles, heat maps, parallel coordinates, table.
(() => {
  const data = JSON.parse(document.getElementById("sweep-data").textContent);
  const element = (id) => document.getElementById(id);
  const PAGE = 50, BINS = 10, MOST_VALUES = 14;
  let metric = 0, method = "";

  const format = (value) => {
    if (value === null || value === undefined) return "–";
    if (typeof value !== "number") return String(value);
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const svg = (name, attributes, ...children) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const sign = (m) => (data.directions[m] === "minimise" ? -1 : 1);
  const score = (row, m = metric) => row.metrics[m];
  const scored = (m = metric) => data.rows.filter((row) => score(row, m) !== null && (!method || row.method === method));
  const better = (a, b, m = metric) => sign(m) * (a - b) > 0;
  const bestOf = (rows, m = metric) => rows.reduce((best, row) => (best === null || better(score(row, m), score(best, m), m) ? row : best), null);
  const describe = (row) => [
    `point ${row.point}: ${row.method}`,
    ...data.axes.map((axis, i) => [axis.name, row.values[i]]).filter(([, v]) => v !== null).map(([n, v]) => `${n} = ${format(v)}`),
    ...data.metrics.map((name, m) => `${name}: ${format(row.metrics[m])}`),
  ].join("\n");

  const tip = element("tip");
  const hint = (node, text) => {
    const move = (event) => {
      tip.textContent = text;
      tip.hidden = false;
      tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)}px`;
    };
    node.addEventListener("pointermove", move);
    node.addEventListener("pointerleave", () => { tip.hidden = true; });
    return node;
  };

  // A scale maps a value to 0..1; `ticks` are [place, text]. Words, and few numbers, stand evenly side by side.
  const scaleOf = (values) => {
    const present = values.filter((v) => v !== null);
    const numeric = present.length > 0 && present.every((v) => typeof v === "number");
    const distinct = [...new Set(present)];
    if (numeric) distinct.sort((a, b) => a - b);
    if (!numeric || distinct.length <= MOST_VALUES) {
      const place = (v) => { const i = distinct.indexOf(v); return i < 0 ? null : distinct.length > 1 ? i / (distinct.length - 1) : 0.5; };
      return { numeric, distinct, place, cells: distinct.map(format), cell: (v) => distinct.indexOf(v), ticks: distinct.map((v) => [place(v), format(v)]), low: distinct[0] };
    }
    const low = distinct[0], high = distinct[distinct.length - 1];
    const log = low > 0 && high / low > 50;
    const forth = (v) => (log ? Math.log(v) : v), back = (x) => (log ? Math.exp(x) : x);
    const place = (v) => (v === null ? null : (forth(v) - forth(low)) / (forth(high) - forth(low)));
    const at = (t) => back(forth(low) + t * (forth(high) - forth(low)));
    return {
      numeric, distinct, place, low,
      cells: Array.from({ length: BINS }, (_, i) => format(Number(at((i + 0.5) / BINS).toPrecision(2)))),
      cell: (v) => (v === null ? -1 : Math.min(BINS - 1, Math.floor(BINS * place(v)))),
      ticks: [0, 0.25, 0.5, 0.75, 1].map((t) => [t, format(Number(at(t).toPrecision(3)))]),
    };
  };
  const scales = data.axes.map((axis, i) => scaleOf(data.rows.map((row) => row.values[i])));
  const limits = (rows, m = metric) => {
    const values = rows.map((row) => score(row, m));
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) { low -= 0.5; high += 0.5; }
    return [low, high];
  };
  // As many digits as tell values of a span apart.
  const within = (value, low, high, more = 0) => {
    const places = more + 1 - Math.floor(Math.log10(high - low));
    return places > 8 || Math.abs(value) >= 1e6 ? value.toExponential(3) : value.toFixed(Math.max(0, places)).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  };
  const ticksBetween = (low, high) => [0, 0.25, 0.5, 0.75, 1].map((t) => [t, within(low + t * (high - low), low, high)]);

  const frame = (width, height, label, wide = false) => svg("svg", { class: wide ? "chart wide" : "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const figure = (title, picture) => {
    const node = document.createElement("figure"), head = document.createElement("h4");
    head.textContent = title;
    node.append(head, picture);
    return node;
  };
  const thin = (ticks, most) => { const step = Math.ceil(ticks.length / most); return ticks.filter((_, i) => i % step === 0); };

  const drawPlane = (picture, box, across, up) => {
    const [x0, y0, x1, y1] = box;
    for (const [t, text] of up) {
      const y = y1 - t * (y1 - y0);
      picture.append(svg("line", { class: "grid", x1: x0, x2: x1, y1: y, y2: y }), svg("text", { x: x0 - 6, y: y + 4, "text-anchor": "end" }, text));
    }
    for (const [t, text] of thin(across, 8)) picture.append(svg("text", { x: x0 + t * (x1 - x0), y: y1 + 18, "text-anchor": "middle" }, text));
    picture.append(svg("path", { class: "axis", d: `M${x0} ${y0}V${y1}H${x1}` }));
  };

  const drawProfile = (a) => {
    const rows = scored().filter((row) => row.values[a] !== null), scale = scales[a], box = [52, 8, 410, 190];
    const picture = frame(430, 216, `${data.metrics[metric]} by ${data.axes[a].name}`);
    if (!rows.length) return picture;
    const [low, high] = limits(rows), pad = 8;
    const x = (v) => box[0] + pad + scale.place(v) * (box[2] - box[0] - 2 * pad);
    const y = (s) => box[3] - (s - low) / (high - low) * (box[3] - box[1]);
    const inset = scale.ticks.map(([t, text]) => [(pad + t * (box[2] - box[0] - 2 * pad)) / (box[2] - box[0]), text]);
    drawPlane(picture, box, inset, ticksBetween(low, high));
    for (const row of rows) picture.append(hint(svg("circle", { class: "dot", r: 3.2, cx: x(row.values[a]), cy: y(score(row)) }), describe(row)));
    if (scale.distinct.length <= MOST_VALUES) {
      const best = scale.distinct.map((v) => bestOf(rows.filter((row) => row.values[a] === v))).filter(Boolean);
      if (scale.numeric && best.length > 1) picture.append(svg("path", { class: "join", d: "M" + best.map((row) => `${x(row.values[a])} ${y(score(row))}`).join("L") }));
      for (const row of best) picture.append(hint(svg("circle", { class: "dot best", r: 3.6, cx: x(row.values[a]), cy: y(score(row)) }), describe(row)));
    }
    return picture;
  };

  const drawMap = (a, b) => {
    const rows = scored().filter((row) => row.values[a] !== null && row.values[b] !== null);
    const [left, top] = [64, 6], across = scales[a], up = scales[b];
    const wide = 380 / across.cells.length, high = Math.min(34, Math.max(16, 240 / up.cells.length));
    const bottom = top + high * up.cells.length;
    const picture = frame(left + 386, bottom + 40, `${data.metrics[metric]} by ${data.axes[a].name} and ${data.axes[b].name}`);
    const cells = across.cells.flatMap((_, i) => up.cells.map((_, j) =>
      ({ i, j, row: bestOf(rows.filter((r) => across.cell(r.values[a]) === i && up.cell(r.values[b]) === j)) })));
    const filled = cells.filter((cell) => cell.row !== null).map((cell) => cell.row);
    if (!filled.length) return picture;
    const [worst, best] = limits(filled);
    const fits = filled.every((row) => wide > 8 + 6.2 * within(score(row), worst, best).length);
    up.cells.forEach((text, j) => picture.append(svg("text", { x: left - 6, y: bottom - (j + 0.5) * high + 4, "text-anchor": "end" }, text)));
    thin(across.cells.map((text, i) => [i, text]), 10).forEach(([i, text]) => picture.append(svg("text", { x: left + (i + 0.5) * wide, y: bottom + 15, "text-anchor": "middle" }, text)));
    picture.append(svg("text", { class: "title", x: left + 190, y: bottom + 34, "text-anchor": "middle" }, data.axes[a].name));
    for (const { i, j, row } of cells) {
      const spot = { x: left + i * wide + 0.5, y: bottom - (j + 1) * high + 0.5, width: wide - 1, height: high - 1 };
      picture.append(svg("rect", { ...spot, class: "empty" }));
      if (row === null) continue;
      let share = (score(row) - worst) / (best - worst);
      if (sign(metric) < 0) share = 1 - share;
      picture.append(svg("rect", { ...spot, class: "heat", "fill-opacity": (0.12 + 0.88 * share).toFixed(3) }));
      if (fits) picture.append(svg("text", { class: share > 0.55 ? "cell strong" : "cell", x: spot.x + spot.width / 2, y: spot.y + spot.height / 2 }, within(score(row), worst, best)));
      picture.append(hint(svg("rect", { ...spot, fill: "transparent" }), describe(row)));
    }
    return picture;
  };

  const kept = new Map();  // column of the parallel coordinates -> [from, to] of 0..1
  const drawLines = () => {
    const rows = scored(), names = [], places = [], ticks = [];
    if (data.methods.length > 1 && !method) {
      const scale = scaleOf(rows.map((row) => row.method));
      names.push("method"); places.push((row) => scale.place(row.method)); ticks.push(scale.ticks);
    }
    data.axes.forEach((axis, a) => { names.push(axis.name); places.push((row) => scales[a].place(row.values[a])); ticks.push(scales[a].ticks); });
    data.metrics.forEach((name, m) => {
      const own = rows.filter((row) => score(row, m) !== null);
      if (!own.length) return;
      const [low, high] = limits(own, m);
      names.push(name); places.push((row) => (score(row, m) === null ? null : (score(row, m) - low) / (high - low))); ticks.push(ticksBetween(low, high));
    });
    const gap = Math.max(110, 1000 / Math.max(1, names.length - 1)), left = 60, top = 34, bottom = 300;
    const width = left + gap * (names.length - 1) + 80;
    const picture = frame(width, bottom + 16, "every point as a line over all axes", true);
    if (!rows.length) return element("lines-plot").replaceChildren(picture);
    const x = (c) => left + c * gap, y = (t) => bottom - t * (bottom - top);
    const [low, high] = limits(rows);
    const passes = (row) => [...kept].every(([c, [from, to]]) => { const t = places[c](row); return t !== null && t >= from - 1e-9 && t <= to + 1e-9; });
    const order = [...rows].sort((p, q) => passes(p) - passes(q) || sign(metric) * (score(p) - score(q)));
    for (const row of order) {
      const spots = places.map((place, c) => [x(c), place(row)]).filter(([, t]) => t !== null);
      let share = (score(row) - low) / (high - low);
      if (sign(metric) < 0) share = 1 - share;
      const line = svg("path", { class: passes(row) ? "line" : "line off", d: "M" + spots.map(([px, t]) => `${px} ${y(t).toFixed(1)}`).join("L") });
      if (passes(row)) line.setAttribute("stroke-opacity", (0.08 + 0.92 * share ** 2).toFixed(3));
      picture.append(hint(line, describe(row)));
    }
    names.forEach((name, c) => {
      picture.append(svg("line", { class: "axis", x1: x(c), x2: x(c), y1: top, y2: bottom }), svg("text", { class: "title", x: x(c), y: 16, "text-anchor": "middle" }, name));
      for (const [t, text] of thin(ticks[c], 9)) picture.append(svg("text", { x: x(c) + 5, y: y(t) + 4 }, text));
      if (kept.has(c)) { const [from, to] = kept.get(c); picture.append(svg("rect", { class: "brush", x: x(c) - 7, width: 14, y: y(to), height: Math.max(2, y(from) - y(to)) })); }
      const handle = svg("rect", { class: "handle", x: x(c) - 11, width: 22, y: top - 6, height: bottom - top + 12 });
      handle.addEventListener("pointerdown", (event) => {
        const box = picture.getBoundingClientRect();
        const at = (e) => Math.min(1, Math.max(0, (bottom - (e.clientY - box.top) * (bottom + 16) / box.height) / (bottom - top)));
        const start = at(event);
        const finish = (e) => {
          const end = at(e);
          if (Math.abs(end - start) < 0.015) kept.delete(c); else kept.set(c, [Math.min(start, end), Math.max(start, end)]);
          drawLines();
        };
        window.addEventListener("pointerup", finish, { once: true });
        event.preventDefault();
      });
      picture.append(handle);
    });
    element("lines-plot").replaceChildren(picture);
    element("lines-kept").textContent = kept.size ? `${rows.filter(passes).length} of ${rows.length} points are kept.` : "";
  };

  const drawFront = () => {
    const [p, q] = ["across", "up"].map((id) => Number(element(id).value));
    const rows = data.rows.filter((row) => score(row, p) !== null && score(row, q) !== null && (!method || row.method === method));
    const box = [64, 8, 620, 330], picture = frame(640, 374, `${data.metrics[q]} against ${data.metrics[p]}`);
    picture.style.maxWidth = "640px";
    if (rows.length) {
      const [xs, ys] = [limits(rows, p), limits(rows, q)];
      drawPlane(picture, box, ticksBetween(...xs), ticksBetween(...ys));
      const beaten = (row) => rows.some((r) => !better(score(row, p), score(r, p), p) && !better(score(row, q), score(r, q), q)
        && (better(score(r, p), score(row, p), p) || better(score(r, q), score(row, q), q)));
      const marks = rows.map((row) => [row, !beaten(row)]).sort((s, t) => s[1] - t[1]);
      for (const [row, front] of marks) picture.append(hint(svg("circle", {
        class: front ? "dot front" : "dot hollow", r: front ? 5 : 4,
        cx: box[0] + (score(row, p) - xs[0]) / (xs[1] - xs[0]) * (box[2] - box[0]),
        cy: box[3] - (score(row, q) - ys[0]) / (ys[1] - ys[0]) * (box[3] - box[1]) }), describe(row)));
      picture.append(svg("text", { class: "title", x: (box[0] + box[2]) / 2, y: 368, "text-anchor": "middle" }, data.metrics[p]));
    }
    element("front-plot").replaceChildren(picture);
  };

  let sorted = null, descending = true, page = 0;
  const columns = [
    { title: "point", of: (row) => row.point, num: true }, { title: "method", of: (row) => row.method },
    ...data.axes.map((axis, a) => ({ title: axis.name, of: (row) => row.values[a], num: scales[a].numeric })),
    ...data.metrics.map((name, m) => ({ title: name, of: (row) => row.metrics[m], num: true })),
    { title: "merge s", of: (row) => row.merge_seconds, num: true }, { title: "score s", of: (row) => row.score_seconds, num: true },
  ];
  const text = new Map(data.rows.map((row) => [row, columns.map((c) => `${c.title}=${c.of(row)}`).concat(row.method, row.problem).join(" ").toLowerCase()]));
  const drawTable = () => {
    const words = element("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const view = data.rows.filter((row) => (!method || row.method === method) && words.every((w) => (" " + text.get(row) + " ").includes(w.includes("=") ? ` ${w}` : w)));
    const by = sorted === null ? columns[2 + data.axes.length + metric] || columns[0] : columns[sorted];
    const down = sorted === null ? data.metrics.length > 0 && sign(metric) > 0 : descending;
    view.sort((a, b) => {
      const x = by.of(a), y = by.of(b);
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
      return down ? -order : order;
    });
    page = Math.min(page, Math.max(0, Math.ceil(view.length / PAGE) - 1));
    element("points-head").replaceChildren(...columns.map((column, i) => {
      const cell = document.createElement("th"), button = document.createElement("button");
      button.type = "button";
      button.textContent = column.title;
      cell.scope = "col";
      if (column.num) cell.className = "num";
      if (column === by) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      button.addEventListener("click", () => {
        descending = column === by ? !down : Boolean(column.num);
        sorted = i;
        page = 0;
        drawTable();
        element("points-head").children[i].firstChild.focus();
      });
      cell.append(button);
      return cell;
    }));
    const best = bestOf(scored());
    element("points-body").replaceChildren(...view.slice(page * PAGE, (page + 1) * PAGE).map((row) => {
      const line = document.createElement("tr");
      if (row === best) line.className = "chosen";
      for (const column of columns) {
        const cell = line.insertCell();
        cell.textContent = format(column.of(row));
        if (column.num) cell.className = "num";
      }
      if (row.problem) line.title = row.problem;
      return line;
    }));
    const first = page * PAGE;
    element("shown").textContent = view.length ? `${first + 1}–${Math.min(first + PAGE, view.length)} of ${view.length}` : "No point fits the filter.";
    element("previous").disabled = page === 0;
    element("next").disabled = first + PAGE >= view.length;
  };

  const draw = () => {
    if (data.metrics.length) {
      element("direction").textContent = sign(metric) > 0 ? "higher is better" : "lower is better";
      if (data.axes.length) {
        element("profiles-plots").replaceChildren(...data.axes.map((axis, a) => figure(axis.name, drawProfile(a))));
        drawLines();
      }
      if (data.pairs.length) {
        element("maps-plots").replaceChildren(...data.pairs.map(([a, b]) => figure(`${data.axes[b].name} over ${data.axes[a].name}`, drawMap(a, b))));
      }
      if (data.metrics.length > 1) drawFront();
    }
    drawTable();
  };

  element("metric").addEventListener("change", (event) => { metric = Number(event.target.value); kept.clear(); sorted = null; draw(); });
  if (element("method")) element("method").addEventListener("change", (event) => { method = event.target.value; kept.clear(); page = 0; draw(); });
  for (const id of ["across", "up"]) if (element(id)) element(id).addEventListener("change", drawFront);
  element("filter").addEventListener("input", () => { page = 0; drawTable(); });
  element("previous").addEventListener("click", () => { page -= 1; drawTable(); });
  element("next").addEventListener("click", () => { page += 1; drawTable(); });
  draw();
})();
