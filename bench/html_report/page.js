"use strict";
(() => {
  const { texts, names, num_texts: numTexts, series } = JSON.parse(document.getElementById("data").textContent);
  for (const one of series) {
    // Rows without names, and texts by their number: `page.py` has the reason.
    one.points = one.points.map((row) => Object.fromEntries(row.map((value, at) => [names[at], at < numTexts ? texts[value] : value])));
  }
  const filters = [...document.querySelectorAll("[data-filter]")];
  const by = (id) => document.getElementById(id);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Plotly reads some tags in its texts; what comes from data is text and nothing else.
  const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const micro = (value) => `${value < 100 ? value.toFixed(2) : value.toFixed(1)} us`;
  const percent = (value) => `${value > 0 ? "+" : ""}${(100 * value).toFixed(1)} %`;
  const say = (point) =>
    `${point.commit.slice(0, 10) || "no commit"}, ${point.time.slice(0, 10)}: ${micro(point.us)} ` +
    `(${micro(point.low)} to ${micro(point.high)}), floor ${micro(point.floor)}, ` +
    `${(point.us / point.floor).toFixed(2)} times the floor` +
    (point.runs > 1 ? `, ${point.runs} runs` : "") + (point.mhz ? `, ${point.mhz} MHz` : "") +
    (point.driver ? `, driver ${point.driver}` : "") + (point.path ? `, ${point.path}` : "");

  // --- themes
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
  const button = by("theme");
  const label = () => { button.textContent = theme() === "dark" ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
    label();
    draw();
  });
  dark.addEventListener("change", () => { label(); draw(); });
  label();

  // --- filters: each choice narrows the ones after it, so that every combination on show has a series
  let shown = series.length ? series.reduce((best, one) => (one.last_change && (!best.last_change ||
    one.last_change.time > best.last_change.time) ? one : best), series[0]) : null;

  const order = (a, b) => (typeof a === "number" ? a - b : a < b ? -1 : a > b ? 1 : 0);

  function fill() {
    let left = series;
    for (const select of filters) {
      const name = select.dataset.filter;
      const values = [...new Set(left.map((one) => one[name]))].sort(order);
      select.replaceChildren(...values.map((value) => new Option(String(value), String(value), false, value === shown[name])));
      left = left.filter((one) => one[name] === shown[name]);
    }
  }

  function choose(changed) {
    let left = series;
    for (const select of filters) {
      const name = select.dataset.filter;
      const match = left.filter((one) => String(one[name]) === select.value);
      const keep = match.length ? match : left.filter((one) => one[name] === left[0][name]);
      left = keep;
      if (select === changed && !match.length) break;
    }
    show(left[0]);
  }

  function show(one) {
    shown = one;
    cursor = one.points.length - 1;
    fill();
    for (const row of document.querySelectorAll("[data-series]")) {
      row.setAttribute("aria-selected", String(row.dataset.series === String(one.id)));
    }
    draw();
  }

  // --- charts
  const layout = (x, y) => ({
    paper_bgcolor: css("--back"), plot_bgcolor: css("--back"), font: { color: css("--front"), size: 13 },
    margin: { l: 70, r: 20, t: 30, b: 60 }, hovermode: "closest", showlegend: true, legend: { orientation: "h", y: 1.12 },
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--front") }, align: "left" },
    xaxis: { gridcolor: css("--line"), zeroline: false, ...x }, yaxis: { gridcolor: css("--line"), zeroline: false, ...y },
  });
  const config = { displaylogo: false, responsive: true, showSendToCloud: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  const hovers = (chart, curve, told) => {
    if (chart.dataset.hovers) return;
    chart.dataset.hovers = "yes";
    chart.on("plotly_hover", (event) => {
      const at = event.points.find((point) => point.curveNumber === curve);
      if (at) told(at.pointNumber);
    });
  };

  let cursor = 0;
  function tell(index) {
    cursor = index;
    by("trend-said").textContent = say(shown.points[index]);
  }

  function drawTrend() {
    const points = shown.points, chart = by("trend"), x = points.map((_, index) => index);
    const step = Math.max(1, Math.ceil(points.length / 12));
    const ticks = x.filter((index) => index % step === 0);
    const hover = points.map((point) => plain(say(point)).replaceAll(", ", "<br>"));
    const marks = shown.changes.map((change) => ({
      type: "line", xref: "x", yref: "paper", x0: change.index - 0.5, x1: change.index - 0.5, y0: 0, y1: 1,
      line: { color: css(change.change > 0 ? "--bad" : "--good"), width: 2, dash: "dot" },
    }));
    const notes = shown.changes.map((change) => ({
      x: change.index - 0.5, xref: "x", y: 1, yref: "paper", yanchor: "top", xanchor: "left", showarrow: false,
      text: `${percent(change.change)} at ${plain(points[change.index].commit.slice(0, 10))}`,
      font: { color: css(change.change > 0 ? "--bad" : "--good") },
    }));
    const time = {
      name: plain(shown.subject), x, y: points.map((point) => point.us), mode: "lines+markers", text: hover, hovertemplate: "%{text}<extra></extra>",
      line: { color: css("--ours"), width: 1 }, marker: { color: css("--ours"), size: 7 },
      error_y: { type: "data", symmetric: false, array: points.map((point) => point.high - point.us),
        arrayminus: points.map((point) => point.us - point.low), color: css("--dim"), thickness: 1, width: 2 },
    };
    const floor = { name: "floor", x, y: points.map((point) => point.floor), mode: "lines", hoverinfo: "skip",
      line: { color: css("--floor"), dash: "dash", width: 1 } };
    const texts = { tickvals: ticks, ticktext: ticks.map((index) => plain(points[index].commit.slice(0, 8) || index)) };
    chart.setAttribute("aria-label", `${shown.model}, M = ${shown.num_tokens}, ${shown.routing}, ${shown.dtype} on ${shown.device}: ` +
      `${points.length} commits, ${shown.changes.length} change points`);
    // Not from zero unless asked: a change of 3 % is to be seen. The floor is drawn where it is near, or asked for.
    const fromZero = by("from-zero").checked || Math.min(...points.map((point) => point.low)) < 1.05 * points.at(-1).floor;
    const all = points.flatMap((point) => [point.low, point.high]), low = Math.min(...all), high = Math.max(...all);
    const room = Math.max(0.15 * (high - low), 0.01 * high);
    const range = fromZero ? [0, high + room] : [low - room, high + 2 * room];
    Plotly.react(chart, fromZero ? [time, floor] : [time], { ...layout({ title: { text: "commit" }, ...texts }, { title: { text: "us" }, range }),
      shapes: marks, annotations: notes }, config);
    hovers(chart, 0, tell);
    tell(Math.min(cursor, points.length - 1));
  }

  let column = [], floorAt = 0;
  function tellFloor(index) {
    floorAt = index;
    const one = column[index];
    by("floor-said").textContent = `M = ${one.num_tokens}: ${micro(one.seconds * 1e6)}, floor ${micro(one.floor_seconds * 1e6)}, ` +
      `${one.ratio.toFixed(2)} times the floor, at ${one.commit.slice(0, 10) || "no commit"}`;
  }

  function drawFloor() {
    const same = ["device", "model", "routing", "dtype", "subject"];
    const every = series.filter((one) => same.every((name) => one[name] === shown[name]));
    // A column has one time for each M: the one chosen above where there are several caches.
    column = [...new Map([...every, ...every.filter((one) => one.cache === shown.cache)].map((one) => [one.num_tokens, one])).values()]
      .sort((a, b) => a.num_tokens - b.num_tokens);
    const x = column.map((one) => one.num_tokens), chart = by("floor");
    const trace = (name, y, dash, color) => ({ name, x, y, mode: "lines+markers", line: { color: css(color), dash, width: 2 },
      text: column.map((one) => `M = ${one.num_tokens}<br>${one.ratio.toFixed(2)} times the floor`), hovertemplate: "%{text}<br>%{y:.2f} us<extra></extra>" });
    const log = { type: "log", dtick: 1 };
    Plotly.react(chart, [trace(plain(shown.subject), column.map((one) => one.seconds * 1e6), "solid", "--ours"),
      trace("floor", column.map((one) => one.floor_seconds * 1e6), "dash", "--floor")],
      layout({ ...log, tickvals: x, ticktext: x.map(String), title: { text: "tokens M" } }, { ...log, title: { text: "us" } }), config);
    hovers(chart, 0, tellFloor);
    tellFloor(Math.max(0, column.indexOf(shown)));
  }

  function draw() {
    if (!shown) return;
    drawTrend();
    drawFloor();
  }

  const keys = (chart, length, at, told) => chart.addEventListener("keydown", (event) => {
    const last = length() - 1;
    const to = { ArrowLeft: Math.max(0, at() - 1), ArrowRight: Math.min(last, at() + 1), Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    told(to);
    Plotly.Fx.hover(chart, [{ curveNumber: 0, pointNumber: to }]);
  });

  if (shown) {
    for (const select of filters) select.addEventListener("change", () => choose(select));
    by("from-zero").addEventListener("change", draw);
    keys(by("trend"), () => shown.points.length, () => cursor, tell);
    keys(by("floor"), () => column.length, () => floorAt, tellFloor);
    for (const each of document.querySelectorAll("[data-show]")) {
      each.addEventListener("click", () => {
        show(series[Number(each.dataset.show)]);
        by("trend-section").scrollIntoView();
      });
    }
    show(shown);
  }

  // --- tables
  function rows(table) {
    const words = document.querySelector(`[data-rows="${table.id}"]`)?.value.toLowerCase().split(/\s+/).filter(Boolean) ?? [];
    const verdict = document.querySelector(`[data-verdicts="${table.id}"]`)?.value ?? "";
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word)) || Boolean(verdict && row.dataset.verdict !== verdict);
    }
  }
  for (const input of document.querySelectorAll("[data-rows]")) input.addEventListener("input", () => rows(by(input.dataset.rows)));
  for (const select of document.querySelectorAll("[data-verdicts]")) {
    const table = by(select.dataset.verdicts);
    const words = [...new Set([...table.tBodies[0].rows].map((row) => row.dataset.verdict))].sort();
    select.append(...words.map((word) => new Option(word, word)));
    select.addEventListener("change", () => rows(table));
  }
})();
