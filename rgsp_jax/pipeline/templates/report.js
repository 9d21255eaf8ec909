"use strict";
// The table of tensors: filtered, sorted and drawn a page at a time, so that ten thousand rows stay quick.
(() => {
  const PAGE = 50;
  const details = document.getElementById("tensors-details");
  const element = (id) => document.getElementById(id);
  let data = null, view = [], page = 0, sorted = -1, descending = false;

  const format = (value, kind) => {
    if (value === null) return "–";
    if (kind === "percent") return Number((100 * value).toPrecision(3)) + " %";
    if (typeof value !== "number") return value;
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };

  const columns = () => data.columns.map((column, i) => ({ title: column[0], kind: column[1], at: i, shown: column[2] }))
    .filter((column) => column.shown || element("all-columns").checked);

  const compare = (a, b) => {
    const x = a[sorted], y = b[sorted];
    if (x === null || y === null || x === "" || y === "") return (x === null || x === "") - (y === null || y === "");
    const order = typeof x === "number" && typeof y === "number"
      ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return descending ? -order : order;
  };

  const select = () => {
    const words = element("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const rule = element("rule").value, flagged = element("flagged").checked;
    const at = (title) => data.columns.findIndex((column) => column[0] === title);
    const ruleAt = at("Rule"), flagsAt = at("Warnings");
    view = data.rows.filter((row, i) => (!rule || row[ruleAt] === rule) && (!flagged || row[flagsAt] !== "")
      && words.every((word) => data.text[i].includes(word)));
    if (sorted >= 0) view.sort(compare);
    page = 0;
    draw();
  };

  const drawHead = (shown) => {
    element("tensors-head").replaceChildren(...shown.map((column) => {
      const cell = document.createElement("th"), button = document.createElement("button");
      button.type = "button";
      button.textContent = column.title;
      cell.scope = "col";
      if (column.kind === "number" || column.kind === "percent") cell.className = "num";
      if (column.at === sorted) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      button.addEventListener("click", () => {
        descending = column.at === sorted ? !descending : cell.className === "num";
        sorted = column.at;
        select();
        element("tensors-head").children[shown.indexOf(column)].firstChild.focus();
      });
      cell.append(button);
      return cell;
    }));
  };

  const draw = () => {
    const shown = columns(), first = page * PAGE, part = view.slice(first, first + PAGE);
    drawHead(shown);
    element("tensors-body").replaceChildren(...part.map((row) => {
      const line = document.createElement("tr");
      for (const column of shown) {
        const cell = line.insertCell();
        const text = format(row[column.at], column.kind);
        if (column.kind === "name") cell.append(...text.split(/(?<=[./_])/).flatMap((part) => [part, document.createElement("wbr")]));
        else cell.textContent = text;
        cell.className = { number: "num", percent: "num", name: "name" }[column.kind] || "";
      }
      return line;
    }));
    element("shown").textContent = view.length
      ? `${first + 1}–${first + part.length} of ${view.length}` : "No tensor fits the filter.";
    element("previous").disabled = page === 0;
    element("next").disabled = first + PAGE >= view.length;
  };

  const open = () => {
    if (data !== null || !details.open) return;
    data = JSON.parse(element("tensors-data").textContent);
    data.text = data.rows.map((row) => row.filter((value) => typeof value === "string").join(" ").toLowerCase());
    element("no-script").remove();
    for (const id of ["rule", "flagged"]) element(id).addEventListener("change", select);
    element("filter").addEventListener("input", select);
    element("all-columns").addEventListener("change", draw);
    element("previous").addEventListener("click", () => { page -= 1; draw(); });
    element("next").addEventListener("click", () => { page += 1; draw(); });
    select();
  };

  details.addEventListener("toggle", open);
  open();
})();
